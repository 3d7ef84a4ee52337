"""The wheel, against the tree: everything of the package is in it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nnsight_compiler

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "nnsight_compiler": "nnsight_compiler",
    "passes": "nnsight_compiler/passes",
    "runtime": "nnsight_compiler/runtime",
}
"""Where each folder of the repository goes in the wheel. The two links inside `nnsight_compiler` are not followed."""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built from a copy of the tree."""
    pytest.importorskip("setuptools", "77", reason="building the wheel needs setuptools 77 or later")
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    finished = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def modules_of_the_tree() -> set[str]:
    found = set()
    for folder, target in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT / folder)
            if folder == "nnsight_compiler" and relative.parts[0] in ("passes", "runtime"):
                continue  # reached through the links
            found.add(f"{target}/{relative.as_posix()}")
    return found


def test_every_module_of_the_tree_is_in_the_wheel_and_no_other(names: set[str]) -> None:
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()


def test_the_wheel_adds_one_package_and_its_record(names: set[str]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"nnsight_compiler", f"nnsight_compiler-{version}.dist-info"}


def test_the_embedded_model_the_types_marker_and_the_licence_are_in_the_wheel(names: set[str]) -> None:
    assert "nnsight_compiler/py.typed" in names
    tiny = {file.name for file in (ROOT / "nnsight_compiler/models/tiny").iterdir()}
    assert {f"nnsight_compiler/models/tiny/{name}" for name in tiny} <= names
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= tiny
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_two_links_lead_to_the_folders_at_the_top() -> None:
    for name in ("passes", "runtime"):
        link = ROOT / "nnsight_compiler" / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / name).resolve()


def test_the_names_of_the_package_are_there_when_they_are_asked_for() -> None:
    assert set(nnsight_compiler.__all__) <= set(dir(nnsight_compiler))
    for name in nnsight_compiler.__all__:
        assert getattr(nnsight_compiler, name) is vars(nnsight_compiler)[name]
    with pytest.raises(AttributeError, match="module 'nnsight_compiler' has no attribute 'intervenes'"):
        _ = nnsight_compiler.intervenes
