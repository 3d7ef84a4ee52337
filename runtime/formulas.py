"""From records of one model's forwards at several sizes to formulas that hold for every size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from nnsight_compiler.runtime.extent import Extent, solve
from nnsight_compiler.runtime.forward_record import Leaves, Other, Record, Seen
from nnsight_compiler.runtime.observation import Event

Setting = tuple[int, int]
"""A number of rows and a number of tokens."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class TensorAxes:
    """A tensor for any number of rows and tokens.

    shared: the dimensions along which all entries are one in memory: writing to one writes to all.
    """

    dtype: torch.dtype
    shape: tuple[Extent, ...]
    shared: frozenset[int] = frozenset()

    def at(self, rows: int, tokens: int) -> torch.Tensor:
        """An empty tensor of this dtype and shape, on `meta`."""
        sizes = [extent.size(rows, tokens) for extent in self.shape]
        stored = [1 if dimension in self.shared else size for dimension, size in enumerate(sizes)]
        return torch.empty(stored, dtype=self.dtype, device="meta").expand(sizes)

    def __repr__(self) -> str:
        shape = (f"{extent} (shared)" if i in self.shared else str(extent) for i, extent in enumerate(self.shape))
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(shape)}]"


@final
@dataclass(frozen=True, slots=True, repr=False)
class Opaque:
    """Stands for a part of a value of which nothing can be told before the run; says why.

    sometimes: what it is where it is a tensor, if that is known.
    """

    reason: str
    sometimes: TensorAxes | None = None

    def __repr__(self) -> str:
        return f"? ({self.reason})" if self.sometimes is None else f"? ({self.sometimes}; {self.reason})"


def solved(runs: Mapping[Setting, Record], repeats: Iterable[Record]) -> tuple[dict[Event, Leaves], dict[Event, str]]:
    """For each event its value with a formula for each size, and the events of which nothing can be told, with why.

    Args:
        repeats: at the first setting, on other numbers: what differs depends on the numbers.
    """
    first, *others = [*runs.values(), *repeats]
    values: dict[Event, Leaves] = {}
    refused: dict[Event, str] = {}
    for event in dict.fromkeys(event for one in (first, *others) for event in one):
        if not all(event in one for one in (first, *others)):
            refused[event] = "it happens in some forwards only: the sizes or the numbers decide"
            continue
        structure = first[event][1]
        if any(one[event][1] != structure for one in others):
            refused[event] = "its structure is not always the same: the sizes or the numbers decide"
            continue
        by_setting = {setting: one[event][0] for setting, one in runs.items()}
        again = [one[event][0] for one in repeats]
        leaves = [
            _leaf({setting: of[i] for setting, of in by_setting.items()}, [of[i] for of in again])
            for i in range(len(first[event][0]))
        ]
        unknown = next((leaf for leaf in leaves if isinstance(leaf, Opaque)), None)
        tensors = any(isinstance(leaf, Seen) for one in (first, *others) for leaf in one[event][0])
        if unknown is not None and tensors and not any(isinstance(leaf, TensorAxes) for leaf in leaves):
            refused[event] = unknown.reason
        else:
            values[event] = leaves, structure
    return values, refused


def same(one: Leaves, other: Leaves) -> bool:
    """Whether two values of one event, or of two layers of one kind, agree in all that is told of them."""
    return one[1] == other[1] and all(map(_equal, one[0], other[0]))


def _leaf(seen: Mapping[Setting, object], again: list[object]) -> Any:
    everything = [*seen.values(), *again]
    first = everything[0]
    kinds = sorted({_kind(one) for one in everything})
    if kinds == ["a tensor"]:
        return _tensor({setting: one for setting, one in seen.items() if isinstance(one, Seen)}, again)
    if len(kinds) > 1:
        tensors = {setting: one for setting, one in seen.items() if isinstance(one, Seen)}
        sometimes = _tensor(tensors, []) if len(tensors) > len(seen) // 2 else None
        known = sometimes if isinstance(sometimes, TensorAxes) else None
        return Opaque(f"{' or '.join(kinds)}: the sizes or the numbers decide", known)
    if isinstance(first, Other):
        return Opaque(kinds[0])
    return first if all(_equal(first, one) for one in everything) else Opaque(f"{kinds[0]} that is not always the same")


def _tensor(seen: Mapping[Setting, Seen], again: list[object]) -> TensorAxes | Opaque:
    first = next(iter(seen.values()))
    if any((one.dtype, len(one.shape)) != (first.dtype, len(first.shape)) for one in seen.values()):
        return Opaque("a tensor whose dtype or number of dimensions is not always the same")
    if not all(_equal(first, one) for one in again):
        return Opaque("its shape depends on the numbers in the inputs")
    extents = [solve({setting: one.shape[i] for setting, one in seen.items()}) for i in range(len(first.shape))]
    shape = tuple(extent for extent in extents if extent is not None)
    if len(shape) < len(extents):
        sizes = ", ".join(f"{list(one.shape)} at {rows} x {tokens}" for (rows, tokens), one in seen.items())
        return Opaque(f"its sizes are no whole multiples of rows and tokens: {sizes}")
    return TensorAxes(first.dtype, shape, _shared(list(seen.values())))


def _shared(seen: list[Seen]) -> frozenset[int]:
    """The dimensions that are one in memory in each run in which they have more than one entry."""
    somewhere = frozenset[int]().union(*(one.shared for one in seen))
    return frozenset(i for i in somewhere if all(i in one.shared or one.shape[i] == 1 for one in seen))


def _equal(one: object, other: object) -> bool:
    """Plain values compare by type too: `True` is not 1. Not-a-numbers are equal."""
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _kind(leaf: object) -> str:
    match leaf:
        case None:
            return "None"
        case Seen():
            return "a tensor"
        case Other(class_name):
            return f"a {class_name}"
        case _:
            return f"a {type(leaf).__name__}"
