"""The small model must be in the wheel, not only in the tree."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

from nnsight_compiler.models import tiny_folder


def test_every_file_of_the_small_model_is_package_data():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path.relative_to(root / "nnsight_compiler").as_posix() for path in tiny_folder().iterdir()]
    assert {"models/tiny/config.json", "models/tiny/model.safetensors", "models/tiny/tokenizer.json"} <= set(files)
    for file in files:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in patterns["nnsight_compiler"]), file
