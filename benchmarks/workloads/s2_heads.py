"""S2: activation patching of attention heads, every layer × every head, at all positions."""

from __future__ import annotations

import torch
from by_hand import after_attention, answer_direction, first, heads
from gpt2 import pair
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def _record(model: GPT2LMHeadModel, ids: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """Runs the model and keeps what the heads of each layer computed, `z`, `[rows, positions, width]`."""
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda module, given, layer=layer: kept.update({layer: given[0]}))
        for layer, block in enumerate(model.transformer.h)
    ]
    try:
        return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


def naive(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """One forward a cell."""
    blocks, kept = model.transformer.h, {}
    _record(model, clean, kept)
    effects = torch.empty(len(blocks), blocks[0].attn.num_heads)
    for layer, block in enumerate(blocks):
        for head in range(block.attn.num_heads):
            part = slice(head * block.attn.head_dim, (head + 1) * block.attn.head_dim)

            def patch(module, given, layer=layer, part=part):
                z = given[0].clone()
                z[:, :, part] = kept[layer][:, :, part]
                return (z,)

            handle = block.attn.c_proj.register_forward_pre_hook(patch)
            try:
                logits = model(corrupt).logits
            finally:
                handle.remove()
            effects[layer, head] = logits[0, -1, io] - logits[0, -1, s]
    return effects


def best(model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, io: int, s: int) -> Tensor:
    """Layer by layer: the heads as rows of one batch, which starts behind the attention of its layer."""
    blocks, before, kept = model.transformer.h, [], {}
    handles = [block.register_forward_pre_hook(lambda module, given: before.append(given[0][1:])) for block in blocks]
    handles += [
        block.attn.c_proj.register_forward_pre_hook(lambda module, given, layer=layer: kept.update({layer: given[0]}))
        for layer, block in enumerate(blocks)
    ]
    try:
        model.transformer(torch.cat([clean, corrupt]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    direction = answer_direction(model, io, s)
    effects = []
    for layer, block in enumerate(blocks):
        of_clean, of_corrupt = (heads(block, part) for part in kept[layer].split(1))
        z = of_corrupt.repeat(block.attn.num_heads, 1, 1, 1)
        z.diagonal(dim1=0, dim2=1)[:] = of_clean[0].permute(1, 2, 0)
        z = z.transpose(1, 2).flatten(2)
        x = after_attention(block, before[layer], z)
        for later in blocks[layer + 1 :]:
            x = first(later(x))
        effects.append(model.transformer.ln_f(x[:, -1]) @ direction)
    return torch.stack(effects)


S2 = Workload(
    name="S2",
    title="layer × head sweep",
    inputs=lambda size: pair(size, seed=2),
    naive=naive,
    best=best,
    bound=1.15,
)
