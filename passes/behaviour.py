"""What a known call does to its arguments: the row type of the table in `known_calls`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import final

Place = int | str
"""An argument: its position, the receiver of a method being 0; or the name of a keyword."""

EVERY: tuple[Place, ...] = (-1,)
"""All arguments of a call, positional, starred and by keyword."""


class Behaviour(Enum):
    """What a call does besides returning. In all cases it reads its arguments."""

    PURE = auto()
    """Nothing: the result is new and shares nothing with the arguments."""
    VIEW = auto()
    """Nothing, but the result may share storage with some arguments, be one of them, or hold them."""
    MUTATES = auto()
    """It writes some arguments in place; the result may share storage as told."""
    CONTAINER = auto()
    """It changes its receiver and stores its other arguments in it. Ordered; nothing moves aside for it."""
    HARMLESS = auto()
    """It shows, measures or sets something outside the program's values, and keeps nothing. Ordered."""


@final
@dataclass(frozen=True, slots=True)
class KnownCall:
    """One row of the table of known calls.

    target: the name on the wire.
    mutates, aliases: the arguments written in place, and those that the result may share storage with or hold.
    random: draws from, or sets, a random generator: never repeated, dropped, merged or reordered among its like.
    scalar: the result is a number, a string, a dtype, … or a tuple of these: it has no storage to share.
    leaf: the result is one tensor or a scalar: it holds no other values that could be taken out of it.
    calls: keywords that bring a function which the call runs; with one of them the call is not known.
    """

    target: str
    behaviour: Behaviour
    mutates: tuple[Place, ...] = ()
    aliases: tuple[Place, ...] = ()
    random: bool = False
    scalar: bool = False
    leaf: bool = False
    calls: tuple[str, ...] = ()


def words(text: str) -> tuple[str, ...]:
    """The words of a text: how the tables of names are written."""
    return tuple(text.split())
