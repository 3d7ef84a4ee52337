"""The methods of Python's own containers, strings and numbers in the table of known calls, for an unknown receiver.

What is said of a method holds for all that have one of its name: containers, strings, tensors and arrays.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from functools import cache
from typing import Any

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Option, Takes, words

_CHANGING = (
    "append appendleft extend extendleft insert remove clear discard reverse rotate update difference_update "
    "intersection_update symmetric_difference_update subtract add partition put fill"
)
"""Methods that change their receiver. `partition`, `put` and `fill` are those of arrays."""

_TAKING = "pop popitem popleft setdefault sort move_to_end __getitem__"
"""Methods that change their receiver, and whose result may be a part of it. A `defaultdict` makes a missing item."""

_LOOKING = (
    "copy get items keys values union intersection difference symmetric_difference fromkeys most_common elements split "
    "rsplit splitlines maketrans __iter__"
)
"""Methods that only look, and whose result may be, or hold, a part of the receiver or of the arguments."""


_PLAIN = (
    "capitalize casefold center count decode encode endswith expandtabs find format format_map isalnum isalpha isascii "
    "isdecimal isdigit isdisjoint isidentifier islower isnumeric isprintable isspace issubset issuperset istitle "
    "isupper join ljust lower lstrip removeprefix removesuffix replace rfind rindex rjust rpartition rstrip "
    "startswith strip swapcase title total translate upper zfill bit_length bit_count as_integer_ratio is_integer hex "
    "fromhex from_bytes to_bytes indices"
)
"""Methods of strings, numbers and containers whose result is a plain value."""

TYPES: tuple[type, ...] = (
    *(list, dict, set, frozenset, tuple, str, bytes, int, float, complex, range, slice),
    *(deque, Counter, OrderedDict, defaultdict),
)
"""Whose methods these are."""


@cache
def _rows() -> dict[str, KnownCall]:
    rows: dict[str, KnownCall] = {}

    def put(names: str, behaviour: Behaviour, **more: Any) -> None:
        for name in words(names):
            rows[name] = KnownCall(f"method.{name}", behaviour, **more)

    # An unknown receiver may be a tensor, and what `add` returns for one is new; for a set it is `None`.
    put(_CHANGING, Behaviour.CONTAINER, mutates=(0,), leaf=True)
    put(_TAKING, Behaviour.CONTAINER, mutates=(0,), aliases=EVERY)
    put("sort", Behaviour.CONTAINER, mutates=(0,), aliases=EVERY, calls=("key",))
    put("index", Behaviour.VIEW, aliases=(0,), leaf=True)
    put("conjugate", Behaviour.VIEW, aliases=(0,), leaf=True, takes=Takes(1, 1, 1))  # an array takes its `out` besides
    inplace = (Option(("inplace",), (0,)),)
    for name in words(_LOOKING):
        put(name, Behaviour.VIEW, aliases=EVERY, options=inplace, takes=_takes(name))
    for name in words(_PLAIN):
        put(name, Behaviour.PURE, scalar=True, leaf=True, options=inplace, takes=_takes(name))
    return rows


def _takes(name: str) -> Takes | None:
    """How many arguments the methods of this name take, where Python tells."""
    least, positional, total = math.inf, 0.0, 0.0
    for holder in TYPES:
        if not hasattr(holder, name):
            continue
        try:
            parameters = inspect.signature(getattr(holder, name)).parameters.values()
        except ValueError:
            return None
        if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
            return None
        if isinstance(vars(holder).get(name), (classmethod, staticmethod)):
            return None
        plain = [each for each in parameters if each.kind is not each.KEYWORD_ONLY]
        least = min(least, sum(each.default is each.empty for each in parameters))
        positional = max(positional, len(plain))
        total = max(total, len(parameters))
    return Takes(int(least), positional, total) if total else None


def python_method(name: str) -> KnownCall | None:
    """The row of a method of Python's own containers, strings and numbers, which holds for a tensor as well."""
    return _rows().get(name)


def python_methods() -> Iterator[str]:
    """The names of all methods that `python_method` knows."""
    yield from _rows()
