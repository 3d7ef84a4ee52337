"""Skipping modules. The oracle: the plain torch module, with another module in the place of the skipped one."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, RunError, intervene

PROMPT = "The Eiffel Tower is in the city of"


class Given(nn.Module):
    """Returns what a function makes of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def with_other(net: nn.Module, path: str, function: Callable[..., Any]) -> nn.Module:
    """A copy of a module in which another stands at the path."""
    made = copy.deepcopy(net)
    parent, _, name = path.rpartition(".")
    setattr(made.get_submodule(parent), name, Given(function))
    return made


class Block(nn.Module):
    """Returns a tuple, as attention does, and calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.b(torch.tanh(self.a(x))), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), Block(), nn.Linear(4, 3)
        self.runs: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.block(x)[0]
        return self.last(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@contextmanager
def counting(*modules: nn.Module) -> Iterator[list[int]]:
    """How often modules run, told by their own code."""
    counts = [0] * len(modules)
    for number, module in enumerate(modules):
        plain = type(module).forward

        def forward(*args: Any, number: int = number, plain: Any = plain, module: Any = module, **kwargs: Any) -> Any:
            counts[number] += 1
            return plain(module, *args, **kwargs)

        module.forward = forward
    try:
        yield counts
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def test_the_value_becomes_the_output(net: Net) -> None:
    model = NNsight(net)

    @intervene
    def skip(model, x):
        with model.trace(x):
            h = model.block.input
            model.block.skip((h * 3, None))
            inside, out = model.block.output, model.output
        return inside, out

    with counting(net.block.a, net.block.b, net.last) as counts:
        inside, out = skip(model, X)
    assert counts == [0, 0, 1]
    assert "forward" not in vars(net.block)
    assert torch.equal(out, with_other(net, "block", lambda h: (h * 3, None))(X))
    assert torch.equal(inside[0], net.first(X) * 3)
    assert inside[1] is None

    with model.trace(X):
        model.block.skip((model.block.input * 3, None))
        again = model.output.save()
    assert torch.equal(again, out)
    assert torch.equal(net(X), copy.deepcopy(net)(X)), "the model is plain afterwards"


@torch.no_grad()
def test_layers_in_a_loop_handed_their_input() -> None:
    tiny = LanguageModel("tiny")

    @intervene
    def without(model, prompt, layers):
        with model.trace(prompt):
            for layer in layers:
                model.layers[layer].skip(model.layers[layer].input)
            logits = model.output.logits
        return logits

    module = tiny._ready()
    args, kwargs = tiny._prepare((PROMPT,), {})
    for layers in ((0,), (1, 2), (0, 1, 2)):
        plain = module
        for layer in layers:
            plain = with_other(plain, f"transformer.h.{layer}", lambda h, *args, **kwargs: h)
        assert torch.equal(without(tiny, PROMPT, layers), plain(*args, **kwargs).logits)
    source = without.lower(tiny, PROMPT, (1, 2)).compile().source
    assert source.count("keep") == 1, "what is handed on is not copied"


@torch.no_grad()
def test_a_value_of_another_layer_and_of_another_forward(net: Net) -> None:
    @intervene
    def skip(model, x, y):
        with model.trace(y):
            other = model.block.output[0]
        with model.trace(x):
            model.last.skip(model.first.output[:, :3] + other[:, :3])
            out = model.output
        return out

    got = skip(NNsight(net), X, X + 1)
    assert torch.equal(got, net.first(X)[:, :3] + net.block(net.first(X + 1))[0][:, :3])


@torch.no_grad()
def test_under_a_live_condition(net: Net) -> None:
    @intervene
    def skip(model, x, limit):
        with model.trace(x):
            h = model.block.input
            if h.norm() > limit:
                model.block.skip((h, None))
            out = model.output
        return out

    model = NNsight(net)
    assert torch.equal(skip(model, X, 1e6), net(X))
    assert torch.equal(skip(model, X, 0.0), with_other(net, "block", lambda h: (h, None))(X))
    assert skip.cache_info().misses == 1


@torch.no_grad()
def test_the_line_that_uses_a_value_says_which(net: Net) -> None:
    """As with a write: the value is as it is at its line, also where a later line changes it in place."""

    @intervene
    def skip(model, x):
        with model.trace(x):
            h = model.block.input
            model.block.skip((h, None))
            h[:] = 0.0
            inside, out = model.block.output[0], model.output
        return inside, out

    inside, out = skip(NNsight(net), X)
    assert torch.equal(inside, net.first(X))
    assert torch.equal(out, net.last(net.first(X)))  # what the model adds to it was changed

    @intervene
    def kept(model, x):
        value = torch.ones(2, 4)
        with model.trace(x):
            model.block.skip((value, None))
            model.block.output[0][:] = 5.0
            out = model.output
        return value, out

    value, _ = kept(NNsight(net), X)
    assert torch.equal(value, torch.ones(2, 4))


@torch.no_grad()
def test_writes_at_the_skipped_module(net: Net) -> None:
    @intervene
    def skip(model, x):
        with model.trace(x):
            model.block.output[0][:, 0] = 7.0
            model.block.input = model.block.input * 2
            model.block.skip((model.block.input, None))
            out = model.output
        return out

    def block(h: torch.Tensor) -> tuple[torch.Tensor, None]:
        value = h * 2
        value[:, 0] = 7.0
        return value, None

    assert torch.equal(skip(NNsight(net), X), with_other(net, "block", block)(X))


class Loop(nn.Module):
    """Runs one block several times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + self.block(x)[0]
        return x


