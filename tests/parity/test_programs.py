"""The same source under nnsight 0.8.1 and here gives the same values, as undecorated blocks and as an experiment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awaited import mark
from running import Outcome, names, parameters, run

import nnsight_compiler

PROGRAMS = Path(__file__).parent / "programs"

TOLERANCE = {}
"""Absolute and relative tolerance, where it is not 0: the two libraries then compute in another order."""


FORMS = {
    "modules.an_attached_module": ("blocks",),
    **{
        f"edits.{name}": ("blocks",)
        for name in (
            "in_place",
            "cleared",
            "an_edit_and_a_write",
            "an_edit_and_a_read_of_it",
            "two_edits",
            "a_vector_captured",
        )
    },
}
"""The forms of a program, where not both: experiments leave the model alone, so that modules are attached, and models
edited in place, outside of them."""


ALL = os.environ.get("NNSIGHT_COMPILER_PARITY") == "all"
"""Whether each program runs in both forms; by default it runs in one, in turns."""


def cases() -> list[Any]:
    found = []
    for file in sorted(PROGRAMS.glob("*.py")):
        for number, name in enumerate(names(file)):
            forms = ("blocks", "experiment")
            for form in FORMS.get(f"{file.stem}.{name}", forms if ALL else forms[number % 2 :][:1]):
                key = f"{file.stem}.{name}"
                marks = mark(f"{key}.{form}", key, file.stem)
                found.append(pytest.param(file, name, form, id=f"{key}-{form}", marks=marks))
    return found


@pytest.mark.parametrize(("file", "name", "form"), cases())
def test_the_same_source(
    file: Path,
    name: str,
    form: str,
    theirs: Callable[[Path, str], Outcome],
    modules: Callable[[Path], Any],
) -> None:
    wanted = theirs(PROGRAMS, f"{file.stem}.{name}")
    assert "error" not in wanted, f"nnsight itself: {wanted}"
    program = getattr(modules(file), name)
    given = parameters(program)
    found = run(nnsight_compiler.intervene(program) if form == "experiment" else program, given, nnsight_compiler)
    assert "error" not in found, f"{found['error']}: {found['message']}"
    assert not found["warnings"]
    assert_same(found["value"], wanted["value"], TOLERANCE.get(f"{file.stem}.{name}", 0.0))


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    """Equal in structure, in types and, to the tolerance, in numbers."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value, tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for left, right in zip(found, wanted, strict=True):
            assert_same(left, right, tolerance)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=tolerance, rel=tolerance)
    else:
        assert found == wanted


def test_the_suite_is_as_large_as_it_claims() -> None:
    assert sum(len(names(file)) for file in PROGRAMS.glob("*.py")) >= 60
