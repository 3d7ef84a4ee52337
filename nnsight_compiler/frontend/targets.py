"""Assignment: values into names, attributes, items, and patterns of them."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from nnsight_compiler.frontend.lowering import Lowering
from nnsight_compiler.ir.ops import Build, Delete, Element, SetAttribute, SetGrad, SetItem, Unpack, Write
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import NONE, UNBOUND, Operand, Slice, Tuple


class Targets(Lowering):
    """Assigns and deletes targets of any shape."""

    def store(self, target: cst.BaseExpression, value: Operand) -> None:
        """`target = value`."""
        span = self.span(target)
        match target:
            case cst.Name():
                self.assign(self.syntax.name(target.value), value, span)
            case cst.Attribute():
                self.store_attribute(self.expression(target.value), self.syntax.name(target.attr.value), value, span)
            case cst.Subscript():
                owner = self.expression(target.value)
                self.builder.emit(SetItem(owner, self.index(target), value, span=span))
            case cst.Tuple() | cst.List():
                self.unpack(target.elements, value, span)
            case _:
                raise AssertionError(f"Python's parser refuses to assign to {type(target).__name__}")

    def store_attribute(self, owner: Operand, name: str, value: Operand, span: Span) -> None:
        """`owner.name = value`."""
        match name:
            case "output" | "input" | "inputs" if self.in_forward:
                self.builder.emit(Write(owner, name, value, span=span))
            case "grad" if self.in_backward:
                self.builder.emit(SetGrad(owner, value, span=span))
            case _:
                self.builder.emit(SetAttribute(owner, name, value, span=span))

    def unpack(self, targets: Sequence[cst.BaseElement], value: Operand, span: Span) -> None:
        """`a, *b, c = value`. The parts of a tuple that is spelled out go straight to their targets."""
        stars = [number for number, target in enumerate(targets) if isinstance(target, cst.StarredElement)]
        if isinstance(value, Tuple) and len(value.parts) == len(targets) and not stars:
            parts: Sequence[Operand] = value.parts
        else:
            values = tuple(self.fresh(target_name(target.value)) for target in targets)
            self.builder.emit(Unpack(values, value, stars[0] if stars else -1, span=span))
            parts = values
        for target, part in zip(targets, parts, strict=True):
            self.store(target.value, part)

    def delete(self, target: cst.BaseExpression) -> None:
        """`del target`."""
        span = self.span(target)
        match target:
            case cst.Name():
                name = self.syntax.name(target.value)
                self.read(name, span)
                self.assign(name, UNBOUND, span)
            case cst.Attribute():
                name = self.syntax.name(target.attr.value)
                self.builder.emit(Delete(self.expression(target.value), None, name, span=span))
            case cst.Subscript():
                owner = self.expression(target.value)
                self.builder.emit(Delete(owner, self.index(target), span=span))
            case cst.Tuple(elements=elements) | cst.List(elements=elements):
                for element in elements:
                    self.delete(element.value)
            case _:
                raise AssertionError(f"Python's parser refuses to delete {type(target).__name__}")

    def index(self, node: cst.Subscript) -> Operand:
        """What stands between the brackets."""
        elements = node.slice
        parts: list[Element] = []
        for element in elements:
            match element.slice:
                case cst.Index(value=value, star="*"):
                    parts.append(Element(self.expression(value), starred=True))
                case cst.Index(value=value):
                    parts.append(Element(self.expression(value)))
                case cst.Slice(lower=lower, upper=upper, step=step):
                    bounds = [NONE if part is None else self.expression(part) for part in (lower, upper, step)]
                    parts.append(Element(Slice(*bounds)))
        if any(part.starred for part in parts):
            result = self.fresh()
            self.builder.emit(Build(result, "tuple", tuple(parts), span=self.span(node)))
            return result
        if len(parts) == 1 and not isinstance(elements[0].comma, cst.Comma):
            return parts[0].value
        return Tuple(tuple(part.value for part in parts))


def target_name(target: cst.BaseExpression) -> str:
    """The name that a value gets, where its target is a name."""
    return target.value if isinstance(target, cst.Name) else ""