@torch.no_grad()
@pytest.mark.parametrize("call", [0, 1, -1])
def test_one_call_of_several(call: int) -> None:
    torch.manual_seed(0)
    net = Loop().eval()

    @intervene
    def skip(model, x, call):
        with model.trace(x):
            model.block.calls[call].skip((model.block.calls[call].input * 2, None))
            for other in range(3):
                if other != call % 3:
                    last = model.block.a.calls[other].output
            out = model.output
        return last, out

    x = X
    for number in range(3):
        if number != call % 3:
            last = net.block.a(x)
        x = x + (x * 2 if number == call % 3 else net.block(x)[0])
    got_last, got = skip(NNsight(net), X, call)
    assert torch.equal(got, x)
    assert torch.equal(got_last, last), "calls keep the numbers that they have where nothing is skipped"


@torch.no_grad()
def test_forwards_that_were_set_on_the_instance(net: Net) -> None:
    """As accelerate does: what was there stands there again, and is what runs where nothing is skipped."""
    seen = []

    def forward(h: torch.Tensor) -> tuple[torch.Tensor, None]:
        seen.append(h)
        return h * 2, None

    net.block.forward = forward

    @intervene
    def skip(model, x, limit):
        with model.trace(x):
            h = model.block.input
            if h.norm() > limit:
                model.block.skip((h, None))
            out = model.output
        return out

    model = NNsight(net)
    assert torch.equal(skip(model, X, 1e6), net.last(net.first(X) * 3))
    seen.clear()
    assert torch.equal(skip(model, X, 0.0), net.last(net.first(X) * 2))
    assert not seen
    assert vars(net.block)["forward"] is forward


