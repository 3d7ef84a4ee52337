"""Names in expressions, and in what defines them: walrus, comprehensions, lambdas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import libcst as cst

from nnsight_compiler.frontend import unsupported
from nnsight_compiler.frontend.events import EventRecorder
from nnsight_compiler.frontend.scopes import Comprehension, Scope, Suite
from nnsight_compiler.frontend.syntax import FunctionNode
from nnsight_compiler.frontend.trees import arguments_in_order, comprehension_clauses, parameters_of


class ExpressionNames(EventRecorder, ABC):
    """Reads expressions."""

    @abstractmethod
    def suite(self, suite: Suite) -> None:
        """Reads a block of statements."""

    def function_body(self, node: FunctionNode, scope: Scope) -> None:
        for parameter in parameters_of(node.params):
            self.define(parameter.node.name)
        if isinstance(node, cst.Lambda):
            self.expression(node.body)
        else:
            self.suite(node.body)
        self.finish(scope, ())

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

    def target(self, node: cst.BaseExpression) -> None:
        match node:
            case cst.Name():
                self.define(node)
            case cst.Tuple(elements=elements) | cst.List(elements=elements):
                for element in elements:
                    self.target(element.value)
            case _:
                self.expression(node)

    def defaults(self, parameters: cst.Parameters) -> None:
        for parameter in parameters_of(parameters):
            if parameter.node.default is not None:
                self.expression(parameter.node.default)


_Handler = Callable[["ExpressionNames", cst.CSTNode], None]


def _handlers(*pairs: tuple[type[cst.CSTNode], object]) -> dict[type[cst.CSTNode], _Handler]:
    return dict(pairs)  # type: ignore[arg-type]  # each handler takes the node class that it is listed for


_EXPRESSIONS = _handlers(
    (cst.Name, ExpressionNames.name),
    *(
        (kind, ExpressionNames.nothing)
        for kind in (cst.Integer, cst.Float, cst.Imaginary, cst.SimpleString, cst.Ellipsis)
    ),
    (cst.ConcatenatedString, lambda walk, node: walk.several((node.left, node.right))),
    (cst.FormattedString, ExpressionNames.formatted),
    (cst.Attribute, lambda walk, node: walk.expression(node.value)),
    (cst.Subscript, ExpressionNames.subscript),
    (cst.Call, ExpressionNames.call),
    *((kind, lambda walk, node: walk.several(node.elements)) for kind in (cst.Tuple, cst.List, cst.Set)),
    *((kind, lambda walk, node: walk.expression(node.value)) for kind in (cst.Element, cst.StarredElement)),
    (cst.Dict, ExpressionNames.dictionary),
    (cst.UnaryOperation, lambda walk, node: walk.expression(node.expression)),
    (cst.BinaryOperation, lambda walk, node: walk.several((node.left, node.right))),
    (cst.BooleanOperation, ExpressionNames.boolean),
    (cst.Comparison, ExpressionNames.comparison),
    (cst.IfExp, ExpressionNames.conditional),
    (cst.NamedExpr, ExpressionNames.walrus),
    (cst.Lambda, ExpressionNames.anonymous),
    (cst.ListComp, ExpressionNames.comprehension),
    (cst.SetComp, ExpressionNames.comprehension),
    (cst.DictComp, ExpressionNames.comprehension),
    (cst.GeneratorExp, ExpressionNames.generator),
)
