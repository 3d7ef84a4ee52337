"""S5: the residual stream after one layer, for many batches of texts."""

from __future__ import annotations

from by_hand import first, hooked
from gpt2 import tokens
from torch import Tensor
from transformers import GPT2LMHeadModel

from workloads.workload import Workload


def naive(model: GPT2LMHeadModel, batches: list[Tensor], layer: int) -> list[Tensor]:
    """A hook, and a forward of the whole model."""
    kept = []
    hook = lambda block, arguments, output: kept.append(first(output))  # noqa: E731
    with hooked((model.transformer.h[layer], hook)):
        for batch in batches:
            model(batch)
    return kept


class _Reached(Exception):  # noqa: N818  # no error: it ends the forward
    """The layer that is harvested has run."""


def best(model: GPT2LMHeadModel, batches: list[Tensor], layer: int) -> list[Tensor]:
    """The hook ends the forward by an exception."""
    kept = []

    def keep(block, arguments, output):
        kept.append(first(output))
        raise _Reached

    with hooked((model.transformer.h[layer], keep)):
        for batch in batches:
            try:
                model.transformer(batch, use_cache=False)
            except _Reached:
                continue
    return kept


S5 = Workload(
    name="S5",
    title="harvest one layer",
    inputs=lambda size: (
        [tokens(size, size.rows, size.text, seed=100 + number) for number in range(size.batches)],
        size.read_layer,
    ),
    naive=naive,
    best=best,
    bound=1.05,
    share=0.30,
)
