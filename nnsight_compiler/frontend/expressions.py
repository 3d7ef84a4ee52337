"""Expressions to operands, in Python's order of evaluation."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import replace

import libcst as cst

from nnsight_compiler.frontend.closures import Closures
from nnsight_compiler.frontend.trees import CONSTANTS, arguments_in_order
from nnsight_compiler.ir.ops import (
    Argument,
    Attribute,
    Build,
    Call,
    Element,
    Grad,
    Item,
    Operator,
    Read,
    Save,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Literal, Operand, Tuple, Value

SIGNS: dict[type[cst.CSTNode], str] = {
    cst.Add: "+", cst.Subtract: "-", cst.Multiply: "*", cst.Divide: "/", cst.FloorDivide: "//", cst.Modulo: "%",
    cst.Power: "**", cst.MatrixMultiply: "@", cst.LeftShift: "<<", cst.RightShift: ">>", cst.BitAnd: "&",
    cst.BitOr: "|", cst.BitXor: "^",
    cst.Equal: "==", cst.NotEqual: "!=", cst.LessThan: "<", cst.LessThanEqual: "<=", cst.GreaterThan: ">",
    cst.GreaterThanEqual: ">=", cst.Is: "is", cst.IsNot: "is not", cst.In: "in", cst.NotIn: "not in",
    cst.AddAssign: "+", cst.SubtractAssign: "-", cst.MultiplyAssign: "*", cst.DivideAssign: "/",
    cst.FloorDivideAssign: "//", cst.ModuloAssign: "%", cst.PowerAssign: "**", cst.MatrixMultiplyAssign: "@",
    cst.LeftShiftAssign: "<<", cst.RightShiftAssign: ">>", cst.BitAndAssign: "&", cst.BitOrAssign: "|",
    cst.BitXorAssign: "^",
    cst.Not: "not", cst.Minus: "-", cst.Plus: "+", cst.BitInvert: "~",
}  # fmt: skip
_Display = cst.Tuple | cst.List | cst.Set


class Expressions(Closures):
    """Lowers expressions. `hint` is the name of the variable that the value goes to."""

    def expression(self, node: cst.BaseExpression, hint: str = "") -> Operand:
        """The value of an expression."""
        return _EXPRESSIONS[type(node)](self, node, hint)

    def condition(self, node: cst.BaseExpression) -> Operand:
        """An operand that is true where the expression is. Nothing is tested twice."""
        match node:
            case cst.BooleanOperation(left=left, operator=cst.And(), right=right):
                test = self.condition(left)
                return self.value_of(test, lambda: self.condition(right), lambda: Literal(False), self.span(node))
            case cst.BooleanOperation(left=left, right=right):
                test = self.condition(left)
                return self.value_of(test, lambda: Literal(True), lambda: self.condition(right), self.span(node))
            case cst.Comparison():
                return self.chain(node, self.expression(node.left), node.comparisons, "", in_condition=True)
            case _:
                return self.expression(node)

    # --- constants and names ---

    def name(self, node: cst.Name, hint: str) -> Operand:
        if node.value in CONSTANTS:
            return Literal(CONSTANTS[node.value])
        return self.read(self.syntax.name(node.value), self.span(node))

    def number(self, node: cst.Integer | cst.Float | cst.Imaginary, hint: str) -> Operand:
        return Literal(ast.literal_eval(node.value))

    def ellipsis(self, node: cst.Ellipsis, hint: str) -> Operand:
        return Literal(...)

    # --- objects ---

    def attribute(self, node: cst.Attribute, hint: str) -> Operand:
        owner = self.expression(node.value)
        return self.load_attribute(owner, self.syntax.name(node.attr.value), self.span(node), hint)

    def load_attribute(self, owner: Operand, name: str, span: Span, hint: str) -> Value:
        """`owner.name`."""
        result = self.fresh(hint)
        match name:
            case "output" | "input" | "inputs" if self.in_forward:
                self.builder.emit(Read(result, owner, name, span=span))
            case "grad" if self.in_backward:
                self.builder.emit(Grad(result, owner, span=span))
            case _:
                self.builder.emit(Attribute(result, owner, name, span=span))
        return result

    def subscript(self, node: cst.Subscript, hint: str) -> Operand:
        owner = self.expression(node.value)
        index = self.index(node)
        result = self.fresh(hint)
        self.builder.emit(Item(result, owner, index, span=self.span(node)))
        return result

    def display(self, node: _Display, hint: str) -> Operand:
        parts: list[Element] = []
        for element in node.elements:
            self.freeze(parts, element.value)
            parts.append(Element(self.expression(element.value), starred=isinstance(element, cst.StarredElement)))
        if isinstance(node, cst.Tuple) and not any(part.starred for part in parts):
            return Tuple(tuple(part.value for part in parts))
        result = self.fresh(hint)
        kind = "tuple" if isinstance(node, cst.Tuple) else "list" if isinstance(node, cst.List) else "set"
        self.builder.emit(Build(result, kind, tuple(parts), span=self.span(node)))  # type: ignore[arg-type]  # a kind
        return result

    def dictionary(self, node: cst.Dict, hint: str) -> Operand:
        parts: list[Element] = []
        for element in node.elements:
            if isinstance(element, cst.DictElement):
                self.freeze(parts, element.key, element.value, kind="dict")
                key = self.expression(element.key)
                parts.append(Element(self.expression(element.value), key))
            else:
                self.freeze(parts, element.value, kind="dict")
                parts.append(Element(self.expression(element.value), starred=True))
        result = self.fresh(hint)
        self.builder.emit(Build(result, "dict", tuple(parts), span=self.span(node)))
        return result

    def freeze(self, parts: list[Element], *following: cst.BaseExpression, kind: str = "tuple") -> None:
        """Python iterates a starred part before it evaluates the next; where that may run code, so must we."""
        if parts and parts[-1].starred and not all(map(self.is_plain, following)):
            frozen = self.fresh()
            span = self.span(following[0])
            self.builder.emit(Build(frozen, kind, (parts[-1],), span=span))  # type: ignore[arg-type]  # tuple or dict
            parts[-1] = replace(parts[-1], value=frozen)

    # --- operators ---

    def unary(self, node: cst.UnaryOperation, hint: str) -> Operand:
        if isinstance(node.operator, cst.Not):
            operand = self.condition(node.expression)
        else:
            operand = self.expression(node.expression)
            negates = isinstance(node.operator, cst.Minus)
            if negates and isinstance(node.expression, cst.Integer | cst.Float | cst.Imaginary):
                assert isinstance(operand, Literal), "a number is a literal"
                return Literal(-operand.value)  # type: ignore[operator]  # a number
        return self.operator(SIGNS[type(node.operator)], (operand,), self.span(node), hint)

    def binary(self, node: cst.BinaryOperation, hint: str) -> Operand:
        operands = self.expression(node.left), self.expression(node.right)
        return self.operator(SIGNS[type(node.operator)], operands, self.span(node), hint)

    def operator(self, sign: str, operands: tuple[Operand, ...], span: Span, hint: str) -> Value:
        result = self.fresh(hint)
        self.builder.emit(Operator(result, sign, operands, span=span))
        return result

    def boolean(self, node: cst.BooleanOperation, hint: str) -> Operand:
        left = self.expression(node.left)
        if isinstance(node.operator, cst.And):
            return self.value_of(left, lambda: self.expression(node.right), lambda: left, self.span(node), hint)
        return self.value_of(left, lambda: left, lambda: self.expression(node.right), self.span(node), hint)

    def comparison(self, node: cst.Comparison, hint: str) -> Operand:
        return self.chain(node, self.expression(node.left), node.comparisons, hint)

    def chain(
        self,
        node: cst.Comparison,
        left: Operand,
        targets: Sequence[cst.ComparisonTarget],
        hint: str,
        in_condition: bool = False,
    ) -> Operand:
        """`left < a < b`: each operand is evaluated once, the second comparison only where the first holds."""
        right = self.expression(targets[0].comparator)
        sign = SIGNS[type(targets[0].operator)]
        if len(targets) == 1:
            return self.operator(sign, (left, right), self.span(node), hint)
        first = self.operator(sign, (left, right), self.span(node), "")
        return self.value_of(
            first,
            lambda: self.chain(node, right, targets[1:], hint, in_condition),
            lambda: Literal(False) if in_condition else first,
            self.span(node),
            hint,
        )

    def conditional(self, node: cst.IfExp, hint: str) -> Operand:
        test = self.condition(node.test)
        return self.value_of(
            test,
            lambda: self.expression(node.body, hint),
            lambda: self.expression(node.orelse, hint),
            self.span(node),
            hint,
        )

    def walrus(self, node: cst.NamedExpr, hint: str) -> Operand:
        assert isinstance(node.target, cst.Name), "a walrus assigns a name"
        value = self.expression(node.value, node.target.value)
        self.assign(self.syntax.name(node.target.value), value, self.span(node))
        return value

    # --- calls and closures ---

    def call(self, node: cst.Call, hint: str) -> Operand:
        match node.func:
            case cst.Attribute(value=owner, attr=cst.Name(value="save")) if not node.args and self.saves():
                saved = self.expression(owner)
                result = self.fresh(hint)
                self.builder.emit(Save(result, saved, span=self.span(node)))
                return result
        function = self.expression(node.func)
        arguments = self.arguments(node.args)
        result = self.fresh(hint)
        self.builder.emit(Call(result, function, arguments, span=self.span(node)))
        return result

    def saves(self) -> bool:
        """Whether `.save()` is ours here."""
        return self.in_forward or self.in_backward or self.in_session

    def arguments(self, nodes: Sequence[cst.Arg]) -> tuple[Argument, ...]:
        """The arguments of a call."""
        parts: list[Element] = []
        ordered = arguments_in_order(nodes)
        for number, node in enumerate(ordered):
            if number:
                self.freeze(parts, node.value, kind="dict" if ordered[number - 1].star == "**" else "tuple")
            parts.append(Element(self.expression(node.value), starred=bool(node.star)))
        return tuple(
            Argument(
                part.value,
                None if node.keyword is None else node.keyword.value,
                "**" if node.star == "**" else "*" if node.star else "",
            )
            for part, node in zip(parts, ordered, strict=True)
        )


_Handler = Callable[[Expressions, cst.BaseExpression, str], Operand]


def _handlers(*pairs: tuple[type[cst.BaseExpression], object]) -> dict[type[cst.CSTNode], _Handler]:
    return dict(pairs)  # type: ignore[arg-type]  # each handler takes the node class that it is listed for


_EXPRESSIONS = _handlers(
    (cst.Name, Expressions.name),
    (cst.Integer, Expressions.number),
    (cst.Float, Expressions.number),
    (cst.Imaginary, Expressions.number),
    (cst.Ellipsis, Expressions.ellipsis),
    (cst.SimpleString, Expressions.string),
    (cst.ConcatenatedString, Expressions.concatenated),
    (cst.FormattedString, Expressions.formatted),
    (cst.Attribute, Expressions.attribute),
    (cst.Subscript, Expressions.subscript),
    (cst.Tuple, Expressions.display),
    (cst.List, Expressions.display),
    (cst.Set, Expressions.display),
    (cst.Dict, Expressions.dictionary),
    (cst.UnaryOperation, Expressions.unary),
    (cst.BinaryOperation, Expressions.binary),
    (cst.BooleanOperation, Expressions.boolean),
    (cst.Comparison, Expressions.comparison),
    (cst.IfExp, Expressions.conditional),
    (cst.NamedExpr, Expressions.walrus),
    (cst.Call, Expressions.call),
    (cst.Lambda, Expressions.anonymous),
    (cst.ListComp, Expressions.comprehension),
    (cst.SetComp, Expressions.comprehension),
    (cst.DictComp, Expressions.comprehension),
    (cst.GeneratorExp, Expressions.generator),
)
