"""Experiments on the internals of neural networks, compiled to torch hooks."""

from nnsight_compiler.block import UnsavedValueError
from nnsight_compiler.compilation import save
from nnsight_compiler.experiment import Experiment, intervene
from nnsight_compiler.files import LocalOnlyWarning
from nnsight_compiler.ir.errors import (
    CompileError,
    ExperimentError,
    FileError,
    IRError,
    ModelError,
    RunError,
    SourceNotFoundError,
)
from nnsight_compiler.models import LanguageModel, NNsight
from nnsight_compiler.passes.check_unused_values import UnusedValueWarning

__all__ = [
    "CompileError",
    "Experiment",
    "ExperimentError",
    "FileError",
    "IRError",
    "LanguageModel",
    "LocalOnlyWarning",
    "ModelError",
    "NNsight",
    "RunError",
    "SourceNotFoundError",
    "UnsavedValueError",
    "UnusedValueWarning",
    "intervene",
    "save",
]
