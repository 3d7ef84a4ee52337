"""S8: generation under a steering vector, at several strengths, with a KV cache."""

from __future__ import annotations

import torch
from by_hand import block_after, embed, first, hooked, replaced
from gpt2 import Size, tokens
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def naive(
    model: GPT2LMHeadModel, prompt: Tensor, vector: Tensor, strengths: list[float], layer: int, count: int
) -> Tensor:
    """One generation a strength."""
    texts = []
    for strength in strengths:

        def steer(block, arguments, output, strength=strength):
            return replaced(output, first(output) + strength * vector)

        with hooked((model.transformer.h[layer], steer)):
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
        texts.append(ids[0])
    return torch.stack(texts)


def best(
    model: GPT2LMHeadModel, prompt: Tensor, vector: Tensor, strengths: list[float], layer: int, count: int
) -> Tensor:
    """The prompt runs once up to the steered layer, and as a row for each strength from there; one batched decode."""
    shift = torch.tensor(strengths)[:, None, None] * vector
    past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.transformer.h)
    ids, new = prompt, prompt
    for _ in range(count):
        x = embed(model, new, ids.shape[1] - new.shape[1])
        for number, block in enumerate(model.transformer.h):
            x, past[number] = block_after(block, x, past[number])
            if number == layer:
                x = x + shift
        new = model.lm_head(model.transformer.ln_f(x[:, -1])).argmax(-1, keepdim=True)
        ids = torch.cat([ids.expand(len(new), -1), new], 1)
    return ids


def inputs(size: Size) -> tuple[Tensor, Tensor, list[float], int, int]:
    vector = torch.randn(size.width, generator=torch.Generator().manual_seed(9))
    strengths = torch.linspace(-20, 20, size.strengths).tolist()
    return tokens(size, 1, size.prompt, seed=9), vector, strengths, size.steered_layer, size.new_tokens


S8 = Workload(
    name="S8",
    title="steered generation",
    inputs=inputs,
    naive=naive,
    best=best,
    bound=1.2,
)
