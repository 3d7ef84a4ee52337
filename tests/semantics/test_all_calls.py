"""All calls of a module that a forward calls several times. The oracle: torch hooks on the plain module."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, RunError, intervene


class Cell(nn.Module):
    """Runs `step` once for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x[:, 0])
        for position in range(x.shape[1]):
            h = self.step(h + x[:, position])
        return self.head(h)


class Deep(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = self.lin(x)
        return self(x, depth - 1) + x if depth else x


class Tied(nn.Module):
    """One module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


class Halting(nn.Module):
    """How often it runs its part depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.sum() < 100:
            x = self.part(x) * 2
        return x


def outputs(net: nn.Module, path: str, *inputs: Any) -> list[torch.Tensor]:
    """What each call of a module returned, in the order in which the calls began."""
    seen: list[Any] = []
    open_calls: list[int] = []

    def before(_: nn.Module, args: Any) -> None:
        open_calls.append(len(seen))
        seen.append(None)

    def after(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen[open_calls.pop()] = out.clone()

    part = net.get_submodule(path)
    handles = part.register_forward_pre_hook(before), part.register_forward_hook(after)
    with torch.no_grad():
        net(*inputs)
    for handle in handles:
        handle.remove()
    return seen


torch.manual_seed(0)
CELL, DEEP, TIED = Cell().eval(), Deep().eval(), Tied().eval()
X = torch.randn(2, 3, 4)


def same(found: Any, expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_a_list_of_all() -> None:
    @intervene
    def read(model, x):
        with model.trace(x):
            values = [call.output for call in model.step.calls]
            count = len(model.step.calls)
        return values, count

    model = NNsight(CELL)
    values, count = read(model, X)
    same(values, outputs(CELL, "step", X))
    assert count == 3
    longer = torch.randn(2, 5, 4)
    values, count = read(model, longer)  # the count depends on the input
    same(values, outputs(CELL, "step", longer))
    assert count == 5
    assert read.cache_info().misses == 2
    read(model, torch.randn(2, 5, 4))
    assert read.cache_info().misses == 2


@torch.no_grad()
def test_in_a_block() -> None:
    model = NNsight(CELL)
    for x in (X, torch.randn(1, 2, 4)):
        with model.trace(x):
            values = list().save()
            for number, call in enumerate(model.step.calls):
                values.append(call.output + number)
        same(values, [each + number for number, each in enumerate(outputs(CELL, "step", x))])


@torch.no_grad()
@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(None, -1), slice(None, None, -1), slice(0, 2)])
def test_slices(part: slice) -> None:
    @intervene
    def read(model, x, part):
        with model.trace(x):
            values = [call.output for call in model.step.calls[part]]
        return values

    same(read(NNsight(CELL), X, part), outputs(CELL, "step", X)[part])


@torch.no_grad()
def test_zip_reversed_and_unpacking() -> None:
    @intervene
    def read(model, x):
        with model.trace(x):
            first, *_, last = model.step.calls[:]
            pairs = [a.output - b.output for a, b in zip(model.step.calls[1:], model.step.calls, strict=False)]
            back = [call.input for call in reversed(model.step.calls)]
            ends = first.output, last.output
        return ends, pairs, back

    ends, pairs, back = read(NNsight(CELL), X)
    seen = outputs(CELL, "step", X)
    same(ends, [seen[0], seen[-1]])
    same(pairs, [seen[1] - seen[0], seen[2] - seen[1]])
    assert len(back) == 3


@torch.no_grad()
def test_writes_and_skips_in_a_loop() -> None:
    @intervene
    def write(model, x):
        with model.trace(x):
            for number, call in enumerate(model.step.calls):
                if number % 2:
                    call.output = call.output * number
                else:
                    call.skip(call.input)
            out = model.output
        return out

    h = torch.zeros(2, 4)
    for position in range(3):
        given = h + X[:, position]
        h = CELL.step(given) * position if position % 2 else given
    assert torch.equal(write(NNsight(CELL), X), CELL.head(h))


@torch.no_grad()
def test_a_module_that_is_called_once() -> None:
    @intervene
    def read(model, x):
        with model.trace(x):
            values = [call.output for call in model.head.calls]
        return values

    same(read(NNsight(CELL), X), [CELL(X)])


@torch.no_grad()
@pytest.mark.parametrize("call", [0, 1, -1])
def test_a_module_that_calls_itself(call: int) -> None:
    @intervene
    def read(model, x, call):
        with model.trace(x):
            values = [each.output for each in model.calls]
            inner = model.lin.calls[call].output
        return values, inner

    x = torch.randn(2, 4)
    values, inner = read(NNsight(DEEP), x, call)
    same(values, outputs(DEEP, "", x))
    assert torch.equal(inner, outputs(DEEP, "lin", x)[call])


@torch.no_grad()
def test_one_module_under_two_paths() -> None:
    @intervene
    def read(model, x):
        with model.trace(x):
            one = [call.output for call in model.one.calls]
            two = [call.output for call in model.two.calls]
        return one, two

    x = torch.randn(2, 4)
    one, two = read(NNsight(TIED), x)
    same(one, outputs(TIED, "one", x))
    same(two, one)


@torch.no_grad()
def test_a_count_that_depends_on_numbers_is_noticed() -> None:
    @intervene
    def read(model, x):
        with model.trace(x):
            values = [call.output for call in model.part.calls]
        return values

    net = Halting()
    model = NNsight(net)
    same(read(model, torch.ones(4)), outputs(net, "part", torch.ones(4)))
    with pytest.raises(RunError, match="ran 6 times in this forward, but 5 times in the one"):
        read(model, torch.ones(4) * 0.5)


REFUSED = [
    ("h = model.step.calls.output", "`.calls` needs the number of the call"),
    ("h = model.step.calls[3].output", "`step` is called 3 times in one forward; there is no call 3"),
    ("h = model.step.calls[-4].output", "`step` is called 3 times in one forward; there is no call -4"),
    ('h = model.step.calls["a"].output', "`.calls` takes the number of a call, or a slice"),
    ("h = model.step.calls[0][0]", "this is one call of a module, which has no items"),
    ("h = [each for each in model.step.calls[0]]", "this is one call of a module, which cannot be iterated"),
    ("h = model.step.output", "`step` is called 3 times in one forward"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_mistakes(body: str, reason: str) -> None:
    text = f"def use(model, x):\n    with model.trace(x):\n        {body}\n    return h\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(NNsight(CELL), X)
    assert found.value.diagnostics[0].span.line == 3


def test_a_module_that_does_not_run() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.add_module("spare", nn.Identity())
    net.forward = lambda x: net[0](x)
    body = "        h = [c.output for c in model.spare.calls]\n"
    text = f"def use(model, x):\n    with model.trace(x):\n{body}    return h\n"
    with pytest.raises(CompileError, match="`spare` is never called in this forward"):
        intervene.from_source(text)(NNsight(net), torch.ones(1, 4))
