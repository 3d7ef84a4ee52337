"""What is small enough to be computed while a program is compiled. All else stays as it is, for the run to compute.

    2 + 3                       computed
    "a" * 10000000000           stays
    sum(range(1000000000000))   stays

A program may come from someone else, and compiling it takes no more time and memory than its text suggests. Legal
because an op that is not folded means the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nnsight_compiler.passes.behaviour import words

LONGEST = 10_000
"""Entries of a tuple or range up to which they are gone through."""
CHARACTERS = 2**20
"""Of a text that is computed with."""
MOST_OPS = 250_000
"""What a program may be unrolled to: ops that are interpreted, and that are emitted, rounds of loops, and entries of a
container that is followed, with all that is in it."""
MOST_OPS_OF_JOBS = 6_000
"""The same for jobs of a service: it checks them one after the other, and none may keep the others waiting."""
BITS = 4096
"""Of whole numbers."""
TEXT = 2_000
"""Characters of the expression by which a value is found again at each call: those of its parts add up."""

_GROWING = frozenset(words("factorial comb perm"))
_LENGTHLESS = frozenset(words("len range slice isinstance bool"))
"""Functions that do not go through what they are given."""


def is_bounded(value: Any) -> bool:
    """Whether computing with a value takes no time to speak of."""
    match value:
        case bool():
            return True
        case int():
            return value.bit_length() <= BITS
        case str() | bytes():
            return len(value) <= CHARACTERS
        case range():
            return value.start.bit_length() <= BITS and value.stop.bit_length() <= BITS
        case tuple():
            return is_flat(value)
        case _:
            return True


def is_flat(values: tuple[Any, ...]) -> bool:
    """Whether a tuple holds few values, all together: tuples may hold one another many times over."""
    waiting, count = [values], 0
    while waiting:
        held = waiting.pop()
        count += len(held)
        if count > LONGEST:
            return False
        waiting.extend(each for each in held if isinstance(each, tuple))
        if not all(is_bounded(each) for each in held if not isinstance(each, tuple)):
            return False
    return True


def may_apply(sign: str, operands: Sequence[Any]) -> bool:
    """Whether an operator on known values is computed now."""
    if not all(map(is_bounded, operands)):
        return False
    if len(operands) == 1:
        return True
    first, second = operands
    match sign:
        case "*":
            for held, times in ((first, second), (second, first)):
                if isinstance(held, (str, bytes, tuple)):
                    most = LONGEST if isinstance(held, tuple) else CHARACTERS
                    return isinstance(times, int) and len(held) * max(times, 0) <= most
        case "<<":
            return isinstance(second, int) and second <= BITS
        case "%":
            return not isinstance(first, (str, bytes))  # a format may ask for any width
        case "in" | "not in":
            return not isinstance(second, range) or isinstance(first, int)  # anything else is compared with each
    return True


def may_call(function: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether a pure function of known values is computed now."""
    name = getattr(function, "__name__", "")
    if not all(map(is_bounded, arguments)):
        return False
    if name in _GROWING or (name == "round" and len(arguments) > 1):
        return all(isinstance(each, float) or abs(each) <= BITS for each in arguments if isinstance(each, (int, float)))
    return name in _LENGTHLESS or not any(isinstance(each, range) and is_long(each) for each in arguments)


def is_long(held: range) -> bool:
    """Whether a range has more entries than are gone through."""
    return length_of(held) > LONGEST


def length_of(held: range) -> int:
    """The length of a range, of any size: `len` takes none from 2**63 on."""
    return max(0, (held.stop - held.start + held.step - (1 if held.step > 0 else -1)) // held.step)


def has_length(held: Any) -> bool:
    """Whether Python can say how many entries it has: it counts to 2**63."""
    return not isinstance(held, range) or length_of(held) < 2**63


__all__ = [
    "MOST_OPS", "MOST_OPS_OF_JOBS", "TEXT", "has_length", "is_bounded", "is_long", "length_of", "may_apply", "may_call",
]  # fmt: skip
