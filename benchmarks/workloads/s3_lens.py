"""S3: the logit lens at the last position, every layer, the full vocabulary."""

from __future__ import annotations

import torch
from by_hand import first, hooked
from gpt2 import tokens
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def naive(model: GPT2LMHeadModel, prompt: Tensor) -> Tensor:
    """The model runs to its end, and the lens is taken of all positions."""
    kept = []
    hook = lambda block, arguments, output: kept.append(first(output))  # noqa: E731
    with hooked(*((block, hook) for block in model.transformer.h)):
        model(prompt)
    return torch.stack([model.lm_head(model.transformer.ln_f(x))[0, -1] for x in kept])


def best(model: GPT2LMHeadModel, prompt: Tensor) -> Tensor:
    """Only the transformer runs; one product with the unembedding."""
    kept = []
    hook = lambda block, arguments, output: kept.append(first(output)[0, -1])  # noqa: E731
    with hooked(*((block, hook) for block in model.transformer.h)):
        model.transformer(prompt, use_cache=False)
    return model.lm_head(model.transformer.ln_f(torch.stack(kept)))


S3 = Workload(
    name="S3",
    title="logit lens",
    inputs=lambda size: (tokens(size, 1, size.prompt, seed=3),),
    naive=naive,
    best=best,
    bound=1.1,
    share=0.26,
)
