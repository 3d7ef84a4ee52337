"""Abstract storages: what the memory analysis says that values are, and that ops read and write."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Site:
    """A live value of the model. `forward` is the name of the forward's result, `rows` that of its invoke's, if any."""

    module: str
    port: str
    call: int | None
    forward: str
    rows: str = ""


@final
@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient with respect to a value, live during a backward pass."""

    value: str


@final
@dataclass(frozen=True, slots=True)
class Fresh:
    """What an op of the program makes: a tensor, a container, a cell, a closure."""

    value: str


@final
@dataclass(frozen=True, slots=True)
class Outside:
    """What comes from outside: a parameter, a global, the result of a host call."""

    value: str


@final
@dataclass(frozen=True, slots=True)
class Weight:
    """An attribute of a module of a model, or the module itself."""

    model: str
    path: str


@final
@dataclass(frozen=True, slots=True)
class Name:
    """The variable that a global or free name stands for, as opposed to its value. The empty name is any name."""

    scope: str
    name: str


Root = Site | Gradient | Fresh | Outside | Weight | Name
Roots = frozenset[Root]

NOTHING: Roots = frozenset()
ANYTHING = Outside("")
"""Anything that host code can reach."""
ANY_NAME = Name("", "")


def is_outside(root: Root) -> bool:
    return isinstance(root, (Outside, Weight))


def holder_of(root: Root) -> Hashable:
    """Whose contents a root shares: all that is outside is one, and so are the sites of a forward."""
    match root:
        case Site(forward=forward):
            return "site", forward
        case Gradient():
            return "gradient"
        case Outside() | Weight():
            return "outside"
        case Fresh() | Name():
            return root
