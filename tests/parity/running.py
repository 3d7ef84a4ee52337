"""Runs the programs of a file under one library, and says what came of each.

A program is a function of a file in `programs/`, written as for nnsight. The same file is ours with one line changed:
`from nnsight import …` becomes `from nnsight_compiler import …`. nnsight changes `object` and `torch.Tensor` when it is
imported, so it runs in a process of its own: `python running.py FILE… --out OUTCOMES`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from subjects import wrapped

Outcome = dict[str, Any]
"""What came of a run: `{"value": …}`, or `{"error": the type's name, "message": …}`; and `warnings`, their texts."""


def names(file: Path) -> list[str]:
    """The programs of a file, without running it."""
    body = ast.parse(file.read_text()).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def ours(file: Path, folder: Path) -> Path:
    """A copy of a file of programs in which the import names our library."""
    text = file.read_text()
    assert text.count("from nnsight import") == 1, f"{file.name} imports from nnsight in one line"
    copied = folder / file.name
    copied.write_text(text.replace("from nnsight import", "from nnsight_compiler import"))
    return copied


def load(file: Path) -> ModuleType:
    """A file of programs, as a module."""
    spec = importlib.util.spec_from_file_location(f"programs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: Callable[..., Any], parameters: list[str], library: ModuleType) -> Outcome:
    """One run of a program on fresh subjects."""
    torch.manual_seed(11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome: Outcome = {"value": settled(program(*[wrapped(name, library) for name in parameters]))}
        except Exception as error:  # whatever a library raises is what is asked about
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome["warnings"] = [
        str(each.message) for each in caught if "LanguageModel is deprecated" not in str(each.message)
    ]
    return outcome


def parameters(program: Callable[..., Any]) -> list[str]:
    """The subjects that a program names."""
    return list(inspect.signature(program).parameters)


def settled(value: Any) -> Any:
    """A value made of plain containers and detached tensors, so that it can be stored and compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {str(key): settled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [settled(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return f"<{type(value).__name__}>"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = importlib.import_module("nnsight")
    outcomes = {}
    for file in options.files:
        module = load(file)
        for name in names(file):
            program = getattr(module, name)
            outcomes[f"{file.stem}.{name}"] = run(program, parameters(program), library)
    torch.save(outcomes, options.out)


if __name__ == "__main__":
    main()
