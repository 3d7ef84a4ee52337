"""Sessions: several traces as one program. The oracle: plain torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, NNsight, intervene
from nnsight_compiler.block import UnsavedValueError
from nnsight_compiler.models.nnsight import TraceArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
X, Y = torch.randn(2, 4), torch.randn(2, 4)
model = NNsight(NET)


@pytest.fixture(autouse=True)
def plain() -> Any:
    with torch.no_grad():
        yield
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in NET.modules())


def patched(clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    source = NET[0](clean)
    changed = NET[0](corrupt)
    changed[:, 0] = source[:, 0]
    return NET[2](NET[1](changed))


def test_values_flow_without_save() -> None:
    with model.session() as session:
        with model.trace(X):
            source = model[0].output
        with model.trace(Y):
            model[0].output[:, 0] = source[:, 0]
            out = model.output.save()
    assert torch.equal(out, patched(X, Y))
    assert session is not None
    with pytest.raises(UnsavedValueError, match="`source` is a value of the model that was not saved"):
        source.sum()


def test_in_an_experiment() -> None:
    @intervene
    def patch(model, clean, corrupt):
        with model.session():
            with model.trace(clean):
                source = model[0].output
            with model.trace(corrupt):
                model[0].output[:, 0] = source[:, 0]
                out = model.output
        return out

    assert torch.equal(patch(model, X, Y), patched(X, Y))
    text = str(patch.lower(model, X, Y))
    assert re.search(r"^  session %\S+ = %model", text, re.M)
    assert text.count("\n    forward ") == 2


def test_loops_and_conditions_around_traces() -> None:
    inputs, norms, kept = [X, Y, X + Y], [], list()
    with model.session():
        total = 0.0
        for number, x in enumerate(inputs):
            with model.trace(x):
                h = model[1].output
            norm = h.norm().item()
            norms.append(norm)
            if norm > 1.0:
                with model.trace(x * number):
                    kept.append(model.output)
            total = total + norm
        last = h.save()
    expected = [NET[1](NET[0](x)).norm().item() for x in inputs]
    assert norms == expected
    assert abs(total - sum(expected)) < 1e-6
    wanted = [NET(x * number) for number, x in enumerate(inputs) if expected[number] > 1.0]
    assert len(kept) == len(wanted)
    assert all(map(torch.equal, kept, wanted))
    assert torch.equal(last, NET[1](NET[0](inputs[-1])))
    assert number == 2


def test_layers_in_a_loop_of_traces() -> None:
    with model.session():
        outs = list().save()
        for layer in range(3):
            with model.trace(X):
                model[layer].output = model[layer].output * 2
                outs.append(model.output)
    for layer, out in enumerate(outs):
        h = X
        for number, part in enumerate(NET):
            h = part(h) * (2 if number == layer else 1)
        assert torch.equal(out, h)


def test_a_module_chosen_by_an_earlier_trace() -> None:
    """A stage ends between two traces."""
    with model.session():
        with model.trace(X):
            layer = int(model.output.argmax()) % 3
        with model.trace(Y):
            h = model[layer].output.save()
    layer_expected = int(NET(X).argmax()) % 3
    assert torch.equal(h, NET[: layer_expected + 1](Y))


def test_plain_values_come_back() -> None:
    with model.session():
        with model.trace(X):
            shape = model[0].output.shape
        count = shape[0] + 1
        names = [f"trace {number}" for number in range(count)]
    assert shape == (2, 4)
    assert names == ["trace 0", "trace 1", "trace 2"]


def test_two_models() -> None:
    other = NNsight(nn.Linear(4, 4))
    with model.session():
        with model.trace(X):
            h = model[0].output
        with other.trace(h):
            out = other.output.save()
    assert torch.equal(out, other._wrapped(NET[0](X)))


def test_gradients_and_training_between_traces() -> None:
    vector = torch.zeros(4, requires_grad=True)
    with torch.enable_grad():
        optimiser = torch.optim.SGD([vector], lr=0.1)
        with model.session():
            losses = list().save()
            for _ in range(3):
                with model.trace(X):
                    model[0].output = model[0].output + vector
                    out = model.output
                loss = out.pow(2).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
    plain = torch.zeros(4, requires_grad=True)
    for loss in losses:
        with torch.enable_grad():
            expected = NET[1:](NET[0](X) + plain).pow(2).sum()
            (grad,) = torch.autograd.grad(expected, plain)
        assert torch.allclose(loss, expected, atol=1e-6)
        plain = (plain - 0.1 * grad).detach().requires_grad_()
    assert torch.allclose(vector, plain, atol=1e-6)


def test_an_error_in_one_trace_gives_back_nothing() -> None:
    """A session is one program: where it fails, no name is assigned; what was done to outer objects stays done."""
    first, seen = "before", []
    with pytest.raises(RuntimeError, match="broken"):  # noqa: PT012, SIM117
        with model.session():
            with model.trace(X):
                first = model[0].output.save()
                seen.append(1)
            with model.trace(Y):
                out = fail(model.output.save())
    assert first == "before"
    assert seen == [1]
    assert "out" not in locals()


def fail(value: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("broken")


TRACE = "with model.trace(x): h = model.output"
NESTED = f"    with model.session():\n        with model.session():\n            {TRACE}\n"
ITER = f"    with model.session() as s:\n        for i in s.iter(3):\n            {TRACE}\n"
REFUSED = [
    (NESTED, "a session cannot begin inside a session", 3),
    (f"    with model.trace(x):\n        with model.session():\n            {TRACE}\n",
     "a session cannot begin inside a forward", 3),
    (f"    with model.session(backend=1):\n        {TRACE}\n", "`.session()` takes no arguments (backend)", 2),
    ("    with model.session() as s:\n        with s.trace(x): h = 1\n", "a session has no `.trace`", 3),
    (ITER, "a session has no `.iter`", 3),
    ("    with model.session():\n        h = model[0].output\n", "values exist only while the model runs", 3),
    (f"    with model[0].session():\n        {TRACE}\n", "only a whole model can be traced", 2),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason", "line"), REFUSED)
def test_mistakes(body: str, reason: str, line: int) -> None:
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(f"def use(model, x):\n{body}    return h\n")(model, X)
    assert found.value.diagnostics[0].span.line == line
    assert "way out" in str(found.value)


def test_mistakes_in_blocks() -> None:
    with pytest.raises(ExperimentError, match=r"`.session\(…\)` without `with` runs nothing"):
        model.session()
    with pytest.raises(TraceArgumentError, match=r"`.session\(\)` takes no arguments but .* \(backend\)"):
        model.session(backend=1)
    with pytest.raises(CompileError, match="a session cannot begin inside a session"):  # noqa: PT012, SIM117
        with model.session():
            with model.session():
                with model.trace(X):
                    out = model.output.save()
    assert "out" not in locals()
