"""Which hypotheses about rows and tokens hold, what is refused and why, and what a cut model tells of the whole."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nnsight_compiler.models import LanguageModel, NNsight
from nnsight_compiler.observations import axes_of
from nnsight_compiler.runtime.axes import Axes, AxisError, InputAxes, Opaque, infer_axes
from nnsight_compiler.runtime.extent import Extent, solve
from nnsight_compiler.runtime.observation import Event

torch.set_num_threads(1)


def extent(**factors: int) -> Extent:
    return Extent(**factors)


@pytest.mark.parametrize(
    ("formula", "axis"),
    [
        (Extent(7), None),
        (Extent(rows=1), "rows"),
        (Extent(1, tokens=1), "tokens+1"),
        (Extent(-1, tokens=2), "2*tokens-1"),
        (Extent(rows_tokens=2), "2*rows*tokens"),
        (Extent(3, rows=4, tokens=1, rows_tokens=1), "rows*tokens+4*rows+tokens+3"),
    ],
)
def test_a_size_is_solved_from_four_and_checked_by_a_fifth(formula: Extent, axis: str | None):
    settings = [(3, 13), (3, 17), (5, 13), (5, 17), (1, 11)]
    sizes = {(rows, tokens): formula.size(rows, tokens) for rows, tokens in settings}
    assert solve(sizes) == formula
    assert solve(sizes | {(1, 11): sizes[1, 11] + 1}) is None
    assert solve(sizes | {(5, 17): sizes[5, 17] + 1}) is None
    assert formula.axis == axis
    assert str(formula) == (axis or "7")


def test_sizes_that_are_no_formula_in_rows_and_tokens():
    settings = [(3, 13), (3, 17), (5, 13), (5, 17), (1, 11)]
    for size in (
        lambda rows, tokens: tokens * tokens,
        lambda rows, tokens: (tokens + 1) // 2,  # a convolution with stride 2
        lambda rows, tokens: 100 - tokens,  # counts down: what is left of a context
        lambda rows, tokens: max(tokens, 15),
        lambda rows, tokens: -(-tokens // 4) * 4,  # padded to a multiple of four
        lambda rows, tokens: rows * rows,
    ):
        assert solve({setting: size(*setting) for setting in settings}) is None


def shapes(axes: Axes, *path: str) -> list[str]:
    return [repr(axes.types(one, "output")) for one in path]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(self.norm(self.up(x)) * scale)


def test_a_module_of_the_users_has_rows():
    axes = infer_axes(Perceptron(), (torch.zeros(7, 4),), {"scale": 2.0})
    assert shapes(axes, "up", "down") == ["float32[rows, 6]", "float32[rows, 2]"]
    assert repr(axes.types("", "input")) == "((float32[rows, 4],), {'scale': 2.0})"
    value = axes.value("up", "output", 0, rows=9, tokens=1)
    assert (value.device.type, value.shape, value.dtype) == ("meta", (9, 6), torch.float32)
    assert (axes.how, axes.reason, axes.fixed, axes.refused) == ("fake", "", {}, {})


class Merged(nn.Module):
    """Rows and positions in one dimension, as in the experts of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.grid = nn.Linear(4, 4), nn.Flatten(0, 1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        flat = self.linear(self.grid(x + positions))
        return {"flat": flat, "mean": flat.reshape(len(x), -1, 4).mean(1), "count": len(flat), "kind": "grid"}


def test_rows_and_tokens_in_one_dimension():
    inputs = InputAxes({"0": ("rows", "tokens"), "1": (None, "tokens")})
    axes = infer_axes(Merged(), (torch.zeros(2, 6, 4), torch.zeros(1, 6, 4)), inputs=inputs)
    assert shapes(axes, "linear", "grid") == ["float32[rows*tokens, 4]"] * 2
    count = "? (a int that is not always the same)"
    assert repr(axes.types("", "output")) == (
        f"{{'flat': float32[rows*tokens, 4], 'mean': float32[rows, 4], 'count': {count}, 'kind': 'grid'}}"
    )
    assert axes.value("", "output", 0, 5, 8)["flat"].shape == (40, 4)
    assert isinstance(axes.value("", "output", 0, 5, 8)["count"], Opaque)


class Selects(nn.Module):
    """Keeps the entries that are positive: how many is in the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.kept, self.after = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.before(x)
        return self.after(hidden) + self.kept(hidden[hidden > 0]).mean()


def test_what_depends_on_the_numbers_is_refused_and_the_rest_is_right():
    torch.manual_seed(0)
    axes = infer_axes(Selects(), (torch.zeros(2, 4),))
    assert shapes(axes, "before", "after", "") == ["float32[rows, 4]"] * 3
    assert axes.how == "real"
    assert "DynamicOutputShapeException" in axes.reason
    assert axes.refused.keys() == {Event("kept", "input", 0), Event("kept", "output", 0)}
    with pytest.raises(AxisError, match="its shape depends on the numbers in the inputs"):
        axes.value("kept", "output", 0, 2, 1)


class Branches(nn.Module):
    """Runs one of its parts where there are more than three rows, and hands over nothing where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Linear(4, 4), nn.Linear(4, 4)
        self.either, self.all = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.either(x if len(x) > 1 else None)
        self.all((x, None) if len(x) > 3 else [x])
        return self.many(x) if len(x) > 3 else self.few(x)


def test_what_happens_at_some_sizes_only_is_refused():
    axes = infer_axes(Branches(), (torch.zeros(2, 4),))
    for path, reason in (
        ("many", "it happens in some forwards only: the sizes or the numbers decide"),
        ("few", "it happens in some forwards only: the sizes or the numbers decide"),
        ("either", "None or a tensor: the sizes or the numbers decide"),
        ("all", "its structure is not always the same: the sizes or the numbers decide"),
    ):
        assert axes.refused[Event(path, "output", 0)] == reason
    assert shapes(axes, "") == ["float32[rows, 4]"]
    with pytest.raises(AxisError, match="how often it runs is not known"):
        axes.value("many", "output", 1, 2, 1)
    with pytest.raises(KeyError):
        axes.value("", "output", 1, 2, 1)


class Fixed(nn.Module):
    """Takes two rows, whatever the first dimension is said to be."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(2, 4))


def test_a_module_that_takes_one_number_of_rows_only():
    axes = infer_axes(Fixed(), (torch.zeros(2, 4),))
    assert (axes.fixed, axes.how) == ({"rows": 2}, "fake")
    assert "invalid for input of size 12" in axes.reason
    assert axes.value("linear", "output", 0, 2, 1).shape == (2, 4)
    with pytest.raises(AxisError, match=r"shapes are known for 2 rows only, not for 3: .*invalid for input"):
        axes.value("linear", "output", 0, 3, 1)


def test_a_module_whose_output_has_no_rows():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).sum(0)

    axes = infer_axes(Sums(), (torch.zeros(2, 4),))
    assert axes.fixed == {"rows": 2}
    assert "nothing that the model returns has as many entries as its input has rows" in axes.reason


def test_a_model_that_cannot_run_at_all():
    axes = infer_axes(nn.Linear(4, 4), (torch.zeros(2, 5),))
    assert axes.how == "none"
    with pytest.raises(AxisError, match="cannot be multiplied"):
        axes.value("", "output", 0, 2, 1)


def test_nothing_is_left_behind():
    module, x = Selects().train(), torch.randn(2, 4)
    before, given = copy.deepcopy(module.state_dict()), x.clone()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    infer_axes(module, (x,))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(x, given)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# --- the cut ---


def causal(name: str, layers: int, **sizes: Any) -> nn.Module:
    config = AutoConfig.for_model(
        name,
        **{"num_hidden_layers": layers, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **sizes,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def told(axes: Axes) -> dict[Event, str]:
    return {event: repr(axes.types(event.path, event.port, event.call)) for event in axes.events}


PROMPT = {"input_ids": torch.ones(1, 4).long()}


MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 8, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("module", "kept"),
    [(causal("llama", 6), 2), (causal("qwen3", 8, head_dim=4, **MIXED), 4), (causal("llama", 3), None)],
    ids=["one kind", "two kinds", "few layers"],
)
def test_a_cut_model_tells_what_the_whole_one_does(module: Any, kept: int | None):
    layers = len(module.model.layers)
    cut, whole = infer_axes(module, (), PROMPT), infer_axes(module, (), PROMPT, cut=False)
    assert (cut.cut, whole.cut, cut.reason) == ({"model.layers": kept} if kept else {}, {}, "")
    assert told(cut) == told(whole)
    assert len(module.model.layers) == module.config.num_hidden_layers == layers


def test_a_model_that_gives_the_states_of_all_layers_is_not_cut():
    module = causal("llama", 6)
    axes = infer_axes(module, (), {**PROMPT, "output_hidden_states": True})
    assert axes.cut == {}
    assert axes.reason.startswith("not cut to its first layers: one layer more makes a difference at model output")
    assert len(axes.types("", "output").hidden_states) == 7


def test_published_sizes_without_weights():
    module = causal("llama", 32, head_dim=128)
    axes = infer_axes(module, (), PROMPT)
    assert axes.cut == {"model.layers": 2}
    assert repr(axes.types("model.layers.31.self_attn.q_proj", "output")) == "float32[rows, tokens, 512]"
    with pytest.raises(KeyError):
        axes.types("model.layers.32", "output")


# --- of a wrapped model ---


def test_prompts_of_one_kind_are_inferred_once():
    model = LanguageModel("tiny")
    axes, rows, tokens = axes_of(model, (torch.ones(1, 4).long(),), {})
    again, more_rows, more_tokens = axes_of(model, (torch.ones(3, 9).long(),), {})
    assert again is axes
    assert ((rows, tokens), (more_rows, more_tokens)) == ((1, 4), (3, 9))
    assert axes_of(model, (torch.ones(3, 9).long(),), {"output_hidden_states": True})[0] is not axes
    assert axes.value("lm_head", "output", 0, 3, 9).shape[:2] == (3, 9)


def test_what_holds_for_one_size_is_not_taken_for_another():
    model = NNsight(Fixed())
    assert axes_of(model, (torch.zeros(2, 4),), {})[0].fixed == {"rows": 2}
    assert axes_of(model, (torch.zeros(1, 8),), {})[0].fixed == {"rows": 1}
    assert axes_of(model, (torch.zeros(2, 4),), {})[0].fixed == {"rows": 2}
