"""How far segments go: from the first to the last op that needs the model, and on to what makes less of its values.

with model.trace(prompt): …                  ┐
with model.trace(other): …                   │  a segment
p = logits[0, -1].softmax(-1)[token]         ┘  one number comes back, not all logits
metric(p)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final, get_args

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import TERMINATORS, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, used, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall
from nnsight_compiler.passes.control_flow import emits
from nnsight_compiler.passes.known_calls import ALL, known_method
from nnsight_compiler.remote.graphs import Graphs
from nnsight_compiler.remote.kinds import DATA, Handle, Helper, Modules, Named
from nnsight_compiler.remote.sides import Side, Sides

CONTEXTS = frozenset(
    f"torch.{name}"
    for name in ("no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "autocast", "amp.autocast")
)
"""Contexts that hold for what runs in them on either side."""

_NAMED = get_args(Named)
_QUIET = (ops.Global, ops.Import, ops.Attribute, ops.Item, ops.Build, ops.Save, ops.Format)
"""Ops without effects."""
_VIEWS = ("method.items", "method.keys", "method.values")
"""Calls whose result only looks at a container, and cannot be sent."""


@final
@dataclass(frozen=True, slots=True)
class Extent:
    """A segment among the ops of a region.

    start, end: those that it takes the place of. ahead: those of them that run before it, on the client. taken: the
        others, which are the segment.
    """

    start: int
    end: int
    ahead: tuple[Op, ...]
    taken: tuple[Op, ...]


class Extents:
    """Finds segments in the regions of a program."""

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self.program = sides.program
        self.graphs = Graphs(sides)
        self.callees = _only_called(self.program)
        self.assigned = _assigned(self.program)

    def is_segment(self, op: Op) -> bool:
        """Whether an op belongs into a segment, whatever stands around it."""
        return self.sides.side(op) is Side.WORKER and not emits(Region((), (op,))) and not self.graphs.is_clients(op)

    def extent(self, held: Sequence[Op], index: int, floor: int) -> Extent:
        """The segment whose first op that needs the model is at this index. It begins at `floor` at the earliest."""
        inside: set[str] = set()
        end = index
        for number in range(index, len(held)):
            op = held[number]
            if not (self.is_segment(op) or self.may_be_inside(op, inside)):
                break
            inside.update(value.name for inner in walk(Region((), (op,))) for value in defined(inner))
            if self.is_segment(op):
                end = number + 1
        ahead, less, last = self.less(held, index, end)
        start = self.start(held, index, end, floor)
        return Extent(start, last, ahead, (*held[start:end], *less))

    def less(self, held: Sequence[Op], index: int, end: int) -> tuple[tuple[Op, ...], tuple[Op, ...], int]:
        """The ops behind a segment that make less of what it gives, those between that can run before it, and where
        they end."""
        body = list(walk(Region((), tuple(held[index:end]))))
        derived = {value.name for op in body for value in defined(op)}
        derived |= {op.cell.name for op in body if isinstance(op, ops.Store) and isinstance(op.cell, Value)}
        known = derived | {value.name for op in body for value in used(op)}
        ahead: list[Op] = []
        less: list[Op] = []
        early: set[str] = set()
        last, counts = end, (0, 0)
        for number in range(end, len(held)):
            op = held[number]
            if self.can_be_ahead(op, derived, early):
                early.update(value.name for value in defined(op))
                ahead.append(op)
                continue
            if not self.makes_less(op, derived, known, early):
                break
            less.append(op)
            if any(value.name in derived for value in used(op)):
                derived.update(value.name for value in defined(op))
                if op.result.name not in self.callees:  # type: ignore[attr-defined]  # such ops have one
                    last, counts = number + 1, (len(ahead), len(less))
            known.update(value.name for value in defined(op))
        return tuple(ahead[: counts[0]]), tuple(less[: counts[1]]), last

    def can_be_ahead(self, op: Op, derived: set[str], early: set[str]) -> bool:
        """Whether an op behind a segment asks only what is known before it, and changes nothing."""
        side = self.sides.side(op)
        if side is Side.NEAR or self.names(op):
            return isinstance(op, (*_QUIET, ops.Call)) and not any(value.name in derived for value in used(op))
        return side is Side.EITHER and isinstance(op, ops.Item) and all(value.name in early for value in used(op))

    def may_be_inside(self, op: Op, inside: set[str]) -> bool:
        """Whether an op may stand between two that need the model."""
        if self.sides.side(op) is not Side.EITHER or isinstance(op, (*TERMINATORS, ops.Emit, ops.Cell, ops.Closure)):
            return False
        return not any(self.changes(each, inside) for each in walk(Region((), (op,))))

    def changes(self, op: Op, inside: set[str]) -> bool:
        """Whether an op changes an object that is not the segment's own: such an object need not be sent."""
        match op:
            case ops.SetItem(object=owner) | ops.SetAttribute(object=owner) | ops.Delete(object=owner):
                changed = [owner]
            case ops.Operator(in_place=True, operands=(owner, _)):
                changed = [owner]
            case ops.Call():
                row = self.row(op)
                if row is None:
                    return False
                if row.random or row.mode or row.iterator:
                    return True
                if row.behaviour not in (Behaviour.MUTATES, Behaviour.CONTAINER):
                    return False
                changed = [argument.value for argument in op.arguments]
                maker = self.sides.made.get(op.function.name) if isinstance(op.function, Value) else None
                changed += [maker.object] if isinstance(maker, ops.Attribute) else []
            case _:
                return False
        return any(isinstance(value, Value) and value.name not in inside for value in changed)

    def row(self, op: ops.Call) -> KnownCall | None:
        target = self.sides.target(op)
        if target is None:
            return None
        return known_method(target.removeprefix("method.")) if target.startswith("method.") else ALL.get(target)

    def makes_less(self, op: Op, derived: set[str], known: set[str], early: set[str]) -> bool:
        """Whether an op only computes something of what a segment gives."""
        if self.sides.side(op) is not Side.EITHER:
            return False
        match op:
            case ops.Call():
                row = self.row(op)
                if row is None or row.behaviour not in (Behaviour.PURE, Behaviour.VIEW):
                    return False
                if row.random or row.iterator or row.mode or row.target in _VIEWS:
                    return False
            case ops.Operator(in_place=in_place) if not in_place:
                pass
            case ops.Load() | ops.Bound():
                return all(value.name in known for value in used(op))
            case _ if not isinstance(op, _QUIET):
                return False
        free = [value for value in used(op) if value.name not in known]
        if isinstance(op, ops.Item) and op.object not in free:
            return all(value.name in early or self.sides.kind(value) == DATA for value in free)
        return all(value.name in early or isinstance(self.sides.kind(value), _NAMED) for value in free)

    def start(self, taken: Sequence[Op], index: int, end: int, floor: int) -> int:
        """Where a segment begins, with what it alone loops over: an iterator cannot be sent."""
        body = set(map(id, walk(Region((), tuple(taken[index:end])))))
        start = index
        while start > floor:
            op = taken[start - 1]
            if not self.brings(op) or self.used_outside(op, body):
                break
            body.add(id(op))
            start -= 1
        while start < index and self.names(taken[start]):
            start += 1
        return start

    def brings(self, op: Op) -> bool:
        """Whether an op makes an iterator, or names what makes one."""
        if self.sides.side(op) is not Side.EITHER:
            return False
        if isinstance(op, ops.Call):
            row = self.row(op)
            return row is not None and row.iterator
        return isinstance(op, ops.Build) or self.names(op)

    def used_outside(self, op: Op, body: set[int]) -> bool:
        names = {value.name for value in defined(op)}
        return any(
            id(each) not in body and any(value.name in names for value in used(each)) for each in self.program.walk()
        )

    def names(self, op: Op) -> bool:
        """Whether an op only names something, so that either side can do so for itself."""
        sides = self.sides
        if sides.side(op) is not Side.EITHER:
            return False
        match op:
            case ops.Global(result=result):
                return isinstance(sides.kind(result), (*_NAMED, Handle, Helper))
            case ops.Import(result=result):
                return isinstance(sides.kind(result), _NAMED)
            case ops.Attribute(result=result, object=owner):
                kind = sides.kind(owner)
                return isinstance(kind, (*_NAMED, Handle, Modules)) or result.name in self.callees
            case ops.Item(object=owner):
                return isinstance(sides.kind(owner), (Handle, Modules))
            case ops.Build(result=result):
                return isinstance(sides.kind(result), Modules) and result.name not in self.assigned
            case ops.Call(result=result):
                row = self.row(op)
                again = isinstance(sides.kind(result), Modules) and not (row is not None and row.iterator)
                return (again and result.name not in self.assigned) or sides.target(op) in CONTEXTS
        return isinstance(op, ops.Edit)


def _only_called(program: Program) -> frozenset[str]:
    """The names of values that are used as what is called, and for nothing else."""
    called: set[str] = set()
    else_used: set[str] = set()
    for op in program.walk():
        function = op.function if isinstance(op, ops.Call) else None
        for value in used(op):
            (called if value is function else else_used).add(value.name)
    return frozenset(called - else_used)


def _assigned(program: Program) -> frozenset[str]:
    """The names of values which some op may change: whose items or attributes it sets, or whose methods it calls."""
    found = set()
    for op in program.walk():
        match op:
            case ops.SetItem(object=Value(name=name)) | ops.Delete(object=Value(name=name)):
                found.add(name)
            case ops.Operator(in_place=True, operands=(Value(name=name), _)) | ops.Attribute(object=Value(name=name)):
                found.add(name)
    return frozenset(found)
