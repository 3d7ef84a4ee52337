"""What the forward of a module takes. It is asked for at every call of a model, and to read a signature takes long."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

Parameters = Mapping[str, inspect.Parameter]

_known: WeakKeyDictionary[FunctionType, Parameters] = WeakKeyDictionary()


def forward_parameters(module: nn.Module) -> Parameters:
    """The parameters of a module's forward."""
    method = type(module).forward
    if "forward" in vars(module) or type(method) is not FunctionType:  # it may be this module's alone
        return inspect.signature(module.forward).parameters
    if method not in _known:
        _known[method] = inspect.signature(module.forward).parameters
    return _known[method]
