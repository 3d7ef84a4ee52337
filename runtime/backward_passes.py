"""Backward passes of several strands: one for all, where each has the gradients of its own rows from it.

Where what a strand does as a gradient arrives fails, it does no more in that pass, and the others go on: the exception
is raised in its strand. A tensor that is not the model's accumulates what strands give it once it is known which of
them came to their passes: those that fail before, and all behind one that fails, give it nothing.

Hooks of such a tensor see what each pass gives it: passes that reach one with hooks are never one, and what is to be
called once a gradient is accumulated waits for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch.utils._pytree import tree_leaves

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.runtime.gradients import Arrival, Backward, Tracked, gradients, leaves_of, nodes_reached, spared


@final
@dataclass(slots=True, eq=False)
class BackwardRequest:
    """A backward pass that a strand waits for.

    failure: what it raised. failed: whether it raised anything.
    gathered: what it, and those that ran with it, give tensors that accumulate gradients.
    """

    plan: Backward
    loss: Any
    tracked: tuple[Tracked, ...]
    models: tuple[Any, ...]
    state: Any
    failure: Exception | None = None
    gathered: Gathered | None = None
    failed: bool = False


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


def summed(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the losses of several strands."""
    return losses[0] if len(losses) == 1 else torch.stack([each.reshape(()) for each in losses]).sum()


def run_backwards(passes: Sequence[BackwardRequest]) -> None:
    """Runs backward passes, as one where they can be; else up to the first that fails."""
    if len(passes) > 1 and _are_apart(passes):
        _run_together(passes)
        return
    gathered = Gathered(passes)
    for number, each in enumerate(passes, 1):
        keeps = {"retain_graph": True} if number < len(passes) else {}  # they may be of rows of one forward
        try:
            with gathered.catching(each.loss, each):
                each.plan.run(each.loss, (), keeps, each.tracked, each.models, each.state)
        except Exception as error:
            each.failure, each.failed = error, True
            return


def _run_together(passes: Sequence[BackwardRequest]) -> None:
    """Runs several passes as one. Their losses depend on rows of their own, so that the gradient of the sum has that of
    each in its rows."""
    handles: list[Any] = []
    arrived = [[False] * len(each.plan.pieces) for each in passes]
    for each, of in zip(passes, arrived, strict=True):
        for number, value in enumerate(each.tracked):
            arrival = _in_strand(each, each.plan.arrival(number, value, of, each.state))
            handles.append(value.edge.node.register_prehook(arrival))
    total, gathered = summed([each.loss for each in passes]), Gathered(passes)
    try:
        with gathered.catching(total, *passes) as accumulates:
            total.backward(retain_graph=accumulates)  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # whose it is cannot be told
        passes[0].failure = found = passes[0].plan.explained(error)
        if found is not error:
            found.__cause__ = error
        return
    finally:
        for handle in handles:
            handle.remove()
    for each, of in zip(passes, arrived, strict=True):
        try:
            if each.failure is None:
                each.plan.check_arrived(of)
        except RunError as error:
            each.failure = error


