"""The ops of a forward, as entries that are to be placed, and what must come before what.

Conditions and contexts are flattened: each op inside carries its frames. Reads are taken out of loops that do not write
their site.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, definitions, operands, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.in_place_writes import in_place, targets
from nnsight_compiler.passes.memory import Fresh, Name, Root, Site, Weight
from nnsight_compiler.passes.moments import Moment, last_step
from nnsight_compiler.passes.pauses import pauses
from nnsight_compiler.passes.sites import RESULT, Order, Place, event_port, locate, place_of

if TYPE_CHECKING:
    from nnsight_compiler.passes.place import Placement

BEFORE = -1
"""The time of what needs no site."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A condition, a context or steps of a generation around an op: which op it is, and for a condition in which
    branch."""

    op: ops.If | ops.With | ops.Steps
    branch: int = 0

    @property
    def uses(self) -> Iterator[Value]:
        """The values that decide whether, or in what, the ops inside run."""
        match self.op:
            case ops.If(condition=operand) | ops.With(context=operand):
                yield from values_in(operand)


@dataclass(slots=True, eq=False)
class Entry:
    """An op of a forward, to be placed.

    merge: it stands for the results of a condition.
    steps: the steps of a generation at which it runs; without, it runs once.
    step: the first of them, or the one.
    """

    op: Op
    order: tuple[int, int]
    frames: tuple[Frame, ...] = ()
    merge: bool = False
    needs: list[Entry] = field(default_factory=list)
    pin: Place | None = None
    steps: ops.Steps | None = None
    step: float = 0
    time: int = BEFORE
    changes: dict[str, Value] = field(default_factory=dict)
    """Values that it takes a copy of instead."""
    follows: Entry | None = None
    """The call whose method it looks up: it runs where that runs."""
    closes: bool = False
    """Whether it ends what happens at its site."""

    @property
    def last(self) -> Moment:
        """When it has run for the last time."""
        if self.steps is None:
            return self.step, self.time
        stop = last_step(self.steps)
        return stop, RESULT if stop == math.inf else self.time

    def beside(self, other: Entry) -> bool:
        """Whether it runs whenever another does, at the same site."""
        return self.along(other) and (self.step, self.time) == (other.step, other.time)

    def along(self, other: Entry) -> bool:
        """Whether both are of one round of one loop over steps, or of none. What writes are repeated in is one loop."""
        if self.steps is None or other.steps is None:
            return self.steps is other.steps
        return self.steps is other.steps or not (self.steps.asked or other.steps.asked)

    def after(self, need: Entry) -> Moment:
        """The moment at which the entry can run for the first time, as far as one that it needs goes."""
        return (need.step, need.time) if self.along(need) else need.last


class Body:
    """The entries of one forward, with what each needs."""

    def __init__(self, placement: Placement, forward: ops.Forward) -> None:
        self.placement = placement
        self.memory = placement.memory
        self.forward = forward
        self.order: Order = placement.orders(forward)
        self.invokes = [op for op in walk(forward.body) if isinstance(op, ops.Invoke)]
        self.given = {root for each in forward.arguments for root in self.memory.reachable(each.value)}
        self.entries: list[Entry] = []
        self.makers: dict[str, Entry] = {}
        self.copies: dict[tuple[str, int], Value] = {}
        self.writers: dict[tuple[str, str, int | None], list[Entry]] = defaultdict(list)
        self.places: dict[int, Place] = {}
        self.detached: set[str] = set()
        self.entered: dict[Root, set[int]] = {}
        self.stops: list[Entry] = []
        self.originals: dict[int, Op] = {}
        """For a loop that lost its reads, the op that the memory analysis knows."""

    def _flatten(self, region: tuple[Op, ...], frames: tuple[Frame, ...]) -> None:
        for op in region:
            match op:
                case ops.If():
                    for branch, part in enumerate((op.then, op.orelse)):
                        self._flatten(part.ops, (*frames, Frame(op, branch)))
                    if op.results:
                        self._add(op, frames, merge=True)
                case ops.With():
                    self._flatten(op.body.ops, (*frames, Frame(op)))
                    self.makers.setdefault(op.result.name, self.entries[-1]) if self.entries else None
                case ops.Invoke() | ops.Applied():
                    self._flatten(op.body.ops, frames)
                case ops.Steps():
                    self._flatten(op.body.ops, (Frame(op), *self._around_steps(op, frames)))
                case ops.Yield():
                    pass
                case ops.For() | ops.While():
                    self._add(self._hoisted(op, frames), frames)
                case _:
                    self._add(op, frames)

    def _around_steps(self, op: ops.Steps, frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
        """The conditions and contexts around steps, which hold in each of them. Steps inside others are their own."""
        for frame in frames:
            if isinstance(frame.op, ops.With) and not self.placement.enters_again(frame.op):
                raise CompileError(
                    [
                        Diagnostic(
                            frame.op.span,
                            "this context would have to be entered again at each step of the loop inside it",
                            "put it into the loop, or around the whole `with model.generate(…)`",
                            ((op.span, "the loop over steps"),),
                        )
                    ]
                )
        return tuple(frame for frame in frames if not isinstance(frame.op, ops.Steps))

    def _add(self, op: Op, frames: tuple[Frame, ...], merge: bool = False) -> Entry:
        steps = frames[0].op if frames and isinstance(frames[0].op, ops.Steps) else None
        entry = Entry(op, (len(self.entries), 0), frames, merge, steps=steps)
        self.entries.append(entry)
        for value in defined(op):
            self.makers[value.name] = entry
        if not merge:
            for part in regions(op):
                for value in definitions(part):
                    self.makers[value.name] = entry
        return entry

    def _hoisted(self, op: ops.For | ops.While, frames: tuple[Frame, ...]) -> ops.For | ops.While:
        """The loop without its reads of sites that it does not write: those are made once, before it."""
        sites = self._changed(op)
        if len(sites) > 1:
            first, second = sorted(sites, key=lambda site: site.time)[:2]
            raise CompileError(
                [
                    Diagnostic(
                        op.span,
                        f"each round of this loop writes to several sites (`{first.path}`, `{second.path}`)",
                        "write a loop for each site, or loop over numbers that are known before the run",
                    )
                ]
            )
        moved: list[Op] = []

        def without(region: Region) -> Region:
            kept = []
            for inner in region.ops:
                hoists = isinstance(inner, ops.Read) and place_of(inner, self.order) not in sites
                if hoists or (isinstance(inner, ops.Require) and any(inner.value in defined(each) for each in moved)):
                    moved.append(inner)
                else:
                    kept.append(rewrite(inner, region=without))
            return Region(region.parameters, tuple(kept))

        hoisted = rewrite(op, region=without)
        for read in moved:
            self._add(read, frames)
        if hoisted is not op:
            self.originals[id(hoisted)] = op
        return hoisted

    def _depend(self) -> None:
        self.entered = self._entered()
        last: dict[object, Entry] = {}
        since: dict[object, list[Entry]] = defaultdict(list)
        through: dict[int, set[object]] = {}

        def wait(entry: Entry, others: list[Entry], key: object) -> None:
            # What a site may hold is another storage at each step: there, the order within a step is enough.
            for other in others:
                held = key in through[id(entry)] or key in through[id(other)]
                if entry.along(other) or not held:
                    entry.needs.append(other)

        for number, entry in enumerate(self.entries):
            if pauses(entry.op, self.placement.pausing):
                entry.needs.extend(self.entries[:number])
            for value in self._uses(entry):
                maker = self.makers.get(value.name)
                if maker is None or maker is entry:
                    continue
                if self._looks_up(maker, entry, value):
                    maker.follows = entry
                    entry.needs.extend(maker.needs)
                else:
                    entry.needs.append(maker)
            for frame in entry.frames:
                for value in frame.uses:
                    if value.name in self.makers:
                        entry.needs.append(self.makers[value.name])
            if entry.merge:
                continue
            reads, writes = self._touched(entry.op)
            through[id(entry)] = self._through_sites(entry.op) if self.entered else set()
            for key in writes:
                wait(entry, since.pop(key, []), key)
                wait(entry, [last[key]] if key in last else [], key)
                last[key] = entry
            for key in reads - writes:
                wait(entry, [last[key]] if key in last else [], key)
                if key not in through[id(entry)]:  # such a value is copied where the op runs elsewhere than at its site
                    since[key].append(entry)

    def _looks_up(self, maker: Entry, entry: Entry, value: Value) -> bool:
        """Whether an entry only looks up the method that a call calls, for that call alone."""
        return (
            isinstance(maker.op, ops.Attribute)
            and isinstance(entry.op, ops.Call)
            and entry.op.function == value
            and entry.frames == maker.frames
            and self.placement.uses[value.name] == 1
        )

    def _uses(self, entry: Entry) -> Iterator[Value]:
        op = entry.op
        if entry.merge:
            assert isinstance(op, ops.If)
            yield from values_in(op.condition)
            for part in (op.then, op.orelse):
                if part.ops and isinstance(part.ops[-1], ops.Yield):
                    yield from used(part.ops[-1])
            return
        yield from used(op)
        for part in regions(op):
            inside = {value.name for value in definitions(part)} | {value.name for value in part.parameters}
            for inner in walk(part):
                yield from (value for value in used(inner) if value.name not in inside)

    def _touched(self, op: Op) -> tuple[set[object], set[object]]:
        """What an op reads and writes besides sites: storages of the program's, and the world outside."""
        op = self.originals.get(id(op), op)
        elsewhere = self._elsewhere(op)
        held = self._is_container_write(op)
        reads = {key for root in self.memory.reads(op) - elsewhere for key in _keys(root, held)}
        writes = {key for root in self.memory.writes(op) - elsewhere for key in _keys(root, held)}
        for inner in (op, *(each for part in regions(op) for each in walk(part))):
            match inner:
                case ops.Record(cache=cache):  # which of two records comes first makes no difference
                    filled = {key for root in self.memory.roots(cache) for key in _keys(root)}
                    reads, writes = reads - filled, writes - filled
                case ops.Call():
                    known = self.memory.origins.known(inner)
                    host = known is None and not isinstance(inner.function, Module)
                    if host or (known is not None and known.behaviour is Behaviour.HARMLESS):
                        writes.add("effects")
                    if host or (known is not None and known.random):
                        writes.add("random")  # host code may draw, or set a seed
                case ops.Raise() | ops.Import() | ops.SetGlobal() | ops.Unpack() | ops.Bound():
                    writes.add("effects") if not isinstance(inner, (ops.Unpack, ops.Bound)) else reads.add("effects")
        return reads, writes

    def _is_container_write(self, op: Op) -> bool:
        """Whether an op puts something into a container or an object, and can change the numbers of no tensor."""
        match op:
            case ops.SetItem(index=Literal(value=str())):
                return True
            case ops.SetAttribute(name=name):
                return not hasattr(torch.Tensor, name)
            case ops.Call():
                known = self.memory.origins.known(op)
                return (
                    known is not None and known.behaviour is Behaviour.CONTAINER and not (known.random or known.calls)
                )
        return False

    def _elsewhere(self, op: Op) -> frozenset[Root]:
        """Storages that the model is given at other sites than those of an op. A site may hold one of them where the
        model hands it on, but between sites the order of the forward rules."""
        if not self.entered:
            return frozenset()
        if any(map(self.memory.calls_closures, (op, *(each for part in regions(op) for each in walk(part))))):
            return frozenset()
        named = self._named(op)
        here = {BEFORE, *(self._place(root, op.span).time for root in self._sites(named))}
        return frozenset(root for root, times in self.entered.items() if root not in named and not times & here)

    def _through_sites(self, op: Op) -> set[object]:
        """The storages that an op may touch as what a site holds, but does not name."""
        roots = self.entered.keys() - self._named(self.originals.get(id(op), op))
        return {key for root in roots for key in _keys(root)}

    def _named(self, op: Op) -> frozenset[Root]:
        inner = (op, *(each for part in regions(op) for each in walk(part)))
        return frozenset[Root]().union(*(self.memory.named(each) for part in inner for each in operands(part)))

    def _entered(self) -> dict[Root, set[int]]:
        """The storages that the model is given in this forward by its body, and when: of its arguments it has copies
        where that matters."""
        entered: dict[Root, set[int]] = defaultdict(set)
        given: list[tuple[Operand, int]] = []
        for op in walk(self.forward.body):
            if isinstance(op, (ops.Write, ops.Skip)):
                given.append((op.value, place_of(op, self.order).time))
            elif isinstance(op, (ops.SetItem, ops.SetAttribute)):
                sites = self._sites(self.memory.named(op.object))
                given.extend((op.value, self._place(site, op.span).time) for site in sites)
            elif isinstance(op, ops.Call) and in_place(op, self.memory) and self._sites(targets(op, self.memory)):
                given.extend((argument.value, BEFORE) for argument in op.arguments)
        for operand, time in given:
            for root in self.memory.named(operand):
                if not isinstance(root, Site):
                    entered[root].add(time)
        return entered

    def _changes(self, op: Op) -> frozenset[Root]:
        """The storages that an op, or anything in its regions, changes by name."""
        inner = (op, *(each for part in regions(op) for each in walk(part)))
        return frozenset[Root]().union(*(targets(each, self.memory) for each in inner if in_place(each, self.memory)))

    def _changed(self, op: Op) -> set[Place]:
        """The sites whose values an op changes by name. What other sites may share with them does not count: between
        sites the order of the forward rules."""
        inner = [op, *(each for part in regions(op) for each in walk(part))]
        changing = [each for each in inner if isinstance(each, (ops.Write, ops.Skip)) or in_place(each, self.memory)]
        if not changing:
            return set()
        if any(self.memory.calls_closures(each) for each in inner):
            roots = self.memory.writes(op)
        else:
            roots = frozenset[Root]().union(*(targets(each, self.memory) for each in changing))
        return {self._place(root, op.span) for root in self._sites(roots)}

    def _sites(self, roots: frozenset[Root]) -> list[Site]:
        return [root for root in roots if isinstance(root, Site) and root.forward == self.forward.result.name]

    def _place(self, root: Site, span: Span) -> Place:
        found = locate(root.module, event_port(root.port), root.call, span, self.order)
        self.places[found.time] = found
        return found


def _keys(root: Root, held: bool = False) -> frozenset[object]:
    """Roots that may be the same storage share a key; sites have none. What is from outside may be a weight too, but
    not where it `held` what was put into it."""
    match root:
        case Site():
            return frozenset()
        case Fresh():
            return frozenset({root})
        case Name():
            return frozenset({"names"})
        case Weight():
            return frozenset({"weights"})
        case _:
            return frozenset({"outside"}) if held else frozenset({"outside", "weights"})
