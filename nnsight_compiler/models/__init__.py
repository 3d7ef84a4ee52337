"""Wrapped models: any `nn.Module`, transformers' language models, and the names of their modules."""

from nnsight_compiler.models.checkpoint import tiny_folder
from nnsight_compiler.models.language import LanguageModel
from nnsight_compiler.models.nnsight import NNsight, TraceArgumentError
from nnsight_compiler.models.prompts import PromptError
from nnsight_compiler.models.view import (
    ModuleIndexError,
    ModuleView,
    NotAContainerError,
    OutsideTraceError,
    UnknownModuleError,
    resolve,
)

__all__ = [
    "LanguageModel",
    "ModuleIndexError",
    "ModuleView",
    "NNsight",
    "NotAContainerError",
    "OutsideTraceError",
    "PromptError",
    "TraceArgumentError",
    "UnknownModuleError",
    "resolve",
    "tiny_folder",
]
