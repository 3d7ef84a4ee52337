"""Training loops in a file: optimisers, schedules, clipping and backward passes, against loops in plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import FileError, LanguageModel, intervene

PROMPT, TARGET, ROUNDS = "The Eiffel Tower is in the city of", 7, 4

USERS = """
import torch
from torch import nn


class Adapter(nn.Module):
    def __init__(self, width, rank=4):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return x + self.up(self.down(x))


torch.manual_seed(0)
adapter = Adapter(128)
vector = torch.linspace(-1, 1, 128)
prompt = torch.linspace(-0.1, 0.1, 2 * 128).reshape(2, 128)


def steer(model, text, target, rounds):
    steering = vector.clone().requires_grad_()
    optimizer = torch.optim.Adam([steering], lr=0.1)
    losses = []
    for _ in range(rounds):
        with model.trace(text):
            model.layers[1].output[:, -1] += steering
            loss = nn.functional.cross_entropy(model.lm_head.output[0, -1:], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return steering.detach(), losses


def adapt(model, text, target, rounds):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    losses = []
    for _ in range(rounds):
        with model.trace(text):
            model.layers[1].output = adapter(model.layers[1].output)
            loss = nn.functional.cross_entropy(model.lm_head.output[0, -1:], target)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append((loss.item(), norm.item(), schedule.get_last_lr()))
    return torch.cat([each.detach().flatten() for each in adapter.parameters()]), losses


def tune(model, text, target, rounds):
    soft = prompt.clone().requires_grad_()
    optimizer = torch.optim.AdamW([{"params": [soft], "lr": 0.05}], weight_decay=0.1)
    losses = []
    for number in range(rounds):
        optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)
        with model.trace(text):
            embedded = model.transformer.drop.input
            model.transformer.drop.input = torch.cat([embedded[:, :1] + soft[:1], embedded[:, 1:-1], soft[None, 1:]], 1)
            loss = nn.functional.cross_entropy(model.lm_head.output[0, -1:], target)
        (soft.grad,) = torch.autograd.grad(loss, [soft])
        optimizer.step()
        losses.append(loss.item())
    return soft.detach(), losses
"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


@contextmanager
def changing(module: nn.Module, change: Callable[[Any], Any], *, before: bool = False) -> Iterator[None]:
    if before:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, out: change(out))
    with handle:
        yield


class Plainly:
    """The same three loops in plain torch, with hooks."""

    def __init__(self, model: LanguageModel, adapter: nn.Module, vector: torch.Tensor, prompt: torch.Tensor) -> None:
        self.net, self.adapter, self.vector, self.prompt = model._module, adapter, vector, prompt
        self.ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(self.ids).logits[0, -1:], torch.tensor([TARGET]))

    def steer(self) -> tuple[torch.Tensor, list[Any]]:
        steering = self.vector.clone().requires_grad_()
        optimizer, losses = torch.optim.Adam([steering], lr=0.1), []

        def add(out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + steering], 1)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        for _ in range(ROUNDS):
            with changing(self.net.transformer.h[1], add):
                loss = self.loss()
            optimizer.zero_grad()
            (steering.grad,) = torch.autograd.grad(loss, [steering])
            optimizer.step()
            losses.append(loss.item())
        return steering.detach(), losses

    def adapt(self) -> tuple[torch.Tensor, list[Any]]:
        parameters = list(self.adapter.parameters())
        optimizer, losses = torch.optim.SGD(parameters, lr=0.1, momentum=0.9), []
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

        def adapted(out: Any) -> Any:
            return (self.adapter(out[0]), *out[1:]) if isinstance(out, tuple) else self.adapter(out)

        for _ in range(ROUNDS):
            with changing(self.net.transformer.h[1], adapted):
                loss = self.loss()
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = grad
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append((loss.item(), norm.item(), schedule.get_last_lr()))
        return torch.cat([each.detach().flatten() for each in parameters]), losses

    def tune(self) -> tuple[torch.Tensor, list[Any]]:
        soft = self.prompt.clone().requires_grad_()
        optimizer, losses = torch.optim.AdamW([{"params": [soft], "lr": 0.05}], weight_decay=0.1), []

        def put(embedded: torch.Tensor) -> torch.Tensor:
            return torch.cat([embedded[:, :1] + soft[:1], embedded[:, 1:-1], soft[None, 1:]], 1)

        for number in range(ROUNDS):
            optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)
            with changing(self.net.transformer.drop, put, before=True):
                loss = self.loss()
            (soft.grad,) = torch.autograd.grad(loss, [soft])
            optimizer.step()
            losses.append(loss.item())
        return soft.detach(), losses


