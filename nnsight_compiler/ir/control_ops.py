"""Ops of control flow, and the terminators of regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from nnsight_compiler.ir.op import Effect, Handler, Op, Region
from nnsight_compiler.ir.values import Operand, Value


@final
@dataclass(frozen=True, slots=True)
class If(Op):
    """Runs one of two regions; each ends in a `yield` of as many operands as there are results, or leaves."""

    results: tuple[Value, ...]
    condition: Operand
    then: Region
    orelse: Region


@final
@dataclass(frozen=True, slots=True)
class For(Op):
    """`for`. `body` takes the item and the carried values; it ends in `continue` (also at its natural end) or `break`
    with the new carried values. `orelse` takes the carried values, runs where no `break` did, and yields the
    results.

    together: made by `merge_forwards`: the rounds advance side by side, each to its next forward, and these forwards
        run as rows of one."""

    results: tuple[Value, ...]
    iterable: Operand
    initial: tuple[Operand, ...]
    body: Region
    orelse: Region | None = None
    together: bool = False


@final
@dataclass(frozen=True, slots=True)
class While(Op):
    """`while`. `condition` takes the carried values and yields the condition, then the carried values; `body` and
    `orelse` are as in `for`, without an item."""

    results: tuple[Value, ...]
    initial: tuple[Operand, ...]
    condition: Region
    body: Region
    orelse: Region | None = None


@final
@dataclass(frozen=True, slots=True)
class Try(Op):
    """`try`/`except`/`else`/`finally`. Variables assigned inside and used outside are cells."""

    body: Region
    handlers: tuple[Handler, ...]
    orelse: Region | None = None
    finalizer: Region | None = None


@final
@dataclass(frozen=True, slots=True)
class With(Op):
    """`with context as result:` on a context manager of Python's (`torch.no_grad()`)."""

    effects = Effect.CALLS
    result: Value
    context: Operand
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Yield(Op):
    """Ends a region normally and hands its values to the op that owns it."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Emit(Op):
    """Hands one value to the consumer of a generator expression and goes on when asked for the next."""

    effects = Effect.CONTROL
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Break(Op):
    """Leaves the nearest loop with these carried values."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Continue(Op):
    """Begins the next round of the nearest loop with these carried values."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Return(Op):
    """Leaves the program or the closure. Inside a `forward` it ends the body; the forward itself still finishes."""

    effects = Effect.CONTROL
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Raise(Op):
    """`raise exception from cause`; both absent: re-raises the exception being handled."""

    effects = Effect.CONTROL
    exception: Operand | None = None
    cause: Operand | None = None
