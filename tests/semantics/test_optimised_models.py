"""Models made to break merged and shared forwards, against plain torch, and how many forwards and rows really run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.runtime import batching

WIDTH = 4


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = linear(), linear(), linear()

    def forward(self, x: torch.Tensor) -> Any:
        return self.third(self.second(self.first(x).tanh()).tanh())


class Skipping(Plain):
    """As a U-Net: what goes down is added on the way up, and the way up uses the modules of the way down's values."""

    def forward(self, x: torch.Tensor) -> Any:
        down = self.first(x)
        return self.third(self.second(down.tanh()) + down) + down


class InPlace(Plain):
    """What the first module gave is changed by the activation, and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        b = self.act(a)
        return self.third(self.second(b) + a)


class Through(Plain):
    """A module returns what it is given, and the model goes on to change that."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        b = self.same(a)
        a += 1
        return self.third(self.second(a) + b)


class Direct(Plain):
    """Calls the `forward` of a module again by itself, which no hook sees."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        return self.third(self.second(self.first.forward(a).tanh()))


class Numbered(Plain):
    """A module is called inside of a block, and again by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(linear(), self.second)

    def forward(self, x: torch.Tensor) -> Any:
        return self.third(self.second(self.block(self.first(x)).tanh()))


class Collect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, self.inner(x)]


class Listing(Plain):
    """A module returns a list, and the model goes on to fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.collect = Collect()

    def forward(self, x: torch.Tensor) -> Any:
        found = self.collect(self.first(x))
        found.append(self.second(found[-1]))
        return self.third(torch.stack(found).sum(0))


@dataclass
class Pair:
    hidden: torch.Tensor
    count: int


class Wrap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(self.inner(x), 1)


class Recording(Plain):
    """A module returns an object, which the model goes on to change."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = Wrap()

    def forward(self, x: torch.Tensor) -> Any:
        pair = self.wrap(self.first(x))
        pair.count += 1
        pair.hidden = pair.hidden * pair.count
        return self.third(self.second(pair.hidden))


class Noting(nn.Module):
    def __init__(self, notes: dict[str, Any]) -> None:
        super().__init__()
        self.inner = linear()
        self.notes = notes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes["seen"] = x * 2
        return self.inner(x)


class Aside(Plain):
    """A module leaves something where a later one finds it."""

    def __init__(self) -> None:
        super().__init__()
        notes: dict[str, Any] = {}
        self.noting = Noting(notes)
        self.held = notes

    def forward(self, x: torch.Tensor) -> Any:
        a = self.noting(self.first(x))
        return self.third(self.second(a) + self.held.pop("seen"))


