"""Experiments on the internals of neural networks, compiled to torch hooks.

What stands here is imported when it is first asked for: parts of the package that need no torch, as the front end of a
service, do not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_compiler.block import UnsavedValueError
    from nnsight_compiler.compilation import save
    from nnsight_compiler.experiment import Experiment, intervene
    from nnsight_compiler.files.saving import LocalOnlyWarning
    from nnsight_compiler.ir.errors import (
        CompileError,
        ExperimentError,
        FileError,
        IRError,
        LimitError,
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
    "LimitError",
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

_HOMES = {
    "block": ("UnsavedValueError",),
    "compilation": ("save",),
    "experiment": ("Experiment", "intervene"),
    "files.saving": ("LocalOnlyWarning",),
    "ir.errors": (
        "CompileError",
        "ExperimentError",
        "FileError",
        "IRError",
        "LimitError",
        "ModelError",
        "RunError",
        "SourceNotFoundError",
    ),
    "models": ("LanguageModel", "NNsight"),
    "passes.check_unused_values": ("UnusedValueWarning",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
