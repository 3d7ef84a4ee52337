"""When each op of a stretch of code runs, as its forwards run with others: see `merge_straight_forwards`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.ir.values import Literal
from nnsight_compiler.passes.memory import Fresh, Memory, Name, Outside, Root, Roots, Weight
from nnsight_compiler.passes.sink import common, defined_within, shows, used_within, waits, writes_of

_PASSES = (ops.Backward, ops.Gradients)


def kind_of(op: ops.Forward) -> object:
    """What forwards have in common that may be rows of one: all but what they are given."""
    options = tuple(
        (each.keyword, each.star, each.value if each.keyword and isinstance(each.value, Literal) else None)
        for each in op.arguments
    )
    return op.model, op.method, options, op.base, op.replays


class Schedule:
    """The times of ops that follow one another: how many forwards, or other things that strands wait for, come before
    each, one needing the other.

    before: for each op the earlier ones that it needs, by their numbers, but for some that those need themselves;
    `last`: those that come after all earlier.
    start: the time of each op. ends: the time after it.
    """

    def __init__(self, units: Sequence[Op], memory: Memory) -> None:
        self.units, self.memory = units, memory
        own = frozenset[Root](
            root for op in units for value in defined_within(op) if not memory.is_held(root := Fresh(value.name))
        )
        self.writes = [self._outside(op, writes_of(op, memory)) for op in units]
        self.reads = [self._outside(op, _reads(op, memory)) for op in units]
        self.last = [
            bool(wrote - own) or shows(op, memory) or isinstance(op, ops.Release)
            for op, wrote in zip(units, self.writes, strict=True)
        ]
        self.makers = {value.name: number for number, op in enumerate(units) for value in defined_within(op)}
        self.before = [self._needs(number) | found for number, found in enumerate(self._conflicts())]
        self.start = self._earliest()

    def _outside(self, op: Op, roots: Roots) -> Roots:
        """What of these storages is not made by the op itself."""
        return common(roots, frozenset(Fresh(value.name) for value in defined_within(op))) if roots else roots

    def _needs(self, number: int) -> set[int]:
        """The earlier ops that make what an op uses."""
        made = (self.makers.get(value.name, number) for value in used_within(self.units[number]))
        return {each for each in made if each < number}

    def _conflicts(self) -> Iterator[set[int]]:
        """For each op the earlier ones that touch what it touches, where one of the two changes it; without those that
        these come after in turn."""
        names = frozenset(root for roots in (*self.reads, *self.writes) for root in roots if isinstance(root, Name))
        last: dict[Hashable, int] = {}
        since: dict[Hashable, list[int]] = {}
        for number, (read, wrote) in enumerate(zip(self.reads, self.writes, strict=True)):
            changed, looked_at = _keys(wrote, names), _keys(read, names)
            found = {last[key] for key in changed | looked_at if key in last}
            for key in changed:
                found.update(since.pop(key, ()))
                last[key] = number
            for key in looked_at - changed:
                since.setdefault(key, []).append(number)
            yield found

    def _earliest(self) -> list[int]:
        start: list[int] = []
        ends: list[int] = []
        end = 0
        for number, op in enumerate(self.units):
            start.append(end if self.last[number] else max((ends[each] for each in self.before[number]), default=0))
            ends.append(start[-1] + waits(op))
            end = max(end, ends[-1])
        return start

    def _latest(self) -> list[float]:
        """The time at which each op must have run for no forward to come later than it can."""
        latest = [math.inf] * len(self.units)
        bound = math.inf
        for number in reversed(range(len(self.units))):
            own = self.start[number] if waits(self.units[number]) else math.inf
            latest[number] = min(latest[number], bound, own)
            for each in self.before[number]:
                latest[each] = min(latest[each], latest[number])
            if self.last[number]:
                bound = min(bound, latest[number])
        return latest

    def groups(self) -> list[list[ops.Forward]]:
        """The forwards that run together, where these are several."""
        found: dict[object, list[ops.Forward]] = {}
        passes = self._passes()
        for number, (op, time) in enumerate(zip(self.units, self.start, strict=True)):
            if isinstance(op, ops.Forward):
                of = passes.get(number, ())
                inside = any(isinstance(each, _PASSES) for each in walk(op.body))
                alone = number if inside or len(of) > 1 or self.last[number] else None
                found.setdefault((time, kind_of(op), *of, alone), []).append(op)
        return [group for group in found.values() if len(group) > 1]

    def _passes(self) -> dict[int, tuple[object, ...]]:
        """For forwards the times and kinds of the backward passes that go through them. The first frees what was
        recorded of all rows of a forward, so that all must come at one time."""
        found: dict[int, tuple[object, ...]] = {}
        for number, op in enumerate(self.units):
            if isinstance(op, _PASSES):
                for each in self._all_before(number):
                    if isinstance(self.units[each], ops.Forward):
                        found[each] = (*found.get(each, ()), (self.start[number], type(op)))
        return found

    def apart(self) -> Iterator[tuple[ops.Forward, Op]]:
        """The forwards that could run with the one of their kind before them but for an op in between."""
        before: dict[object, int] = {}
        for number, op in enumerate(self.units):
            if not isinstance(op, ops.Forward):
                continue
            other = before.get(kind_of(op))
            before[kind_of(op)] = number
            if other is None or self.start[other] == self.start[number]:
                continue
            needed = self._all_needed(number)
            between = (each for each in sorted(needed | {number}) if self.last[each] or self.before[each] - needed)
            culprit = next(between, None)
            if other not in needed and culprit is not None:
                yield op, self.units[culprit]

    def _all_needed(self, number: int) -> set[int]:
        """The earlier ops that make what an op uses, and what they use in turn."""
        return _closure(number, self._needs)

    def _all_before(self, number: int) -> set[int]:
        """The same with those that put something into what it uses."""
        return _closure(number, lambda each: self.before[each])

    def strands(self) -> ops.Strands:
        """The ops as strands: each goes on for as long as nothing in it comes too late."""
        latest = self._latest()
        made: list[tuple[int, list[Op]]] = []
        ends: list[int] = []
        time, end = -1, 0
        for number, op in enumerate(self.units):
            earliest = end if self.last[number] else max((ends[each] for each in self.before[number]), default=0)
            stays = time == self.start[number] if waits(op) else earliest <= time <= latest[number]
            if not stays:
                time = self.start[number] if waits(op) else earliest
                made.append((time, []))
            made[-1][1].append(op)
            time += waits(op)
            ends.append(time)
            end = max(end, time)
        strands = tuple(ops.Strand(after, Region((), tuple(held)), span=held[0].span) for after, held in made)
        return ops.Strands(Region((), strands), span=self.units[0].span)


def _closure(number: int, needs: Callable[[int], set[int]]) -> set[int]:
    """What one needs, and what that needs in turn."""
    found: set[int] = set()
    waiting = {number}
    while waiting:
        new = needs(waiting.pop()) - found
        found |= new
        waiting |= new
    return found


def _keys(roots: Roots, names: frozenset[Name]) -> set[Hashable]:
    """What roots have in common, of those that ops of a stretch touch, if and only if they may be the same storage."""
    found: set[Hashable] = set()
    for root in roots:
        match root:
            case Outside() | Weight():
                found.add("outside")
            case Name(name=""):
                found |= names
            case _:
                found.add(root)
    return found


def _reads(op: Op, memory: Memory) -> Roots:
    """What an op looks at: a forward at what it is given, and what is looked at in its body."""
    if not isinstance(op, ops.Forward):
        return memory.reads(op)
    given = (memory.reachable(each.value) for each in op.arguments)
    inside = (memory.reads(each) for at in op.body.ops for region in regions(at) for each in region.ops)
    return frozenset[Root]().union(*given, *inside)
