"""S7: patchscope: the last position of every source layer, put into the last position of every target layer."""

from __future__ import annotations

import torch
from by_hand import answer_direction, block_after, embed, first, hooked, replaced, streams
from gpt2 import tokens
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def naive(model: GPT2LMHeadModel, source: Tensor, target: Tensor, io: int, s: int) -> Tensor:
    """One forward a cell."""
    blocks, kept = model.transformer.h, []
    hook = lambda block, arguments, output: kept.append(first(output)[:, -1])  # noqa: E731
    with hooked(*((block, hook) for block in blocks)):
        model(source)
    effects = torch.empty(len(blocks), len(blocks))
    for i, value in enumerate(kept):
        for j, block in enumerate(blocks):

            def patch(block, arguments, output, value=value):
                x = first(output).clone()
                x[:, -1] = value
                return replaced(output, x)

            with hooked((block, patch)):
                logits = model(target).logits
            effects[i, j] = logits[0, -1, io] - logits[0, -1, s]
    return effects


def best(model: GPT2LMHeadModel, source: Tensor, target: Tensor, io: int, s: int) -> Tensor:
    """All cells in one pass: the rows of a target layer join the batch there."""
    sources = torch.stack([x[0, -1] for x in streams(model, source)])
    base, rows = embed(model, target), None
    for block in model.transformer.h:
        base = first(block(base))
        joining = base.repeat(len(sources), 1, 1)
        joining[:, -1] = sources
        rows = joining if rows is None else torch.cat([first(block(rows)), joining])
    difference = model.transformer.ln_f(rows[:, -1]) @ answer_direction(model, io, s)
    return difference.view(len(model.transformer.h), -1).T


def causal_cone(model: GPT2LMHeadModel, source: Tensor, target: Tensor, io: int, s: int) -> Tensor:
    """The wavefront on the last position alone: all others are as in the plain run of the target."""
    sources = torch.stack([x[0, -1:] for x in streams(model, source)])
    base, rows = embed(model, target), None
    for block in model.transformer.h:
        base, (keys, values) = block_after(block, base)
        if rows is not None:
            rows, _ = block_after(block, rows, (keys[:, :, :-1], values[:, :, :-1]))
        rows = sources if rows is None else torch.cat([rows, sources])
    difference = model.transformer.ln_f(rows[:, -1]) @ answer_direction(model, io, s)
    return difference.view(len(model.transformer.h), -1).T


S7 = Workload(
    name="S7",
    title="patchscope",
    inputs=lambda size: (tokens(size, 1, size.prompt, seed=7), tokens(size, 1, size.prompt, seed=8), 1, 2),
    naive=naive,
    best=best,
    further={"causal cone": causal_cone},
    bound=1.2,
)
