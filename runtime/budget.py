"""How many forwards may be rows of one, for all that is alive at once to stay within a budget of memory.

What a forward on so many rows needs is told from the cost of the model's forward and from what the program keeps of it.
To measure a cost takes as long as some small forwards: it is not asked for where the shapes alone show that there is
room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime.axes import Axes, AxisError
from nnsight_compiler.runtime.costs import Cost, bound
from nnsight_compiler.runtime.free_memory import free_memory
from nnsight_compiler.runtime.inputs import Given
from nnsight_compiler.runtime.kept import site_bytes
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.requests import Request

Measured = tuple[Axes, Callable[[], Cost]]
"""The shapes of a model's forward on inputs of one kind, and what gives its cost."""

SHARE = 4
"""Forwards that share rows may take one part in so many of what is free, where no budget is given."""


@final
class Allowance:
    """What the forwards of one run of a loop may use, and what they were found not to have.

    given: the budget in bytes, where there is one.
    outside: the state that the loop began with, whose values are not the loop's.
    """

    def __init__(self, given: int | None, outside: Any) -> None:
        self.given = given
        self._outside = {id(storage) for storage in _storages(outside)}
        self._free: int | None = None
        self._tokens: dict[Any, int] = {}

    def free(self, device: torch.device) -> int:
        """The bytes that were free when the loop first asked."""
        if self._free is None:
            self._free = free_memory(device)
        return self._free

    def limit(self, device: torch.device) -> int:
        """The bytes that may be alive at once."""
        return self.free(device) // SHARE if self.given is None else self.given

    def plenty(self, device: torch.device) -> int:
        """The bytes below which a generous estimate needs no closer look."""
        return self.free(device) if self.given is None else self.given

    def tokens(self, request: Request) -> int | None:
        """How many tokens a forward may have, where an earlier one ran out of memory."""
        return self._tokens.get((request.forward.alike, id(request.model)))

    def halve(self, request: Request, number: int) -> None:
        """Has forwards of the kind of this one, of which `number` ran out of memory together, be half as large."""
        self._tokens[request.forward.alike, id(request.model)] = number * max(1, request.rows * request.tokens) // 2

    def held(self, requests: Iterable[Request]) -> int:
        """The bytes of what strands hold that wait for these."""
        found = {id(storage): storage for each in requests for storage in _storages(each.state)}
        return sum(storage.nbytes() for key, storage in found.items() if key not in self._outside)


def _storages(state: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of the tensors in a state, also in plain containers in it."""
    for name in () if state is None else type(state).__slots__:
        for leaf in pytree.tree_leaves(getattr(state, name, None)):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                yield leaf.untyped_storage()


@final
@dataclass(slots=True)
class Needs:
    """How much memory requests need, each kind measured once.

    measured: the shapes and the cost of a model's forward on some inputs.
    """

    measured: Callable[[Any, Given], Measured]
    _kinds: dict[Any, Measured] = field(default_factory=dict)
    _bounds: dict[Any, int] = field(default_factory=dict)
    _peaks: dict[Any, int] = field(default_factory=dict)
    _strands: dict[Any, int] = field(default_factory=dict)

    def most(self, request: Request, wanted: int, allowance: Allowance, waiting: Sequence[Request]) -> int:
        """How many requests like this one, up to `wanted`, can be rows of one while others wait too: at least one.

        Raises:
            AxisError: a budget is given, and what a forward needs cannot be told.
        """
        device = request.device
        try:
            if self._bound(request, wanted) <= allowance.plenty(device):
                return wanted
            room = allowance.limit(device) - self.waiting(request, allowance, waiting)
            few, many = 1, wanted + 1
            while many - few > 1:
                between = (few + many) // 2
                few, many = (between, many) if self.peak(request, between) <= room else (few, between)
            return few
        except AxisError:
            if allowance.given is not None:
                raise
            return wanted  # nothing is known, and nothing was asked for

    def peak(self, request: Request, number: int) -> int:
        """The most bytes that are alive at once in a forward of so many requests like this one.

        Raises:
            AxisError: it cannot be told.
        """
        whole = not request.forward.ends_early(request.args, request.kwargs)
        name = request.key, number, whole, request.records
        if name not in self._peaks:
            axes, cost = self._kind(request)
            rows, tokens = number * request.rows, _tokens(request)
            costs = cost()
            kept = [
                (each.event, number * each.nbytes(axes, request.rows, tokens))
                for each in request.forward.keeps
                if each.event in costs.events
            ]
            end = request.forward.end
            until = None if whole or end not in costs.events else end
            size = costs.peak(rows, tokens, until, kept)
            if request.records:  # what modules give stays for the backward pass
                size = max(size, bound(axes, rows, tokens))
            self._peaks[name] = size + self._beside(request, number, axes)
        return self._peaks[name]

    def waiting(self, request: Request, allowance: Allowance, waiting: Sequence[Request]) -> int:
        """The bytes of what is alive besides a forward like this: what strands hold, and prefixes."""
        prefixes = len({id(each.base) for each in waiting if each.base is not None})
        return allowance.held(waiting) + prefixes * self._prefix(request)

    def strand(self, request: Request) -> int:
        """The bytes that a strand comes to hold, which waits for this; what is given to the model at least."""
        if request.key not in self._strands:
            try:
                axes, _ = self._kind(request)
            except AxisError:
                return request.nbytes
            kept = sum(each.nbytes(axes, request.rows, _tokens(request)) for each in request.forward.strand)
            self._strands[request.key] = request.nbytes + kept
        return self._strands[request.key]

    def _bound(self, request: Request, number: int) -> int:
        """What forwards of so many requests stay below, from the shapes alone."""
        name = request.key, number
        if name not in self._bounds:
            axes, _ = self._kind(request)
            size = bound(axes, number * request.rows, _tokens(request)) + self._beside(request, number, axes)
            self._bounds[name] = size + number * self.strand(request)
        return self._bounds[name]

    def _beside(self, request: Request, number: int, axes: Axes) -> int:
        """The bytes that a shared forward takes beyond those of the model's own: its inputs, each strand's and all in
        one; at a site where a value is replaced, what is put into the rows, and the copy that it is put into."""
        rows, tokens = number * request.rows, _tokens(request)
        changed = [site_bytes(axes, event, rows, tokens) for event in request.forward.changes]
        repeated = number * self._prefix(request) if request.rows > 1 else 0
        return 3 * number * request.nbytes + 2 * max(changed, default=0) + repeated

    def _prefix(self, request: Request) -> int:
        """The bytes that a prefix holds of one input."""
        if request.base is None:
            return 0
        axes, _ = self._kind(request)
        events = (Event(path, "output", 0) for path in request.base.plan.paths)
        return sum(site_bytes(axes, event, request.rows, request.tokens) for event in events)

    def _kind(self, request: Request) -> Measured:
        if request.key not in self._kinds:
            inputs: Any = request.inputs
            if request.forward.generation is not None:
                inputs = request.model._first_step(inputs)
                if inputs is None:
                    raise AxisError("what a generation is given first is not known")
            self._kinds[request.key] = self.measured(request.model, inputs)
        return self._kinds[request.key]


def _tokens(request: Request) -> int:
    """How many tokens there are at the end: a generation has what it makes, beside its prompt."""
    more = request.kwargs.get("max_new_tokens") if request.forward.generation is not None else None
    return request.tokens + (more if isinstance(more, int) else 0)


_MESSAGES = ("DefaultCPUAllocator", "MPS backend out of memory", "std::bad_alloc")
"""What torch says where memory that is not of a CUDA device is spent."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in _MESSAGES)
