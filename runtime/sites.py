"""What generated site functions call: reading, writing and keeping the values at a site.

A site function takes the value at its site and returns what the model goes on with. At an output that is what the
module returned; at an input it is the pair of positional arguments and keyword arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.assignments import described, misfit

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def first_argument(value: Arguments, where: str) -> Any:
    """The first positional argument of a module, or else its first keyword argument."""
    args, kwargs = value
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise RunError(f"{where}: this module is called without arguments, so it has no `.input`")


def with_first_argument(value: Arguments, first: Any) -> Arguments:
    """The arguments with the first one replaced."""
    args, kwargs = value
    if args:
        return (first, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: first}


def replaced(old: Any, new: Any, where: str) -> Any:
    """What a site holds after `site = new`: a scalar fills a tensor, a tensor goes to the site's device and dtype.

    Raises:
        RunError: the new value does not fit what the model goes on with; `where` names the line.
    """
    wrong = misfit(old, new)
    if wrong is not None:
        reason, way_out = wrong
        raise RunError(f"{where}: {reason}" + (f"\n  way out: {way_out}" if way_out else ""))
    if not isinstance(old, torch.Tensor):
        return new
    if isinstance(new, torch.Tensor):
        if not new.ndim and old.ndim:
            new = new.expand(old.shape).clone()
        return moved(new, old)
    return torch.full_like(old, new)


def moved(new: torch.Tensor, site: torch.Tensor) -> torch.Tensor:
    """The tensor on the site's device and with its dtype."""
    if new.device == site.device and new.dtype == site.dtype:
        return new
    return new.to(device=site.device, dtype=site.dtype)


def replaced_first(value: Arguments, new: Any, where: str) -> Arguments:
    """The arguments after `module.input = new`."""
    return with_first_argument(value, replaced(first_argument(value, where), new, where))


def replaced_all(value: Arguments, new: Any, where: str) -> Arguments:
    """The arguments after `module.inputs = new`."""
    if isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], (tuple, list)) and isinstance(new[1], dict):
        return tuple(new[0]), new[1]
    raise RunError(
        f"{where}: `.inputs` is a pair of positional and keyword arguments, not {described(new)}\n"
        "  way out: assign `((first, second), {})`, or `.input` for the first argument alone"
    )


def set_item(value: Any, held: Any, index: Any, new: Any) -> tuple[Any, Any]:
    """`held[index] = new` for what was read from a site: the site's value and the value read, after it.

    A tensor is written in place. A tuple, a mapping or a dataclass cannot be, or would be shared with the model: a new
    one takes its place, at the site too where it is still what the site holds.
    """
    if isinstance(held, torch.Tensor):
        put(held, index, new)
        return value, held
    made = _with_item(held, index, new)
    return (made if value is held else value), made


def set_first_item(value: Arguments, held: Any, index: Any, new: Any) -> tuple[Arguments, Any]:
    """`held[index] = new` for what was read from a module's `.input`."""
    args, kwargs = value
    current = args[0] if args else next(iter(kwargs.values()))
    after, made = set_item(current, held, index, new)
    return (value if after is current else with_first_argument(value, after)), made


def put(target: Any, index: Any, new: Any) -> None:
    """`target[index] = new`; a tensor goes to the device of the tensor that it is written into."""
    if isinstance(target, torch.Tensor) and isinstance(new, torch.Tensor) and new.device != target.device and new.ndim:
        new = new.to(target.device)
    target[index] = new


def _with_item(held: Any, index: Any, new: Any) -> Any:
    if isinstance(held, tuple):
        items = list(held)
        items[index] = new
        return type(held)(*items) if hasattr(held, "_fields") else tuple(items)
    if is_dataclass(held) and not isinstance(held, type):
        names = [each.name for each in fields(held) if getattr(held, each.name) is not None]
        name = index if isinstance(index, str) else names[index]
        return replace(held, **{name: new})
    if isinstance(held, Mapping):
        made: Any = type(held)
        return made({**held, index: new})
    if isinstance(held, list):
        made = list(held)
        made[index] = new
        return made
    held[index] = new
    return held


def keep(value: Any) -> Any:
    """The value as it is now: tensors in it are copied, in tuples, mappings and dataclasses too.

    A list, set or dict of the program's own is kept itself, since it is saved as it stands when the trace ends.
    """
    if isinstance(value, torch.Tensor):
        return value.clone()
    kind = type(value)
    if kind in (list, set, dict) or isinstance(value, (int, float, str, bytes, type(None))):
        return value
    if isinstance(value, tuple):
        items = [keep(item) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: keep(getattr(value, each.name)) for each in fields(value) if each.init})
    if isinstance(value, Mapping):
        made: Any = kind
        return made({name: keep(item) for name, item in value.items()})
    return value


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple, list, mapping or dataclass with one in it."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(holds_tensor, value.values()))
    return isinstance(value, (tuple, list)) and any(map(holds_tensor, value))


def from_end(index: Any, where: str) -> bool:
    """Whether an index counts from the end; a slice or a tuple of indices, whether all of it does.

    Raises:
        RunError: a part of it does, and a part is not negative; `where` names the line.
    """
    found = set(_from_end(index))
    if len(found) == 2:
        raise RunError(
            f"{where}: this index names positions of the prompt and, with negative numbers, some of each step\n"
            "  way out: write two lines, one for each"
        )
    return False not in found


def _from_end(index: Any) -> Iterator[bool]:
    """For each number of an index, whether it counts from the end. A mask is as long as the prompt."""
    if isinstance(index, slice):
        yield from (bound < 0 for bound in (index.start, index.stop) if bound is not None)
    elif isinstance(index, (tuple, list, range)):
        for each in index:
            yield from _from_end(each)
    elif isinstance(index, torch.Tensor):
        yield from [False] if index.dtype == torch.bool else (index < 0).flatten().tolist()
    elif isinstance(index, bool):
        yield False
    elif hasattr(index, "__index__") and not getattr(index, "ndim", 0):
        yield operator.index(index) < 0
    elif index is not None and index is not ...:
        yield from _from_end(torch.as_tensor(index))
