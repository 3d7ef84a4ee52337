"""S4: saves what every block, attention and MLP returns, for two texts."""

from __future__ import annotations

from by_hand import first, hooked
from gpt2 import tokens
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def sites(model: GPT2LMHeadModel) -> list[nn.Module]:
    """The attention, the MLP and the block itself of each block."""
    return [module for block in model.transformer.h for module in (block.attn, block.mlp, block)]


def naive(model: GPT2LMHeadModel, texts: Tensor) -> list[Tensor]:
    """Hooks, and a forward of the whole model."""
    kept = []
    hook = lambda module, arguments, output: kept.append(first(output))  # noqa: E731
    with hooked(*((module, hook) for module in sites(model))):
        model(texts)
    return kept


def best(model: GPT2LMHeadModel, texts: Tensor) -> list[Tensor]:
    """The unembedding, which nothing needs, does not run."""
    kept = []
    hook = lambda module, arguments, output: kept.append(first(output))  # noqa: E731
    with hooked(*((module, hook) for module in sites(model))):
        model.transformer(texts, use_cache=False)
    return kept


S4 = Workload(
    name="S4",
    title="save everything",
    inputs=lambda size: (tokens(size, 2, size.text, seed=4),),
    naive=naive,
    best=best,
    bound=1.03,
    share=0.70,
)
