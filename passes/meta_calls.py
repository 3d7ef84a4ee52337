"""Known calls on stand-ins: `UNKNOWN` where nothing can be said."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import torch

from nnsight_compiler.passes.behaviour import Behaviour, KnownCall, words
from nnsight_compiler.passes.bounded import has_length
from nnsight_compiler.passes.known_calls import callable_of
from nnsight_compiler.passes.meta_items import LISTS
from nnsight_compiler.passes.meta_operators import apply_operator, is_small, on_plain
from nnsight_compiler.passes.meta_torch import has_marks, torch_call
from nnsight_compiler.passes.stand_ins import UNKNOWN, Items, Mark, Method

RESHAPING = frozenset(
    words(
        "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ moveaxis_ resize_ resize_as_ set_ as_strided_ "
        "sparse_resize_ sparse_resize_and_clear_ swap_tensors"
    )
)
"""Methods that change the shape of a tensor in place."""

_NUMBERS = frozenset(words("size dim ndimension numel nelement __len__ is_floating_point is_complex element_size"))
"""Methods and functions of torch whose result rests on shape and dtype alone."""
_STAYS = frozenset(words("cpu cuda xpu pin_memory"))
_BUILTINS = frozenset(words("len range list tuple dict sum min max abs round int float bool isinstance"))
_LONGEST = 10_000
"""Entries up to which a container is followed."""


def call_known(known: KnownCall, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of what is in the table of known calls. `function` is its stand-in: a method, or what it is called by."""
    name = known.target.rpartition(".")[2]
    if isinstance(function, Method):
        if isinstance(function.receiver, torch.Tensor):
            return _tensor_method(function.receiver, function.name, known, args, kwargs)
        if function.name == "numel" and isinstance(function.receiver, torch.Size):
            return function.receiver.numel()
        return _container_method(function, args, kwargs)
    if function is UNKNOWN or known.target.startswith("method."):
        return UNKNOWN
    if known.target.startswith("torch.Tensor."):
        return _tensor_method(args[0], name, known, args[1:], kwargs) if args else UNKNOWN
    if known.target.startswith("builtins."):
        return _builtin(name, args, kwargs)
    called = callable_of(known.target)
    if called is None:
        return UNKNOWN
    if known.target.startswith("math."):
        plain = not kwargs and all(type(each) in (int, float, bool) for each in args) and all(map(is_small, args))
        return on_plain(called, args) if plain and name not in ("factorial", "comb", "perm") else UNKNOWN  # type: ignore[arg-type]
    if not known.target.startswith(("torch.", "einops.")) or known.behaviour is Behaviour.HARMLESS:
        return UNKNOWN
    if name in _NUMBERS:
        return on_plain(called, args)  # type: ignore[arg-type]
    return torch_call(called, args, kwargs, known.behaviour is Behaviour.MUTATES, known.random)  # type: ignore[arg-type]


def _tensor_method(receiver: Any, name: str, known: KnownCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(receiver, torch.Tensor) or name in RESHAPING:
        return UNKNOWN
    if name in _STAYS:
        return receiver
    if name == "to":
        return _moved(receiver, args, kwargs)
    if name in ("clone", "detach") and not args and not kwargs:
        return receiver.detach()
    function = getattr(torch.Tensor, name)
    if name in _NUMBERS:
        return UNKNOWN if any(map(has_marks, (args, kwargs))) else _checked(function, (receiver, *args), kwargs)
    return torch_call(function, (receiver, *args), kwargs, known.behaviour is Behaviour.MUTATES, known.random)


def _moved(receiver: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`tensor.to(…)`: only the dtype matters here."""
    given = [*args, *(kwargs.get(name) for name in ("dtype", "other"))]
    if any(each is UNKNOWN for each in given):
        return UNKNOWN
    kinds = [each.dtype if isinstance(each, torch.Tensor) else each for each in given]
    kinds = [each for each in kinds if isinstance(each, torch.dtype)]
    return receiver if not kinds or kinds[0] == receiver.dtype else receiver.to(kinds[0])


def _container_method(method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held, name = method.receiver, method.name
    if not isinstance(held, (list, dict)) or name not in LISTS or len(held) > _LONGEST:
        return UNKNOWN
    if name in ("extend", "update"):
        return UNKNOWN  # the interpreter follows these only where it knows what they take
    try:
        return getattr(held, name)(*args, **kwargs)
    except (TypeError, LookupError):
        return UNKNOWN


def _builtin(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name not in _BUILTINS or kwargs or not args:
        return UNKNOWN
    first = args[0]
    match name:
        case "len":
            if isinstance(first, torch.Tensor):
                return first.shape[0] if first.ndim else UNKNOWN
            known = isinstance(first, (list, tuple, dict, str, range)) and has_length(first)
            return len(first) if known else UNKNOWN
        case "range":
            return on_plain(range, args) if all(type(each) is int for each in args) else UNKNOWN
        case "list" | "tuple":
            made = list if name == "list" else tuple
            known = isinstance(first, (list, tuple, range)) and has_length(first) and len(first) <= _LONGEST
            return made(first) if known else UNKNOWN
        case "isinstance":
            return UNKNOWN if len(args) != 2 or any(isinstance(each, Mark) for each in args) else _is_instance(*args)
        case "sum":
            return _sum(*args) if len(args) <= 2 else UNKNOWN
        case "dict":
            return UNKNOWN
    if len(args) == 1 and type(first) in (int, float, bool):
        return on_plain(getattr(builtins, name), args)
    if name in ("min", "max") and all(type(each) in (int, float, bool) for each in args):
        return on_plain(getattr(builtins, name), args)
    if name == "abs" and isinstance(first, torch.Tensor):
        return torch_call(torch.abs, (first,), {})
    return UNKNOWN


def _is_instance(held: Any, kind: Any) -> Any:
    known = (torch.Tensor, int, float, bool, str, list, tuple, dict)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not all(each in known for each in kinds) or isinstance(held, (Items, Method, Mark)):
        return UNKNOWN
    return isinstance(held, kinds)


def _sum(held: Any, start: Any = 0) -> Any:
    if not isinstance(held, (list, tuple)) or len(held) > 1000 or any(map(has_marks, (*held, start))):
        return UNKNOWN
    total = start
    for each in held:
        total = apply_operator("+", (total, each), in_place=False)
    return total


def _checked(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except (TypeError, IndexError, RuntimeError):
        return UNKNOWN
