"""What a known call does to its arguments: the row type of the table in `known_calls`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import final

from nnsight_compiler.ir.ops import Argument
from nnsight_compiler.ir.values import Literal, Operand

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
    BARRIER = auto()
    """It runs no code of the user's, and reaches nothing but what it is given. What it does to that is not told: the
    passes take it for a host call, and only its name is known."""


@final
@dataclass(frozen=True, slots=True)
class Option:
    """An argument by which a call writes: `out=result`, `inplace=True`. Left out, `None` or `False`, it does not.

    places: where the argument stands.
    mutates: what is then written, and may be the result.
    """

    places: tuple[Place, ...]
    mutates: tuple[Place, ...]


OUT = Option(("out",), ("out",))


@final
@dataclass(frozen=True, slots=True)
class Takes:
    """How many arguments, receiver included, a method can be given: at least, at most by position, at most in all.

    The table knows a method on an unknown object by its name alone. What is called with arguments that the method does
    not take is another one of the same name: `run.log({"loss": loss})` is no logarithm.
    """

    least: int
    positional: float
    total: float


@final
@dataclass(frozen=True, slots=True)
class KnownCall:
    """One row of the table of known calls.

    target: the name on the wire.
    mutates, aliases: the arguments written in place, and those that the result may share storage with or hold.
    random: draws from, or sets, a random generator: never repeated, dropped, merged or reordered among its like.
    scalar: the result is a number, a string, a dtype, … or a tuple of these: it has no storage to share.
    leaf: the result is one tensor or array, or a scalar: it holds no other values that could be taken out of it.
    iterator: the result changes when it is read.
    mode: sets what later calls of torch or numpy go by, such as the default dtype: none of them is moved across it.
    calls: arguments that bring a function which the call runs; with one of them the call is not known.
    options: arguments by which it writes.
    takes: for a method, the number of arguments; `None` where any are taken to be its own.
    """

    target: str
    behaviour: Behaviour
    mutates: tuple[Place, ...] = ()
    aliases: tuple[Place, ...] = ()
    random: bool = False
    scalar: bool = False
    leaf: bool = False
    iterator: bool = False
    mode: bool = False
    calls: tuple[Place, ...] = ()
    options: tuple[Option, ...] = ()
    takes: Takes | None = None


def behaviour_of(known: KnownCall, arguments: Sequence[Argument]) -> KnownCall | None:
    """The row of a call with these arguments, the receiver of a method first: `out=` and `inplace=` make it write.

    `None` if an argument may bring a function of the user's which the call would run, if a method takes no such
    arguments, or if the row is a barrier's: then it is a host call.
    """
    if known.behaviour is Behaviour.BARRIER:
        return None
    if known.takes is not None and not _fits(known.takes, arguments):
        return None
    if any(_given(place, arguments, _is_literal) for place in known.calls):
        return None
    for option in known.options:
        off = _is_literal if option.places == option.mutates else _is_off
        if any(_given(place, arguments, off) for place in option.places):
            known = replace(
                known,
                behaviour=Behaviour.MUTATES,
                mutates=(*known.mutates, *option.mutates),
                aliases=known.aliases if known.aliases == EVERY else (*known.aliases, *option.mutates),
                scalar=False,
            )
    return known


def _fits(takes: Takes, arguments: Sequence[Argument]) -> bool:
    if any(argument.star for argument in arguments):
        return True
    positional = sum(argument.keyword is None for argument in arguments)
    return positional <= takes.positional and takes.least <= len(arguments) <= takes.total


def _given(place: Place, arguments: Sequence[Argument], without: Callable[[Operand], bool]) -> bool:
    """Whether an argument may be given at a place, other than one without effect."""
    named = isinstance(place, str)
    if any(argument.star == ("**" if named else "*") for argument in arguments):
        return True
    if isinstance(place, str):
        found = [argument for argument in arguments if argument.keyword == place]
    else:
        found = [argument for argument in arguments if argument.keyword is None and not argument.star][place:][:1]
    return any(not without(argument.value) for argument in found)


def _is_literal(value: Operand) -> bool:
    """Whether it is neither a function nor anything that can be written."""
    return isinstance(value, Literal)


def _is_off(value: Operand) -> bool:
    return isinstance(value, Literal) and value.value in (None, False)


def words(text: str) -> tuple[str, ...]:
    """The words of a text: how the tables of names are written."""
    return tuple(text.split())
