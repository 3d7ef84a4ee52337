"""What strands ask for: forwards, each with what the model is given and where its values go."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime.backward_passes import BackwardRequest, GradientsRequest
from nnsight_compiler.runtime.calls import CallRequest
from nnsight_compiler.runtime.forwards import Forward, Running
from nnsight_compiler.runtime.input_axes import InputAxes, are_flat, input_axes, places
from nnsight_compiler.runtime.inputs import Given, Runnable
from nnsight_compiler.runtime.prefixes import Prefix
from nnsight_compiler.runtime.scanning import ready


@final
@dataclass(slots=True, eq=False)
class Request:
    """A forward that a strand waits for.

    args, kwargs: what the model is given, prepared.
    axes: which dimensions of that are rows and tokens, and `rows` and `tokens` how many there are.
    key: what requests have in common that may share a forward as they are.
    device: where the model is.
    failure: what it raised when it ran.
    """

    forward: Forward
    model: Runnable
    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    axes: InputAxes
    rows: int
    tokens: int
    key: Any
    device: torch.device
    base: Prefix | None = None
    failure: Exception | None = None

    @property
    def inputs(self) -> Given:
        """What the model is given."""
        return self.args, self.kwargs

    @property
    def records(self) -> bool:
        """Whether gradients are recorded as far as it can be told before the run."""
        return torch.is_grad_enabled() and self.forward.may_record(self.state, self.args, self.kwargs)

    @property
    def nbytes(self) -> int:
        """The size of what the model is given."""
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, torch.Tensor))

    @property
    def padded_key(self) -> Any:
        """What requests have in common that may share a forward once they are as long as the longest."""
        kinds = tuple((place, _kind(leaf, self.axes.dims.get(place, ()))) for place, leaf in places(*self.inputs))
        return "padded", id(self.forward), id(self.model), kinds

    def by(self, forward: Forward) -> Request:
        """The same with another plan."""
        return self if forward is self.forward else replace(self, forward=forward, key=(id(forward), *self.key[1:]))

    def alone(self) -> Running:
        """The run of this one by itself."""
        return self.forward.running(self.model, self.root, self.args, self.kwargs, (self.state,), self.base)


Requests = tuple[Request | BackwardRequest | GradientsRequest | CallRequest, ...]


R = TypeVar("R", Request, BackwardRequest, GradientsRequest, CallRequest)


def forwards_in(requests: Requests) -> tuple[Request, ...]:
    """The forwards among what is waited for."""
    return tuple(each for each in requests if isinstance(each, Request))


def passes_in(requests: Requests) -> Iterator[BackwardRequest]:
    """The backward passes among what is waited for."""
    return (each for each in requests if isinstance(each, BackwardRequest))


def awaited(
    forward: Forward,
    model: Runnable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: Any,
    base: Prefix | None = None,
) -> Iterator[Requests]:
    """Where a strand waits for a forward to run."""
    root = ready(model)
    args, kwargs = forward.prepared(model, args, kwargs, state)
    axes = input_axes(root, args, kwargs)
    rows, tokens = axes.sizes(args, kwargs)
    kinds = tuple([(place, _kind(leaf)) for place, leaf in places(args, kwargs)])
    structure = None if are_flat(args, kwargs) else pytree.tree_structure((args, kwargs))
    key = id(forward), id(model), structure, kinds
    device = next((each.device for each in root.parameters()), torch.device("cpu"))
    request = Request(forward, model, root, args, kwargs, state, axes, rows, tokens, key, device, base)
    yield from served(request)


def served(request: R) -> Generator[Requests, None, R]:
    """Where a strand waits for a request to be served, and what it raised is raised."""
    yield (request,)
    failure, request.failure = request.failure, None
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # it holds this frame
    return request


def _kind(leaf: Any, names: tuple[str | None, ...] = ()) -> Any:
    """What must be equal of an argument. `names`: of dimensions that count tokens, the size may differ."""
    if isinstance(leaf, torch.Tensor):
        names = names + (None,) * (leaf.dim() - len(names))
        sizes = tuple("tokens" if name == "tokens" else size for name, size in zip(names, leaf.shape, strict=True))
        return leaf.dtype, leaf.device, sizes, leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
