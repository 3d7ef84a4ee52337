"""Random programs of reads, writes and gradients mean what they mean in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from torch import nn

from nnsight_compiler import NNsight, intervene

LAYERS = 4


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


@pytest.fixture(scope="module")
def net() -> Chain:
    torch.manual_seed(0)
    return Chain().double().eval()


class Program:
    """A random program, as source for an experiment and as hooks for torch."""

    def __init__(self, draw: Any) -> None:
        pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
        sites = list(range(LAYERS))
        self.replaced = {site: pick(None, None, "h * 0.5", "h + 1", "torch.sin(h)") for site in sites}
        self.written = {site: pick(None, None, None, "g * 2", "g + 1", "g.clamp(-0.1, 0.1)") for site in sites}
        self.in_place = pick(True, False)
        self.slices = {site: pick("", "[:, -1]", "[0]", "[0, 1:]") for site in sites}
        self.asked = draw(st.permutations(sites))[: draw(st.integers(1, LAYERS))]
        self.losses = draw(st.integers(1, 2))
        self.after = pick(True, False)

    def source(self) -> str:
        lines = ["def run(model, x):", "    with model.trace(x):"]
        for site in reversed(range(LAYERS)):  # the order of the source is not that of the model
            lines.append(f"        h{site} = model.layers[{site}].output")
            if self.replaced[site]:
                value = self.replaced[site].replace("h", f"h{site}", 1) if "sin" not in self.replaced[site] else ""
                lines.append(f"        n{site} = {value or f'torch.sin(h{site})'}")
                lines.append(f"        model.layers[{site}].output = n{site}")
        lines += [f"        s{site} = h{site}{self.slices[site]}" for site in self.asked]
        lines.append("        out = model.output")
        inner = "    " if self.after else "        "
        for number in range(self.losses):
            keep = "True" if number + 1 < self.losses else "False"
            loss = ("out.square().sum()", "out[:, 0].sin().sum()")[number]
            lines.append(f"{inner}with {loss}.backward(retain_graph={keep}):")
            for site in self.asked:
                name = f"h{site}"
                lines.append(f"{inner}    a{number}_{site} = s{site}.grad")
                if number == 0 and self.written[site]:
                    new = self.written[site].replace("g", f"{name}.grad", 1)
                    if self.in_place and self.written[site] == "g * 2":
                        lines.append(f"{inner}    {name}.grad *= 2")
                    else:
                        lines.append(f"{inner}    {name}.grad = {new}")
        results = [f"a{number}_{site}" for number in range(self.losses) for site in self.asked]
        lines.append(f"    return ({', '.join(results)},)")
        return "\n".join(lines) + "\n"

    def truth(self, net: Chain, x: torch.Tensor) -> list[torch.Tensor]:
        values: dict[int, torch.Tensor] = {}
        space: dict[str, Any] = {"torch": torch}
        handles = []
        for site, layer in enumerate(net.layers):

            def hook(_: nn.Module, __: Any, h: torch.Tensor, site: int = site) -> torch.Tensor | None:
                values[site] = h
                change = self.replaced[site]
                return eval(change, space, {"h": h}) if change else None

            handles.append(layer.register_forward_hook(hook))
        out = net(x)
        for handle in handles:
            handle.remove()
        found = []
        for number in range(self.losses):
            loss = (out.square().sum(), out[:, 0].sin().sum())[number]
            seen: dict[int, torch.Tensor] = {}
            hooks = []
            for site in self.asked:

                def arrive(g: torch.Tensor, site: int = site, number: int = number, seen: Any = seen) -> Any:
                    seen[site] = g.clone()
                    change = self.written[site] if number == 0 else None
                    new = eval(change, space, {"g": g}) if change else None
                    if self.in_place and change == "g * 2" and not self.slices[site]:
                        seen[site] = new.clone()  # what was read is the tensor that `*=` changes
                    return new

                hooks.append(values[site].register_hook(arrive))
            torch.autograd.backward(loss, inputs=list(net.parameters()), retain_graph=True)
            for each in hooks:
                each.remove()
            found += [eval(f"g{self.slices[site]}", space, {"g": seen[site]}) for site in self.asked]
        for parameter in net.parameters():
            parameter.grad = None
        return found


@pytest.fixture(scope="module")
def model(net: Chain) -> NNsight:
    return NNsight(net)


@given(data=st.data())
@examples(4)
def test_gradients_of_random_programs(net: Chain, model: NNsight, data: st.DataObject) -> None:
    program = Program(data.draw)
    torch.manual_seed(1)
    x = torch.randn(2, 3, dtype=torch.float64)
    source = program.source()
    found = intervene.from_source(source, {"torch": torch})(model, x)
    wanted = program.truth(net, x)
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12), source
    assert all(parameter.grad is None for parameter in net.parameters())


def test_writes_of_gradients_do_not_wait_for_one_another(net: Chain, model: NNsight) -> None:
    @intervene
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        with model.trace(x):
            first, last = model.layers[0].output, model.layers[3].output
            before = model.layers[0].input
            with model.output.square().sum().backward():
                first.grad *= 2  # the last of both to arrive, and the first in the source
                last.grad = last.grad + 1
                gradient = before.grad
        return gradient

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    given = x.clone().requires_grad_()
    first = net.layers[0](given)
    stream = torch.tanh(first) + given
    for layer in list(net.layers)[1:]:
        last = layer(stream)
        stream = torch.tanh(last) + stream
    first.register_hook(lambda g: g * 2)
    last.register_hook(lambda g: g + 1)
    (wanted,) = torch.autograd.grad(stream.square().sum(), [given])
    assert torch.allclose(run(model, x), wanted, rtol=1e-9, atol=1e-12)


def test_what_a_written_gradient_needs_keeps_its_order(net: Chain, model: NNsight) -> None:
    @intervene
    def run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace(x):
            h = model.layers[0].output
            loss = model.output.sum()
            with loss.backward(retain_graph=True):
                plain = h.grad
            with loss.backward():
                new = h.grad * 3
                h.grad = new
                again = h.grad
                new.mul_(2)  # `again` is that tensor
                h.grad = again * 1
                written = h.grad
        return plain, written

    plain, written = run(model, torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(written, plain * 6, rtol=1e-9, atol=1e-12)
