"""Random programs over several invokes: each gives what the same statements give for its input alone, run by hand."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_compiler import NNsight, intervene

torch.set_num_threads(1)
torch.manual_seed(0)


class Pair(nn.Module):
    """Gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.two(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pair, self.b = nn.Linear(4, 4), Pair(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.pair(self.a(x).tanh())
        return self.b(one * two)


NET = Net()
STATEMENTS = {
    "h = model.a.output; model.a.output = h * 2; kept.append(h)": ("a", lambda h: h * 2, True),
    "model.a.output[:, 0] = 3": ("a", lambda h: h.index_fill(1, torch.tensor([0]), 3.0), False),
    "model.a.output = 1.5": ("a", lambda h: torch.full_like(h, 1.5), False),
    "h = model.pair.output[0]; model.pair.output[0] = h + 1; kept.append(h)": ("pair.one", lambda h: h + 1, True),
    "model.pair.two.output[:] *= 0.5": ("pair.two", lambda h: h * 0.5, False),
    "h = model.b.output; model.b.output = -h; kept.append(h)": ("b", lambda h: -h, True),
    "model.b.output += 1": ("b", lambda h: h + 1, False),
}
SITES = ("a", "pair.one", "pair.two", "b")


def by_hand(statements: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    """The same, module by module; what is kept in the order of the statements, then the output."""
    kept: dict[int, torch.Tensor] = {}

    def through(site: str, value: torch.Tensor) -> torch.Tensor:
        for number, statement in enumerate(statements):
            path, change, keeps = STATEMENTS[statement]
            if path == site:
                if keeps:
                    kept[number] = value
                value = change(value)
        return value

    with torch.no_grad():
        hidden = through("a", NET.a(x)).tanh()
        one, two = through("pair.one", NET.pair.one(hidden)), through("pair.two", NET.pair.two(hidden))
        out = through("b", NET.b(one * two))
    return [*(kept[number] for number in sorted(kept)), out]


programs = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(STATEMENTS)), max_size=4), st.integers(1, 3)), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(programs)
def test_random_invokes_are_each_as_alone(program: list[tuple[list[str], int]]) -> None:
    lines = ["def use(model, xs):", "    results = []", "    with model.trace() as tracer:"]
    for number, (statements, _) in enumerate(program):
        lines += [f"        with tracer.invoke(xs[{number}]):", "            kept = []"]
        lines += [f"            {part}" for statement in statements for part in statement.split("; ")]
        lines += ["            kept.append(model.output)", "            results.append(kept)"]
    text = "\n".join([*lines, "    return results", ""])
    inputs: list[Any] = [torch.randn(rows, 4) for _, rows in program]
    found = intervene.from_source(text)(NNsight(NET), inputs)
    for (statements, _), x, values in zip(program, inputs, found, strict=True):
        for value, expected in zip(values, by_hand(statements, x), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
