"""What nnsight 0.8.1 makes of the programs of this folder: found once, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import Outcome, load, ours

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """`theirs("file.program")`: what came of a program under nnsight. The first call runs all that there are."""
    if importlib.util.find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed: pip install nnsight==0.8.1")
    known: dict[str, Outcome] = {}

    def outcome(program: str) -> Outcome:
        if not known:
            files = [file for folder in ("programs", "differences") for file in sorted((HERE / folder).glob("*.py"))]
            out = tmp_path_factory.mktemp("theirs") / "outcomes"
            command = [sys.executable, "-W", "ignore", HERE / "running.py", *files, "--out", out]
            done = subprocess.run(
                [str(part) for part in command],
                capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            known.update(torch.load(out, weights_only=True))
        return known[program]

    return outcome


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], object]:
    """`modules(file)`: a file of programs with our library imported."""
    folder = tmp_path_factory.mktemp("ours")
    loaded: dict[Path, object] = {}

    def module(file: Path) -> object:
        if file not in loaded:
            loaded[file] = load(ours(file, folder))
        return loaded[file]

    return module
