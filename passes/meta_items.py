"""Attributes and items of stand-ins, and assignments to items: `UNKNOWN` where nothing can be said."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.passes.meta_torch import Mistake, broadcast, has_marks, raised_by, torch_call
from nnsight_compiler.passes.stand_ins import DEVICE, INTEGER, PLAIN, UNKNOWN, Items, Mark, Method

_TENSOR_FACTS = frozenset(words("shape ndim dtype itemsize nbytes"))
_TENSOR_VIEWS = frozenset(words("T mT H mH real imag"))
LISTS = frozenset(words("append extend insert pop get items keys values copy setdefault reverse update"))
"""Methods of containers which only move what they hold."""


def attribute(held: Any, name: str) -> Any:
    """`held.name`, where reading it runs no code of the user's."""
    match held:
        case torch.Tensor():
            return _tensor_attribute(held, name)
        case Mark() | Items() | Method():
            return UNKNOWN
        case list() | dict():
            if type(held) in (list, dict) and name in LISTS:
                return Method(held, name)
        case tuple() if hasattr(held, "_fields") or type(held).__module__ == "torch.return_types":
            found = getattr(held, name, UNKNOWN)
            return found if isinstance(found, (torch.Tensor, *PLAIN)) else UNKNOWN
        case torch.Size() if name == "numel":
            return Method(held, name)
    if isinstance(held, Mapping) and type(held) is not dict:
        # The outputs of transformers are mappings whose entries are attributes too.
        return held.get(name, UNKNOWN)
    if isinstance(held, type) and issubclass(held, torch.Tensor):
        return vars(held).get(name, getattr(torch._C.TensorBase, name, UNKNOWN))
    if isinstance(held, type(torch)):
        return vars(held).get(name, UNKNOWN)
    return UNKNOWN


def _tensor_attribute(held: torch.Tensor, name: str) -> Any:
    if name in _TENSOR_FACTS:
        return getattr(held, name)
    if name in _TENSOR_VIEWS:
        return torch_call(lambda tensor: getattr(tensor, name), (held,), {})
    if name == "device":
        return DEVICE
    return Method(held, name) if callable(getattr(torch.Tensor, name, None)) else UNKNOWN


def item(held: Any, index: Any) -> Any:
    """`held[index]`."""
    if isinstance(held, torch.Tensor):
        return _tensor_item(held, index)
    if index is UNKNOWN or index is INTEGER or isinstance(held, Mark):
        return UNKNOWN
    if isinstance(held, (list, tuple, range)):
        if type(index) is not int and (not isinstance(index, slice) or has_marks(index)):
            return UNKNOWN
        try:
            return held[index]
        except (LookupError, TypeError, ValueError):
            return UNKNOWN  # Python says so when the line runs, as it does of all that is not the model's
    if isinstance(held, Mapping) and type(index) in (str, int):
        if index in held:
            return held[index]
        if type(index) is int and type(held) is not dict and -len(held) <= index < len(held):
            return list(held.values())[index]
    return UNKNOWN


def out_of_range(index: int, size: int, what: str) -> tuple[str, str]:
    entries = "entry" if size == 1 else "entries"
    way_out = f"use an index from {-size} to {size - 1}" if size else "there is nothing to index"
    return f"index {index} is out of range: {what} has {size} {entries}", way_out


def _tensor_item(held: torch.Tensor, index: Any) -> Any:
    index = concrete_index(index)
    if index is UNKNOWN:
        return UNKNOWN
    check_index(held, index)
    return torch_call(operator.getitem, (held, index), {})


def concrete_index(index: Any) -> Any:
    """An index that gives the shape which this one gives: a number that is not known is taken for 0."""
    if isinstance(index, tuple):
        parts = tuple(map(concrete_index, index))
        return UNKNOWN if any(part is UNKNOWN for part in parts) else parts
    if index is INTEGER:
        return 0
    if isinstance(index, torch.Tensor) and index.ndim == 0:
        return UNKNOWN if index.dtype in (torch.bool, torch.uint8) else 0
    return UNKNOWN if has_marks(index) else index


def check_index(held: torch.Tensor, index: Any) -> None:
    """Raises `Mistake` where a number in the index is beyond its dimension, or there are more than dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or type(part) in (int, slice) for part in parts):
        return  # torch says itself what is wrong with others
    taken = sum(type(part) in (int, slice) for part in parts)
    if taken > held.ndim:
        noun = "dimension" if held.ndim == 1 else "dimensions"
        raise Mistake(
            f"{taken} dimensions are indexed, but this tensor has {held.ndim} {noun}: {list(held.shape)}",
            "leave out an index",
        )
    dimension = 0
    for part in parts:
        if part is ...:
            dimension += held.ndim - taken
        elif part is not None:
            if type(part) is int and not -held.shape[dimension] <= part < held.shape[dimension]:
                reason, way_out = out_of_range(part, held.shape[dimension], "this dimension{axis}")
                raise Mistake(reason, way_out, dimension)
            dimension += 1


def check_item_assignment(held: torch.Tensor, index: Any, new: Any) -> None:
    """Raises `Mistake` where `held[index] = new` does not fit."""
    index = concrete_index(index)
    if index is UNKNOWN:
        return
    check_index(held, index)
    part = torch_call(operator.getitem, (held, index), {})
    if not isinstance(part, torch.Tensor) or not isinstance(new, torch.Tensor):
        return

    def assign(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        target[index] = value
        return target

    leading = next((number for number, size in enumerate(new.shape) if size != 1), new.ndim)
    shape = new.shape[min(leading, new.ndim) :]  # torch drops leading dimensions of one entry
    if broadcast(part.shape, shape) != tuple(part.shape) and raised_by(assign, (torch.empty_like(held), new), {}):
        raise Mistake(
            f"a value of shape {list(new.shape)} is assigned to a part of shape {list(part.shape)}",
            "make the shapes equal; a dimension of one entry, or a missing first one, is repeated",
        )
