"""The record of one forward: what stood at each event, tensors by shape and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final
from typing import Literal as OneOf

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.operations import Operations


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as it was at an event. `shared`: the dimensions of more than one entry that are one in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shared: frozenset[int]


@final
@dataclass(frozen=True, slots=True)
class Other:
    """What is neither a tensor nor plain; by the name of its class."""

    class_name: str


Plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Leaves that are kept as they are."""

Leaves = tuple[list[Any], pytree.TreeSpec]
Record = dict[Event, Leaves]
"""The leaves of what stood at each event, and their structure; at an input that of `(args, kwargs)`."""


def record(
    shadow: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], operations: Collection[str] = ()
) -> Record:
    """Runs a forward of a shadow and says what stood at each event, at modules and these operations inside of them, in
    the order in which they happened."""
    found: dict[Event, Leaves] = {}
    calls: Counter[str] = Counter()
    running: dict[str, list[int]] = {}

    def keep(path: str, port: OneOf["input", "output"], call: int, value: object) -> None:
        leaves, structure = pytree.tree_flatten(value)
        found[Event(path, port, call)] = list(map(_seen, leaves)), structure

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.setdefault(path, []).append(calls[path])
            keep(path, "input", calls[path], (args, kwargs))
            calls[path] += 1

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            keep(path, "output", running[path].pop(), output)

        return hook

    run = object()
    inside = Operations(shadow, run)
    inside.refused = {}
    parts: list[tuple[str, Any]] = list(shadow.named_modules())
    known = {path for path, _ in parts}
    parts += [(path, inside.operation(path)) for path in sorted(operations) if path.partition(":")[0] in known]
    for path, part in parts:
        part.register_forward_pre_hook(before(path), with_kwargs=True)
        part.register_forward_hook(after(path))
    with ACTIVE.running(run):
        shadow(*args, **kwargs)
    return found


def _seen(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        shared = frozenset(
            dimension
            for dimension, (size, stride) in enumerate(zip(leaf.shape, leaf.stride(), strict=True))
            if size > 1 and stride == 0
        )
        return Seen(leaf.dtype, tuple(map(int, leaf.shape)), shared)
    return leaf if isinstance(leaf, Plain) else Other(type(leaf).__name__)
