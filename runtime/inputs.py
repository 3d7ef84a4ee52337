"""What a model is given in one forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from nnsight_compiler.passes.rows import Batch

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward, or of an invoke."""


class Runnable(Protocol):
    """A wrapped model: it makes of what a program gives it the arguments of its torch module."""

    def _ready(self) -> nn.Module: ...
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given: ...
    def _batch(self, given: Sequence[Given], options: Mapping[str, Any]) -> Batch: ...
    def _forward_parameters(self) -> Collection[str]: ...
    def _prepare_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given: ...
    def _first_step(self, inputs: Given) -> Given | None: ...


def shapes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a forward's inputs may decide how often its modules run, besides what was guarded on."""
    return tuple([getattr(value, "shape", None) for value in (*args, *kwargs.values())])


def copied(value: Any, made: dict[int, Any]) -> Any:
    """A copy of an input: of the tensors in it, and of the containers around them. What is one stays one: `made` holds
    the copies so far."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, torch.Tensor):
        copy: Any = value.clone()
    elif isinstance(value, tuple):
        items = [copied(item, made) for item in value]
        copy = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif type(value) is list:
        copy = [copied(item, made) for item in value]
    elif type(value) is dict:
        copy = {name: copied(item, made) for name, item in value.items()}
    else:
        return value
    made[id(value)] = copy
    return copy
