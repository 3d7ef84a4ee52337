"""The order in which modules run, against plain torch hooks; and that looking leaves nothing behind."""

from __future__ import annotations

import copy
import random

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nnsight_compiler.ir.types import Dimension, TensorType
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.observe import observe

torch.set_num_threads(1)


def small_gpt2(device: str = "cpu") -> nn.Module:
    config = AutoConfig.for_model("gpt2", n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def order_by_hooks(module: nn.Module, *args: object, **kwargs: object) -> list[tuple[str, str]]:
    """The oracle: torch's own hooks on a copy, with real numbers."""
    module = copy.deepcopy(module)
    seen: list[tuple[str, str]] = []
    for path, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, path=path: seen.append((path, "input")))
        part.register_forward_hook(lambda *_, path=path: seen.append((path, "output")))
    with torch.no_grad():
        module(*args, **kwargs)
    return seen


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=False).items()}


class Repeats(nn.Module):
    """Runs its parts out of the order in which it holds them, one of them twice, one never, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.other = self.twice
        self.runs = 0
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        self.runs += 1
        hidden = self.other(self.twice(x)) * scale
        self.seen.append(hidden)
        return {"logits": self.last(hidden)}


def test_order_and_counts_are_those_of_torch_hooks():
    module, x = Repeats(), torch.randn(2, 4)
    seen = observe(module, (x,), {"scale": 2.0})
    assert [(event.path, event.port) for event in seen.events] == order_by_hooks(module, x, scale=2.0)
    assert (seen.count("twice"), seen.count("never"), seen.count("other"), seen.count("")) == (2, 0, 0, 1)
    assert seen.time("twice", "output", 0) < seen.time("twice", "input", 1) < seen.time("last", "input", 0)
    with pytest.raises(KeyError):
        seen.time("never", "input", 0)
    assert seen.how == "fake"
    assert seen.reason == ""


def test_nothing_is_left_on_the_module_or_its_arguments():
    module = Repeats()
    calls: list[str] = []
    module.last.register_forward_hook(lambda *_: calls.append("hook"))
    module.last.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    cache: list[torch.Tensor] = []

    class Appends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            cache.append(x)
            return self.inner(x)["logits"]

    observe(Appends(), (torch.randn(2, 4), cache))
    assert (module.runs, module.seen, calls, cache) == (0, [], [], [])
    assert len(module.last._forward_hooks) == len(module.last._forward_pre_hooks) == 1
    assert not module.twice._forward_hooks


def test_a_module_that_keeps_a_tensor_with_a_history_can_be_copied():
    module = Repeats()
    module(torch.randn(2, 4))  # `seen` now holds a tensor that is no leaf
    kept = module.seen[0].detach().clone()
    observe(module, (torch.randn(2, 4),))
    assert len(module.seen) == 1
    assert torch.equal(module.seen[0], kept)


@pytest.mark.parametrize("looks_at_numbers", [False, True])
def test_training_state_and_random_generators_stay(looks_at_numbers: bool):
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.drop(self.norm(x)) * torch.rand(1) * random.random()
            return x if not looks_at_numbers or x.sum().item() > -1e9 else -x

    module, x = Trains().train(), torch.randn(8, 4)
    before, torch_state, python_state = state(module), torch.get_rng_state(), random.getstate()
    seen = observe(module, (x,))
    assert seen.how == ("real" if looks_at_numbers else "fake")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert module.training
    assert module.norm.training


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.positive(x) if x.sum() > 0 else self.negative(x)


def test_a_branch_on_a_number_is_observed_with_real_tensors():
    module = Branches()
    for sign, taken, other in ((1, "positive", "negative"), (-1, "negative", "positive")):
        seen = observe(module, (sign * torch.ones(1, 4),))
        assert (seen.how, seen.count(taken), seen.count(other)) == ("real", 1, 0)
        assert "DataDependent" in seen.reason


def test_the_models_own_error_comes_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        observe(nn.Linear(4, 4), (torch.ones(1, 5),))
    with pytest.raises(TypeError, match="unexpected keyword"):
        observe(nn.Linear(4, 4), (torch.ones(1, 4),), {"mask": None})


def test_values_that_are_written_to_later():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)
            self.view = nn.Flatten(0)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.second(self.relu(self.first(x)))
            flat = self.view(hidden)
            flat[0] = 0
            return hidden, flat

    seen = observe(InPlace(), (torch.randn(2, 4),))
    assert seen.how == "fake"
    assert seen.mutated_later == {
        Event("first", "output", 0),
        Event("relu", "input", 0),
        Event("second", "output", 0),
        Event("view", "input", 0),
        Event("view", "output", 0),
    }


def test_kinds_and_shapes():
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.lstm(x)[0]}

    seen = observe(Kinds(), (torch.randn(2, 3, 4),))
    expected = TensorType("float32", (Dimension(2), Dimension(3), Dimension(4)))
    assert seen.shape[Event("lstm", "input", 0)] == seen.shape[Event("", "input", 0)] == expected
    assert seen.kind[Event("lstm", "output", 0)] == "tuple"
    assert seen.kind[Event("", "output", 0)] == "mapping"
    assert seen.shape[Event("", "output", 0)] is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gpt2_loaded_and_not(device: str):
    ids = torch.arange(6)[None]
    seen = observe(small_gpt2(device), (), {"input_ids": ids})
    assert seen.how == "fake"
    assert [(event.path, event.port) for event in seen.events] == order_by_hooks(small_gpt2(), input_ids=ids)
    assert seen.shape[Event("transformer.h.1", "output", 0)] == TensorType(
        "float32", (Dimension(1), Dimension(6), Dimension(16))
    )
    assert seen.kind[Event("", "output", 0)] == "mapping"


def test_accelerates_hooks_stay_and_do_not_run():
    ids = torch.arange(6)[None]
    expected = order_by_hooks(small_gpt2(), ids)
    for place in (
        lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
        lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    ):
        model = small_gpt2()
        before = model(ids).logits
        model = place(model)
        hooks = {path: part._hf_hook for path, part in model.named_modules() if hasattr(part, "_hf_hook")}
        seen = observe(model, (ids,))
        assert seen.how == "fake", seen.reason
        assert [(event.path, event.port) for event in seen.events] == expected
        assert hooks
        assert all(model.get_submodule(path)._hf_hook is hook for path, hook in hooks.items())
        assert torch.equal(model(ids).logits, before)


def test_offloaded_weights_with_a_branch_on_a_number():
    module = accelerate.cpu_offload(Branches(), execution_device=torch.device("cpu"))
    assert module.positive.weight.is_meta
    seen = observe(module, (torch.ones(1, 4),))
    assert (seen.how, seen.count("positive"), seen.count("negative")) == ("real", 1, 0)
    assert module.positive.weight.is_meta
    assert module(torch.ones(1, 4)).shape == (1, 4)


def test_arguments_that_require_grad_and_inference_mode():
    module, x = nn.Linear(4, 4), torch.randn(1, 4, requires_grad=True) * 2
    assert observe(module, (x,)).count("") == 1
    with torch.inference_mode():
        assert observe(module, (torch.randn(1, 4),)).count("") == 1
        assert observe(nn.Linear(4, 4), (torch.randn(1, 4),)).mutated_later == frozenset()


def test_a_forward_set_on_the_instance_runs_on_the_shadow():
    module, x = Repeats(), torch.randn(1, 4)
    plain = module.forward

    def louder(x: torch.Tensor, *, scale: float = 2.0) -> dict[str, torch.Tensor]:
        return plain(x, scale=scale)

    module.forward = louder  # type: ignore[method-assign]
    seen = observe(module, (x,))
    assert (seen.count("twice"), seen.count("last"), module.runs) == (2, 1, 0)
    assert module.forward is louder
