"""Refuses accesses to what does not run, since a module around it is skipped.

    forward %f0 = trace %model(%prompt)
      skip %model@transformer.h.1 = %x
      %h = read %model@transformer.h.1.mlp output        (refused: both lines are named)

What is inside is told by time: whatever happens between the input and the output of a call is a part of it, by
whichever path it is named, and whether the skip happens in any case or only under a condition. The input and the output
of the skipped module itself exist: what it is given, and what the skip gives in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.passes.sites import Order, Orders, Place, forwards, locate, place_of


def check_skips(program: Program, orders: Orders) -> Program:
    """The program itself.

    Raises:
        CompileError: it reads, writes or skips something inside of a module that it skips.
    """
    wrong: list[Diagnostic] = []
    for forward in forwards(program.body):
        accesses = [op for op in walk(forward.body) if isinstance(op, (ops.Read, ops.Write, ops.Skip))]
        if any(isinstance(op, ops.Skip) for op in accesses):
            wrong.extend(_inside(accesses, orders(forward)))
    if wrong:
        raise CompileError(wrong)
    return program


def _inside(accesses: list[ops.Read | ops.Write | ops.Skip], order: Order) -> Iterator[Diagnostic]:
    places = [place_of(op, order) for op in accesses]
    for skip, place in zip(accesses, places, strict=True):
        if not isinstance(skip, ops.Skip):
            continue
        end = locate(place.path, "output", place.call, skip.span, order).time
        for op, other in zip(accesses, places, strict=True):
            if place.time < other.time < end:
                yield Diagnostic(
                    op.span,
                    f"{_named(other)} is inside of {_named(place)}, which is skipped: it does not run",
                    "skip it in a forward of its own, or skip the modules inside that are not needed, one by one",
                    ((skip.span, f"{_named(place)} is skipped here"),),
                )


def _named(place: Place) -> str:
    name = f"`{place.path}`" if place.path else "the model"
    return name if place.call is None else f"{name} (call {place.call})"