class Mixing(Plain):
    """Each row sees the mean of all."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        return self.third(self.second(a - a.mean(0, keepdim=True)).tanh())


class Counting(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


class Buffered(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


class Logging(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.log.append(len(x))
        return super().forward(x) * len(self.log)


class Changing(Plain):
    def forward(self, x: torch.Tensor) -> Any:
        x += 1
        return super().forward(x)


class Drawing(Plain):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x + torch.rand_like(x))


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.norm(x))


class Dropping(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.drop(x))


@intervene
def sweep(model, x):
    found = []
    for entry in range(3):
        with model.trace(x):
            early = model.first.output.sum()
            model.second.output[:, entry] = 1
            out = model.third.output
        found.append((early, out))
    return found


def by_hand(module: nn.Module, x: torch.Tensor) -> list[Any]:
    """The same sweep with plain hooks."""
    found = []
    for entry in range(3):
        early: list[torch.Tensor] = []
        late: list[torch.Tensor] = []
        seen = [0]

        def change(_m: Any, _a: Any, output: torch.Tensor, entry: int = entry, seen: list[int] = seen) -> None:
            seen[0] += 1
            output[:, entry] = 1

        handles = [
            module.first.register_forward_hook(lambda _m, _a, output, early=early: early.append(output.sum())),
            module.second.register_forward_hook(change),
            module.third.register_forward_hook(lambda _m, _a, output, late=late: late.append(output.clone())),
        ]
        try:
            with torch.no_grad():
                module(x)
        finally:
            for handle in handles:
                handle.remove()
        found.append((early[0], late[0]))
    return found


def made(kind: type[nn.Module], training: bool = False) -> nn.Module:
    torch.manual_seed(3)
    module = kind()
    return module.train(training)


def why_not(kind: type[nn.Module], name: str, training: bool = False) -> list[str]:
    compiled = sweep.compile(NNsight(made(kind, training)), torch.ones(2, WIDTH))
    return [remark.what for remark in compiled.remarks if remark.optimisation == name and not remark.fired]


EVERY = [
    Plain, Skipping, InPlace, Through, Direct, Listing, Recording, Aside, Mixing, Counting, Buffered, Logging, Normed,
]  # fmt: skip


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("training", [False, True])
def test_a_sweep_equals_hooks(kind: type[nn.Module], training: bool) -> None:
    x = torch.linspace(-1, 2, 2 * WIDTH).reshape(2, WIDTH)
    wanted = by_hand(made(kind, training), x.clone())
    found = sweep(NNsight(made(kind, training)), x.clone())
    for (early, out), (other_early, other_out) in zip(found, wanted, strict=True):
        torch.testing.assert_close(early, other_early, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out, other_out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Drawing, Dropping])
def test_what_is_drawn_is_drawn_in_order(kind: type[nn.Module]) -> None:
    x = torch.linspace(-1, 2, 2 * WIDTH).reshape(2, WIDTH)
    modules = made(kind, True), made(kind, True)
    torch.manual_seed(5)
    wanted = by_hand(modules[0], x.clone())
    model = NNsight(modules[1])
    sweep.compile(model, x.clone())
    torch.manual_seed(5)
    found = sweep(model, x.clone())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kind", "training", "reason"),
    [
        (Counting, False, "`the model` keeps something of its own from one forward to the next"),
        (Logging, False, "`the model` keeps something of its own from one forward to the next"),
        (Buffered, False, "draws random numbers, or changes a buffer, in the order of the program"),
        (Drawing, False, "`the model` draws random numbers"),
        (Changing, False, "the model writes in place to what it is given"),
        (Dropping, True, "the model is in training mode, in which rows may depend on one another"),
    ],
)
def test_why_rounds_are_not_merged(kind: type[nn.Module], training: bool, reason: str) -> None:
    assert any(reason in each for each in why_not(kind, "merge_forwards", training))


# --- calls ---


@intervene
def second_call(model, x):
    found = []
    for scale in (2.0, 3.0):
        with model.trace(x):
            model.second.calls[1].output *= scale
            out = model.third.output
        found.append(out)
    return found


def test_a_call_keeps_its_number_where_the_one_before_it_is_replayed() -> None:
    x = torch.linspace(-1, 2, 2 * WIDTH).reshape(2, WIDTH)
    found = second_call(NNsight(made(Numbered)), x)
    module = made(Numbered)
    with torch.no_grad():
        middle = module.second(module.block(module.first(x)).tanh())
        for out, scale in zip(found, (2.0, 3.0), strict=True):
            torch.testing.assert_close(out, module.third(middle * scale))


# --- how much runs ---


class Count:
    """Counts forwards and rows of a module, where they really run."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        plain = module.forward

        def counting(x: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(x))
            return plain(x)

        module.forward = counting  # type: ignore[method-assign]


def test_a_sweep_is_one_run_of_what_is_alike_and_one_of_all_rows() -> None:
    module = made(Plain)
    counts = {name: Count(part) for name, part in module.named_children()}
    model, x = NNsight(module), torch.ones(1, WIDTH)
    for _ in range(2):
        for count in counts.values():
            count.rows.clear()
        sweep(model, x)
    assert {name: count.rows for name, count in counts.items()} == {"first": [1], "second": [1], "third": [3]}


@intervene
def over_prompts(model, xs):
    found = []
    for x in xs:
        with model.trace(x):
            model.first.output[..., 0] = 0
            out = model.third.output.sum()
        found.append(out)
    return found


def test_prompts_of_two_lengths_are_two_forwards() -> None:
    module = made(Plain)
    count = Count(module.third)
    model = NNsight(module)
    xs = [torch.full((1, tokens, WIDTH), float(number)) for number, tokens in enumerate((3, 4, 3, 4, 3))]
    with model.trace(xs[0]):
        model.third.output.save()
    count.rows.clear()
    found = over_prompts(model, xs)
    assert sorted(count.rows) == [2, 3]
    alone = over_prompts.with_options(without="all")(model, xs)
    torch.testing.assert_close(found, alone)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "ENOUGH", {"cpu": 2, "cuda": 2})
    module = made(Plain)
    count = Count(module.third)
    model, xs = NNsight(module), [torch.full((1, WIDTH), float(number)) for number in range(5)]
    with model.trace(xs[0]):
        model.third.output.save()
    count.rows.clear()
    found = over_prompts(model, xs)
    assert count.rows == [2, 2, 1]
    torch.testing.assert_close(found, over_prompts.with_options(without="all")(model, xs))
