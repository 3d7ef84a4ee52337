"""Stopping a forward. The oracle: the plain module, and its parts called one by one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, RunError, intervene


class Counted(nn.Module):
    """A layer that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.linear(x)


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Counted() for _ in range(4))).eval()


def runs(net: nn.Sequential) -> list[int]:
    found = [layer.runs for layer in net]
    for layer in net:
        layer.runs = 0
    return found


@torch.no_grad()
def test_what_comes_later_does_not_run(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            h = model[1].output
            tracer.stop()
        return h

    model = NNsight(net)
    for _ in range(2):
        assert torch.equal(stop(model, X), net[:2](X))
        assert runs(net) == [2, 2, 0, 0]  # the program's, and the plain ones

    with model.trace(X) as tracer:
        h = model[1].output.save()
        tracer.stop()
    assert torch.equal(h, net[:2](X))
    assert runs(net) == [2, 2, 0, 0]


@torch.no_grad()
def test_it_ends_after_all_that_precedes_it_in_the_source(net: nn.Sequential) -> None:
    """Also where that is written in another order than the model's."""

    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            late = model[2].output
            early = model[0].output
            tracer.stop()
            model[1].input = early * 2  # after the line, and before the end of the forward
        return early, late

    early, late = stop(NNsight(net), X)
    assert runs(net) == [1, 1, 1, 0]
    assert torch.equal(early, net[0](X))
    assert torch.equal(late, net[1:3](net[0](X) * 2))


@torch.no_grad()
def test_at_one_site(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            h = model[1].input
            tracer.stop()
            twice = h * 2
            h[:] = 1
            after = model[1].input
        return h, twice, after

    h, twice, after = stop(NNsight(net), X)
    assert runs(net) == [1, 0, 0, 0]
    assert torch.equal(twice, net[0](X) * 2)
    assert torch.equal(h, torch.ones(2, 4))
    assert torch.equal(after, torch.ones(2, 4))


def test_before_anything(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            tracer.stop()
            given = model.input
        return given

    assert torch.equal(stop(NNsight(net), X), X)
    assert runs(net) == [0, 0, 0, 0]


@torch.no_grad()
def test_under_a_live_condition(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x, limit):
        with model.trace(x) as tracer:
            h = model[1].output
            if h.norm() > limit:
                tracer.stop()
            late = model[3].output
            twice = late * 2
        return h, late, twice

    model = NNsight(net)
    h, late, twice = stop(model, X, 1e6)
    assert runs(net) == [1, 1, 1, 1]
    assert torch.equal(late, net(X))
    assert torch.equal(twice, net(X) * 2)
    runs(net)
    h, late, twice = stop(model, X, 0.0)
    assert runs(net) == [1, 1, 0, 0]
    assert stop.cache_info().misses == 1
    assert torch.equal(h, net[:2](X))
    message = r"test_stop.py:\d+:\d+: `late` does not exist: the forward was stopped before it, at .*test_stop.py:\d+"
    for use in (lambda: late + 1, lambda: torch.relu(late), lambda: late.shape, lambda: bool(late), lambda: len(late)):
        with pytest.raises(RunError, match=message):
            use()
    with pytest.raises(RunError, match="`twice` does not exist"):
        twice.sum()
    assert "which the forward did not come to" in repr(late)


@torch.no_grad()
def test_a_use_inside_of_the_experiment(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x, limit):
        with model.trace(x) as tracer:
            h = model[1].output
            if h.norm() > limit:
                tracer.stop()
            late = model[3].output
        return late.sum()

    with pytest.raises(RunError, match="`late` does not exist") as found:
        stop(NNsight(net), X, 0.0)
    assert any("late.sum()" in str(entry.statement) for entry in found.traceback)


@torch.no_grad()
def test_in_a_block_under_a_condition(net: nn.Sequential) -> None:
    model, acts = NNsight(net), []
    with model.trace(X) as tracer:
        for layer in model:
            h = layer.output
            acts.append(h)
            if h.norm() < 1e6:
                tracer.stop()
        late = model[2].input.save()
    assert runs(net) == [1, 0, 0, 0]
    assert len(acts) == 1
    assert torch.equal(acts[0], net[0](X))
    with pytest.raises(RunError, match="`late` does not exist"):
        late + 1


@torch.no_grad()
def test_a_skip_and_a_stop(net: nn.Sequential) -> None:
    @intervene
    def both(model, x):
        with model.trace(x) as tracer:
            model[1].skip(model[0].input)
            h = model[2].output
            tracer.stop()
        return h

    assert torch.equal(both(NNsight(net), X), net[2](X))
    assert runs(net) == [1, 0, 2, 0]


@torch.no_grad()
def test_a_second_run_of_the_last_site_is_not_waited_for() -> None:
    """The forward ends at the call that is meant, whatever comes later."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Counted()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.step(x)
            return x

    loop = Loop().eval()

    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            h = model.step.calls[1].output
            tracer.stop()
        return h

    assert torch.equal(stop(NNsight(loop), X), loop.step.linear(loop.step.linear(X)))
    assert loop.step.runs == 2


ENDED = "the forward does not come to"
REFUSED = [
    ("tracer.stop(); h = model.output", f"{ENDED} the output of `the model`: it is stopped before", 1),
    ("tracer.stop(); h = tracer.result", f"{ENDED} the output of `the model`: it is stopped before", 1),
    ("h = model[1].output; tracer.stop(); h = model[2].input", f"{ENDED} the input of `2`", 1),
    ("h = model[1].output; tracer.stop(); model[3].output = 0; k = model[3].output", f"{ENDED} the output of `3`", 1),
    ("h = model[1].output; tracer.stop(); model[3].skip(h); k = model[3].output", f"{ENDED} the input of `3`", 1),
    ("h = model[1].output; tracer.stop(h)", "`.stop()` takes no arguments", 0),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason", "related"), REFUSED)
def test_mistakes(net: nn.Sequential, body: str, reason: str, related: int) -> None:
    text = f"def use(model, x):\n    with model.trace(x) as tracer:\n        {body}\n    return h\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(NNsight(net), X)
    diagnostic = found.value.diagnostics[0]
    assert diagnostic.span.line == 3
    assert len(diagnostic.related) == related
    assert "way out" in str(found.value)


def test_a_stop_of_another_forward(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x):
        with model.trace(x) as first:
            h = model[1].output
        with model.trace(x):
            k = model[1].output
            first.stop()
        return h, k

    with pytest.raises(CompileError, match=r"`.stop\(\)` belongs to a forward that is not running here"):
        stop(NNsight(net), X)


def test_gradients_up_to_the_stop(net: nn.Sequential) -> None:
    @intervene
    def stop(model, x):
        with model.trace(x) as tracer:
            h = model[1].output
            tracer.stop()
        return h

    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(stop(NNsight(net), x).sum(), x)
    (expected,) = torch.autograd.grad(net[:2](x).sum(), x)
    assert torch.equal(found, expected)
