"""Names resolved before lowering: the scopes of a program, their variables, and what the language does not support.

One walk over the function, in Python's order of evaluation. It finds for each name which scope it belongs to, records
the events that `flow` needs, and collects a diagnostic for every construct that cannot be lowered, so that lowering
itself cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal as OneOf
from typing import final

import libcst as cst

from nnsight_compiler.frontend import contexts, unsupported
from nnsight_compiler.frontend.flow import Branch, Define, Event, Guarded, Leave, Loop, Use, Variable, solve
from nnsight_compiler.frontend.syntax import FunctionNode, Syntax
from nnsight_compiler.frontend.trees import CONSTANTS, arguments_in_order, comprehension_clauses, parameters_of
from nnsight_compiler.ir.errors import Diagnostic

ScopeKind = OneOf["function", "block", "generator", "comprehension"]
Comprehension = cst.ListComp | cst.SetComp | cst.DictComp
Suite = cst.BaseSuite | Sequence[cst.BaseStatement | cst.BaseSmallStatement]


@final
@dataclass(eq=False, slots=True)
class Scope:
    """A scope and its names. A comprehension's is evaluated in place; the others are code of their own.

    outside: for the outermost scope, the names that belong to functions around the program.
    frame: for a block, the names that belong to the frame around it and not to its globals.
    complete: whether `frame` is all of them, as for a function; in a module or a class, what the block assigns is too.
    traced: for a block, the name of the model that it traces, whose value is at hand.
    walrus: for a comprehension, the variables of the surrounding code that it assigns.
    """

    kind: ScopeKind
    parent: Scope | None = None
    outside: Container[str] = ()
    frame: Container[str] = ()
    complete: bool = False
    traced: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    declared_global: set[str] = field(default_factory=set)
    declared_nonlocal: set[str] = field(default_factory=set)
    walrus: set[Variable] = field(default_factory=set)

    def mention(self, name: str) -> Variable:
        """The scope's record of the name, made on its first mention."""
        return self.variables.setdefault(name, Variable(name, len(self.variables)))

    def owns(self, name: str) -> bool:
        """Whether the name is a variable of this scope."""
        if name in self.declared_global or name in self.declared_nonlocal:
            return False
        variable = self.variables.get(name)
        if variable is None or self.kind != "block":
            return variable is not None and variable.bound
        return (
            name in self.frame
            or name == self.traced
            or (not self.complete and (variable.bound or variable.changed_inside))
        )

    def find(self, name: str) -> Variable | OneOf["global", "free"]:
        """What the name means in code of this scope."""
        scope: Scope | None = self
        while scope is not None:
            if scope.owns(name):
                return scope.variables[name]
            if name in scope.declared_global:
                return "global"
            if scope.parent is None:
                return "free" if name in scope.outside else "global"
            scope = scope.parent
        raise AssertionError("every chain of scopes ends")

    def own_variables(self) -> list[Variable]:
        """The variables of this scope, in the order of their first mention."""
        return [variable for name, variable in self.variables.items() if self.owns(name)]


@final
@dataclass(slots=True)
class Analysis:
    """What lowering needs to know. Nodes are compared by identity.

    live: the variables that are used before they are assigned; a block's come from the frame.
    surely_assigned: the variables that every way to the end has assigned.
    """

    root: Scope
    scopes: dict[cst.CSTNode, Scope] = field(default_factory=dict)
    branches: dict[cst.CSTNode, Branch] = field(default_factory=dict)
    loops: dict[cst.CSTNode, Loop] = field(default_factory=dict)
    live: set[Variable] = field(default_factory=set)
    surely_assigned: set[Variable] = field(default_factory=set)
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def reads(self) -> list[Variable]:
        """The variables that are used before they are assigned."""
        return [each for each in self.root.own_variables() if each in self.live]

    def exports(self) -> list[Variable]:
        """The variables of a block that it assigns or deletes."""
        return [each for each in self.root.own_variables() if each.bound or each.changed_inside]


def analyse_function(syntax: Syntax, node: FunctionNode, outside: Container[str]) -> Analysis:
    """Resolves the names of a function. `outside`: the names that belong to functions around it."""
    scope = Scope("function", outside=outside)
    walk = _Walk(syntax, Analysis(scope))
    walk.function_body(node, scope)
    return walk.analysis


