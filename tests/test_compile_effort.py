"""How much compiling does: it is counted, since time on a shared machine tells little."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import NNsight, answers, intervene
from nnsight_compiler.ir import ops
from nnsight_compiler.passes.memory import Memory


def make(layers: int) -> NNsight:
    return NNsight(
        GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=8, n_head=2, vocab_size=11, n_positions=32)).eval()
    )


def tokens(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % 11


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the memory analysis is made, and a model is asked about a forward."""
    found: Counter[str] = Counter()
    plain = Memory.__init__

    def made(self: Memory, *args: Any, **options: Any) -> None:
        found["analyses"] += 1
        plain(self, *args, **options)

    monkeypatch.setattr(Memory, "__init__", made)
    for name in ("observed", "extent_of", "why_undivided"):
        asked = getattr(answers, name)

        def counted(*args: Any, name: str = name, asked: Any = asked, **options: Any) -> Any:
            found[name] += 1
            return asked(*args, **options)

        monkeypatch.setattr(answers, name, counted)
    return found


def sweep(model, clean, corrupt):
    with model.trace(clean):
        streams = [block.output for block in model.transformer.h]
    effects = []
    for layer in range(len(model.transformer.h)):
        for position in range(clean.shape[1]):
            with model.trace(corrupt):
                model.transformer.h[layer].output[:, position] = streams[layer][:, position]
                logits = model.lm_head.output
            effects.append(logits[0, -1, 1] - logits[0, -1, 2])
    return torch.stack(effects)


def every_pair(model, source, target):
    found = []
    for i in range(len(model.transformer.h)):
        for j in range(len(model.transformer.h)):
            with model.trace(source):
                act = model.transformer.h[i].output[:, -1]
            with model.trace(target):
                model.transformer.h[j].output[:, -1] = act
                found.append(model.lm_head.output[0, -1, 3])
    return torch.stack(found)


@pytest.mark.parametrize("written", [sweep, every_pair])
def test_more_layers_take_no_more_analyses_and_no_more_questions(written: Any, counts: Counter[str]) -> None:
    efforts = []
    for layers in (3, 5):
        model, first, second = make(layers), tokens(7), tokens(7).flip(1)
        counts.clear()
        compiled = intervene(written).compile(model, first, second)
        assert sum(isinstance(op, ops.Forward) for op in compiled.program.walk()) > layers
        per_site = counts.pop("why_undivided", 0)
        assert per_site <= 2 * layers + 1  # sites, and what the program reads at the end
        efforts.append(dict(counts))
    assert efforts[0] == efforts[1]
    assert efforts[0]["analyses"] <= 15
    assert efforts[0]["extent_of"] == 2
    assert efforts[0]["observed"] <= 3


def test_more_positions_make_no_larger_program() -> None:
    model = make(3)
    sizes = [
        sum(1 for _ in intervene(sweep).compile(model, tokens(length), tokens(length).flip(1)).program.walk())
        for length in (4, 9, 31)
    ]
    assert len(set(sizes)) == 1
