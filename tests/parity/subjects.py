"""The models that the programs of this folder run on, made the same way for either library.

A program names what it runs on by its parameters: `def zero_one(net)`. A wrapper serves all programs of a process, so
that what a library finds out about a model is found once; `own_net` is one of the program's own, which it may change.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TINY = Path(__file__).parents[2] / "nnsight_compiler" / "models" / "tiny"
"""The model that comes with the package: a GPT-2 of three layers, trained on a few facts."""


class Net(nn.Module):
    """Three linear layers and a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return self.head(x)


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.act(self.linear(x))
        return x + y, y.mean(-1)


class Named(nn.Module):
    """Takes keywords and returns a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, *, value: torch.Tensor, bias: float = 0.0) -> dict[str, torch.Tensor]:
        hidden = self.linear(value) + bias
        return {"hidden": hidden, "norm": hidden.norm(dim=-1)}


class Mixed(nn.Module):
    """Tuples, keywords, a dict, and a module that is called twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(Pair(width) for _ in range(2))
        self.named = Named(width)
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs:
            x, _ = pair(x)
        found = self.named(value=x, bias=0.5)
        x = found["hidden"] / (1 + found["norm"].unsqueeze(-1))
        x = self.shared(torch.tanh(self.shared(x)))
        return self.head(x)


class Picture(nn.Module):
    """Convolutions, a batch norm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2))
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).flatten(1))


class Reader(nn.Module):
    """A recurrent network: its `GRU` returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.rnn = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.embed(ids))
        return self.head(states)


class Table(nn.Module):
    """A constant of two rows and three columns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.arange(6.0).reshape(2, 3))

    def forward(self, scale: float) -> torch.Tensor:
        return self.values * scale


class Tabled(LlamaForCausalLM):
    """A language model that looks into a table of its own, whatever its input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.table = Table()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        found = super().forward(input_ids, attention_mask=attention_mask, **options)
        found.logits = found.logits + self.table(0.5).sum()
        return found


LLAMA = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1007, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip

MODULES = {
    "model": lambda: AutoModelForCausalLM.from_pretrained(TINY),
    "eager": lambda: AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager"),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tabled": lambda: Tabled(LlamaConfig(**LLAMA)),
    "net": Net,
    "mixed": Mixed,
    "picture": Picture,
    "reader": Reader,
}
"""How the torch module of each subject is made."""

RENAMES = {"renamed": {"transformer.h": "blocks", "mlp": "ff"}, "misnamed": {"transformer.hh": "blocks"}}
"""Subjects that are the model with names of the user's."""


@functools.cache
def plain(name: str) -> nn.Module:
    """The torch module of a subject, which nobody wraps: it is copied first."""
    torch.manual_seed(7)
    module: nn.Module = MODULES["model" if name in RENAMES else name]()
    return module.eval()


@functools.cache
def tokenizer() -> Any:
    """The tokenizer of the tiny model."""
    return AutoTokenizer.from_pretrained(TINY)


def wrapped(name: str, library: ModuleType) -> Any:
    """A wrapper of the library's around a copy of a subject."""
    if name.startswith("own_"):
        return _wrapped(name.removeprefix("own_"), library)
    return _shared(name, library)


def _wrapped(name: str, library: ModuleType) -> Any:
    module = copy.deepcopy(plain(name))
    if isinstance(module, GPT2LMHeadModel | LlamaForCausalLM):
        options = {"rename": RENAMES[name]} if name in RENAMES else {}
        return library.LanguageModel(module, tokenizer=tokenizer(), **options)
    return library.NNsight(module)


_shared = functools.cache(_wrapped)
