"""Modules of a model that a program calls itself, and their weights, without data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.passes.meta_torch import torch_call
from nnsight_compiler.passes.stand_ins import UNKNOWN, empty_like

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_POINTWISE = (nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.LogSoftmax)


def weight_of(model: Any, path: str, name: str) -> Any:
    """A parameter or a buffer of a module, looked up without running code of the module's."""
    module = module_at(model, path)
    if module is None:
        return UNKNOWN
    for held in (module._parameters, module._buffers):
        found = held.get(name)
        if isinstance(found, torch.Tensor):
            return empty_like(found)
    return UNKNOWN


def call_module(model: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module gives when it is called on these values: for modules of torch's own whose forward is theirs."""
    module = module_at(model, path)
    if module is None or kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return UNKNOWN
    if "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS):
        return UNKNOWN
    weights = {name: UNKNOWN if held is None else empty_like(held) for name, held in module._parameters.items()}
    bias = weights.get("bias", UNKNOWN)
    bias = None if bias is UNKNOWN else bias
    kind = type(module)
    if kind is nn.Linear:
        return torch_call(F.linear, (args[0], weights["weight"], bias), {})
    if kind is nn.LayerNorm:
        shape = tuple(module.normalized_shape)  # type: ignore[arg-type]
        fits = tuple(args[0].shape[-len(shape) :]) == shape and args[0].dtype.is_floating_point
        return args[0].detach() if fits else torch_call(F.layer_norm, (args[0], shape), {})
    if kind is nn.Embedding:
        return torch_call(F.embedding, (args[0], weights["weight"]), {})
    return args[0].detach() if kind in _POINTWISE else UNKNOWN


def module_at(model: Any, path: str) -> nn.Module | None:
    """The torch module at a path of a wrapped model."""
    if not is_handle(model):
        return None
    module = model._root._module
    for part in path.split(".") if path else ():
        module = module._modules.get(part)
        if module is None:
            return None
    return module if isinstance(module, nn.Module) else None
