"""Operands: what an op may take. SSA values, and immediates that need no op of their own.

Immediates are built without effects, so that they can stand inside an operand: `item %h[:, -1]` has one operand that is
a value and one that is a tuple of a slice and a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

from nnsight_compiler.ir.types import ANY, Type

Scalar = bool | int | float | complex | str | bytes | None


@final
@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: defined once, by an op or as a parameter of a region. Names are unique within a program.

    The name is an identifier with optional `.n` suffixes (`h`, `h.1`, `0`); the text form writes it as `%h`.
    """

    name: str
    type: Type = ANY

    def __str__(self) -> str:
        return f"%{self.name}"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A constant that the source spells out: `None`, a bool, a number, a string, bytes, or `...`.

    Two literals are equal when type and spelling are: `1`, `1.0` and `True` differ, and `nan` equals itself.
    """

    value: object

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literal):
            return NotImplemented
        return type(self.value) is type(other.value) and self._spelling() == other._spelling()

    def __hash__(self) -> int:
        return hash((type(self.value).__name__, self._spelling()))

    def _spelling(self) -> str:
        # Python refuses to write very long integers in decimal.
        return hex(self.value) if isinstance(self.value, int) else repr(self.value)


@final
@dataclass(frozen=True, slots=True)
class Unbound:
    """What a variable holds before it is assigned. Only merges, exports and `bound` may take it."""


@final
@dataclass(frozen=True, slots=True)
class Module:
    """A module of a model, resolved: `%model@transformer.h.3`. `model` is the value that holds the wrapped model."""

    model: Value
    path: str


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """`lower:upper:step`, each part `Literal(None)` where it is left out."""

    lower: Operand = field(default_factory=lambda: NONE)
    upper: Operand = field(default_factory=lambda: NONE)
    step: Operand = field(default_factory=lambda: NONE)


@final
@dataclass(frozen=True, slots=True)
class Tuple:
    """A tuple without starred parts."""

    parts: tuple[Operand, ...]


Operand = Value | Literal | Unbound | Module | Slice | Tuple

NONE: Literal = Literal(None)
UNBOUND = Unbound()


def values_in(operand: Operand) -> Iterator[Value]:
    """The SSA values that an operand mentions, in order."""
    match operand:
        case Value():
            yield operand
        case Module(model=model):
            yield model
        case Slice(lower=lower, upper=upper, step=step):
            for part in (lower, upper, step):
                yield from values_in(part)
        case Tuple(parts=parts):
            for part in parts:
                yield from values_in(part)
        case Literal() | Unbound():
            return


def map_operand(operand: Operand, change: Callable[[Value], Operand]) -> Operand:
    """The operand with `change` applied to every value in it."""
    match operand:
        case Value():
            return change(operand)
        case Module(model=model, path=path):
            new = change(model)
            if isinstance(new, Module):
                return Module(new.model, f"{new.path}.{path}".strip("."))
            assert isinstance(new, Value), f"a module's model must stay a value, not {new}"
            return operand if new is model else Module(new, path)
        case Slice(lower=lower, upper=upper, step=step):
            return Slice(map_operand(lower, change), map_operand(upper, change), map_operand(step, change))
        case Tuple(parts=parts):
            return Tuple(tuple(map_operand(part, change) for part in parts))
        case Literal() | Unbound():
            return operand
