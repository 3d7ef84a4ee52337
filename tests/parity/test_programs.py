"""The same source under nnsight 0.8.1 and here gives the same values: as undecorated blocks, as an experiment, and as
one that goes through all that a service is sent and sends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awaited import mark
from chosen import BOTH_FORMS
from running import Outcome, names, parameters, run

import nnsight_compiler

PROGRAMS = Path(__file__).parent / "programs"

TOLERANCE = 1e-5
"""Absolute and relative: a position or a row by itself is added up in another order than among others (`narrow`)."""


FORMS = {
    "modules.an_attached_module": ("blocks",),
    "idioms.a_lambda_for_each_layer": ("blocks", "experiment"),
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
edited in place, outside of them; a service is not sent functions that a container holds."""


def cases() -> list[Any]:
    """Each program in one form, in turns, or in all."""
    found = []
    for file in sorted(PROGRAMS.glob("*.py")):
        for number, name in enumerate(names(file)):
            forms = ("blocks", "experiment", "remote")
            for form in FORMS.get(f"{file.stem}.{name}", forms if BOTH_FORMS else forms[number % 3 :][:1]):
                key = f"{file.stem}.{name}"
                marks = mark(f"{key}.{'blocks' if form == 'blocks' else 'experiment'}", key, file.stem)
                found.append(pytest.param(file, name, form, id=f"{key}-{form}", marks=marks))
    return found


@pytest.mark.parametrize(("file", "name", "form"), cases())
def test_the_same_source(
    file: Path,
    name: str,
    form: str,
    theirs: Callable[[str], Outcome],
    modules: Callable[[Path], Any],
) -> None:
    wanted = theirs(f"{file.stem}.{name}")
    assert "error" not in wanted, f"nnsight itself: {wanted}"
    program = getattr(modules(file), name)
    given = parameters(program)
    found = run(written(program, form), given, nnsight_compiler)
    assert "error" not in found, f"{found['error']}: {found['message']}"
    assert not found["warnings"]
    assert_same(found["value"], wanted["value"], TOLERANCE)


def written(program: Callable[..., Any], form: str) -> Callable[..., Any]:
    """A program in one of the forms."""
    if form == "blocks":
        return program
    experiment = nnsight_compiler.intervene(program)
    return experiment if form == "experiment" else functools.partial(experiment, remote="local")


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
