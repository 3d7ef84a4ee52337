"""Backward passes and gradients that strands ask for, in one pass where that gives the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils._pytree import tree_leaves

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.runtime.gradients import Backward, Tracked, backward, gradients, nodes_reached


@final
@dataclass(slots=True, eq=False)
class BackwardRequest:
    """A backward pass that a strand waits for. `failure`: what it raised."""

    plan: Backward
    loss: Any
    tracked: tuple[Tracked, ...]
    models: tuple[Any, ...]
    state: Any
    failure: Exception | None = None

    def serve(self, keeps: Mapping[str, bool]) -> None:
        """Runs the pass by itself."""
        self.plan.run(self.loss, (), keeps, self.tracked, self.models, self.state)


@final
@dataclass(slots=True, eq=False)
class GradientsRequest:
    """Gradients that a strand waits for: `found`, once they are there. `failure`: what it raised."""

    outputs: Any
    tracked: tuple[Tracked, ...]
    where: str
    found: tuple[Any, ...] = ()
    failure: Exception | None = None

    @property
    def loss(self) -> Any:
        """The tensor that is differentiated, where it is one."""
        leaves = tree_leaves(self.outputs)
        return leaves[0] if len(leaves) == 1 else None

    def serve(self, keeps: Mapping[str, bool]) -> None:
        """Takes the gradients by themselves."""
        self.found = gradients(self.outputs, self.tracked, (), keeps, self.where)


def run_backwards(passes: Sequence[BackwardRequest]) -> None:
    """Runs backward passes, as one where they can be; else up to the first that fails."""
    if not _are_apart(passes):
        _one_by_one(passes)
        return
    models = {id(model): model for each in passes for model in each.models}.values()
    backward([(each.plan, each.tracked, each.state) for each in passes], _total(passes), models, (), {})


def run_gradients(requests: Sequence[GradientsRequest]) -> None:
    """Takes gradients, at once where that gives the same; else up to the first that fails."""
    if not _are_apart(requests):
        _one_by_one(requests)
        return
    edges = {_place(value): value.edge for each in requests for value in each.tracked}
    try:
        found = torch.autograd.grad(_total(requests), list(edges.values()))
    except RuntimeError as error:
        raise RunError(f"{requests[0].where}: {error}") from error
    arrived = dict(zip(edges, found, strict=True))
    for each in requests:
        each.found = tuple(value.part_of(arrived[_place(value)]) for value in each.tracked)


def _place(value: Tracked) -> tuple[Any, int]:
    """What tells where the gradient of a value arrives."""
    return value.edge.node, value.edge.output_nr


def _one_by_one(requests: Sequence[BackwardRequest | GradientsRequest]) -> None:
    """Serves each of these, up to the first that fails. They may be of rows of one forward, which are recorded as one;
    the last of them frees that."""
    for number, each in enumerate(requests, 1):
        try:
            each.serve({"retain_graph": True} if number < len(requests) else {})
        except Exception as error:
            each.failure = error
            return


def _are_apart(requests: Sequence[BackwardRequest | GradientsRequest]) -> bool:
    """Whether these are several, and the sum of the losses has the gradients that each asks for: each loss is a number
    that depends on the values whose gradients are asked for with it, and on none of which another is asked for. So it
    is with rows of a forward, of which each loss has its own; a tensor that the program had before may be in all of
    them."""
    if len(requests) < 2:
        return False
    own = [{each.edge.node for each in one.tracked if each.part is None} for one in requests]
    asked = Counter(node for nodes in own for node in nodes)
    for one, nodes in zip(requests, own, strict=True):
        if not isinstance(one.loss, torch.Tensor) or one.loss.numel() != 1 or not one.loss.requires_grad:
            return False
        met = set(nodes_reached(one.loss))
        if any(each.edge.node not in met for each in one.tracked):
            return False
        if any(times > (node in nodes) and node in met for node, times in asked.items()):
            return False
    return True


def _total(requests: Sequence[BackwardRequest | GradientsRequest]) -> torch.Tensor:
    """The sum of the losses."""
    return torch.stack([each.loss.reshape(()) for each in requests]).sum()
