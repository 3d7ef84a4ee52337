"""The warning of values that were made from the model and are used by nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, UnusedValueWarning, intervene


@pytest.fixture
def model() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_a_name_bound_anew_is_not_a_write(model: NNsight) -> None:
    x = torch.ones(1, 4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with model.trace(x):
            acts = model[0].output
            acts = acts * 0
            output = model.output.save()
    (warning,) = found
    assert warning.category is UnusedValueWarning
    assert "`acts` is made from a value of the model" in str(warning.message)
    assert warning.filename == __file__
    assert warning.lineno == 26
    assert torch.equal(output, model(torch.ones(1, 4)))


@pytest.mark.parametrize(
    "line",
    [
        "kept = model[0].output.save()",
        "model[0].output = model[0].output * 0",
        "print((model[0].output * 0).shape)",
        "model[0].output.mul_(0)",
        "count = 3 * 4",
    ],
)
def test_what_is_used_or_saved_is_not_reported(model: NNsight, line: str) -> None:
    text = f"def use(model, x):\n    with model.trace(x):\n        {line}\n        out = model.output\n    return out\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        intervene.from_source(text)(model, torch.ones(1, 4))
