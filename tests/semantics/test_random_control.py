"""Random skips, stops and reads of calls, on small modules with their layers in a random order, against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene


class Net(nn.Module):
    """Runs its layers in a given order, some of them several times."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            x = torch.tanh(self.layers[layer](x))
        return x


@intervene
def experiment(model, x, skips, reads, stop):
    with model.trace(x) as tracer:
        for layer, call, scale in skips:
            one = model.layers[layer].calls[call]
            one.skip(one.input * scale)
        values = [model.layers[layer].calls[call].output for layer, call in reads]
        if stop:
            tracer.stop()
        else:
            values.append(model.output)
    return values


X = torch.linspace(-1, 1, 6).reshape(2, 3)


@st.composite
def cases(draw):
    order = tuple(draw(st.lists(st.integers(0, 2), min_size=2, max_size=6)))
    calls = [(layer, order[:place].count(layer)) for place, layer in enumerate(order)]
    skips = draw(st.lists(st.sampled_from(calls), unique=True, max_size=3))
    reads = tuple(draw(st.lists(st.sampled_from(calls), unique=True, min_size=1, max_size=4)))
    scaled = tuple((layer, call, draw(st.sampled_from([0.0, 0.5, 2.0]))) for layer, call in skips)
    return order, scaled, reads, draw(st.booleans())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases())
@torch.no_grad()
def test_as_plain_torch(case) -> None:
    order, skips, reads, stop = case
    torch.manual_seed(0)
    net = Net(order).eval()
    ran: list[int] = []
    for number, layer in enumerate(net.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    scales = {(layer, call): scale for layer, call, scale in skips}
    outputs, x, times = {}, X, {}
    for time, layer in enumerate(order):
        key = layer, order[:time].count(layer)
        linear = net.layers[layer]
        outputs[key] = x * scales[key] if key in scales else nn.functional.linear(x, linear.weight, linear.bias)
        times[key] = time
        x = torch.tanh(outputs[key])
    expected = [outputs[key] for key in reads] + ([] if stop else [x])
    if stop and any(times[key] > max(times[read] for read in reads) for key in scales):
        with pytest.raises(CompileError, match="reach nothing"):
            experiment(NNsight(net), X, skips, reads, stop)
        return
    found = experiment(NNsight(net), X, skips, reads, stop)
    assert all(map(torch.equal, found, expected))
    if stop:
        assert len(ran) == 1 + max(times[read] for read in reads)
    assert not any("forward" in vars(layer) for layer in net.layers)
