"""Files, and functions to make them of."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_compiler import Experiment, LanguageModel, intervene


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`written(text)` runs the text as a module of the user's, in a file of its own, and gives its globals."""

    def write(text: str, name: str = "users.py") -> dict[str, Any]:
        file = tmp_path / name
        file.write_text(text)
        scope: dict[str, Any] = {"__name__": name.removesuffix(".py")}
        exec(compile(text, str(file), "exec"), scope)
        linecache.checkcache(str(file))
        return scope

    return write


@pytest.fixture
def through(tmp_path: Path) -> Callable[..., Experiment]:
    """`through(experiment)` is that experiment, saved to a file and loaded."""

    def pass_through(experiment: Any, **options: Any) -> Experiment:
        if not isinstance(experiment, Experiment):
            experiment = intervene(experiment)
        path = tmp_path / f"{experiment.ir.name}.safetensors"
        experiment.save(path)
        return Experiment.load(path, **options)

    return pass_through
