"""Operators, while a program is specialised: computed on known numbers and strings, kept as ops on everything else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Literal
from nnsight_compiler.passes.bounded import TEXT, is_bounded, may_apply
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements, Known, constant, immutable, is_constant
from nnsight_compiler.passes.interpretation import Interpretation

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift,
    ">>": operator.rshift, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "==": operator.eq, "!=": operator.ne, "is": operator.is_, "is not": operator.is_not,
    "in": lambda left, right: left in right, "not in": lambda left, right: left not in right,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "not": operator.not_,
}
CONVERSIONS: dict[str, Callable[[Any], str]] = {"": format, "s": str, "r": repr, "a": ascii}
"""How a replacement field of an f-string makes text."""


def interpret_operator(specialiser: Interpretation, op: ops.Operator) -> Abstract:
    """The result of an operator."""
    parts = [specialiser.evaluate.resolved(specialiser.abstract(operand)) for operand in op.operands]
    if op.operator == "+" and (joined := _joined(specialiser, op, *parts)) is not None:
        return joined
    if op.operator in ("in", "not in") and (found := _contained(*parts)) is not None:
        return constant(found == (op.operator == "in"))
    for part in parts:
        if isinstance(part.fact, Elements) and op.in_place:
            part.fact.forget()
    if op.operator == "not":
        parts = [specialiser.evaluate.truth(part) for part in parts]
    value = _folded(op, parts)
    if value is not None and value.fact is not None and isinstance(value.operand, Literal):
        return value
    if op.operator in ("is", "is not") and any(part.operand is None for part in parts):
        same = parts[0].fact == parts[1].fact
        return constant(same if op.operator == "is" else not same)
    plain = op.operator in ("is", "is not", "not", "in", "not in")
    use = specialiser.use
    result = specialiser.builder.fresh(op.result.name)
    span = specialiser.span(op)
    specialiser.emit(ops.Operator(result, op.operator, tuple(map(use, parts)), op.in_place, span=span))
    if op.in_place:
        specialiser.change(parts[0])
    else:
        specialiser.fresh.add(result.name)
    loops = NO_LOOPS.union(*(part.loops for part in parts))
    live = 0 if plain else max(part.live for part in parts)
    at_run = any(part.at_run for part in parts)
    return Abstract(result, None if value is None else value.fact, loops, live, span, at_run)


def interpret_format(specialiser: Interpretation, op: ops.Format) -> None:
    """An f-string: computed where all in it are constants of the program."""
    parts = [_text(specialiser, part) for part in op.parts]
    whole = None if None in parts else "".join(part for part in parts if part is not None)
    if whole is None or len(whole) > TEXT:
        specialiser.keep(op, live=0)  # text
    else:
        specialiser.scope[op.result] = constant(whole)


def _text(specialiser: Interpretation, part: str | ops.FormatPart) -> str | None:
    if isinstance(part, str):
        return part
    match specialiser.abstract(part.value).fact:
        case Known(value=bool() | int() | str() as value, text=None) if part.specification is None:
            return CONVERSIONS[part.conversion](value) if is_bounded(value) else None
    return None


def _joined(
    specialiser: Interpretation, op: ops.Operator, left: Abstract, right: Abstract | None = None
) -> Abstract | None:
    """The sum of two lists or tuples that are followed, which is followed, too; `None` for all else."""
    if right is None or not isinstance(left.fact, Elements) or not isinstance(right.fact, Elements):
        return None
    first, second = left.fact, right.fact
    extends = op.in_place and first.kind == "list" and second.kind in ("list", "tuple")
    if first.items is None or second.items is None or not (extends or first.kind == second.kind != "dict"):
        return None
    if first.kind == "list" and (left.operand is None) != (right.operand is None):
        return None  # modules, which only lists that hold nothing else can hold
    items = [*first.items, *second.items]
    specialiser.work(0, first.size + second.size)
    if first.kind == "tuple":
        return specialiser.pack(items)
    fact = Elements("list", items)
    if extends:
        fact = first
        fact.items, fact.size = items, first.size + second.size - 1
    span = specialiser.span(op)
    if left.operand is None:
        return Abstract(None, fact, span=span)
    result = specialiser.builder.fresh(op.result.name)
    operands = specialiser.use(left), specialiser.use(right)
    specialiser.emit(ops.Operator(result, "+", operands, op.in_place, span=span))
    return Abstract(result, fact, left.loops | right.loops, 0, span, left.at_run or right.at_run)


def _contained(item: Abstract, container: Abstract) -> bool | None:
    """Whether a constant is among those of a container that is followed; `None` where not all of them are known."""
    match container.fact:
        case Elements(kind="dict", items=list(), keys=entries) | Elements(items=list() as entries):
            if is_constant(item) and all(map(is_constant, entries)):
                return any(entry.fact == item.fact for entry in entries)
    return None


def _folded(op: ops.Operator, parts: list[Abstract]) -> Abstract | None:
    """The result of an operator on known numbers and strings; `None` where it is not known, or raises."""
    facts = [part.fact for part in parts if isinstance(part.fact, Known) and immutable(part.fact.value)]
    if len(facts) != len(parts):
        return None
    table = UNARY if len(parts) == 1 else BINARY
    if op.operator not in table or not may_apply(op.operator, [fact.value for fact in facts]):
        return None
    try:
        value = table[op.operator](*(fact.value for fact in facts))
    except Exception:  # the op stays, and raises for the user at its own line when it runs
        return None
    if all(fact.text is None for fact in facts):
        return constant(value)
    texts = [f"({fact.text})" if fact.text is not None else repr(fact.value) for fact in facts]
    text = f"{op.operator} {texts[0]}" if len(texts) == 1 else f"{texts[0]} {op.operator} {texts[1]}"
    return Abstract(None, Known(value, text)) if immutable(value) and len(text) <= TEXT else None