def analyse_block(
    syntax: Syntax, node: cst.With, item: int, frame: Container[str], complete: bool, traced: str
) -> Analysis:
    """Resolves the names of a `with` block whose item number `item` opens the trace. For the rest, see `Scope`."""
    scope = Scope("block", frame=frame, complete=complete, traced=traced)
    walk = _Walk(syntax, Analysis(scope))
    walk.block(node, item, scope)
    return walk.analysis


@final
class _Walk:
    def __init__(self, syntax: Syntax, analysis: Analysis) -> None:
        self.syntax = syntax
        self.analysis = analysis
        self.scope = analysis.root
        self.events: list[Event] = []
        self.certain = True
        self.in_forward = False
        self.loops: tuple[int, ...] = ()
        self.sections: tuple[int, ...] = ()
        self.breakable = False
        self.clock = 0
        self.global_in_nested: set[str] = set()

    # --- the program ---

    def function_body(self, node: FunctionNode, scope: Scope) -> None:
        for parameter in parameters_of(node.params):
            self.define(parameter.node.name)
        if isinstance(node, cst.Lambda):
            self.expression(node.body)
        else:
            self.suite(node.body)
        self.finish(scope, ())

    def block(self, node: cst.With, item: int, scope: Scope) -> None:
        self.in_forward = True
        opened = node.items[item]
        if opened.asname is not None:
            self.target(opened.asname.name)
        self.with_items(node.items[item + 1 :], node.body)
        if not scope.complete:
            scope.declared_global |= self.global_in_nested
        exports = self.analysis.exports()
        for variable in exports:
            self.use(variable)
        self.finish(scope, exports)

    def finish(self, scope: Scope, live_at_end: Sequence[Variable]) -> None:
        """Ends a scope that is code of its own: decides on cells, then on merges."""
        for variable in scope.variables.values():
            variable.cell |= not scope.owns(variable.name) or variable.outlives_a_change()
        live, surely = solve(self.events, live_at_end)
        if scope is self.analysis.root:
            self.analysis.live, self.analysis.surely_assigned = live, surely

    # --- events ---

    def place(self, name: str) -> tuple[Scope, Variable]:
        """The scope in which this code's name is recorded: a comprehension's own, or that of the code around it."""
        scope = self.scope
        while scope.kind == "comprehension" and name not in scope.variables:
            assert scope.parent is not None, "a comprehension stands in other code"
            scope = scope.parent
        return scope, scope.mention(name)

    def use(self, variable: Variable) -> None:
        variable.uses += 1
        for section in self.sections:
            variable.uses_in_section[section] = variable.uses_in_section.get(section, 0) + 1
        self.events.append(Use(variable))

    def define(self, node: cst.Name) -> Variable:
        scope, variable = self.place(self.syntax.name(node.value))
        self.clock += 1
        variable.bound = True
        variable.last_assigned = self.clock
        variable.assigning_loops.update(self.loops)
        variable.assigning_sections.update(self.sections)
        self.events.append(Define(variable, self.certain or scope.kind == "comprehension"))
        return variable

    def delete(self, node: cst.Name) -> None:
        self.name(node)
        self.define(node).deleted = True

    def name(self, node: cst.Name) -> None:
        if node.value not in CONSTANTS:
            self.use(self.place(self.syntax.name(node.value))[1])

    def report(self, node: cst.CSTNode, reason: str, way_out: str) -> None:
        self.analysis.diagnostics.append(Diagnostic(self.syntax.span(node), reason, way_out))

    @contextmanager
    def possibly(self) -> Iterator[None]:
        """Code that may be skipped within an expression."""
        before, self.certain = self.certain, False
        yield
        self.certain = before

    @contextmanager
    def sequence(self) -> Iterator[list[Event]]:
        """Collects the events of a nested sequence."""
        outer, self.events = self.events, []
        yield self.events
        self.events = outer

    @contextmanager
    def loop(self) -> Iterator[None]:
        before = self.loops
        self.clock += 1
        self.loops = (*before, self.clock)
        yield
        self.loops = before

    @contextmanager
    def section(self) -> Iterator[list[Event]]:
        before = self.sections
        self.clock += 1
        self.sections = (*before, self.clock)
        with self.sequence() as events:
            yield events
        self.sections = before

    @contextmanager
    def nested(self, node: cst.CSTNode, kind: ScopeKind) -> Iterator[Scope]:
        """Code that runs later: its own events, and its free names captured where it stands."""
        outer = self.scope
        state = self.events, self.certain, self.loops, self.sections, self.breakable, self.in_forward
        self.scope = self.analysis.scopes[node] = Scope(kind, outer)
        self.events, self.certain, self.loops, self.sections, self.breakable = [], True, (), (), False
        self.in_forward = False
        yield self.scope
        inner, self.scope = self.scope, outer
        self.events, self.certain, self.loops, self.sections, self.breakable, self.in_forward = state
        self.global_in_nested |= inner.declared_global
        for name, variable in inner.variables.items():
            if not inner.owns(name) and name not in inner.declared_global:
                changed = variable.changed_inside or (variable.bound and name in inner.declared_nonlocal)
                self.capture(self.place(name)[1], changed)

    def capture(self, variable: Variable, changed: bool) -> None:
        self.clock += 1
        self.use(variable)
        variable.changed_inside |= changed
        variable.first_captured = min(variable.first_captured, self.clock)
        variable.capturing_loops.update(self.loops)

    # --- statements ---

    def suite(self, suite: Suite) -> None:
        for statement in suite.body if isinstance(suite, cst.BaseSuite) else suite:
            self.statement(statement)

    def statement(self, node: cst.CSTNode) -> None:
        handler = _STATEMENTS.get(type(node))
        if handler is None:
            self.report(node, *unsupported.statement(node))
        else:
            handler(self, node)

    def line(self, node: cst.SimpleStatementLine) -> None:
        for statement in node.body:
            self.statement(statement)

    def assign(self, node: cst.Assign) -> None:
        self.expression(node.value)
        for target in node.targets:
            self.target(target.target)

    def annotated(self, node: cst.AnnAssign) -> None:
        if node.value is not None:
            self.expression(node.value)
            self.target(node.target)
        elif isinstance(node.target, cst.Name):
            self.place(self.syntax.name(node.target.value))[1].bound = True
        elif isinstance(node.target, cst.Attribute | cst.Subscript):
            self.expression(node.target.value)

    def augmented(self, node: cst.AugAssign) -> None:
        self.expression(node.target)
        self.expression(node.value)
        if isinstance(node.target, cst.Name):
            self.define(node.target)

    def target(self, node: cst.BaseExpression) -> None:
        match node:
            case cst.Name():
                self.define(node)
            case cst.Tuple(elements=elements) | cst.List(elements=elements):
                for element in elements:
                    self.target(element.value)
            case _:
                self.expression(node)

    def delete_targets(self, node: cst.Del) -> None:
        self.delete_target(node.target)

    def delete_target(self, node: cst.BaseExpression) -> None:
        match node:
            case cst.Name():
                self.delete(node)
                scope = self.place(self.syntax.name(node.value))[0]
                if self.syntax.name(node.value) in scope.declared_global | scope.declared_nonlocal:
                    self.report(node, *unsupported.DELETED_OUTER_NAME)
            case cst.Tuple(elements=elements) | cst.List(elements=elements):
                for element in elements:
                    self.delete_target(element.value)
            case _:
                self.expression(node)

    def imported(self, node: cst.Import) -> None:
        for alias in node.names:
            if alias.asname is not None and isinstance(alias.asname.name, cst.Name):
                self.define(alias.asname.name)
            else:
                name: cst.BaseExpression = alias.name
                while isinstance(name, cst.Attribute):
                    name = name.value
                assert isinstance(name, cst.Name), "a module's name starts with a name"
                self.define(name)

    def imported_from(self, node: cst.ImportFrom) -> None:
        if isinstance(node.names, cst.ImportStar):
            self.report(node, *unsupported.STAR_IMPORT)
            return
        for alias in node.names:
            name = alias.name if alias.asname is None else alias.asname.name
            if isinstance(name, cst.Name):
                self.define(name)

    def declare(self, node: cst.Global | cst.Nonlocal) -> None:
        names = {self.syntax.name(item.name.value) for item in node.names}
        if self.scope.kind == "block":
            return  # the frame's own code tells which names are its locals
        declared = self.scope.declared_global if isinstance(node, cst.Global) else self.scope.declared_nonlocal
        declared |= names
        for name in sorted(names):
            self.scope.mention(name)

    def condition(self, node: cst.If) -> None:
        self.expression(node.test)
        with self.sequence() as then:
            self.suite(node.body)
        with self.sequence() as orelse:
            if isinstance(node.orelse, cst.If):
                self.condition(node.orelse)
            elif node.orelse is not None:
                self.suite(node.orelse.body)
        branch = self.analysis.branches[node] = Branch((then, orelse))
        self.events.append(branch)

    def asserted(self, node: cst.Assert) -> None:
        self.expression(node.test)
        if node.msg is not None:
            self.expression(node.msg)

    def for_loop(self, node: cst.For) -> None:
        if node.asynchronous is not None:
            self.report(node, *unsupported.ASYNC)
        self.expression(node.iter)
        self.looping(node, lambda: self.target(node.target), tests=False, endless=False)

    def while_loop(self, node: cst.While) -> None:
        self.looping(node, lambda: self.expression(node.test), tests=True, endless=contexts.is_true(node.test))

    def looping(self, node: cst.For | cst.While, head: Callable[[], None], tests: bool, endless: bool) -> None:
        breakable, self.breakable = self.breakable, True
        with self.loop():
            with self.sequence() as first:
                head()
            with self.sequence() as body:
                self.suite(node.body)
        self.breakable = breakable
        with self.sequence() as orelse:
            if node.orelse is not None:
                self.suite(node.orelse.body)
        loop = self.analysis.loops[node] = Loop(first, body, orelse, tests, endless)
        self.events.append(loop)

    def jump(self, node: cst.Break | cst.Continue) -> None:
        word: OneOf["break", "continue"] = "break" if isinstance(node, cst.Break) else "continue"
        if not self.breakable:
            self.report(node, *unsupported.outer_jump(word))
        self.events.append(Leave(word))

    def returned(self, node: cst.Return) -> None:
        if node.value is not None:
            self.expression(node.value)
        if self.scope.kind == "block":
            self.report(node, *unsupported.outer_jump("return"))
        self.events.append(Leave("exit"))

    def raised(self, node: cst.Raise) -> None:
        if node.exc is not None:
            self.expression(node.exc)
        if node.cause is not None:
            self.expression(node.cause.item)
        self.events.append(Leave("exit"))

    def attempt(self, node: cst.Try) -> None:
        if self.in_forward:
            self.report(node, *unsupported.TRY_IN_FORWARD)
        sections = []
        with self.section() as body:
            self.suite(node.body)
        sections.append(body)
        for handler in node.handlers:
            if handler.type is not None:
                self.expression(handler.type)
            with self.section() as section:
                name = None if handler.name is None else handler.name.name
                if isinstance(name, cst.Name):
                    self.define(name)
                self.suite(handler.body)
                if isinstance(name, cst.Name):
                    self.define(name).deleted = True
            sections.append(section)
        for part in (node.orelse, node.finalbody):
            if part is not None:
                with self.section() as section:
                    self.suite(part.body)
                sections.append(section)
        self.events.append(Guarded(sections))

    def with_statement(self, node: cst.With) -> None:
        if node.asynchronous is not None:
            self.report(node, *unsupported.ASYNC)
        self.with_items(node.items, node.body)

    def with_items(self, items: Sequence[cst.WithItem], body: Suite) -> None:
        if not items:
            self.suite(body)
            return
        item, rest = items[0], items[1:]
        self.expression(item.item)
        kind = contexts.kind_of(item)
        if kind == "backward" and item.asname is not None:
            self.report(item.asname, *unsupported.NAMED_BACKWARD)
        before, self.in_forward = self.in_forward, self.in_forward or contexts.opens_forward(kind)
        target = None if item.asname is None else item.asname.name
        if kind == "unknown":
            with self.section() as section:
                if target is not None:
                    self.target(target)
                self.with_items(rest, body)
            self.events.append(Guarded([section]))
        else:
            if target is not None:
                self.target(target)
            self.with_items(rest, body)
        self.in_forward = before

    def function(self, node: cst.FunctionDef) -> None:
        if node.asynchronous is not None:
            self.report(node.asynchronous, *unsupported.ASYNC)
        for decorator in node.decorators:
            self.expression(decorator.decorator)
        self.defaults(node.params)
        with self.nested(node, "function") as scope:
            self.function_body(node, scope)
        self.define(node.name)

    def defaults(self, parameters: cst.Parameters) -> None:
        for parameter in parameters_of(parameters):
            if parameter.node.default is not None:
                self.expression(parameter.node.default)

    # --- expressions ---

    def expression(self, node: cst.CSTNode) -> None:
        handler = _EXPRESSIONS.get(type(node))
        if handler is None:
            self.report(node, *unsupported.expression(node))
        else:
            handler(self, node)

    def nothing(self, node: cst.CSTNode) -> None:
        return

    def several(self, nodes: Sequence[cst.CSTNode]) -> None:
        for node in nodes:
            self.expression(node)

    def call(self, node: cst.Call) -> None:
        if not node.args and isinstance(node.func, cst.Name) and node.func.value == "super":
            self.report(node, *unsupported.BARE_SUPER)
        self.expression(node.func)
        for argument in arguments_in_order(node.args):
            self.expression(argument.value)

    def subscript(self, node: cst.Subscript) -> None:
        self.expression(node.value)
        for element in node.slice:
            match element.slice:
                case cst.Index(value=value):
                    self.expression(value)
                case cst.Slice(lower=lower, upper=upper, step=step):
                    self.several([part for part in (lower, upper, step) if part is not None])

    def dictionary(self, node: cst.Dict) -> None:
        for element in node.elements:
            if isinstance(element, cst.DictElement):
                self.expression(element.key)
            self.expression(element.value)

    def comparison(self, node: cst.Comparison) -> None:
        self.expression(node.left)
        self.expression(node.comparisons[0].comparator)
        with self.possibly():
            self.several([each.comparator for each in node.comparisons[1:]])

    def boolean(self, node: cst.BooleanOperation) -> None:
        self.expression(node.left)
        with self.possibly():
            self.expression(node.right)

    def conditional(self, node: cst.IfExp) -> None:
        self.expression(node.test)
        with self.possibly():
            self.several((node.body, node.orelse))

    def walrus(self, node: cst.NamedExpr) -> None:
        self.expression(node.value)
        assert isinstance(node.target, cst.Name), "a walrus assigns a name"
        name = self.syntax.name(node.target.value)
        inline: list[Scope] = []
        scope = self.scope
        while scope.kind in ("comprehension", "generator"):
            if scope.kind == "generator":
                scope.declared_nonlocal.add(name)
                scope.mention(name).bound = True
            inline.append(scope)
            assert scope.parent is not None, "a comprehension stands in other code"
            scope = scope.parent
        if any(each.kind == "generator" for each in inline):
            scope.mention(name).bound = True
            return
        variable = self.define(node.target)
        for each in inline:
            each.walrus.add(variable)

    def formatted(self, node: cst.FormattedString) -> None:
        self.format_parts(node.parts)

    def format_parts(self, parts: Sequence[cst.BaseFormattedStringContent]) -> None:
        for part in parts:
            if isinstance(part, cst.FormattedStringExpression):
                self.expression(part.expression)
                self.format_parts(part.format_spec or ())

    def anonymous(self, node: cst.Lambda) -> None:
        self.defaults(node.params)
        with self.nested(node, "function") as scope:
            self.function_body(node, scope)

    def comprehension(self, node: Comprehension) -> None:
        clauses = comprehension_clauses(node.for_in)
        self.expression(clauses[0].iter)
        outer = self.scope
        self.scope = self.analysis.scopes[node] = Scope("comprehension", outer)
        with self.possibly(), self.loop():
            self.clauses(clauses)
            if isinstance(node, cst.DictComp):
                self.several((node.key, node.value))
            else:
                self.expression(node.elt)
        scope, self.scope = self.scope, outer
        for variable in scope.variables.values():
            variable.cell |= variable.outlives_a_change()

    def clauses(self, clauses: Sequence[cst.CompFor]) -> None:
        """The clauses of a comprehension, whose first iterable is evaluated already."""
        for clause in clauses:
            if clause.asynchronous is not None:
                self.report(clause, *unsupported.ASYNC)
            self.claim(clause.target)
        for number, clause in enumerate(clauses):
            if number:
                self.expression(clause.iter)
            self.target(clause.target)
            self.several([condition.test for condition in clause.ifs])

    def claim(self, target: cst.BaseExpression) -> None:
        """Makes the names of a comprehension's target its own before anything in it mentions them."""
        match target:
            case cst.Name():
                self.scope.mention(self.syntax.name(target.value)).bound = True
            case cst.Tuple(elements=elements) | cst.List(elements=elements):
                for element in elements:
                    self.claim(element.value)

    def generator(self, node: cst.GeneratorExp) -> None:
        clauses = comprehension_clauses(node.for_in)
        self.expression(clauses[0].iter)
        with self.nested(node, "generator") as scope:
            with self.possibly(), self.loop():
                self.clauses(clauses)
                self.expression(node.elt)
            self.finish(scope, ())