@torch.no_grad()
def test_other_threads_and_plain_calls_see_the_plain_model(net: Net) -> None:
    model, plain = NNsight(net), copy.deepcopy(net)(X)
    inner: list[torch.Tensor] = []

    @intervene
    def skip(model, x, scale):
        with model.trace(x):
            h = model.block.input
            model.block.skip((h * scale, None))
            print_free(net, x)
            out = model.output
        return out

    def print_free(module: nn.Module, x: torch.Tensor) -> None:
        inner.append(module(x))

    expected = {scale: with_other(net, "block", lambda h, scale=scale: (h * scale, None))(X) for scale in (0.0, 2.0)}
    wrong: list[str] = []
    failed: list[BaseException] = []

    @torch.no_grad()
    def work(scale: float | None) -> None:
        try:
            for _ in range(50):
                got = net(X) if scale is None else skip(model, X, scale)
                if not torch.equal(got, plain if scale is None else expected[scale]):
                    wrong.append(str(scale))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (0.0, None, 2.0, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert not wrong
    assert all(torch.equal(each, plain) for each in inner)
    assert "forward" not in vars(net.block)


@torch.no_grad()
def test_a_failing_run_leaves_the_model_as_it_was(net: Net) -> None:
    @intervene
    def skip(model, x):
        with model.trace(x):
            model.block.skip((model.block.input, None))
            int("no number")
            out = model.last.output
        return out

    with pytest.raises(ValueError, match="no number"):
        skip(NNsight(net), X)
    assert "forward" not in vars(net.block)
    assert not net.block._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_value_has_the_dtype_that_the_model_goes_on_with(net: Net, dtype: torch.dtype) -> None:
    net.to(dtype)

    @intervene
    def skip(model, x, value):
        with model.trace(x):
            model.first.skip(value)
            out = model.output
        return out

    value = torch.ones(2, 4)
    got = skip(NNsight(net), X.to(dtype), value)
    assert torch.equal(got, with_other(net, "first", lambda x: value.to(dtype))(X.to(dtype)))


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_flow_through_what_is_given(net: Net, grad: bool) -> None:
    @intervene
    def skip(model, x, value):
        with model.trace(x):
            model.first.skip(value)
            out = model.output
        return out

    value = torch.ones(2, 4, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = skip(NNsight(net), X, value)
    assert out.requires_grad is grad
    if grad:
        (found,) = torch.autograd.grad(out.sum(), value)
        plain = torch.ones(2, 4, requires_grad=True)
        (expected,) = torch.autograd.grad(with_other(net, "first", lambda x: plain)(X).sum(), plain)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_each_grad_mode(net: Net, mode: Any) -> None:
    @intervene
    def skip(model, x):
        with model.trace(x):
            model.block.skip((model.block.input, None))
            out = model.output
        return out

    with mode():
        assert torch.equal(skip(NNsight(net), X), with_other(net, "block", lambda h: (h, None))(X))


class Sometimes(nn.Module):
    """Runs a module where its input says so: what runs cannot be told from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) if x.sum() > 0 else self.other(x)


@torch.no_grad()
def test_a_skip_that_does_not_happen_is_an_error() -> None:
    net = Sometimes().eval()

    @intervene
    def skip(model, x):
        with model.trace(x):
            model.part.skip(model.part.input)
            out = model.output
        return out

    model = NNsight(net)
    assert torch.equal(skip(model, torch.ones(2, 4)), torch.ones(2, 4))
    with pytest.raises(RunError, match="`part` input did not run in this forward"):
        skip(model, -torch.ones(2, 4))


REFUSED = [
    ("model.block.skip((model.block.input, None)); h = model.block.a.output; out = model.output",
     "`block.a` is inside of `block`, which is skipped: it does not run", 2),
    ("h = model.block.a.output; model.block.skip((model.block.input, None)); out = model.output",
     "`block.a` is inside of `block`, which is skipped: it does not run", 2),
    ("model.block.a.output = 0; model.block.skip((model.block.input, None)); out = model.output",
     "`block.a` is inside of `block`, which is skipped: it does not run", 2),
    ("model.block.a.skip(x); model.block.skip((model.block.input, None)); out = model.output",
     "`block.a` is inside of `block`, which is skipped: it does not run", 2),
    ("if x.sum() > 0: model.block.skip((model.block.input, None))\n        out = model.output, model.block.b.input",
     "`block.b` is inside of `block`, which is skipped: it does not run", 2),
    ("model.first.skip(model.last.input); out = model.output",
     "this changes whether `first` runs, but needs the input of `last`, which the same forward computes only later",
     2),
    ("model.first.skip(model.first.output); out = model.output", "this changes whether `first` runs", 2),
    ("model.first.skip(0); out = model.output", "a number is given for a module that does not run", 1),
    ("model.first.skip(torch.tensor(1.0)); out = model.output", "a number is given for a module that does not run", 1),
    ("model.first.skip(torch.ones(3)); out = model.output",
     "a tensor of shape [3] is assigned where the module gives [2, 4]", 1),
    ("model.block.skip(x); out = model.output", "the module gives a tuple of 2, which one value cannot replace", 1),
    ("model.first.skip(); out = model.output", "`.skip(…)` takes one value", 1),
    ("model.first.skip(x, x); out = model.output", "`.skip(…)` takes one value", 1),
    ("out = model.first.output; model.last.skip(x[:, :3])", "this skip can reach nothing", 1),
    ("model.first.calls[0].start; out = model.output", "a call of a module has no `.start`", 1),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason", "lines"), REFUSED)
def test_mistakes(net: Net, body: str, reason: str, lines: int) -> None:
    text = f"def use(model, x, torch):\n    with model.trace(x):\n        {body}\n    return out\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(NNsight(net), X, torch)
    (diagnostic,) = found.value.diagnostics
    assert diagnostic.span.line in (3, 4)
    assert len(diagnostic.related) == lines - 1
    assert "way out" in str(found.value)


def test_a_skip_outside_of_a_trace() -> None:
    with pytest.raises(CompileError, match="a module's values exist only while the model runs"):
        intervene.from_source("def use(model, x):\n    model.first.skip(x)\n")(NNsight(Net()), X)
    with pytest.raises(AttributeError, match=r"exists inside `with model\.trace"):
        NNsight(Net()).first.skip(X)


@torch.no_grad()
def test_what_only_the_run_can_tell_is_checked_there(net: Net) -> None:
    @intervene
    def skip(model, x, make):
        with model.trace(x):
            model.first.skip(make('"text"'))
            out = model.output
        return out

    with pytest.raises(RunError, match=r"the module returns a tensor, but a str is given in its place"):
        skip(NNsight(net), X, json.loads)
