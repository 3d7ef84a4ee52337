"""Random whole programs: we and the statement oracle give equal values, equal logs, equal exceptions.

Each program runs three times through the same experiment, with other arguments."""

from __future__ import annotations

import linecache
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from random_examples import examples
from statement_oracle import OutsideError, StandIn, keep
from statement_programs import LAYERS, TOKENS, WIDTH, programs
from torch import nn

from nnsight_compiler import NNsight, UnusedValueWarning, intervene, save

CALLS = [
    {"seed": 1, "layer": 1, "layers": (0, 2), "numbers": [3, 1, 2], "scale": 0.5},
    {"seed": 2, "layer": 3, "layers": (0, 2), "numbers": [5], "scale": -1.5},
    {"seed": 3, "layer": 1, "layers": (3, 1, 1), "numbers": [0, 4, 7], "scale": 2.0},
]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) + 0.5 * x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    return Net().eval()


def load(text: str, **names: Any) -> dict[str, Any]:
    """Runs a program's module, with its text where tracebacks and compilers find it."""
    file = f"<program {hash(text)}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    namespace: dict[str, Any] = {"__name__": "program", **names}
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    return namespace


def outcome(namespace: dict[str, Any], model: Any, seed: int, **arguments: Any) -> dict[str, Any]:
    """All that one call shows: what it returns or raises, its log, and the state that it leaves."""
    namespace["LOG"].clear()
    arguments["numbers"] = list(arguments["numbers"])
    arguments["state"] = namespace["State"]()
    arguments["x"] = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    random.seed(seed)
    result: Any = None
    raised = ""
    try:
        result = namespace["program"](model, **arguments)
    except OutsideError:
        raise
    except (ArithmeticError, LookupError, NameError, ValueError) as error:
        raised = "NameError" if isinstance(error, NameError) else type(error).__name__
    return {
        "result": result,
        "raised": raised,
        "log": list(namespace["LOG"]),
        "state": vars(arguments["state"]),
        "numbers": arguments["numbers"],
        "globals": (namespace["CALLS"], namespace["FACTOR"], dict(namespace["TABLE"])),
        "random": random.random(),
        "x": arguments["x"],
    }


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)
    return type(ours) is type(theirs) and repr(ours) == repr(theirs)


def hooked(net: nn.Module) -> list[str]:
    return [
        name
        for name, module in net.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]


def expected(text: str, net: nn.Module) -> list[dict[str, Any]]:
    namespace = load(text, intervene=lambda function: function, save=keep)
    model = StandIn(net)
    return [outcome(namespace, model, **call) for call in CALLS]


def compare(text: str, net: nn.Module) -> None:
    try:
        wanted = expected(text, net)
    except OutsideError:
        assume(False)
    namespace = load(text, intervene=intervene, save=save)
    model = NNsight(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedValueWarning)
        for number, (call, want) in enumerate(zip(CALLS, wanted, strict=True)):
            found = outcome(namespace, model, **call)
            for part, value in want.items():
                assert equal(found[part], value), (
                    f"call {number}: {part} is\n{found[part]}\nand should be\n{value}\nin\n{text}"
                )
            assert not hooked(net)


def profile(staged: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda test: examples(20)(given(text=programs(staged))(test))


@profile(staged=False)
def test_programs_of_one_stage(net: Net, text: str) -> None:
    compare(text, net)


@profile(staged=True)
def test_programs_of_several_stages(net: Net, text: str) -> None:
    compare(text, net)