_Handler = Callable[["_Walk", cst.CSTNode], None]


def _handlers(*pairs: tuple[type[cst.CSTNode], object]) -> dict[type[cst.CSTNode], _Handler]:
    return dict(pairs)  # type: ignore[arg-type]  # each handler takes the node class that it is listed for


_STATEMENTS = _handlers(
    (cst.SimpleStatementLine, _Walk.line),
    (cst.Expr, lambda walk, node: walk.expression(node.value)),
    (cst.Assign, _Walk.assign),
    (cst.AnnAssign, _Walk.annotated),
    (cst.AugAssign, _Walk.augmented),
    (cst.Del, _Walk.delete_targets),
    (cst.Import, _Walk.imported),
    (cst.ImportFrom, _Walk.imported_from),
    (cst.Global, _Walk.declare),
    (cst.Nonlocal, _Walk.declare),
    (cst.If, _Walk.condition),
    (cst.Assert, _Walk.asserted),
    (cst.For, _Walk.for_loop),
    (cst.While, _Walk.while_loop),
    (cst.Break, _Walk.jump),
    (cst.Continue, _Walk.jump),
    (cst.Return, _Walk.returned),
    (cst.Raise, _Walk.raised),
    (cst.Try, _Walk.attempt),
    (cst.With, _Walk.with_statement),
    (cst.FunctionDef, _Walk.function),
    (cst.Pass, _Walk.nothing),
)

