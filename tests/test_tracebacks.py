"""Tracebacks have the user's lines, and the model's where it is the model that fails; none of the compiler's own.

The mistakes are ones that only a run finds: what a list or a mask selects.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, RunError, UnsavedValueError, intervene

HERE = Path(__file__).read_text().splitlines()
plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
model = NNsight(plain)
X = torch.ones(1, 4)


def lines(error: BaseException) -> list[str]:
    """The lines of a traceback that stand in this file, and the files of the others."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [HERE[(each.lineno or 1) - 1].strip() if each.filename == __file__ else each.filename for each in frames]
    return found[1:]  # after the line that calls


def raised(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def bad_index() -> None:
    with model.trace(X):
        hidden = model[0].output.save()
        hidden = hidden[:, [99]]


def explode(value: torch.Tensor) -> torch.Tensor:
    return value[:, [99]]


@intervene
def decorated(model, x):
    with model.trace(x):
        return explode(model[0].output)


@intervene
def misspelt(model, x):
    with model.trace(x):
        return model.nothing.output


def bad_write() -> None:
    with model.trace(X):
        model[0].output = X[X > 0]
        out = model[1].output.save()  # noqa: F841


def bad_input() -> None:
    with model.trace(torch.zeros(1, 9)):
        out = model[1].output.save()  # noqa: F841


def unsaved() -> None:
    with model.trace(X):
        kept = model[0].output.save()  # noqa: F841
        lost = model[0].output
    print(lost + 1)


def test_an_error_at_a_site_ends_at_its_own_line() -> None:
    error = raised(IndexError, bad_index)
    assert lines(error) == ["with model.trace(X):", "hidden = hidden[:, [99]]"]


def test_an_error_in_a_helper_that_was_inlined() -> None:
    error = raised(IndexError, lambda: decorated(model, X))
    assert lines(error)[1:] == ["return value[:, [99]]"]


def test_a_compile_error_ends_where_it_was_called() -> None:
    error = raised(CompileError, lambda: misspelt(model, X))
    assert lines(error) == ["error = raised(CompileError, lambda: misspelt(model, X))"]


def test_a_write_that_does_not_fit_ends_at_its_own_line() -> None:
    error = raised(RunError, bad_write)
    assert lines(error) == ["with model.trace(X):", "model[0].output = X[X > 0]"]


def test_the_models_own_error_keeps_the_models_lines() -> None:
    error = raised(RuntimeError, bad_input)
    mine, *models = lines(error)
    assert mine == "with model.trace(torch.zeros(1, 9)):"
    assert models[-1].endswith("linear.py")
    assert any(each.endswith("container.py") for each in models)
    assert not any("nnsight_compiler" in each or "/runtime/" in each for each in models)


def test_an_unsaved_value_ends_where_it_is_used() -> None:
    error = raised(UnsavedValueError, unsaved)
    assert lines(error) == ["print(lost + 1)"]


def test_what_an_error_was_raised_from_stays() -> None:
    def handled() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            bad_index()

    error = raised(IndexError, handled)
    assert isinstance(error.__context__, KeyError)
    assert not error.__suppress_context__
