"""Whether padding before a prompt changes what a model gives for it: found out by running the model, once.

A model whose positions count padding, or whose layers see it, gives other values for a prompt that shares a forward
with longer ones. Nothing in a model's signature tells.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.models.batches import BatchError, padded
from nnsight_compiler.runtime.shadow import Reals, generators_kept, has_weights, shadowed

_found: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
"""The largest difference that was found, as a part of the largest value."""

_positions: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()
"""What `padding_position` found; to look through all modules takes as long as a small forward."""

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
"""Differences up to that part of the largest value are those of rounding; in shorter formats, a tenth."""


def require_padding_harmless(model: Any, padding_id: int) -> None:
    """Refuses padding where it changes the values of a prompt. Where the weights are not loaded, nothing is told.

    Raises:
        BatchError: it does, or this cannot be found out.
    """
    module: nn.Module = model._wrapped
    if not has_weights(module):
        return
    if module not in _found:
        with generators_kept(module), torch.no_grad():
            _found[module] = _difference(model, module, padding_id)
    dtype = next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)
    if not _found[module] <= TOLERANCE.get(dtype, 0.1):
        raise BatchError(
            f"a {type(module).__name__} gives other values for a prompt that has padding before it than for the prompt"
            " alone, so that prompts of different lengths cannot share a forward: give prompts of one length, or run a"
            " `trace` for each"
        )


def _difference(model: Any, module: nn.Module, padding_id: int) -> float:
    vocabulary = module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(3, vocabulary, (1, length), generator=generator) for length in (7, 4))
    given = [model._prepare((ids,), {})[1] for ids in (long, short)]
    if module.config.is_encoder_decoder:  # type: ignore[union-attr]
        start = torch.randint(3, vocabulary, (1, 3), generator=generator).to(given[0]["input_ids"].device)
        given = [{**each, "decoder_input_ids": start} for each in given]
    shadow = shadowed(module, Reals()).eval()
    together = _first(shadow(**padded(given, padding_id, model._takes()).kwargs))[1:]
    alone = _first(shadow(**given[1]))
    if alone.dim() > 1 and alone.shape[1] == 4 and together.shape[1] == 7:
        together = together[:, 3:]
    if together.shape != alone.shape:
        raise BatchError(
            f"what a {type(module).__name__} returns does not show whether padding changes it: prompts of different"
            " lengths cannot share a forward"
        )
    scale = float(alone.abs().max())
    return float((together - alone).abs().max()) / scale if scale else float("inf")


def padding_position(module: nn.Module) -> int | None:
    """The token that is padding to a model which counts positions by looking for it, as RoBERTa does: such a model is
    given no positions."""
    if module not in _positions:
        looked_for = (
            part.padding_idx
            for name, part in module.named_modules()
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
        )
        _positions[module] = next((each for each in looked_for if each is not None), None)
    return _positions[module]


def _first(output: Any) -> torch.Tensor:
    """The first tensor of numbers that a model returns: its logits, or its last hidden states."""
    leaves = pytree.tree_leaves(output)
    return next(each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point())
