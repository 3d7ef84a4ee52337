"""How often models run is counted while they do, and is limited: against what the model's own `forward` counts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import LanguageModel, LimitError, NNsight, RunError, intervene
from nnsight_compiler.runtime.runs import Effort, counted

PROMPT = "The Eiffel Tower is in the city of"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture
def calls(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the model's `forward`. Hooks would keep prefixes from being shared."""
    seen: list[int] = []
    plain = type(model._module).forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model._module), "forward", forward)
    return seen


def loop(model: Any, prompt: str, times: int) -> Any:
    total = 0.0
    for number in range(times):
        with model.trace(prompt):
            model.layers[0].output[:] *= number
            top = model.lm_head.output[0, -1].max()
        total += top.item()
    return total


def swept(model: Any, prompt: str, times: int) -> Any:
    found = []
    for position in range(times):
        with model.trace(prompt):
            model.layers[2].output[:, position] = 0
            found.append(model.lm_head.output[0, -1])
    return torch.stack(found)


def written(model: Any, prompt: str, times: int) -> Any:
    with model.generate(prompt, max_new_tokens=times, min_new_tokens=times, do_sample=False) as tracer:
        model.layers[0].output[:] *= 2
        ids = tracer.result
    return ids


def several(model: Any, prompt: str, times: int) -> Any:
    with model.session():
        with model.trace() as tracer:
            with tracer.invoke(prompt):
                first = model.layers[1].output[:, -1]
            with tracer.invoke("Hello"):
                second = model.layers[1].output[:, -1]
        for _ in range(times):
            with model.trace("Hello"):
                model.layers[1].output[:, -1] += first - second
                first = model.layers[1].output[:, -1]
    return first


@pytest.mark.parametrize("options", [{}, {"without": "all"}], ids=["fast", "plain"])
@pytest.mark.parametrize("program", [loop, swept, written, several])
def test_each_run_of_the_model_counts_one(
    model: LanguageModel, calls: list[int], program: Callable[..., Any], options: dict[str, Any]
) -> None:
    experiment = intervene(program).with_options(**options)
    experiment(model, PROMPT, 4)  # how it is compiled, and what is seen of the model for it, are no runs of it
    for times in (4, 6):
        calls.clear()
        with counted(Effort()) as effort:
            experiment(model, PROMPT, times)
        assert effort.count == len(calls) > 0
        if options:
            assert effort.count == {loop: times, swept: times, written: times, several: times + 1}[program]


def test_forwards_that_share_rows_or_a_prefix_are_fewer(model: LanguageModel, calls: list[int]) -> None:
    experiment = intervene(swept)
    experiment(model, PROMPT, 8)
    calls.clear()
    with counted(Effort(2)) as effort:
        experiment(model, PROMPT, 8)
    assert effort.count == len(calls) == 2


@pytest.mark.parametrize(("program", "line"), [(loop, 3), (written, 1)])
def test_one_run_too_many_is_refused_at_its_line(
    model: LanguageModel, calls: list[int], program: Callable[..., Any], line: int
) -> None:
    experiment = intervene(program).with_options(without="all")
    with counted(Effort(3)):
        value = experiment(model, PROMPT, 3)
    calls.clear()
    with counted(Effort(3)) as effort, pytest.raises(LimitError) as refused:
        experiment(model, PROMPT, 4)
    assert effort.count == len(calls) == 3
    place = f"{__file__}:{program.__code__.co_firstlineno + line}:"
    assert str(refused.value).startswith(place)
    assert "this may run the model 3 times, each step of a generation counted, and has\n" in str(refused.value)
    assert "way out: fewer rounds or steps, or several runs" in str(refused.value)
    assert isinstance(refused.value, RunError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model._module.modules())
    again = experiment(model, PROMPT, 3)  # the model is as it was, and what is not counted is not limited
    assert torch.equal(again, value) if isinstance(value, torch.Tensor) else again == value


def test_forwards_in_rows_are_refused_as_those_that_run_alone(model: LanguageModel) -> None:
    experiment = intervene(swept)
    experiment(model, PROMPT, 2)
    with counted(Effort(0)) as effort, pytest.raises(LimitError):
        experiment(model, PROMPT, 4)
    assert effort.count == 0


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def toy(model: Any, x: torch.Tensor, times: int) -> Any:
    total = 0.0
    for _ in range(times):
        with model.trace(x):
            total += model.first.output.sum().item()
    return total


@pytest.mark.parametrize(("every", "told"), [(0.0, [1, 2, 3, 4, 5]), (1000.0, [1])])
def test_the_count_is_reported_while_it_grows(every: float, told: list[int]) -> None:
    experiment, seen = intervene(toy).with_options(without="all"), []
    with counted(Effort(report=seen.append, every=every)) as effort:
        experiment(NNsight(Network()), torch.ones(1, 2), 5)
    assert seen == told
    assert effort.count == 5


def test_what_reports_may_end_the_run() -> None:
    def cancelled(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    net = Network()
    with counted(Effort(report=cancelled, every=0.0)), pytest.raises(KeyboardInterrupt):
        intervene(toy).with_options(without="all")(NNsight(net), torch.ones(1, 2), 5)
    assert not net.first._forward_hooks


def test_other_threads_are_not_counted() -> None:
    model, seen = NNsight(Network()), []

    def run() -> None:
        seen.append(intervene(toy)(model, torch.ones(1, 2), 5))

    with counted(Effort(1)) as effort:
        other = threading.Thread(target=run)
        other.start()
        other.join()
    assert len(seen) == 1
    assert effort.count == 0
