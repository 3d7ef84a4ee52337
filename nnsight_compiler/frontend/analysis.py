"""Names resolved before lowering, in one walk that also finds what the language does not support.

After it, lowering itself cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Literal as OneOf
from typing import final

import libcst as cst

from nnsight_compiler.frontend import contexts, unsupported
from nnsight_compiler.frontend.expression_names import ExpressionNames
from nnsight_compiler.frontend.flow import Branch, Guarded, Leave, Loop
from nnsight_compiler.frontend.scopes import Analysis, Scope, Suite
from nnsight_compiler.frontend.syntax import FunctionNode, Syntax


def analyse_function(syntax: Syntax, node: FunctionNode, outside: Container[str]) -> Analysis:
    """Resolves the names of a function. `outside`: the names that belong to functions around it."""
    scope = Scope("function", outside=outside)
    walk = StatementNames(syntax, Analysis(scope))
    walk.function_body(node, scope)
    return walk.analysis


def analyse_block(
    syntax: Syntax, node: cst.With, item: int, frame: Container[str], complete: bool, traced: str
) -> Analysis:
    """Resolves the names of a `with` block whose item number `item` opens the trace. For the rest, see `Scope`."""
    scope = Scope("block", frame=frame, complete=complete, traced=traced)
    walk = StatementNames(syntax, Analysis(scope))
    walk.block(node, item, scope)
    return walk.analysis


@final
class StatementNames(ExpressionNames):
    """Reads statements."""

    # --- the program ---

    def block(self, node: cst.With, item: int, scope: Scope) -> None:
        opened = node.items[item]
        self.in_forward = contexts.opens_forward(contexts.kind_of(opened))
        if opened.asname is not None:
            self.target(opened.asname.name)
        self.with_items(node.items[item + 1 :], node.body)
        if not scope.complete:
            scope.declared_global |= self.global_in_nested
        exports = self.analysis.exports()
        for variable in exports:
            self.use(variable)
        self.finish(scope, exports)

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

    def delete_targets(self, node: cst.Del) -> None:
        self.delete_target(node.target)

    def delete_target(self, node: cst.BaseExpression) -> None:
        match node:
            case cst.Name():
                self.delete(node)
                self.deleted.append((self.scope, node))
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


_Handler = Callable[["StatementNames", cst.CSTNode], None]


def _handlers(*pairs: tuple[type[cst.CSTNode], object]) -> dict[type[cst.CSTNode], _Handler]:
    return dict(pairs)  # type: ignore[arg-type]  # each handler takes the node class that it is listed for


_STATEMENTS = _handlers(
    (cst.SimpleStatementLine, StatementNames.line),
    (cst.Expr, lambda walk, node: walk.expression(node.value)),
    (cst.Assign, StatementNames.assign),
    (cst.AnnAssign, StatementNames.annotated),
    (cst.AugAssign, StatementNames.augmented),
    (cst.Del, StatementNames.delete_targets),
    (cst.Import, StatementNames.imported),
    (cst.ImportFrom, StatementNames.imported_from),
    (cst.Global, StatementNames.declare),
    (cst.Nonlocal, StatementNames.declare),
    (cst.If, StatementNames.condition),
    (cst.Assert, StatementNames.asserted),
    (cst.For, StatementNames.for_loop),
    (cst.While, StatementNames.while_loop),
    (cst.Break, StatementNames.jump),
    (cst.Continue, StatementNames.jump),
    (cst.Return, StatementNames.returned),
    (cst.Raise, StatementNames.raised),
    (cst.Try, StatementNames.attempt),
    (cst.With, StatementNames.with_statement),
    (cst.FunctionDef, StatementNames.function),
    (cst.Pass, StatementNames.nothing),
)