def _in_strand(request: BackwardRequest, arrival: Arrival) -> Arrival:
    """What a strand does where a gradient arrives; nothing more once that failed."""

    def guarded(given: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
        if request.failure is not None:
            return None
        try:
            return arrival(given)
        except Exception as error:
            request.failure, request.failed = error, True
            return None

    return guarded


@final
@dataclass(slots=True, eq=False)
class Gathered:
    """What passes that ran at one time give tensors that accumulate gradients, and are not the model's.

    found: which tensors, what they are given, and the passes of which that is the sum.
    """

    passes: Sequence[BackwardRequest]
    found: list[tuple[torch.Tensor, torch.Tensor, tuple[BackwardRequest, ...]]] = field(default_factory=list)

    @contextmanager
    def catching(self, loss: Any, *passes: BackwardRequest) -> Iterator[bool]:
        """While a pass runs from this loss, which is that of these: takes what would be accumulated. Whether anything
        would be."""
        models = {id(model): model for each in passes for model in each.models}
        weights = spared(models.values(), passes[0].plan.named)
        handles: list[Any] = []
        stilled: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for node in leaves_of(loss) if isinstance(loss, torch.Tensor) else ():
            if id(node.variable) in weights:
                handles.append(node.register_prehook(_nothing))
            else:
                handles.append(node.register_prehook(self._taking(node.variable, passes)))
                hooks = _hooks_after(node.variable)
                stilled.append((hooks, dict(hooks)))
                hooks.clear()
                for each in passes:
                    each.gathered = self
        try:
            yield passes[0].gathered is not None
        finally:
            for handle in handles:
                handle.remove()
            for hooks, before in stilled:
                hooks.update(before)

    def _taking(self, tensor: torch.Tensor, passes: tuple[BackwardRequest, ...]) -> Arrival:
        def take(given: tuple[torch.Tensor | None, ...]) -> tuple[None, ...]:
            if given[0] is not None:
                self.found.append((tensor, given[0].detach().clone(), passes))
            return (None,) * len(given)

        return take

    def settle(self, passes: Sequence[BackwardRequest]) -> None:
        """Has tensors accumulate what these of the passes give them."""
        whole = {id(each) for each in passes}
        sums = [of for _, _, of in self.found if len(of) > 1]
        if any(each.failed or id(each) not in whole for of in sums for each in of):
            self._again(passes)
        for tensor, gradient, of in self.found:
            if whole.issuperset(map(id, of)):
                _accumulate(tensor, gradient)

    def _again(self, passes: Sequence[BackwardRequest]) -> None:
        """Takes anew what each of these gives by itself, as far as it comes."""
        self.found.clear()
        for each in passes:
            try:
                with self.catching(each.loss, each):
                    each.plan.run(each.loss, (), {"retain_graph": True}, each.tracked, each.models, each.state)
            except Exception:
                if not each.failed:
                    raise


def settle(passes: Sequence[BackwardRequest]) -> None:
    """Has tensors accumulate what these passes give them: those of the strands that came to them."""
    gathered = {id(each.gathered): each.gathered for each in passes if each.gathered is not None}
    for held in gathered.values():
        held.settle([each for each in passes if each.gathered is held])


def _nothing(given: tuple[torch.Tensor | None, ...]) -> tuple[None, ...]:
    return (None,) * len(given)


def _accumulate(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    if tensor.grad is None:
        tensor.grad = gradient
    else:
        with torch.no_grad():
            tensor.grad += gradient
    with torch.no_grad():
        for hook in tuple(_hooks_after(tensor).values()):
            hook(tensor)


def _hooks_after(tensor: torch.Tensor) -> dict[int, Any]:
    """What the user has called once a tensor accumulated a gradient."""
    hooks: dict[int, Any] | None = tensor._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


def _is_hooked(node: Any) -> bool:
    """Whether hooks of the user are called where a node accumulates a gradient."""
    tensor = getattr(node, "variable", None)
    return tensor is not None and bool(tensor._backward_hooks or _hooks_after(tensor))


def _are_apart(requests: Sequence[BackwardRequest | GradientsRequest]) -> bool:
    """Whether the sum of the losses has the gradients that each of these asks for: each loss is a number that depends
    on the values whose gradients are asked for with it, and on none of which another is asked for. So it is with rows
    of a forward, of which each loss has its own; a tensor that the program had before may be in all of them, unless
    hooks of the user make something else of its gradient."""
    own = [{each.edge.node for each in one.tracked if each.part is None} for one in requests]
    asked = Counter(node for nodes in own for node in nodes)
    for one, nodes in zip(requests, own, strict=True):
        if not isinstance(one.loss, torch.Tensor) or one.loss.numel() != 1 or not one.loss.requires_grad:
            return False
        nodes_of_loss = set(nodes_reached(one.loss))
        if any(map(_is_hooked, nodes_of_loss)):
            return False
        if any(each.edge.node not in nodes_of_loss for each in one.tracked):
            return False
        if any(times > (node in nodes) and node in nodes_of_loss for node, times in asked.items()):
            return False
    return True


def run_gradients(requests: Sequence[GradientsRequest]) -> None:
    """Takes gradients, at once where that gives the same; else up to the first that fails."""
    if len(requests) < 2 or not _are_apart(requests):
        for number, each in enumerate(requests, 1):
            # The rows of one forward are recorded as one, which the last of them frees.
            keeps = {"retain_graph": True} if number < len(requests) else {}
            try:
                each.found = gradients(each.outputs, each.tracked, (), keeps, each.where)
            except Exception as error:
                each.failure = error
                return
        return
    tracked = tuple(value for each in requests for value in each.tracked)
    whole = tuple({(value.edge.node, value.edge.output_nr): value for value in tracked}.values())
    edges = [each.edge for each in whole]
    try:
        found = torch.autograd.grad(summed([each.loss for each in requests]), edges)
    except RuntimeError as error:  # whose it is cannot be told
        requests[0].failure = RunError(f"{requests[0].where}: {error}")
        requests[0].failure.__cause__ = error
        return
    by_edge = {(each.node, each.output_nr): gradient for each, gradient in zip(edges, found, strict=True)}
    for each in requests:
        each.found = tuple(value.part_of(by_edge[value.edge.node, value.edge.output_nr]) for value in each.tracked)
