"""Wrapped models: any `nn.Module`, transformers' language models, and the names of their modules."""

from nnsight_compiler.models.nnsight import NNsight, TraceArgumentError
from nnsight_compiler.models.view import (
    ModuleIndexError,
    ModuleView,
    NotAContainerError,
    OutsideTraceError,
    UnknownModuleError,
    resolve,
)

__all__ = [
    "ModuleIndexError",
    "ModuleView",
    "NNsight",
    "NotAContainerError",
    "OutsideTraceError",
    "TraceArgumentError",
    "UnknownModuleError",
    "resolve",
]