def numbers(losses: list[Any]) -> torch.Tensor:
    flat = [[each[0], each[1], *each[2]] if isinstance(each, tuple) else [each] for each in losses]
    return torch.tensor(flat)


@pytest.mark.parametrize("name", ["steer", "adapt", "tune"])
def test_a_training_loop_in_a_file_trains_as_plain_torch_does(model, written, through, name: str) -> None:
    scope = written(USERS)
    adapter = copy.deepcopy(scope["adapter"])
    truth, losses = getattr(Plainly(model, adapter, scope["vector"], scope["prompt"]), name)()
    weights = {key: value.clone() for key, value in model._module.state_dict().items()}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast, plain = through(scope[name]), through(scope[name]).with_options(without="all")
    assert fast.host_ops == ()
    for experiment in (fast, plain, intervene(scope[name])):  # a file trains its own copy; the last one, the original
        value, found = experiment(model, PROMPT, torch.tensor([TARGET]), ROUNDS)
        torch.testing.assert_close(value, truth, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(numbers(found), numbers(losses), atol=1e-5, rtol=1e-5)
        assert found[-1] != found[0]
    assert all(torch.equal(value, weights[key]) for key, value in model._module.state_dict().items())


REFUSED = {
    "a step with a closure": ("    o.step(lambda: x.sum())", "the method `.step(…)`"),
    "a step with a closure by its name": ("    o.step(closure=len)", "the method `.step(…)`"),
    "a step with what may be a closure": ("    o.step(*[len])", "the method `.step(…)`"),
    "an optimiser that runs a closure": ("    torch.optim.LBFGS([x])", "torch.optim.LBFGS"),
    "a schedule by a function": (
        "    torch.optim.lr_scheduler.LambdaLR(o, len)", "torch.optim.lr_scheduler.LambdaLR",
    ),
    "a hook": ("    o.register_step_post_hook(len)", "the method `.register_step_post_hook(…)`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::nnsight_compiler.LocalOnlyWarning")
def test_what_runs_functions_while_it_trains_stays_a_host_op(written, through, name: str) -> None:
    line, what = REFUSED[name]
    scope = written(f"import torch\ndef use(x):\n    o = torch.optim.SGD([x], 1.0)\n{line}\n    return x")
    with pytest.raises(FileError, match="this file makes calls that are not admitted") as refused:
        through(scope["use"])(torch.zeros(2, requires_grad=True))
    assert f"users.py:4:5: {what}: it is not in the table of known calls\n    {line}\n" in str(refused.value)


def test_explain_tells_what_trains_from_host_ops(model, written) -> None:
    scope = written(USERS)
    steps = intervene(scope["steer"]).explain(model, PROMPT, torch.tensor([TARGET]), ROUNDS).as_data()["stages"][0]
    found = {step["what"]: step["why"] for step in steps["variants"][0]["steps"] if step["kind"] == "host"}
    trains = "trains: no forward is moved across it; files may hold it"
    assert found == {f"host op `{name}(…)`": trains for name in (
        "torch.optim.Adam", "optimizer.zero_grad", "optimizer.step"
    )}  # fmt: skip
