"""GPT-2 driven by hand: what an expert writes around the model's own modules.

Activations are `[rows, positions, width]`, keys and values `[rows, heads, positions, width of a head]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel

Hook = Callable[[nn.Module, Any, Any], Any]


@contextmanager
def hooked(*hooks: tuple[nn.Module, Hook]) -> Iterator[None]:
    """Forward hooks that are there for the time of a `with`."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """The hidden states in what a module returned: a block gives a tuple in some versions of transformers, and the
    attention in all."""
    return output[0] if isinstance(output, tuple) else output


def replaced(output: Any, value: Tensor) -> Any:
    """What a module returned, with other hidden states."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def embed(model: GPT2LMHeadModel, ids: Tensor, start: int = 0) -> Tensor:
    """The residual stream before the first block, for tokens from position `start` on."""
    return model.transformer.wte(ids) + model.transformer.wpe(torch.arange(start, start + ids.shape[1]))


def streams(model: GPT2LMHeadModel, ids: Tensor) -> list[Tensor]:
    """The residual stream after each block; neither the final norm nor the unembedding runs."""
    x, result = embed(model, ids), []
    for block in model.transformer.h:
        x = first(block(x))
        result.append(x)
    return result


def answer_direction(model: GPT2LMHeadModel, io: int, s: int) -> Tensor:
    """The vector whose product with the last residual stream is the difference of the two logits."""
    return model.lm_head.weight[io] - model.lm_head.weight[s]


def heads(block: nn.Module, x: Tensor) -> Tensor:
    """`[rows, positions, width]` to `[rows, heads, positions, width of a head]`."""
    return x.view(*x.shape[:2], block.attn.num_heads, -1).transpose(1, 2)


def after_attention(block: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """The rest of a block: its stream, given what its heads computed, `[rows, positions, width]`."""
    x = x + block.attn.c_proj(z)
    return x + block.mlp(block.ln_2(x))


def block_after(
    block: nn.Module, x: Tensor, past: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One block on positions that come after others, of which only the keys and values are needed.

    Returns the stream, and the keys and values of all positions so far. A past of one row is shared by all rows.
    """
    q, k, v = (heads(block, part) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1))
    new, mask = x.shape[1], None
    if past is not None:
        k, v = (torch.cat([old.expand(len(x), -1, -1, -1), own], 2) for old, own in zip(past, (k, v), strict=True))
        if new > 1:
            mask = torch.ones(new, k.shape[2], dtype=torch.bool).tril(k.shape[2] - new)
    z = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
    return after_attention(block, x, z.transpose(1, 2).reshape(x.shape)), (k, v)
