"""Calls that were once taken for something else, run on a small model and held against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from nnsight_compiler import NNsight, intervene

SHIFT = torch.Tensor.add_
SEEN: list[Any] = []


class Run:
    """Something that logs, and so has a method of a tensor's name."""

    def log(self, values: dict[str, Any]) -> None:
        SEEN.append(values)


def make_run() -> Run:
    return Run()


@pytest.fixture
def model() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


INPUT = torch.ones(2, 4)


def test_a_seed_comes_before_the_draw(model: NNsight) -> None:
    @intervene
    def draw(model: Any, x: torch.Tensor) -> Any:
        with model.trace(x):
            print(model[1].output.sum() > 1e9)
            torch.manual_seed(3)
            noise = torch.rand(3)
        return noise

    torch.manual_seed(1)
    drawn = draw(model, INPUT)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_in_place_by_position(model: NNsight) -> None:
    @intervene
    def rectify(model: Any, x: torch.Tensor) -> Any:
        with model.trace(x):
            F.relu(model[0].output, True)
            out = model[1].output
        return out

    first, second = model._module
    with torch.no_grad():
        expected = second(first(INPUT).relu())
    assert torch.equal(rectify(model, INPUT), expected)


def test_a_method_called_through_a_variable(model: NNsight) -> None:
    @intervene
    def shift(model: Any, x: torch.Tensor) -> Any:
        with model.trace(x):
            hidden = model[0].output
            before = hidden.clone()
            SHIFT(hidden, 1)
            after = hidden.clone()
        return after - before

    assert torch.allclose(shift(model, INPUT), torch.ones(2, 4))


def test_a_method_of_another_class_is_run(model: NNsight) -> None:
    @intervene
    def logged(model: Any, x: torch.Tensor) -> Any:
        run = make_run()
        with model.trace(x):
            run.log({"mean": model[0].output.mean().item()})
            out = model[1].output
        return out

    SEEN.clear()
    logged(model, INPUT)
    with torch.no_grad():
        assert [{"mean": model._module[0](INPUT).mean().item()}] == SEEN
