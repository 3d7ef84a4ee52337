"""Ending a forward where the program says so, and what stands for the values that it then has not come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, final

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.refusing import Refusing


@final
@dataclass(frozen=True, slots=True)
class Stopped:
    """What a site function returns where the forward ends at its site, and the line that says so."""

    where: Span


@final
@dataclass(frozen=True, slots=True)
class Later:
    """A value that a site makes for others: its place in the state, its name, and the line that makes it."""

    slot: str
    name: str
    span: Span


class NotReachedError(RunError):
    """A value of a site that its forward did not come to, since it was stopped before."""


@final
class NotReached(Refusing):
    """Stands for a value that a forward did not come to."""

    __slots__ = ("_value", "_where")

    def __init__(self, value: Later, where: Span) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_where", where)

    def __repr__(self) -> str:
        return f"<`{self._value.name}` of {self._value.span}, which the forward did not come to>"

    def _refuse(self) -> NoReturn:
        raise NotReachedError(
            f"{self._value.span}: `{self._value.name}` does not exist: the forward was stopped before it, at"
            f" {self._where}\n  way out: use it only where the forward was not stopped, or read it before"
            " `tracer.stop()`"
        )


def not_reached(state: Any, values: tuple[Later, ...], where: Span) -> None:
    """Has these values refuse any use."""
    for value in values:
        setattr(state, value.slot, NotReached(value, where))
