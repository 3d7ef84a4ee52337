"""Models and oracles for the tests of meaning: hand-written torch hooks, on the plain modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnsight_compiler import LanguageModel, NNsight

Hook = tuple[str, str, Callable[[Any], Any]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hooked() -> Callable[..., Any]:
    """`hooked(module, inputs, *hooks)` runs the plain module under hooks `(path, "output" | "input", function)`.

    A hook's function takes the value there, and what it returns replaces it, unless that is `None`. `input` means the
    first argument.
    """

    def run(module: nn.Module, inputs: torch.Tensor, *hooks: Hook, grad: bool = False) -> Any:
        handles = []
        for path, port, function in hooks:
            target = module.get_submodule(path)
            if port == "output":
                handles.append(target.register_forward_hook(lambda _m, _a, out, f=function: f(out)))
            else:

                def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], f: Any = function) -> Any:
                    if args:
                        new = f(args[0])
                        return None if new is None else ((new, *args[1:]), kwargs)
                    name = next(iter(kwargs))
                    new = f(kwargs[name])
                    return None if new is None else (args, {**kwargs, name: new})

                handles.append(target.register_forward_pre_hook(before, with_kwargs=True))
        try:
            with torch.set_grad_enabled(grad):
                return module(inputs)
        finally:
            for handle in handles:
                handle.remove()

    return run


@pytest.fixture(scope="session")
def grab(hooked) -> Callable[..., Any]:
    """`grab(module, inputs, path, port, *hooks)`: the value at one site, copied, in a run under hooks."""

    def run(module: nn.Module, inputs: torch.Tensor, path: str, port: str = "output", *hooks: Hook) -> torch.Tensor:
        held: list[torch.Tensor] = []

        def keep(value: Any) -> None:
            held.append((value if isinstance(value, torch.Tensor) else value[0]).detach().clone())

        hooked(module, inputs, *hooks, (path, port, keep))
        return held[-1]

    return run


def gpt2(layers: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=32, n_head=4, vocab_size=101, n_positions=32, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, max_position_embeddings=32, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def plain_gpt2() -> GPT2LMHeadModel:
    return gpt2(4)


@pytest.fixture(scope="session")
def model(plain_gpt2) -> LanguageModel:
    """A random GPT-2 of four layers, wrapped; the oracle uses the plain one."""
    return LanguageModel(plain_gpt2)


@pytest.fixture(params=["gpt2", "llama"], scope="session")
def either(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, str]:
    """A wrapped model, the plain module, and the path of its layers."""
    if request.param == "gpt2":
        plain: nn.Module = gpt2(3)
        return LanguageModel(plain), plain, "transformer.h"
    plain = llama(3)
    return LanguageModel(plain), plain, "model.layers"


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.tensor([[5, 17, 42, 3, 88, 9]])


@pytest.fixture
def corrupt() -> torch.Tensor:
    return torch.tensor([[5, 18, 41, 7, 60, 9]])


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


# --- modules of our own ---


@dataclass
class Reading:
    hidden: torch.Tensor
    norm: torch.Tensor


class Block(nn.Module):
    """A layer that returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        z = self.act(y)
        return x + z, z.mean(-1)


class AsDict(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"hidden": y, "norm": y.norm(dim=-1)}


class AsDataclass(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Reading:
        y = self.linear(x)
        return Reading(hidden=y, norm=y.norm(dim=-1))


class Stack(nn.Module):
    """Tuple layers, a shared module called twice, tied modules, a dict and a dataclass on the way."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.shared = nn.Linear(width, width)
        self.mapping = AsDict(width)
        self.record = AsDataclass(width)
        self.first = nn.Linear(width, width)
        self.tied = self.first
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(x)
        x = self.shared(x)
        x = self.shared(torch.tanh(x))
        held = self.mapping(x)
        x = held["hidden"] / (1 + held["norm"].unsqueeze(-1))
        found = self.record(x)
        x = found.hidden + found.norm.unsqueeze(-1)
        return self.head(self.first(x))


@pytest.fixture
def plain_stack() -> Stack:
    torch.manual_seed(2)
    return Stack().eval()


@pytest.fixture
def stack(plain_stack) -> NNsight:
    return NNsight(plain_stack)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def counts() -> Iterator[Callable[[nn.Module], dict[str, int]]]:
    """Counts how often each module of a model is called, by path."""
    handles = []

    def start(module: nn.Module) -> dict[str, int]:
        seen: dict[str, int] = {}
        for name, each in module.named_modules():

            def note(*_: Any, name: str = name) -> None:
                seen[name] = seen.get(name, 0) + 1

            handles.append(each.register_forward_pre_hook(note))
        return seen

    yield start
    for handle in handles:
        handle.remove()
