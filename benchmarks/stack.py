"""The model of the call-cost benchmark, and its experiments written by hand with torch hooks.

Used from two environments, ours and nnsight's, so that both meet the same baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROUNDS = 2000
TOLERANCE = 1e-4


class Stack(nn.Module):
    """Four `Linear(8)`. What is saved comes last, so that no contestant can save time by ending the forward there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class IdleStack(Stack):
    """With 200 more layers which never run: a bigger module tree, and the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleList(nn.Linear(8, 8) for _ in range(200))


class LongStack(IdleStack):
    """With 200 more layers which run first and which no experiment touches."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.idle:
            x = layer(x)
        return super().forward(x)


class ControlStack(Stack):
    """With as much work before the four layers as in `LongStack`, but not done by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(200):
            x = nn.functional.linear(x, self.weight)
        return super().forward(x)


STACKS: dict[str, type[Stack]] = {
    "four layers": Stack,
    "and 200 that do not run": IdleStack,
    "and 200 that run": LongStack,
    "and 200 products without modules": ControlStack,
}


def make_stack(kind: str = "four layers") -> tuple[Stack, Tensor]:
    """A stack with seeded weights, and an input for it, `[rows=4, width=8]`."""
    torch.manual_seed(0)
    return STACKS[kind]().eval(), torch.randn(4, 8)


def hooks_one(model: Stack, x: Tensor) -> Tensor:
    """Saves the last layer's output."""
    saved = []
    handle = model.layers[3].register_forward_hook(lambda module, arguments, output: saved.append(output.clone()))
    try:
        model(x)
    finally:
        handle.remove()
    return saved[0]


def hooks_all(model: Stack, x: Tensor) -> list[Tensor]:
    """Saves every layer's output."""
    saved = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        saved.append(output.clone())

    handles = [layer.register_forward_hook(keep) for layer in model.layers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return saved


def hooks_write(model: Stack, x: Tensor) -> Tensor:
    """Zeroes one layer's output in place and returns the model's."""

    def zero(module: nn.Module, arguments: object, output: Tensor) -> None:
        output[:] = 0

    handle = model.layers[1].register_forward_hook(zero)
    try:
        return model(x)
    finally:
        handle.remove()


BY_HAND: dict[str, Callable[[Stack, Tensor], Tensor | list[Tensor]]] = {
    "save one layer": hooks_one,
    "save all four layers": hooks_all,
    "write one layer": hooks_write,
}


def check_equal(case: str, expected: Tensor | list[Tensor], actual: Tensor | list[Tensor]) -> None:
    """Stops the benchmark where two contestants do not return the same: a faster wrong answer is a bug."""
    wanted = expected if isinstance(expected, list) else [expected]
    got = actual if isinstance(actual, list) else [actual]
    if len(wanted) != len(got):
        raise SystemExit(f"{case}: {len(wanted)} values expected, {len(got)} returned")
    worst = max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True))
    if worst >= TOLERANCE:
        raise SystemExit(f"{case}: results differ by {worst:.2g}")