_EXPRESSIONS = _handlers(
    (cst.Name, _Walk.name),
    *((kind, _Walk.nothing) for kind in (cst.Integer, cst.Float, cst.Imaginary, cst.SimpleString, cst.Ellipsis)),
    (cst.ConcatenatedString, lambda walk, node: walk.several((node.left, node.right))),
    (cst.FormattedString, _Walk.formatted),
    (cst.Attribute, lambda walk, node: walk.expression(node.value)),
    (cst.Subscript, _Walk.subscript),
    (cst.Call, _Walk.call),
    *((kind, lambda walk, node: walk.several(node.elements)) for kind in (cst.Tuple, cst.List, cst.Set)),
    *((kind, lambda walk, node: walk.expression(node.value)) for kind in (cst.Element, cst.StarredElement)),
    (cst.Dict, _Walk.dictionary),
    (cst.UnaryOperation, lambda walk, node: walk.expression(node.expression)),
    (cst.BinaryOperation, lambda walk, node: walk.several((node.left, node.right))),
    (cst.BooleanOperation, _Walk.boolean),
    (cst.Comparison, _Walk.comparison),
    (cst.IfExp, _Walk.conditional),
    (cst.NamedExpr, _Walk.walrus),
    (cst.Lambda, _Walk.anonymous),
    (cst.ListComp, _Walk.comprehension),
    (cst.SetComp, _Walk.comprehension),
    (cst.DictComp, _Walk.comprehension),
    (cst.GeneratorExp, _Walk.generator),
)
