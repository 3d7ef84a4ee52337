"""Ops of names: what a program reads and sets outside of itself, and the cells of its variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf
from typing import final

from nnsight_compiler.ir.op import Effect, Op
from nnsight_compiler.ir.values import Operand, Value


@final
@dataclass(frozen=True, slots=True)
class Global(Op):
    """Reads a name as Python does: `scope="global"` from the module's globals, then the builtins; `scope="free"` from
    the closure of the decorated function. Read anew at each run."""

    effects = Effect.READS
    result: Value
    name: str
    scope: OneOf["global", "free"] = "global"


@final
@dataclass(frozen=True, slots=True)
class SetGlobal(Op):
    """Assigns a name that the function declares `global`, or `nonlocal` of a function outside the program."""

    effects = Effect.WRITES
    name: str
    value: Operand
    scope: OneOf["global", "free"] = "global"


@final
@dataclass(frozen=True, slots=True)
class Cell(Op):
    """A fresh box for a variable that needs memory: captured by a closure, or assigned where an exception may pass.
    `initial` may be `Unbound`."""

    effects = Effect.WRITES
    result: Value
    name: str
    initial: Operand


@final
@dataclass(frozen=True, slots=True)
class Load(Op):
    """Reads a cell. An empty cell raises Python's `UnboundLocalError` with the cell's `name`; without a name, what it
    holds may be `Unbound`."""

    effects = Effect.READS
    result: Value
    cell: Operand
    name: str | None


@final
@dataclass(frozen=True, slots=True)
class Store(Op):
    """Puts a value into a cell; `Unbound` empties it (`del`)."""

    effects = Effect.WRITES
    cell: Operand
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Bound(Op):
    """The value of a variable that some path may have left unassigned; raises `UnboundLocalError` if it did."""

    result: Value
    value: Operand
    name: str


@final
@dataclass(frozen=True, slots=True)
class Import(Op):
    """`import module` (`name=None`: the top package, or the module itself with `leaf`), `from module import name`.
    `level` counts the dots of a relative import."""

    effects = Effect.CALLS
    result: Value
    module: str
    name: str | None = None
    level: int = 0
    leaf: bool = False
