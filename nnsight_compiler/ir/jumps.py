"""Which `break` and `continue` belong to a loop."""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_compiler.ir.ops import Break, Closure, Continue, For, Op, Region, Try, While
from nnsight_compiler.ir.traverse import regions


def jumps(region: Region, guarded: bool = False) -> Iterator[tuple[Op, bool]]:
    """The jumps of the loop around a region, each with whether it leaves a `try` that has a `finally`."""
    for op in region.ops:
        match op:
            case Break() | Continue():
                yield op, guarded
            case For(orelse=otherwise) | While(orelse=otherwise):
                if otherwise is not None:
                    yield from jumps(otherwise, guarded)
            case Try(finalizer=finalizer):
                for inner in regions(op):
                    yield from jumps(inner, guarded or (finalizer is not None and inner is not finalizer))
            case Closure():
                pass
            case _:
                for inner in regions(op):
                    yield from jumps(inner, guarded)
