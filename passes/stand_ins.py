"""Stand-ins: what an interpretation without data computes with in place of the values of a run.

A tensor is stood in for by a tensor on the meta device: it has a shape and a dtype, and no data. Plain numbers, strings
and slices stand for themselves, and containers for copies of themselves, so that nothing of the user's is ever touched.
Whatever else there is, or may be, is `UNKNOWN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import ModuleType, NoneType
from typing import Any, Final, final

import torch
from torch import nn

META: Final = torch.device("meta")


class Mark(Enum):
    """Values of which little or nothing is known."""

    UNKNOWN = auto()
    """Anything."""
    INTEGER = auto()
    """Some whole number, such as the variable of a loop over a range."""
    DEVICE = auto()
    """The device of some tensor."""


UNKNOWN: Final = Mark.UNKNOWN
INTEGER: Final = Mark.INTEGER
DEVICE: Final = Mark.DEVICE

PLAIN = (NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.Size, range, type(...))


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A method of a stand-in, before it is called."""

    receiver: Any
    name: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """What an iterator will give: `zip`, `enumerate` and the like, read once."""

    held: list[Any]


def stand_in(value: Any, memo: dict[int, Any]) -> Any:
    """The stand-in of a value of the user's. `memo` keeps what was made, so that what is one object stays one."""
    if isinstance(value, PLAIN) and type(value) in PLAIN:
        return value
    if id(value) in memo:
        return memo[id(value)][1]
    made = _made(value, memo)
    memo[id(value)] = value, made  # the value is held, lest another take its identity
    return made


def _made(value: Any, memo: dict[int, Any]) -> Any:
    match value:
        case torch.Tensor():
            return empty_like(value)
        case torch.device():
            return DEVICE
        case slice():
            return slice(*(stand_in(part, memo) for part in (value.start, value.stop, value.step)))
        case ModuleType() | type():
            return value
    if type(value) is tuple:
        return tuple(stand_in(item, memo) for item in value)
    if type(value) is list:
        made: list[Any] = []
        memo[id(value)] = value, made
        made.extend(stand_in(item, memo) for item in value)
        return made
    if type(value) is dict and all(type(key) in PLAIN for key in value):
        table: dict[Any, Any] = {}
        memo[id(value)] = value, table
        table.update((key, stand_in(item, memo)) for key, item in value.items())
        return table
    return UNKNOWN


def empty_like(value: torch.Tensor) -> Any:
    """A tensor without data, of the shape, strides and dtype of another; of plain dense tensors alone."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        return UNKNOWN
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def copied(value: Any) -> Any:
    """What stands at a site, with containers of its own, so that a program may change them."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    if isinstance(value, Mapping):
        made: Any = type(value)
        return made({key: copied(item) for key, item in value.items()})
    return value if type(value) in PLAIN else UNKNOWN


def inside(value: Any) -> Iterator[Any]:
    """A value, and all that it holds where it is a container."""
    waiting, seen = [value], set()
    while waiting:
        held = waiting.pop()
        yield held
        if isinstance(held, (list, tuple, Mapping, set, Items, Method, slice)) and id(held) not in seen:
            seen.add(id(held))
            waiting.extend(parts(held))


def parts(value: Any) -> list[Any]:
    """What a container holds."""
    match value:
        case torch.Size():
            return []
        case list() | tuple() | set():
            return list(value)
        case Mapping():
            return list(value.values())
        case Items(held=held):
            return held
        case Method(receiver=receiver):
            return [receiver]
        case slice():
            return [value.start, value.stop, value.step]
        case _:
            return []


def is_container(value: Any) -> bool:
    """Whether a value can change what it holds."""
    return isinstance(value, (list, set, Mapping, Items))


def same(first: Any, second: Any) -> bool:
    """Whether two stand-ins say the same."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and first.dtype == second.dtype
    if type(first) is not type(second):
        return False
    if type(first) is tuple:
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) in PLAIN and bool(first == second)
