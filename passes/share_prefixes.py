"""Has forwards on the same input replay what they compute alike, up to their first write, instead of computing it.

    together %p in %0                                   %base = prefix %model(%corrupt) holds ('wte', 'h.0')
      forward %1 = trace %model(%corrupt)               together %p in %0
        at %model@h.0 output                              forward %1 = trace %model(%corrupt) from %base …
          %2 = read %model@h.0 output          ──▶          at %model@h.0 output
          set_item %2[:, %p] = %source                        %2 = read %model@h.0 output
                                                              set_item %2[:, %p] = %source
                                                        release %base

A module whose call is over when a forward first changes something gives what it gives where nothing is changed. Such a
forward runs once, on the rows of the input, up to the last module that any of the others replays; they give its
values, repeated for their own rows, without running these modules. The model's own code around them runs as ever, so
that whatever it makes of its input (masks, positions, skip connections, collected states) is right. The largest modules
are replayed that hold no site of the forward inside.

Legal, where the arguments of the forwards are the same values, and nothing between the first and the last of them may
change these, the model, or how torch computes: no call that is not known, no write to what they hold. A module is not
replayed that runs more than once, that draws random numbers, or whose call does more than return: what it puts into a
container or an attribute would be missing (the shared keys and values of Gemma 3n). Nor is one whose value shares
memory with another that is changed later, here or by the model. Keys and values are not cached in such forwards; where
the program looks at what the whole model returns, which has that cache, nothing is shared, and within a module that
returns more than a tensor, nothing either where the program looks at that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal as OneOf
from typing import cast

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, operands, regions, rewrite, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Tuple, values_in
from nnsight_compiler.passes.memory import Memory, Site
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.roots import ANYTHING, Weight
from nnsight_compiler.passes.sites import Order, Orders

NAME = "share_prefixes"

WhyNot = Callable[[ops.Forward], str | None]


def share_prefixes(program: Program, orders: Orders, why_not: WhyNot, remarks: Remarks) -> Program:
    """The program with prefixes; the program itself where no two forwards begin alike.

    Args:
        why_not: why a forward cannot be resumed in the middle; `None` where it can.
    """
    return _Sharing(program, orders, why_not, remarks).run()


@dataclass(frozen=True, slots=True)
class _Member:
    """A forward that could replay these modules. `often`: whether a loop is around it, but for those around the
    arguments; `writes`: whether it goes on otherwise than the others."""

    forward: ops.Forward
    replays: tuple[str, ...]
    often: bool
    writes: bool


class _Sharing:
    def __init__(self, program: Program, orders: Orders, why_not: WhyNot, remarks: Remarks) -> None:
        self.program, self.orders, self.why_not, self.remarks = program, orders, why_not, remarks
        self.memory = Memory.of(program, copies=True)
        self.builder = Builder(value.name for value in program.values())
        self.homes: dict[str, tuple[int, ...]] = {}
        self.paths: dict[int, tuple[tuple[Region, int], ...]] = {}
        self.replaying: dict[int, ops.Forward] = {}
        self.before: dict[int, list[Op]] = {}
        self.after: dict[int, list[Op]] = {}

    def run(self) -> Program:
        self._locate(self.program.body, (), False)
        groups: dict[object, list[ops.Forward]] = {}
        for op in walk(self.program.body):
            if isinstance(op, ops.Forward) and op.method == "trace":
                groups.setdefault((op.model, op.arguments), []).append(op)
        for group in groups.values():
            self._share(group)
        if not self.replaying:
            return self.program
        return replace(self.program, body=self._rewritten(self.program.body))

    def _locate(self, region: Region, around: tuple[tuple[Region, int], ...], hidden: bool) -> None:
        """Notes where each forward stands, and in which regions each value is defined; `hidden` if the innermost of
        these is that of a forward, which no other stands in."""
        home = (*(id(each) for each, _ in around), *(() if hidden else (id(region),)))
        for value in region.parameters:
            self.homes[value.name] = home
        for number, op in enumerate(region.ops):
            here = (*around, (region, number))
            for value in defined(op):
                self.homes[value.name] = home
            if isinstance(op, ops.Forward):
                self.paths[id(op)] = here
            inside = hidden or isinstance(op, ops.Forward)
            for inner in regions(op):
                self._locate(inner, around if hidden else here, inside)

    def _share(self, group: list[ops.Forward]) -> None:
        home = self._home(group[0])
        if home is None:
            return
        region = home
        spots = [self._spot(each, region) for each in group]
        often = [spot is not None and self._looped(each, region) for each, spot in zip(group, spots, strict=True)]
        if len(group) < 2 and not any(often):
            return
        members: list[_Member] = []
        for forward, loops in zip(group, often, strict=True):
            reason = self.why_not(forward) or _reason(forward)
            if reason is not None:
                self.remarks.refused(NAME, forward.span, reason)
                continue
            replays = replayable(forward, self.orders(forward), self.memory)
            if replays:
                writes = any(isinstance(root, Site) for op in walk(forward.body) for root in self.memory.writes(op))
                members.append(_Member(forward, replays, loops, writes))
        if sum(2 if each.often else 1 for each in members) < 2 or not any(each.writes for each in members):
            return
        places = [spot for each in members if (spot := self._spot(each.forward, region)) is not None]
        first, last = min(places), max(places)
        barrier = self._barrier(region.ops[first : last + 1], members[0].forward)
        if barrier is not None:
            self.remarks.refused(NAME, members[0].forward.span, barrier)
            return
        self._give(region, first, last, members)

    def _give(self, region: Region, first: int, last: int, members: Sequence[_Member]) -> None:
        forward = members[0].forward
        held = dict.fromkeys(path for each in members for path in each.replays)
        base = self.builder.fresh("base")
        prefix = ops.Prefix(base, forward.model, forward.arguments, _paths(held), span=forward.span)
        self.before.setdefault(id(region.ops[first]), []).append(prefix)
        self.after.setdefault(id(region.ops[last]), []).append(ops.Release(base, span=forward.span))
        for each in members:
            self.replaying[id(each.forward)] = replace(each.forward, base=base, replays=_paths(each.replays))
        lines = sorted({each.forward.span.line for each in members})
        also = f", as those at line {', '.join(map(str, lines[1:]))}" if len(lines) > 1 else ""
        deepest = max(members, key=lambda each: len(each.replays))
        self.remarks.fired(
            NAME, forward.span, f"starts from one run of the model on its input{also}, up to {deepest.replays[-1]!r}"
        )

    def _home(self, forward: ops.Forward) -> Region | None:
        """The innermost region in which all that the forward is given is known."""
        path = self.paths[id(forward)]
        given = [value for each in operands(forward) for value in values_in(each)]
        deepest = 0
        for value in given:
            home = self.homes.get(value.name, ())
            if home != tuple(id(each) for each, _ in path[: len(home)]):
                return None
            deepest = max(deepest, len(home) - 1)
        return path[deepest][0]

    def _spot(self, forward: ops.Forward, region: Region) -> int | None:
        return next((number for each, number in self.paths[id(forward)] if each is region), None)

    def _looped(self, forward: ops.Forward, region: Region) -> bool:
        path = self.paths[id(forward)]
        depth = next(number for number, (each, _) in enumerate(path) if each is region)
        return any(isinstance(each.ops[number], (ops.For, ops.While)) for each, number in path[depth:])

    def _barrier(self, between: Sequence[Op], forward: ops.Forward) -> str | None:
        """What may change the input or the model while the prefix is held."""
        model = next((value.name for value in values_in(forward.model)), "")
        given = {root for each in forward.arguments for root in self.memory.reachable(each.value)}
        for op in walk(Region((), tuple(between))):
            if isinstance(op, ops.Call) and not isinstance(op.function, Module):
                known = self.memory.origins.known(op)
                if known is None:
                    return f"a call at line {op.span.line} is not known, and may change the model or its input"
                if known.mode:
                    return f"a call at line {op.span.line} sets how torch computes"
            if regions(op) and any(True for _ in regions(op)):
                continue  # its ops are looked at themselves
            wrote = [root for root in self.memory.writes(op) if not isinstance(root, Site)]
            if self.memory.overlap(wrote, given):
                return f"line {op.span.line} may change the input in between"
            if any(root == ANYTHING or (isinstance(root, Weight) and root.model == model) for root in wrote):
                return f"line {op.span.line} may change the model in between"
        return None

    def _rewritten(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            made += self.before.get(id(op), [])
            made.append(self.replaying[id(op)] if id(op) in self.replaying else rewrite(op, region=self._rewritten))
            made += self.after.get(id(op), [])
        return Region(region.parameters, tuple(made))


def _paths(paths: Sequence[str] | dict[str, None]) -> Tuple:
    return Tuple(tuple(Literal(path) for path in paths))


def _reason(forward: ops.Forward) -> str | None:
    """Why a forward cannot replay anything, as its body shows."""
    if any(
        argument.keyword in ("grad", "past_key_values", "use_cache") or argument.star for argument in forward.arguments
    ):
        return "its arguments ask for gradients of all weights, or for cached keys and values"
    for op in walk(forward.body):
        match cast(AnyOp, op):
            case ops.Invoke():
                return "its input is that of its invokes"
            case ops.Backward() | ops.Gradients() | ops.Require() | ops.Track():
                return "gradients are asked for"
            case ops.Cache() | ops.Record() | ops.Steps():
                return "all modules, or steps, are looked at"
            case ops.Read(port="inputs"):
                return "all arguments of a module are looked at, which may hold the cache of keys and values"
            case ops.Read(module=Module(path=""), port="output") | ops.Skip():
                return "what the whole model returns is looked at, or a module is skipped"
            case _:
                pass
    return None


# --- which modules are replayed ---


@dataclass(slots=True)
class _Run:
    """A call of a module: from when to when, and the calls inside of it."""

    path: str
    start: int
    end: int
    inner: list[_Run]


def replayable(forward: ops.Forward, order: Order, memory: Memory) -> tuple[str, ...]:
    """The largest modules that are over when a forward first changes a site, and that hold none of its sites inside."""
    sites: list[int] = []
    until: int | None = None
    last = 0
    for at in forward.body.ops:
        if not isinstance(at, ops.At) or at.port not in ("input", "output"):
            continue
        time = order.time(at.module.path, at.port, at.call or 0)
        sites.append(time)
        last = max(last, time)
        writes = any(isinstance(root, Site) for op in at.body.ops for root in memory.writes(op))
        if writes and (until is None or time < until):
            until = time
    if not sites or order.how == "registered" or order.draws:
        return ()
    end = last if until is None else until
    found: list[str] = []
    outputs = {at.module.path for at in forward.body.ops if isinstance(at, ops.At) and at.port == "output"}
    numbered = {at.module.path for at in forward.body.ops if isinstance(at, ops.At)}
    numbered = {path for path in numbered if order.count(path) > 1}
    written = written_pieces(forward, order, memory)

    def visit(run: _Run) -> None:
        if run.start >= end:
            return
        inside = any(run.start < time < run.end for time in sites)
        fits = run.end <= end and not inside and order.count(run.path) == 1 and not _acts(run, order)
        if fits and ":" not in run.path and not _calls(run, numbered) and not _is_aliased(run, order, written):
            found.append(run.path)
            return
        if run.path in outputs and not order.is_tensor(run.path, "output"):
            return  # it may hold something of each module inside
        for each in run.inner:
            visit(each)

    for root in _runs(order):
        for each in root.inner:
            visit(each)
    return tuple(found)


def written_pieces(forward: ops.Forward, order: Order, memory: Memory) -> frozenset[int]:
    """The pieces of memory behind what the forward's body changes."""
    found: set[int] = set()
    for op in walk(forward.body):
        if isinstance(op, ops.At):
            for site in (root for each in op.body.ops for root in memory.writes(each) if isinstance(root, Site)):
                found.update(order.pieces(site.module, "output" if site.port == "output" else "input", site.call or 0))
    return frozenset(found)


