"""What `narrow` and `fuse_calls` ask of a model's modules: which of them treat every position by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.passes.facts import Guard, Guards
from nnsight_compiler.passes.parts import Positionwise
from nnsight_compiler.runtime.autograd_recording import adapters
from nnsight_compiler.runtime.observation import Event, Observation
from nnsight_compiler.runtime.positionwise import condition, why_not_positionwise


def positionwise_of(model: Any, path: str, seen: Observation) -> Positionwise | str:
    """How a module of a wrapped model treats positions, or why it is not known to treat them apart: what it is given
    and gives has been seen in a forward. The reason is empty where it is one block of many modules."""
    module = model._module.get_submodule(path) if ":" not in path else None
    if not isinstance(module, nn.Module):
        return ""
    kinds = [seen.shape.get(Event(path, port, 0)) for port in ("input", "output")]
    given, gives = (each if isinstance(each, TensorType) else TensorType() for each in kinds)
    leaf = next(module.children(), None) is None
    if not given.shape or not gives.shape or given.shape[:-1] != gives.shape[:-1]:
        return "what it is given and gives is not known to be one vector for each position" if leaf else ""
    width, size = given.shape[-1].size, gives.shape[-1].size
    dtype = getattr(torch, given.dtype or "", None)
    if width is None or size is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return "what it is given is not known" if leaf else ""
    reason = why_not_positionwise(module, width, dtype)
    if reason is not None:
        return reason if leaf else ""
    linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    trained = {id(each) for each in adapters(model._module)} if linear else set()
    linear = linear and not any(id(each) in trained for each in module.parameters())
    return Positionwise(width, size, str(given.dtype), str(gives.dtype), linear, linear and module.bias is not None)


def conditions_of(
    proved: Iterable[tuple[Any, str]], guards: Collection[Guard], objects: Mapping[str, Any]
) -> tuple[tuple[Guard, ...], dict[str, Any]]:
    """The guards that these modules of models stay as they were when they were proved, with the objects that all
    guards mention."""
    made = Guards(objects=dict(objects))
    name = made.name(condition, "condition")
    texts = {guard.value: guard.text for guard in guards if guard.kind == "model"}
    for model, path in proved:
        text = f"{name}({texts[model._token]}._module, {path!r})"
        made.add(text, "condition", None)
    return tuple(made.guards.values()), made.objects
