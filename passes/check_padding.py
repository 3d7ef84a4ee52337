"""Refuses constant positions that land on padding: in a list of prompts that differ in length, which is one rectangle.

    forward %f = trace %model(["a long prompt", "short"])
      %h = read %model@transformer.h.3 output : f32[rows=2, tokens=3, 768]
      %0 = item %h[:, 0]                            the second prompt has two positions of padding before it

The lengths are those of this call, and so is the mistake. Looked at is what surely runs: not what stands in a condition
or in a loop. The program itself is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Literal, Operand, Slice, Tuple, Value
from nnsight_compiler.passes.sites import forwards

Lengths = Callable[[ops.Forward, Value | None], tuple[int, ...]]
"""How many tokens the prompts of a forward, or of one of its invokes, have, if they differ and are a rectangle."""


def check_padding(program: Program, lengths: Lengths, arguments: Mapping[str, Any]) -> Program:
    """Refuses positions on padding, all at once.

    Args:
        arguments: the values of parameters in this call; one that is a number is a position too.
    """
    known = {
        parameter.value.name: arguments[parameter.value.name]
        for parameter in program.parameters
        if type(arguments.get(parameter.value.name)) is int
    }
    wrong: list[Diagnostic] = []
    for forward in forwards(program.body):
        reads: dict[str, ops.Read] = {}
        for op in _sure(forward.body):
            if isinstance(op, ops.Read):
                reads[op.result.name] = op
            elif isinstance(op, (ops.Item, ops.SetItem)) and isinstance(op.object, Value) and op.object.name in reads:
                rows = reads[op.object.name].rows
                own = lengths(forward, rows if isinstance(rows, Value) else None)
                found = _on_padding(op.object, op.index, own, known) if own else None
                if found is not None:
                    wrong.append(_told(op, *found))
    if wrong:
        raise CompileError(wrong)
    return program


def _sure(region: Region) -> Iterator[Op]:
    """The ops of a region that run in any case, in order."""
    for op in region.ops:
        yield op
        if isinstance(op, (ops.Invoke, ops.With)):
            yield from _sure(op.body)


def _on_padding(
    held: Value, index: Operand, lengths: tuple[int, ...], known: Mapping[str, int]
) -> tuple[int, int, int] | None:
    """The position, the row where it is padding, and the length of that row."""
    shape = held.type.shape if isinstance(held.type, TensorType) else None
    if not shape or [dimension.axis for dimension in shape[:2]] != ["rows", "tokens"] or shape[1].size is None:
        return None
    parts = index.parts if isinstance(index, Tuple) else (index,)
    if len(parts) < 2:
        return None
    rows, position = _selected(parts[0], len(lengths), known), _number(parts[1], known)
    if position is None:
        return None
    place = position + shape[1].size if position < 0 else position
    for row in rows:
        if place < shape[1].size - lengths[row]:
            return position, row, lengths[row]
    return None


def _selected(part: Operand, rows: int, known: Mapping[str, int]) -> range:
    """The rows that the first part of an index surely selects."""
    if isinstance(part, Slice):
        bounds = [_bound(each) for each in (part.lower, part.upper, part.step)]
        return range(0) if ... in bounds else range(rows)[slice(*bounds)]
    number = _number(part, known)
    if number is None or not -rows <= number < rows:
        return range(0)
    return range(rows)[number : number + 1 or None]


def _bound(part: Operand) -> Any:
    """A bound of a slice; an ellipsis where it is not spelled out."""
    return part.value if isinstance(part, Literal) and type(part.value) in (int, NoneType) else ...


def _number(part: Operand, known: Mapping[str, int]) -> int | None:
    if isinstance(part, Value):
        return known.get(part.name)
    return part.value if isinstance(part, Literal) and type(part.value) is int else None


def _told(op: Op, position: int, row: int, length: int) -> Diagnostic:
    tokens = f"{length} token" + ("" if length == 1 else "s")
    return Diagnostic(
        op.span,
        f"position {position} is padding in prompt {row}, which has {tokens}: a list of prompts is one rectangle,"
        " padded on the left",
        "give each prompt an invoke of its own, `with tracer.invoke(prompt):`, where positions are its own; or count"
        " from the end",
    )
