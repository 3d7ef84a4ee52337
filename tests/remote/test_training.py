"""Training loops that run elsewhere: one job where the optimiser is made in them, parts where it is the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import LanguageModel, intervene
from nnsight_compiler.remote.backends import LocalBackend

PROMPT, TARGET, ROUNDS = "The Eiffel Tower is in", torch.tensor([7]), 4


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that were run."""
    seen: list[Any] = []
    plain = LocalBackend.run

    def run(self: LocalBackend, job: Any, on_token: Any = None) -> bytes:
        seen.append(job)
        return plain(self, job, on_token)

    monkeypatch.setattr(LocalBackend, "run", run)
    return seen


@pytest.fixture(scope="module")
def truth(model: LanguageModel) -> tuple[torch.Tensor, list[float]]:
    """The vector that a loop in plain torch finds, and its losses."""
    vector = torch.zeros(128, requires_grad=True)
    optimizer, losses = torch.optim.Adam([vector], lr=0.1), []
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def add(_: nn.Module, __: Any, out: Any) -> Any:
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + vector], 1)
        return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

    for _ in range(ROUNDS):
        with model._module.transformer.h[1].register_forward_hook(add):
            loss = nn.functional.cross_entropy(model._module(ids).logits[0, -1:], TARGET)
        (vector.grad,) = torch.autograd.grad(loss, [vector])
        optimizer.step()
        losses.append(loss.item())
    return vector.detach(), losses


def test_a_loop_with_its_optimiser_is_one_job(model: LanguageModel, truth: Any, jobs: list[Any]) -> None:
    @intervene
    def train(model, prompt, target, vector, rounds):
        vector = vector.clone().requires_grad_()
        optimizer = torch.optim.Adam([vector], lr=0.1)
        losses = []
        for _ in range(rounds):
            with model.trace(prompt):
                model.layers[1].output[:, -1] += vector
                loss = nn.functional.cross_entropy(model.lm_head.output[0, -1:], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return vector.detach(), losses

    vector, losses = train(model, PROMPT, TARGET, torch.zeros(128), ROUNDS, remote="local")
    assert len(jobs) == 1
    torch.testing.assert_close(vector, truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, truth[1], atol=1e-4, rtol=1e-5)


def test_an_optimiser_of_the_callers_steps_there(model: LanguageModel, truth: Any, jobs: list[Any]) -> None:
    @intervene
    def train(model, prompt, target, vector, optimizer, rounds):
        losses = []
        for _ in range(rounds):
            with model.trace(prompt):
                model.layers[1].output[:, -1] += vector
                loss = nn.functional.cross_entropy(model.lm_head.output[0, -1:], target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    vector = torch.zeros(128, requires_grad=True)
    losses = train(model, PROMPT, TARGET, vector, torch.optim.Adam([vector], lr=0.1), ROUNDS, remote="local")
    assert len(jobs) == ROUNDS
    torch.testing.assert_close(vector.detach(), truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, truth[1], atol=1e-4, rtol=1e-5)


def test_what_no_job_may_do_is_done_here(model: LanguageModel, truth: Any) -> None:
    """An assignment that is refused in jobs is the client's, and settles: it was given two sides in turn, for ever."""

    @intervene
    def assigned(model, prompt):
        model.lm_head.weight.grad = None
        with model.trace(prompt):
            top = model.lm_head.output[0, -1].max()
        return top.item()

    found = assigned(model, PROMPT, remote="local")
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert found == pytest.approx(model._module(ids).logits[0, -1].max().item(), abs=1e-4)
