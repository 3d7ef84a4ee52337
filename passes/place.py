"""Places every op of a forward at the earliest site where all that it needs exists.

    forward %f0 = trace %model(%corrupt)                 forward %f0 = trace %model(%corrupt)
      %logits = read %model@lm_head output                 at %model@h.3 output
      %0 = item %logits[:, -1]                               %1 = read %model@h.3 output
      %1 = read %model@h.3 output                    ──▶     set_item %1[:, %position] = %source
      set_item %1[:, %position] = %source                  at %model@lm_head output
    return %0                                                %logits = read %model@lm_head output
                                                             %0 = item %logits[:, -1]
                                                             %kept = save %0
                                                         return %kept

Legal, since ops keep every order that matters: what an op uses comes before it; accesses to the same storage of the
program's, and effects, keep their order in the source; accesses to one site keep it within that site, and sites are
ordered by the model (DESIGN.md D1, D2). A value of the model that is used after its site is copied there, at the place
in the source order where it is used, so that it is what it was: the model, or a later write, may change the original.
What needs no site runs before the forward. A write that needs a value of a later site is refused with the cycle.

Conditions and `with` contexts whose bodies touch several sites are split, one piece a site.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NoReturn

import networkx as nx

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import defined, definitions, operands, regions, rewrite, used, walk
from nnsight_compiler.ir.values import UNBOUND, Module, Operand, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.memory import Fresh, Memory, Name, Root, Site
from nnsight_compiler.passes.sites import Order, Orders, Place, event_port, forwards, in_place, locate, place_of

BEFORE = -1
"""The time of what needs no site."""


def place(program: Program, orders: Orders) -> Program:
    """The program with the body of each forward as a sequence of `at` regions.

    Raises:
        CompileError: an op needs what does not exist yet at the site where it must run.
    """
    return _Placement(program, orders).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """A condition or a context around an op: which op it is, and for a condition in which branch."""

    op: ops.If | ops.With
    branch: int = 0


ENTERED_AGAIN = frozenset(
    f"torch.{name}" for name in ("no_grad", "enable_grad", "inference_mode", "autocast", "amp.autocast")
)
"""Contexts that mean the same around several parts as around the whole."""


@dataclass(slots=True, eq=False)
class _Entry:
    """An op of a forward, to be placed. `merge`: it stands for the results of a condition."""

    op: Op
    order: tuple[int, int]
    frames: tuple[_Frame, ...] = ()
    merge: bool = False
    needs: list[_Entry] = field(default_factory=list)
    pin: Place | None = None
    time: int = BEFORE
    changes: dict[str, Value] = field(default_factory=dict)
    """Values that it takes a copy of instead."""
    follows: _Entry | None = None
    """The call whose method it looks up: it runs where that runs."""


class _Placement:
    def __init__(self, program: Program, orders: Orders) -> None:
        self.program = program
        self.orders = orders
        self.memory = Memory(program)
        self.builder = Builder(value.name for value in program.values())
        self.homes: dict[str, str] = {}
        self.leaving: dict[str, Value] = {}
        for forward in forwards(program.body):
            for value in definitions(forward.body):
                self.homes[value.name] = forward.result.name
        self.used_outside = set(self._used_outside(program.body, ""))
        self.uses = Counter(value.name for op in program.walk() for value in used(op))

    def run(self) -> Program:
        body = self._region(self.program.body)
        return replace(self.program, body=self._renamed(body, "") if self.leaving else body)

    def _used_outside(self, region: Region, home: str) -> Iterator[str]:
        """The values of forwards that are used outside of their own."""
        for op in region.ops:
            for value in used(op):
                if self.homes.get(value.name, home) != home:
                    yield value.name
            inner = op.result.name if isinstance(op, ops.Forward) else home
            for part in regions(op):
                yield from self._used_outside(part, inner)

    def _region(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            if isinstance(op, ops.Forward):
                before, forward = _Schedule(self, op).run()
                made += [*before, forward]
            else:
                made.append(rewrite(op, region=self._region))
        return Region(region.parameters, tuple(made))

    def _renamed(self, region: Region, home: str) -> Region:
        """The region, taking the copies of values that left other forwards."""

        def change(value: Value) -> Operand:
            kept = self.leaving.get(value.name)
            return value if kept is None or self.homes.get(value.name) == home else kept

        def changed(op: Op) -> Op:
            inner = op.result.name if isinstance(op, ops.Forward) else home
            return rewrite(op, operand=change, region=lambda part: self._renamed(part, inner))

        return Region(region.parameters, tuple(map(changed, region.ops)))


class _Schedule:
    """The placing of one forward."""

    def __init__(self, placement: _Placement, forward: ops.Forward) -> None:
        self.placement = placement
        self.memory = placement.memory
        self.forward = forward
        self.order: Order = placement.orders(forward)
        self.entries: list[_Entry] = []
        self.makers: dict[str, _Entry] = {}
        self.copies: dict[tuple[str, int], Value] = {}
        self.writers: dict[tuple[str, str, int | None], list[_Entry]] = defaultdict(list)
        self.places: dict[int, Place] = {}
        self.detached: set[str] = set()
        self.entered: dict[Root, set[int]] = {}
        self.originals: dict[int, Op] = {}
        """For a loop that lost its reads, the op that the memory analysis knows."""

    def run(self) -> tuple[list[Op], ops.Forward]:
        self._flatten(self.forward.body.ops, ())
        self._depend()
        for entry in self.entries:
            if entry.follows is None:
                self._time(entry)
        for entry in self.entries:
            if entry.follows is not None:
                entry.time = entry.follows.time
        self._copy()
        slots: dict[int, list[_Entry]] = defaultdict(list)
        for entry in sorted(self.entries, key=lambda each: each.order):
            slots[entry.time].append(entry)
        self._note_uses()
        before = self._gather(slots.pop(BEFORE, []), 0)
        made = []
        for time in sorted(slots):
            entries = slots[time]
            site = self.places[time]
            assert isinstance(self.forward.model, Value)
            body = Region((), tuple(self._gather(entries, 0)))
            module = Module(self.forward.model, site.path)
            made.append(ops.At(module, site.port, site.call, body, span=entries[0].op.span))
        return before, replace(self.forward, body=Region((), tuple(made)))

    # --- what is to be placed ---

    def _flatten(self, region: tuple[Op, ...], frames: tuple[_Frame, ...]) -> None:
        for op in region:
            match op:
                case ops.If():
                    for branch, part in enumerate((op.then, op.orelse)):
                        self._flatten(part.ops, (*frames, _Frame(op, branch)))
                    if op.results:
                        self._add(op, frames, merge=True)
                case ops.With():
                    self._flatten(op.body.ops, (*frames, _Frame(op)))
                    self.makers.setdefault(op.result.name, self.entries[-1]) if self.entries else None
                case ops.Yield():
                    pass
                case ops.For() | ops.While():
                    self._add(self._hoisted(op, frames), frames)
                case _:
                    self._add(op, frames)

    def _add(self, op: Op, frames: tuple[_Frame, ...], merge: bool = False) -> _Entry:
        entry = _Entry(op, (len(self.entries), 0), frames, merge)
        self.entries.append(entry)
        for value in defined(op):
            self.makers[value.name] = entry
        if not merge:
            for part in regions(op):
                for value in definitions(part):
                    self.makers[value.name] = entry
        return entry

    def _hoisted(self, op: ops.For | ops.While, frames: tuple[_Frame, ...]) -> ops.For | ops.While:
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
        moved: list[ops.Read] = []

        def without(region: Region) -> Region:
            kept = []
            for inner in region.ops:
                if isinstance(inner, ops.Read) and place_of(inner, self.order) not in sites:
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

    # --- what must come before what ---

    def _depend(self) -> None:
        self.entered = self._entered()
        last: dict[object, _Entry] = {}
        since: dict[object, list[_Entry]] = defaultdict(list)
        for entry in self.entries:
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
                operand = frame.op.condition if isinstance(frame.op, ops.If) else frame.op.context
                for value in values_in(operand):
                    if value.name in self.makers:
                        entry.needs.append(self.makers[value.name])
            if entry.merge:
                continue
            reads, writes = self._touched(entry.op)
            through_sites = self._through_sites(entry.op) if self.entered else set()
            for key in writes:
                entry.needs.extend(since.pop(key, []))
                if key in last:
                    entry.needs.append(last[key])
                last[key] = entry
            for key in reads - writes:
                if key in last:
                    entry.needs.append(last[key])
                if key not in through_sites:  # such a value is copied where the op runs elsewhere than at its site
                    since[key].append(entry)

    def _looks_up(self, maker: _Entry, entry: _Entry, value: Value) -> bool:
        """Whether an entry only looks up the method that a call calls, for that call alone."""
        return (
            isinstance(maker.op, ops.Attribute)
            and isinstance(entry.op, ops.Call)
            and entry.op.function == value
            and entry.frames == maker.frames
            and self.placement.uses[value.name] == 1
        )

    def _uses(self, entry: _Entry) -> Iterator[Value]:
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
        reads = {_key(root) for root in self.memory.reads(op) - elsewhere if not isinstance(root, Site)}
        writes = {_key(root) for root in self.memory.writes(op) - elsewhere if not isinstance(root, Site)}
        for inner in (op, *(each for part in regions(op) for each in walk(part))):
            match inner:
                case ops.Call():
                    known = self.memory.origins.known(inner)
                    if (known is None and not isinstance(inner.function, Module)) or (
                        known is not None and known.behaviour is Behaviour.HARMLESS
                    ):
                        writes.add("effects")
                    elif known is not None and known.random:
                        writes.add("random")
                case ops.Raise() | ops.Import() | ops.SetGlobal() | ops.Unpack() | ops.Bound():
                    writes.add("effects") if not isinstance(inner, (ops.Unpack, ops.Bound)) else reads.add("effects")
        return reads, writes

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
        return {_key(root) for root in self.entered.keys() - self._named(self.originals.get(id(op), op))}

    def _named(self, op: Op) -> frozenset[Root]:
        inner = (op, *(each for part in regions(op) for each in walk(part)))
        return frozenset[Root]().union(*(self.memory.named(each) for part in inner for each in operands(part)))

    def _entered(self) -> dict[Root, set[int]]:
        """The storages that the model is given in this forward, and when."""
        entered: dict[Root, set[int]] = defaultdict(set)
        given: list[tuple[Operand, int]] = [(each.value, BEFORE) for each in self.forward.arguments]
        for op in walk(self.forward.body):
            if isinstance(op, (ops.Write, ops.Skip)):
                given.append((op.value, place_of(op, self.order).time))
            elif isinstance(op, (ops.SetItem, ops.SetAttribute)):
                sites = self._sites(self.memory.named(op.object))
                given.extend((op.value, self._place(site, op.span).time) for site in sites)
            elif isinstance(op, ops.Call) and in_place(op, self.memory) and self._sites(self._targets(op)):
                given.extend((argument.value, BEFORE) for argument in op.arguments)
        for operand, time in given:
            for root in self.memory.named(operand):
                if not isinstance(root, Site):
                    entered[root].add(time)
        return entered

    # --- times ---

    def _sites(self, roots: frozenset[Root]) -> list[Site]:
        return [root for root in roots if isinstance(root, Site) and root.forward == self.forward.result.name]

    def _place(self, root: Site, span: Span) -> Place:
        found = locate(root.module, event_port(root.port), root.call, span, self.order)
        self.places[found.time] = found
        return found

    def _time(self, entry: _Entry) -> None:
        op = self.originals.get(id(entry.op), entry.op)
        if not entry.merge:
            entry.pin = self._pin(entry, op)
        entry.time = max((need.time for need in entry.needs), default=BEFORE)
        if entry.pin is None:
            return
        if entry.time > entry.pin.time and isinstance(op, ops.Read):
            # To read changes nothing: under a condition that is known only later, it is done in any case.
            entry.frames, entry.needs = (), []
        elif entry.time > entry.pin.time:
            self._refuse(entry)
        entry.time = entry.pin.time

    def _pin(self, entry: _Entry, op: Op) -> Place | None:
        """The site at which an op must run: the one that it reads or writes."""
        if isinstance(op, (ops.Read, ops.Write, ops.Skip)):
            found = place_of(op, self.order)
            self.places[found.time] = found
            if not isinstance(op, ops.Read):
                self.writers[found.path, found.port, found.call].append(entry)
            return found
        sites = self._changed(op)
        if not sites:
            return None
        if len(sites) > 1:
            first, second = sorted(sites, key=lambda site: site.time)[:2]
            raise CompileError(
                [
                    Diagnostic(
                        op.span,
                        f"this writes in place to what may be a value of `{first.path}` or of `{second.path}`",
                        "write to each site by its own name, or make a new value and assign it",
                    )
                ]
            )
        (site,) = sites
        self.writers[site.path, site.port, site.call].append(entry)
        return site

    def _changes(self, op: Op) -> frozenset[Root]:
        """The storages that an op, or anything in its regions, changes by name."""
        inner = (op, *(each for part in regions(op) for each in walk(part)))
        return frozenset[Root]().union(*(self._targets(each) for each in inner if in_place(each, self.memory)))

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
            roots = frozenset[Root]().union(*map(self._targets, changing))
        return {self._place(root, op.span) for root in self._sites(roots)}

    def _targets(self, op: Op) -> frozenset[Root]:
        """The storages that an op changes by name."""
        match op:
            case ops.SetItem(object=base) | ops.SetAttribute(object=base) | ops.Delete(object=base):
                return self.memory.roots(base)
            case ops.Operator(operands=parts):
                return self.memory.roots(parts[0])
            case ops.Call():
                known = self.memory.origins.known(op)
                assert known is not None
                changed = self.memory.origins.at(op, known.mutates)
                of = self.memory.roots if known.behaviour is Behaviour.CONTAINER else self.memory.named
                return frozenset[Root]().union(*(of(argument.value) for argument in changed))
        return self.memory.writes(op)

    def _refuse(self, entry: _Entry) -> NoReturn:
        """The error of a write that needs what only a later site gives: both lines, and the way between them."""
        assert entry.pin is not None
        graph = nx.DiGraph()
        for each in self.entries:
            graph.add_edges_from((each, need) for need in each.needs)
        late = [
            each for each in nx.descendants(graph, entry) if each.pin is not None and each.pin.time > entry.pin.time
        ]
        source = min(late, key=lambda each: len(nx.shortest_path(graph, entry, each)))
        assert source.pin is not None
        graph.add_edge(source, entry)  # the model itself computes the later site from the earlier
        cycle = nx.shortest_path(graph, entry, source)
        here, there = _spelled(entry.pin), _spelled(source.pin)
        chain = [f"line {each.op.span.line}" for each in cycle]
        raise CompileError(
            [
                Diagnostic(
                    entry.op.span,
                    f"this changes {here}, but needs {there}, which the same forward computes only later:"
                    f" {' needs '.join(chain)}, and the model needs line {entry.op.span.line} before that",
                    "take the value from a forward of its own: run the model once for the value, and again with the"
                    " change",
                    ((source.op.span, f"{there} is read here"),),
                )
            ]
        )

    # --- copies of values that outlive their site ---

    def _copy(self) -> None:
        for entry in list(self.entries):
            for value in dict.fromkeys(self._uses(entry)):
                if not self._live(value):
                    continue
                maker = self.makers[value.name]
                if maker is entry or (maker.time == entry.time and not self._stores(entry, value)):
                    continue
                if not entry.merge and self._changes(entry.op) & self._own(value):
                    continue  # what the program made is changed itself; copies are made after that
                entry.changes[value.name] = self._copied(value, entry.order[0])
        for entry in self.entries:
            if isinstance(entry.op, (ops.For, ops.While)):
                kept = rewrite(entry.op, region=self._kept_in)
                self.originals[id(kept)] = self.originals.get(id(entry.op), entry.op)
                entry.op = kept
        for entry in list(self.entries):
            if isinstance(entry.op, (ops.Write, ops.Skip)):
                for value in dict.fromkeys(values_in(entry.op.value)):
                    if self._shared(entry, value):
                        entry.changes[value.name] = self._given(entry, entry.changes.get(value.name, value))
        for name in self.placement.used_outside:
            if name in self.makers and self.placement.homes.get(name) == self.forward.result.name:
                left = self._value(name)
                if left is not None and self._live(left):
                    self.placement.leaving[name] = self._copied(left, len(self.entries) + len(self.copies))

    def _shared(self, write: _Entry, value: Value) -> bool:
        """Whether what a write gives to the model, which may go on to change it in place, is also something else. A
        value that the program itself changes after the write stays one with the site."""
        if value.name in write.changes:
            return True
        roots = self.memory.named(value)
        if self._sites(roots):
            return False
        after = [each for each in self.entries if each.order > write.order or each.time > write.time]
        if any(not each.merge and in_place(each.op, self.memory) and self._targets(each.op) & roots for each in after):
            return False
        if any(not isinstance(root, Fresh) for root in roots) or value.name not in self.makers:
            return bool(roots)
        outside = (self._value(name) for name in self.placement.used_outside if name in self.makers)
        later = (used for each in after for used in self._uses(each))
        return any(self.memory.named(each) & roots for each in (*later, *outside) if each is not None)

    def _given(self, write: _Entry, value: Value) -> Value:
        """A copy of a value for the model alone."""
        given = self.placement.builder.fresh(value.name)
        save = ops.Save(given, value, span=write.op.span)
        entry = _Entry(save, (write.order[0], -1), write.frames, time=write.time)
        self.entries.append(entry)
        self.makers[given.name] = entry
        self.detached.add(given.name)
        return given

    def _value(self, name: str) -> Value | None:
        op = self.makers[name].op
        found = [value for value in defined(op) if value.name == name]
        return found[0] if found else None

    def _live(self, value: Value) -> bool:
        """Whether a value may be one that the model still holds, where it is made."""
        if value.name in self.detached or value.name not in self.makers:
            return False
        if not self._sites(self.memory.reachable(value)):
            return False
        maker = self.makers[value.name]
        if isinstance(maker.op, ops.Read) or any(isinstance(each, ops.Read) for each in self._inner(maker)):
            return True
        taken = [each for each in self._uses(maker) if each.name not in maker.changes]
        alive = any(self._live(each) for each in taken)
        if not alive:
            self.detached.add(value.name)
        return alive

    @staticmethod
    def _inner(entry: _Entry) -> Iterator[Op]:
        if not entry.merge:
            for part in regions(entry.op):
                yield from walk(part)

    def _stores(self, entry: _Entry, value: Value) -> bool:
        """Whether an op puts the value where it outlives its site: into a container, an object, a cell, a closure."""
        match entry.op:
            case ops.Build(result=result, kind="list" | "dict" | "set"):
                return self._outlives(result, entry.time)
            case ops.Call() as op:
                known = self.memory.origins.known(op)
                if known is None or known.behaviour is not Behaviour.CONTAINER:
                    return False
                return any(value in values_in(argument.value) for argument in op.arguments)
            case ops.SetItem(object=base) | ops.SetAttribute(object=base):
                stored = value in values_in(entry.op.value)
                return stored and not self._sites(self.memory.roots(base))
            case ops.Store() | ops.Cell() | ops.SetGlobal():
                return True
        return False

    def _kept_in(self, region: Region) -> Region:
        """A region of a loop, in which values of the model are copied where they are put into something."""
        made: list[Op] = []
        for op in region.ops:
            copies: dict[str, Value] = {}
            for value in self._put(op):
                if self._sites(self.memory.reachable(value)):
                    copies[value.name] = self.placement.builder.fresh(value.name)
                    made.append(ops.Save(copies[value.name], value, span=op.span))
            new = rewrite(op, region=self._kept_in)
            if copies:
                new = rewrite(new, operand=_taking(copies))
            made.append(new)
        return Region(region.parameters, tuple(made))

    def _put(self, op: Op) -> Iterator[Value]:
        """The values that an op puts into a container, an object or a global name."""
        match op:
            case ops.Call():
                known = self.memory.origins.known(op)
                if known is not None and known.behaviour is Behaviour.CONTAINER:
                    yield from dict.fromkeys(value for part in op.arguments for value in values_in(part.value))
            case ops.SetItem(object=base, value=value) | ops.SetAttribute(object=base, value=value):
                if not self._sites(self.memory.roots(base)) and not self.memory.origins.is_tensor(base):
                    yield from dict.fromkeys(values_in(value))
            case ops.SetGlobal(value=value):
                yield from dict.fromkeys(values_in(value))

    def _outlives(self, container: Value, time: int) -> bool:
        """Whether a container is used after the site where it is made, or changed, or held by something else."""
        if container.name in self.placement.used_outside or self.memory.escaped(container):
            return True
        users = [each for each in self.entries if any(value == container for value in self._uses(each))]
        return any(each.time != time for each in users)

    def _own(self, value: Value) -> frozenset[Root]:
        """The storages of the program's own that a value may be."""
        return frozenset(root for root in self.memory.roots(value) if isinstance(root, Fresh))

    def _copied(self, value: Value, before: int) -> Value:
        """A copy of a live value, made at its site, as it is before the op numbered `before`."""
        maker = self.makers[value.name]
        writes = [
            writer
            for root in self._sites(self.memory.reachable(value))
            for place in [self._place(root, maker.op.span)]
            for writer in self.writers[place.path, place.port, place.call]
            if maker.order[0] < writer.order[0] < before and not isinstance(writer.op, ops.Write)
        ]
        own = self._own(value)
        writes += [
            each
            for each in self.entries
            if maker.order[0] < each.order[0] < before and not each.merge and self._changes(each.op) & own
        ]
        after = max([maker, *writes], key=lambda each: each.order)
        time = max(each.time for each in (maker, *writes)) if own else maker.time
        key = (value.name, after.order[0])
        if key not in self.copies:
            kept = self.placement.builder.fresh(value.name)
            self.copies[key] = kept
            save = ops.Save(kept, value, span=maker.op.span)
            entry = _Entry(save, (after.order[0], 1 + len(self.copies)), maker.frames, time=time)
            entry.needs.append(maker)
            self.entries.append(entry)
            self.makers[kept.name] = entry
            self.detached.add(kept.name)
        return self.copies[key]

    # --- putting the pieces together ---

    def _note_uses(self) -> None:
        self.users: dict[str, list[_Entry]] = defaultdict(list)
        for entry in self.entries:
            for value in self._uses(entry):
                self.users[entry.changes.get(value.name, value).name].append(entry)
            for frame in entry.frames:
                operand = frame.op.condition if isinstance(frame.op, ops.If) else frame.op.context
                for value in values_in(operand):
                    self.users[value.name].append(entry)

    def _gather(self, entries: list[_Entry], depth: int) -> list[Op]:
        """The ops of one site, in order, with the conditions and contexts around them."""
        made: list[Op] = []
        index = 0
        while index < len(entries):
            entry = entries[index]
            owner = self._owner(entry, depth)
            if owner is None:
                made.append(self._final(entry))
                index += 1
                continue
            end = index
            while end < len(entries) and self._owner(entries[end], depth) is owner:
                end += 1
            piece = entries[index:end]
            made.append(
                self._condition(owner, piece, depth) if isinstance(owner, ops.If) else self._with(owner, piece, depth)
            )
            index = end
        return made

    @staticmethod
    def _owner(entry: _Entry, depth: int) -> ops.If | ops.With | None:
        if len(entry.frames) > depth:
            return entry.frames[depth].op
        if entry.merge:
            assert isinstance(entry.op, ops.If)
            return entry.op
        return None

    @staticmethod
    def _final(entry: _Entry) -> Op:
        if not entry.changes:
            return entry.op
        changes: Callable[[Value], Operand] = lambda value: entry.changes.get(value.name, value)  # noqa: E731

        def inside(region: Region) -> Region:
            return Region(region.parameters, tuple(rewrite(op, operand=changes, region=inside) for op in region.ops))

        return rewrite(entry.op, operand=changes, region=inside)

    def _with(self, owner: ops.With, piece: list[_Entry], depth: int) -> ops.With:
        result = owner.result
        inside = {id(entry) for entry in piece}
        others = [
            entry
            for entry in self.entries
            if id(entry) not in inside and len(entry.frames) > depth and entry.frames[depth].op is owner
        ]
        if others and not self._enters_again(owner):
            first, other = sorted((piece[0], others[0]), key=lambda entry: entry.time)
            raise CompileError(
                [
                    Diagnostic(
                        owner.span,
                        "this context would have to be entered several times: what it covers happens at different times"
                        " of the forward",
                        "put it around the whole trace, or around what happens at one module",
                        ((first.op.span, "this is first"), (other.op.span, "this is later")),
                    )
                ]
            )
        if any(entry.time < piece[0].time for entry in others):
            result = self.placement.builder.fresh(owner.result.name)
        return replace(owner, result=result, body=Region((), tuple(self._gather(piece, depth + 1))))

    def _enters_again(self, owner: ops.With) -> bool:
        """Whether a context may be entered several times, each time for a part of what it covers."""
        made = (op for op in self.placement.program.walk() if any(value == owner.context for value in defined(op)))
        return any(isinstance(op, ops.Call) and op.target in ENTERED_AGAIN for op in made)

    def _condition(self, owner: ops.If, piece: list[_Entry], depth: int) -> ops.If:
        merge = next(
            (entry for entry in piece if entry.merge and entry.op is owner and len(entry.frames) == depth), None
        )
        inside = {id(entry) for entry in piece}
        results: list[Value] = list(owner.results) if merge is not None else []
        branches: list[Region] = []
        leaks: list[list[Value]] = []
        for branch in (0, 1):
            entries = [entry for entry in piece if entry is not merge and entry.frames[depth].branch == branch]
            body = Region((), tuple(self._gather(entries, depth + 1)))
            leaking = [
                value
                for op in body.ops
                for value in defined(op)
                if value.name in self.placement.used_outside
                or value in self.placement.leaving.values()
                or any(id(user) not in inside for user in self.users[value.name])
            ]
            leaks.append(leaking)
            branches.append(body)
        made: list[Region] = []
        for branch, body in enumerate(branches):
            renamed = {value: self.placement.builder.fresh(value.name) for value in leaks[branch]}
            body = _with_new_names(body, renamed)
            if body.ops and isinstance(body.ops[-1], ops.TERMINATORS):
                made.append(body)
                continue
            yielded: list[Operand] = []
            if merge is not None:
                source = (owner.then, owner.orelse)[branch]
                last = source.ops[-1] if source.ops else None
                values: tuple[Operand, ...] = (UNBOUND,) * len(owner.results)
                if isinstance(last, ops.Yield):
                    values = tuple(used_operand(each, merge.changes, renamed) for each in last.values)
                yielded.extend(values)
            for side in (0, 1):
                yielded.extend(renamed[value] if side == branch else UNBOUND for value in leaks[side])
            made.append(Region(body.parameters, (*body.ops, ops.Yield(tuple(yielded), span=owner.span))))
        results.extend(value for side in leaks for value in side)
        return replace(owner, results=tuple(results), then=made[0], orelse=made[1])


def used_operand(operand: Operand, changes: dict[str, Value], renamed: dict[Value, Value]) -> Operand:
    """An operand of a branch's `yield`, with the copies and the new names of that branch."""
    from nnsight_compiler.ir.values import map_operand

    return map_operand(
        operand, lambda value: renamed.get(changes.get(value.name, value), changes.get(value.name, value))
    )


def _taking(copies: dict[str, Value]) -> Callable[[Value], Operand]:
    return lambda value: copies.get(value.name, value)


def _with_new_names(region: Region, renamed: dict[Value, Value]) -> Region:
    if not renamed:
        return region
    uses = substitute(region, dict(renamed))
    return Region(
        uses.parameters,
        tuple(rewrite(op, result=lambda value: renamed.get(value, value)) for op in uses.ops),
    )


def _key(root: Root) -> object:
    """Roots that may be the same storage have the same key."""
    match root:
        case Fresh():
            return root
        case Name():
            return "names"
        case _:
            return "outside"


def _spelled(place: Place) -> str:
    return f"the {place.port} of `{place.path or 'the model'}`"
