"""What generated code needs besides the user's own globals."""

from __future__ import annotations

from typing import final


@final
class UnboundType:
    """The type of `UNBOUND`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNBOUND"


UNBOUND = UnboundType()
"""What a variable holds that was not assigned on the way here."""


@final
class Cell:
    """A variable in memory: captured by a closure, or assigned where an exception may pass."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def unbound(name: str) -> UnboundLocalError:
    """Python's error for reading a local variable that has no value."""
    return UnboundLocalError(f"cannot access local variable '{name}' where it is not associated with a value")


def unbound_free(name: str) -> NameError:
    """Python's error for reading a variable of the function around it that has no value."""
    return NameError(
        f"cannot access free variable '{name}' where it is not associated with a value in enclosing scope", name=name
    )
