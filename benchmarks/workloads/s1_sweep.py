"""S1: activation patching of the residual stream, every layer × every position."""

from __future__ import annotations

import torch
from by_hand import answer_direction, block_after, embed, first, hooked, replaced, streams
from gpt2 import pair
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def naive(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """One forward a cell."""
    blocks, kept = model.transformer.h, {}

    def keep(block, arguments, output):
        kept[block] = first(output)

    with hooked(*((block, keep) for block in blocks)):
        model(clean)
    effects = torch.empty(len(blocks), clean.shape[1])
    for layer, block in enumerate(blocks):
        for position in range(clean.shape[1]):

            def patch(block, arguments, output, position=position):
                x = first(output).clone()
                x[:, position] = kept[block][:, position]
                return replaced(output, x)

            with hooked((block, patch)):
                logits = model(corrupt).logits
            effects[layer, position] = logits[0, -1, io] - logits[0, -1, s]
    return effects


def _patched(clean: Tensor, corrupt: Tensor) -> Tensor:
    """A row for each position, of the corrupted stream with the clean one there; both are `[positions, width]`."""
    rows = corrupt.repeat(len(corrupt), 1, 1)
    rows.diagonal(dim1=0, dim2=1)[:] = clean.T
    return rows


def best(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """Layer by layer: all positions as rows of one batch, which starts where it was patched."""
    direction = answer_direction(model, io, s)
    effects = []
    for layer, both in enumerate(streams(model, torch.cat([clean, corrupt]))):
        x = _patched(*both)
        for block in model.transformer.h[layer + 1 :]:
            x = first(block(x))
        effects.append(model.transformer.ln_f(x[:, -1]) @ direction)
    return torch.stack(effects)


def wavefront(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """All cells in one pass: the rows of a layer join the batch there, so that each weight is read once."""
    both, rows = embed(model, torch.cat([clean, corrupt])), None
    for block in model.transformer.h:
        both = first(block(both))
        joining = _patched(*both)
        rows = joining if rows is None else torch.cat([first(block(rows)), joining])
    difference = model.transformer.ln_f(rows[:, -1]) @ answer_direction(model, io, s)
    return difference.view(len(model.transformer.h), -1)


def causal_cone(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """The wavefront on the positions from the first on in which the prompts differ: before it, both runs are equal, so
    that patching changes nothing, and the keys and values of the corrupted run serve all rows."""
    start = int((clean != corrupt)[0].nonzero()[0])
    count = clean.shape[1] - start
    base, rows = embed(model, corrupt), embed(model, clean[:, start:], start)  # row 0 is the clean run
    for block in model.transformer.h:
        base, (keys, values) = block_after(block, base)
        rows, _ = block_after(block, rows, (keys[:, :, :start], values[:, :, :start]))
        rows = torch.cat([rows, _patched(rows[0], base[0, start:])])
    last = torch.cat([base[:, -1], rows[1:, -1]])
    difference = model.transformer.ln_f(last) @ answer_direction(model, io, s)
    effects = difference[0].repeat(len(model.transformer.h), clean.shape[1])
    effects[:, start:] = difference[1:].view(-1, count)
    return effects


S1 = Workload(
    name="S1",
    title="layer × position sweep",
    inputs=lambda size: pair(size, seed=1),
    naive=naive,
    best=best,
    further={"wavefront": wavefront, "causal cone": causal_cone},
    bound=1.15,
    share=0.11,
)