def _is_aliased(run: _Run, order: Order, written: frozenset[int]) -> bool:
    """Whether what a module gives shares memory with something else, and one of the two is changed: a copy of it would
    not change with the other."""
    if order.is_changed_later(run.path, "output") or order.is_changed_later(run.path, "input"):
        return True
    changed = written & set(order.pieces(run.path, "output"))
    if not changed:
        return False
    return any(changed & set(order.pieces(*event)) for event in _named(order, run.start))


def _named(order: Order, last: int) -> Iterator[tuple[str, OneOf["output", "input"], int]]:
    """The events up to one, each with the number of its call."""
    calls: dict[tuple[str, str], int] = {}
    for event in order.events[: last + 1]:
        number = calls[event.path, event.port] = calls.get((event.path, event.port), -1) + 1
        yield event.path, "input" if event.port == "input" else "output", number


def _calls(run: _Run, paths: Collection[str]) -> bool:
    return any(each.path in paths or _calls(each, paths) for each in run.inner)


def _acts(run: _Run, order: Order) -> bool:
    return run.path in order.effects or any(_acts(each, order) for each in run.inner)


def _runs(order: Order) -> list[_Run]:
    outermost: list[_Run] = []
    around: list[_Run] = []
    for time, event in enumerate(order.events):
        if event.port == "input":
            run = _Run(event.path, time, time, [])
            (around[-1].inner if around else outermost).append(run)
            around.append(run)
        else:
            around.pop().end = time
    return outermost


def _in(operand: Operand | None) -> Iterator[str]:
    if isinstance(operand, Tuple):
        yield from (str(part.value) for part in operand.parts if isinstance(part, Literal))


def replayed_paths(forward: ops.Forward) -> tuple[str, ...]:
    """The paths of the modules that a forward replays."""
    return tuple(_in(forward.replays))


def held_paths(prefix: ops.Prefix) -> tuple[str, ...]:
    """The paths of the modules whose values a prefix holds."""
    return tuple(_in(prefix.modules))
