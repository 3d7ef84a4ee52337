"""How many bytes values take: tensors, and what Python's own operators and functions make of numbers and containers.

"-" * 10**12        1 TB, as `bytes_of_operator` tells before anything is made
list(range(n))      an entry and a number for each
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.passes.bounded import length_of
from nnsight_compiler.passes.stand_ins import parts

ENTRY, OBJECT = 8, 32
"""Bytes of an entry of a list, and of a small object of Python's, such as a number."""

_LISTING = frozenset(words("builtins.list builtins.tuple builtins.set builtins.frozenset builtins.sorted"))
_FILLING = frozenset(words("builtins.bytes builtins.bytearray"))


def held_bytes(values: list[Any], added: Mapping[int, tuple[Any, int]]) -> int:
    """The bytes that these values take where they are written down: what shares memory once, a view by itself.

    added: what containers take besides for entries that are not in them here, by their identity.
    """
    size, storages, seen = 0, dict[int, tuple[int, int]](), set[int]()
    waiting = list(values)
    while waiting:
        held = waiting.pop()
        if isinstance(held, torch.Tensor):
            if id(held) not in seen:
                storage = held.untyped_storage()
                so_far, _ = storages.get(storage._cdata, (0, 0))
                storages[storage._cdata] = so_far + held.numel() * held.itemsize, storage.nbytes()
        elif isinstance(held, (list, tuple, dict, set)):
            if id(held) in seen:
                continue
            size += ENTRY * len(held) + added.get(id(held), (None, 0))[1]
            waiting.extend(parts(held))
        else:
            size += len(held) if isinstance(held, (str, bytes)) else 0 if held is None else OBJECT
        seen.add(id(held))
    return size + sum(min(each) for each in storages.values())


def tensor_bytes(value: Any) -> int:
    """The bytes of a tensor by itself; none of anything else."""
    return value.numel() * value.itemsize if isinstance(value, torch.Tensor) else 0


def bytes_of_operator(sign: str, first: Any, second: Any) -> tuple[int, bool]:
    """The bytes of what an operator makes of plain values, where these may be many; whether of a whole number."""
    if sign == "*":
        for held, times in ((first, second), (second, first)):
            if isinstance(held, (str, bytes, list, tuple)) and type(times) is int and times > 0:
                return len(held) * times * (1 if isinstance(held, (str, bytes)) else ENTRY), False
    if type(first) is int and type(second) is int and second > 0:
        if sign == "**" and abs(first) > 1:
            return (abs(first).bit_length() - 1) * second // 8, True
        if sign == "<<" and first:
            return second // 8, True
    return 0, False


def bytes_of_call(target: str, args: tuple[Any, ...]) -> int:
    """The bytes of what a known call makes of plain values, where these may be many."""
    if target in _LISTING and len(args) == 1:
        return listed_bytes(args[0])
    if target in _FILLING and len(args) == 1 and type(args[0]) is int:
        return args[0]
    return 0


def listed_bytes(held: Any) -> int:
    """The bytes of a list of what an iterable gives."""
    if not isinstance(held, range):
        return 0
    return length_of(held) * (ENTRY + OBJECT)
