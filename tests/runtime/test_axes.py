"""Shapes for any number of rows and tokens, against real forwards at sizes at which nothing was solved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModelForCausalLM

from nnsight_compiler.runtime.axes import Axes, AxisError, Opaque, TensorAxes, infer_axes

torch.set_num_threads(1)


def real_values(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[tuple[str, str, int], Any]:
    """The oracle: what torch's own hooks see in a real forward."""
    seen: dict[tuple[str, str, int], Any] = {}

    def keep(path: str, port: str, value: Any) -> None:
        call = sum(key[:2] == (path, port) for key in seen)
        seen[path, port, call] = value

    handles = []
    for path, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(
                lambda _, a, k, path=path: keep(path, "input", (a, dict(k))), with_kwargs=True
            ),
            part.register_forward_hook(lambda _, a, output, path=path: keep(path, "output", output)),
        ]
    with torch.no_grad():
        module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def disagreements(axes: Axes, real: dict[tuple[str, str, int], Any], rows: int, tokens: int) -> list[str]:
    """Where what was inferred is not what a real forward shows; refused events and opaque parts claim nothing."""
    wrong: list[str] = []
    told = {(event.path, event.port, event.call) for event in axes.events}
    refused = {(event.path, event.port, event.call) for event in axes.refused}
    for event in real.keys() | told:
        if event in refused:
            continue
        if event not in told or event not in real:
            wrong.append(f"{event}: {'does not happen' if event not in real else 'is not told'}")
            continue
        expected, expected_structure = pytree.tree_flatten(axes.value(*event, rows, tokens))
        leaves, structure = pytree.tree_flatten(real[event])
        if structure != expected_structure:
            wrong.append(f"{event}: {structure} is said to be {expected_structure}")
            continue
        for leaf, one in zip(leaves, expected, strict=True):
            if isinstance(one, Opaque):
                continue
            if isinstance(leaf, torch.Tensor):
                if not (isinstance(one, torch.Tensor) and (leaf.shape, leaf.dtype) == (one.shape, one.dtype)):
                    wrong.append(f"{event}: {leaf.dtype}{list(leaf.shape)} is said to be {one}")
            elif leaf != one:
                wrong.append(f"{event}: {leaf!r} is said to be {one!r}")
    return wrong


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_value_of_a_real_forward_at_other_sizes(name: str):
    sizes = {
        "gpt2": {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
        "llama": {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
        | {"num_key_value_heads": 2},
    }[name]
    config = AutoConfig.for_model(name, vocab_size=50, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).eval()
    axes = infer_axes(empty, (), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    real = real_values(model, (), {"input_ids": torch.randint(50, (2, 11))})
    assert (axes.how, axes.reason, axes.fixed, axes.refused) == ("fake", "", {}, {})
    assert disagreements(axes, real, rows=2, tokens=11) == []
    assert disagreements(axes, real, rows=2, tokens=12) != []
    assert str(axes.types("lm_head", "output")) == "float32[rows, tokens, 50]"
    with pytest.raises(KeyError):
        axes.types("lm_head", "output", 1)


def test_what_is_not_rows():
    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.flat, self.kept = nn.Linear(4, 4), nn.Flatten(0, 1), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept(x[x > 0])
            return self.linear(self.flat(x[:, None].expand(-1, 3, -1)))

    axes = infer_axes(Numbers(), (torch.zeros(2, 4),))
    assert repr(axes.types("", "output")) == "float32[3*rows, 4]"
    assert isinstance(axes.types("linear", "input")[0][0], TensorAxes)
    with pytest.raises(AxisError, match=r"its shape depends on the numbers"):
        axes.value("kept", "output", 0, 2, 1)
