"""What forwards are said to cost, against what real ones of other sizes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnsight_compiler import NNsight
from nnsight_compiler.observations import axes_of, cost_of
from nnsight_compiler.runtime.axes import AxisError
from nnsight_compiler.runtime.costs import Cost, bound
from nnsight_compiler.runtime.free_memory import _of_groups, _of_system, free_memory
from nnsight_compiler.runtime.meter import Meter
from nnsight_compiler.runtime.observation import Event
from tests.support.architectures import FAMILIES, IDS, random_model
from tests.support.chosen import some

SIZES = (1, 6), (3, 9), (8, 60)
DEPTH = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")


def deep(kind: str) -> Any:
    """A model of so many layers that it is cut for measuring."""
    options: dict[str, Any] = {name: 6 for name in DEPTH if name in FAMILIES[kind]}
    if kind == "gpt_neo":
        options["attention_types"] = [[["global", "local"], 3]]
    return random_model(kind, **options)


def cost(model: nn.Module, **inputs: Any) -> Cost:
    return cost_of(NNsight(model), (), inputs)[0]


@pytest.mark.parametrize("kind", some(FAMILIES, "gpt2", "mixtral"))
def test_real_forwards_cost_what_was_said(kind: str) -> None:
    model = deep(kind)
    found = cost(model, input_ids=IDS)
    for rows, tokens in SIZES:
        ids = torch.randint(3, 100, (rows, tokens))
        with torch.no_grad(), Meter() as meter:
            model(input_ids=ids)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        assert found.flops(rows, tokens) == pytest.approx(counter.get_total_flops(), rel=0.02)
        assert found.peak(rows, tokens) == pytest.approx(meter.peak, rel=0.2)
        assert meter.peak <= bound(axes_of(NNsight(model), (), {"input_ids": IDS})[0], rows, tokens)


class Stack(nn.Module):
    """Two layers on [rows, width], and one on their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(4, 32), nn.Linear(32, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.narrow(self.wide(x)) + x)


def test_costs_up_to_an_event_and_of_one_module_by_hand() -> None:
    found = cost(Stack().eval(), x=torch.ones(2, 4))
    wide, narrow, last = 2 * 4 * 32, 2 * 32 * 4, 2 * 4
    assert found.flops(7, 1) == 7 * (wide + narrow + last)
    assert found.flops(7, 1, until=Event("wide", "output", 0)) == 7 * wide
    assert found.flops(7, 1, until=Event("narrow", "input", 0)) == 7 * wide
    assert found.within(Event("narrow", "output", 0), 7, 1) == 7 * narrow
    assert found.within(Event("", "output", 0), 7, 1) == found.flops(7, 1)
    assert found.peak(7, 1, until=Event("wide", "output", 0)) == 7 * 32 * 4
    assert found.peak(7, 1) == 7 * (32 + 4) * 4


def test_what_a_program_keeps_adds_to_the_peak_from_its_event_on() -> None:
    found = cost(Stack().eval(), x=torch.ones(2, 4))
    wide, narrow = Event("wide", "output", 0), Event("narrow", "output", 0)
    assert found.peak(7, 1, kept=[(wide, 1000)]) == 7 * (32 + 4) * 4 + 1000
    assert found.peak(7, 1, until=wide, kept=[(wide, 1000)]) == 7 * 32 * 4 + 1000
    assert found.peak(7, 1, until=wide, kept=[(narrow, 1000)]) == 7 * 32 * 4
    # The wide layer's output is still there when the narrow one returns, and gone when the last one does.
    assert found.peak(7, 1, kept=[(narrow, 100)]) == 7 * (32 + 4) * 4 + 100
    assert found.peak(7, 1, kept=[(Event("last", "output", 0), 100)]) == 7 * (32 + 4) * 4
    assert found.peak(7, 1, kept=[(Event("last", "output", 0), 5000)]) == 7 * (4 + 1) * 4 + 5000


def test_rows_within_a_budget_are_as_many_as_fit() -> None:
    found = cost(Stack().eval(), x=torch.ones(2, 4))
    row = found.peak(1, 1)
    for rows in (1, 2, 3, 100):
        assert found.rows_within(rows * row, 1) == rows
        assert found.rows_within(rows * row + row - 1, 1) == rows
    assert found.rows_within(row - 1, 1) == 1  # fewer than one there are not


def test_a_size_that_cannot_vary_is_the_only_one_that_is_told() -> None:
    class Four(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(4, 2) @ torch.ones(2, 3)

    found = cost(Four(), x=torch.ones(4, 2))
    assert found.flops(4, 1) == 2 * 4 * 2 * 3
    with pytest.raises(AxisError, match="costs are known for 4 rows only, not for 5"):
        found.peak(5, 1)


def test_measuring_leaves_the_model_and_the_generators_alone() -> None:
    model = Stack().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cost(model, x=torch.ones(2, 4))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_weights_need_not_be_loaded_and_are_measured_once() -> None:
    with torch.device("meta"):
        model = NNsight(Stack().eval())
    first, rows, tokens = cost_of(model, (torch.ones(2, 4),), {})
    again, more, _ = cost_of(model, (torch.ones(9, 4),), {})
    assert first is again
    assert (rows, tokens, more) == (2, 1, 9)


def test_free_memory_is_what_the_system_or_the_container_allows(tmp_path: Path) -> None:
    assert 0 < free_memory("cpu") < 2**50
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    assert _of_system(tmp_path / "meminfo") == 5000 * 1024
    assert _of_system(tmp_path / "none") > 2**20
    assert min(_of_groups(tmp_path)) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert min(_of_groups(tmp_path)) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert min(_of_groups(tmp_path)) == 300
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert min(_of_groups(tmp_path)) == 350
