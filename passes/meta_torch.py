"""Functions of torch on tensors without data: what they give, and what they are sure to refuse.

What torch says of tensors without data is not taken for a mistake alone: it must say so of real ones, zeros of the same
shapes, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from nnsight_compiler.passes.stand_ins import DEVICE, INTEGER, META, PLAIN, UNKNOWN, Items, Method, inside

_SHAPES = re.compile(
    r"size|shape|dimension|dim\b|\bdims\b|out of (range|bounds)|out-of-(range|bounds)|length|broadcast|square|too many"
    r" indices"
)
_NOT_SHAPES = re.compile(r"stride|not implemented|meta|overflow|scalar type|dtype|contiguous|memory")


class Mistake(Exception):  # noqa: N818  # becomes a diagnostic
    """What is sure to raise at run time, in words, and a way out. `dimension`: the number of the dimension meant, whose
    axis the text names where it says `{axis}`."""

    def __init__(self, reason: str, way_out: str = "", dimension: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.way_out, self.dimension = reason, way_out, dimension


def torch_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    writes: bool = False,
    draws: bool = False,
) -> Any:
    """What a function of torch gives on tensors without data."""
    if "out" in kwargs or any(map(has_marks, (args, kwargs))) or _in_many_pieces(function, args):
        return UNKNOWN
    kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
    if "device" in kwargs:
        kwargs["device"] = META
    args = tuple(META if each is DEVICE else each for each in args)
    try:
        key = function, torch.get_default_dtype(), *map(_signature, args), *map(_signature, kwargs.items())
    except TypeError:
        return _computed(function, args, kwargs, writes, draws)
    remembered = _results.get(key)
    if remembered is None:
        try:
            remembered = _summary(_computed(function, args, kwargs, writes, draws), args)
        except Mistake as mistake:
            remembered = mistake
        if len(_results) >= _MANY:
            _results.clear()
        _results[key] = remembered
    if isinstance(remembered, Mistake):
        raise Mistake(remembered.reason, remembered.way_out)
    return _again(remembered, args)


_CUTTING = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind",
                      "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"})  # fmt: skip
_MOST_PIECES = 10_000


def _in_many_pieces(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function may cut a tensor into so many that even without data they take long to make."""
    cuts = getattr(function, "__name__", "") in _CUTTING
    return cuts and any(isinstance(each, torch.Tensor) and max(each.shape, default=0) > _MOST_PIECES for each in args)


_results: dict[Any, Any] = {}
"""What calls gave, by the shapes of their arguments: torch takes its time over tensors without data."""
_MANY = 10_000


def _signature(value: Any) -> Any:
    """What of an argument the shape of a result rests on. `TypeError` where that is more than can be said."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), *map(_signature, value)
    if isinstance(value, slice):
        return slice, *map(_signature, (value.start, value.stop, value.step))
    if isinstance(value, (*PLAIN, torch.device)):
        return type(value), value
    raise TypeError


def _summary(found: Any, args: tuple[Any, ...]) -> Any:
    """A result as it is remembered; the number of an argument where it is that argument."""
    if isinstance(found, torch.Tensor):
        number = next((number for number, each in enumerate(args) if each is found), None)
        return (found.shape, found.stride(), found.dtype) if number is None else number
    if isinstance(found, (tuple, list)):
        return [type(found), *(_summary(each, args) for each in found)]
    return UNKNOWN


def _again(remembered: Any, args: tuple[Any, ...]) -> Any:
    """A result like the one that is remembered."""
    if remembered is UNKNOWN:
        return UNKNOWN
    if isinstance(remembered, tuple):
        shape, stride, dtype = remembered
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)
    if isinstance(remembered, int):
        return args[remembered]
    kind, *parts = remembered
    made = [_again(each, args) for each in parts]
    return kind(*made) if hasattr(kind, "_fields") else kind(made)


def _computed(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool, draws: bool
) -> Any:
    try:
        with nullcontext() if any(isinstance(each, torch.Tensor) for each in args) else META:
            found = function(*args, **kwargs)
    except Exception as error:  # whatever torch, or code of its in Python, makes of tensors without data
        if _of_shapes(error) and not draws:
            raised = raised_by(function, args, kwargs, writes)
            if raised is not None:
                raise Mistake(raised, _shapes_of(args, kwargs)) from None
        return UNKNOWN
    return found if _is_known(found) else UNKNOWN


def _of_shapes(error: Exception) -> bool:
    if isinstance(error, NotImplementedError) or not isinstance(error, (IndexError, RuntimeError, ValueError)):
        return False
    text = str(error)
    return bool(_SHAPES.search(text)) and not _NOT_SHAPES.search(text)


def raised_by(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool = True
) -> str | None:
    """What a function says of zeros of these shapes, where it does not take them for reasons of shape."""
    memo: dict[int, torch.Tensor] = {}

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in memo:
                large = value.numel() > 2**20
                if large and writes:
                    raise MemoryError
                memo[id(value)] = torch.zeros(1 if large else value.shape, dtype=value.dtype, device="cpu")
                if large:
                    memo[id(value)] = memo[id(value)].expand(value.shape)
            return memo[id(value)]
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(map(real, value))
        return torch.device("cpu") if value == META else value

    try:
        function(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
    except MemoryError:
        return None
    except Exception as error:  # as above
        return str(error).partition("\n")[0].rstrip(". ") if _of_shapes(error) else None
    return None


def _shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    held = reversed(list(inside((*args, *kwargs.values()))))
    shapes = [str(list(each.shape)) for each in held if isinstance(each, torch.Tensor)]
    return f"the shapes here are {', '.join(shapes)}" if len(shapes) > 1 else f"the shape here is {''.join(shapes)}"


def has_marks(value: Any) -> bool:
    """Whether something in a value is not known well enough to compute with it."""
    if isinstance(value, (torch.Tensor, *PLAIN)):
        return False
    return any(each is UNKNOWN or each is INTEGER or isinstance(each, (Items, Method)) for each in inside(value))


def _is_known(found: Any) -> bool:
    """Whether a result rests on shapes alone: a tensor without data, or several."""
    if isinstance(found, torch.Tensor):
        return found.is_meta
    return isinstance(found, (tuple, list)) and all(map(_is_known, found))


def broadcast(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that both are repeated to; `None` where they do not go together."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    sizes = list(longer)
    for number in range(1, len(shorter) + 1):
        if sizes[-number] == 1:
            sizes[-number] = shorter[-number]
        elif shorter[-number] not in (1, sizes[-number]):
            return None
    return tuple(sizes)
