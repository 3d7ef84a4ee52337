"""Operators, while a program is specialised: computed on known numbers and strings, kept as ops on everything else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Literal
from nnsight_compiler.passes.bounded import TEXT, may_apply
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements, Known, constant, immutable
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


def interpret_operator(specialiser: Interpretation, op: ops.Operator) -> Abstract:
    """The result of an operator."""
    parts = [specialiser.evaluate.resolved(specialiser.abstract(operand)) for operand in op.operands]
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
