"""What forwards of strands leave behind: what the program keeps of them, how large that is, what else they changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, definitions, users_by_forward, walk
from nnsight_compiler.ir.types import Dimension, TensorType
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.memory import Fresh, Memory, Root, Site
from nnsight_compiler.runtime.axes import Axes, AxisError
from nnsight_compiler.runtime.observation import Event


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """A value that is kept from an event on. `shape`: `None` where it is as large as all that stands there."""

    event: Event
    itemsize: int = 0
    shape: tuple[Dimension, ...] | None = None

    def nbytes(self, axes: Axes, rows: int, tokens: int) -> int:
        """Its size in a forward of so many rows and tokens; 0 where that cannot be told."""
        if self.shape is None:
            return site_bytes(axes, self.event, rows, tokens)
        counted = {"rows": rows, "tokens": tokens}
        return self.itemsize * math.prod(counted.get(each.axis or "", each.size or 1) for each in self.shape)


def site_bytes(axes: Axes, event: Event, rows: int, tokens: int) -> int:
    """The size of what stands at an event; 0 where that cannot be told."""
    try:
        with _disable_current_modes():  # a meter of the run would count tensors that have no memory
            held = axes.value(event.path, event.port, event.call, rows, tokens)
    except (AxisError, KeyError):
        return 0
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(held) if isinstance(leaf, torch.Tensor))


def event_of(path: str, port: str, call: int | None) -> Event:
    """The event of a site; of one inside of a module, the module's own output."""
    before = port in ("input", "skip") and ":" not in path
    return Event(path.partition(":")[0], "input" if before else "output", call or 0)


@final
@dataclass(frozen=True, slots=True)
class Footprint:
    """What a forward of a strand leaves behind.

    keeps: what is used after it. strand: the same of all forwards of the round that it is one of.
    changes: where values of the model are replaced.
    made: what its sites make.
    repeatable: whether its sites change nothing but that, and what the model does.
    """

    keeps: tuple[Kept, ...]
    strand: tuple[Kept, ...]
    changes: tuple[Event, ...]
    made: tuple[Value, ...]
    repeatable: bool


def footprints(program: Program) -> dict[str, Footprint]:
    """What the forwards of strands leave behind, by their results' names."""
    found: dict[str, Footprint] = {}
    users: dict[str, set[str]] = {}
    for op in program.walk():
        if not isinstance(op, ops.Strand) and not (isinstance(op, ops.For) and op.together):
            continue
        memory = Memory.of(program, copies=True)
        users = users or users_by_forward(program.body)
        forwards = [each for each in walk(op.body) if isinstance(each, ops.Forward)]
        own = [found.get(each.result.name) or _footprint(each, users, memory) for each in forwards]
        strand = tuple(kept for each in own for kept in each.keeps)
        names = [each.result.name for each in forwards]
        found |= {name: replace(each, strand=strand) for name, each in zip(names, own, strict=True)}
    return found


def _footprint(forward: ops.Forward, users: Mapping[str, set[str]], memory: Memory) -> Footprint:
    made = tuple(definitions(forward.body))
    after = {value.name for value in made if users.get(value.name, set()) - {forward.result.name}}
    allowed = frozenset[Root](Fresh(value.name) for value in made)
    sites = [at for at in forward.body.ops if isinstance(at, ops.At)]
    return Footprint(
        keeps=tuple(dict.fromkeys(kept for at in sites for kept in _kept(at, after, memory))),
        strand=(),
        changes=tuple(event_of(at.module.path, at.port, at.call) for at in sites if _replaces(at)),
        made=made,
        repeatable=all(
            root in allowed or (isinstance(root, Site) and root.forward == forward.result.name)
            for at in sites
            for op in walk(at.body)
            for root in memory.writes(op)
        ),
    )


def _kept(at: ops.At, after: set[str], memory: Memory) -> Iterator[Kept]:
    """What of a site is used after its forward."""
    event = event_of(at.module.path, at.port, at.call)
    for op in walk(at.body):
        for value in defined(op):
            roots = memory.roots(value)
            if value.name not in after or not roots:
                continue
            kind = op.value.type if isinstance(op, ops.Save) and isinstance(op.value, Value) else value.type
            shared = any(isinstance(root, Site) for root in roots)
            yield Kept(event) if shared or not isinstance(kind, TensorType) else _of_type(kind, event)


def _of_type(kind: TensorType, event: Event) -> Kept:
    if kind.dtype is None or kind.shape is None or any(each.size is None and each.axis is None for each in kind.shape):
        return Kept(event)
    return Kept(event, getattr(torch, kind.dtype).itemsize, kind.shape)


def _replaces(at: ops.At) -> bool:
    return any(isinstance(op, (ops.Write, ops.SetItem)) for op in walk(at.body))
