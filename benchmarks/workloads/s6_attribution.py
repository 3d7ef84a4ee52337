"""S6: attribution patching: (clean − corrupted) · gradient at every attention, MLP and block, for several pairs."""

from __future__ import annotations

import torch
from by_hand import first, hooked
from gpt2 import pair
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.s4_save_all import sites
from workloads.workload import Workload

Pair = tuple[Tensor, Tensor, int, int]


def naive(model: GPT2LMHeadModel, pairs: list[Pair]) -> Tensor:
    """Two forwards and a backward pass a pair; weights have gradients, as they have when a model is loaded."""
    scores = []
    for clean, corrupt, io, s in pairs:
        of_clean: list[Tensor] = []
        of_corrupt: list[Tensor] = []

        def keep_clean(module, arguments, output, kept=of_clean):
            kept.append(first(output).detach())

        def keep_corrupt(module, arguments, output, kept=of_corrupt):
            first(output).retain_grad()
            kept.append(first(output))

        with hooked(*((module, keep_clean) for module in sites(model))):
            model(clean)
        with hooked(*((module, keep_corrupt) for module in sites(model))):
            logits = model(corrupt).logits
        (logits[0, -1, io] - logits[0, -1, s]).backward()
        triples = zip(of_clean, of_corrupt, strict=True)
        scores.append(torch.stack([((a - b) * b.grad).sum(-1)[0].detach() for a, b in triples]))
        model.zero_grad()
    return torch.stack(scores)


def best(model: GPT2LMHeadModel, pairs: list[Pair]) -> Tensor:
    """All pairs at once, no gradients of weights, none at all in the clean forward, two rows of the unembedding."""
    cleans, corrupts, ios, others = zip(*pairs, strict=True)
    kept: list[Tensor] = []

    def keep(module, arguments, output):
        value = first(output)
        kept.append(value if value.requires_grad or not torch.is_grad_enabled() else value.requires_grad_())

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with hooked(*((module, keep) for module in sites(model))):
            with torch.no_grad():
                model.transformer(torch.cat(cleans), use_cache=False)
            of_clean = kept.copy()
            kept.clear()
            last = model.transformer(torch.cat(corrupts), use_cache=False).last_hidden_state[:, -1]
        weight = model.lm_head.weight
        difference = (last * (weight[list(ios)] - weight[list(others)])).sum()
        gradients = torch.autograd.grad(difference, kept)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    scores = []
    for value in of_clean:
        value -= kept[len(scores)].detach()
        scores.append(torch.einsum("rpw,rpw->rp", value, gradients[len(scores)]))
    return torch.stack(scores, 1)


S6 = Workload(
    name="S6",
    title="attribution patching",
    inputs=lambda size: ([pair(size, seed=200 + number) for number in range(size.pairs)],),
    naive=naive,
    best=best,
    bound=1.1,
    gradients=True,
)
