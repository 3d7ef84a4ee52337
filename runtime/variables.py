"""Which values of a program can share a Python variable, as the versions of one variable of the user's did.

    %h = call …              h = f(x)
    %h.1 = call %g(%h)  ──▶  h = g(h)         the first tensor is free once the second is there
    return %h.1              return h

Two values share a variable if both are versions of the same name in the same function and neither is assigned while the
other is still needed. A value that a closure captures, that the handling of an exception binds, or that a forward takes
part in has a variable to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from nnsight_compiler.ir.ops import (
    At,
    AtGradient,
    Backward,
    Break,
    Cell,
    Closure,
    Continue,
    For,
    Forward,
    If,
    Invoke,
    Op,
    Parameter,
    Raise,
    Region,
    Return,
    Steps,
    Strand,
    Try,
    While,
    With,
    Yield,
)
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.runtime.regions import captured, continues_through_finally, stem

MODEL_REGIONS = (Forward, Strand, Invoke, Steps, At, Backward, AtGradient)
Live = frozenset[str]
NONE: Live = frozenset()


def shared_variables(program: Program) -> list[list[str]]:
    """Groups of names of values, each group for one variable; values that stand alone are left out."""
    functions = [(program.parameters, program.body)]
    apart = set[str]()
    for op in program.walk():
        if isinstance(op, Closure):
            functions.append((op.parameters, op.body))
            apart.add(op.result.name)
            apart.update(value.name for value in captured(op))
        elif isinstance(op, Cell):
            apart.add(op.result.name)
        elif isinstance(op, Try):
            apart.update(value.name for handler in op.handlers for value in handler.body.parameters)
        elif isinstance(op, MODEL_REGIONS) or (isinstance(op, For) and op.together):  # a function of its own
            apart.update(value.name for value in (*defined(op), *_mentioned(op.body)))
    return [group for parameters, body in functions for group in _Function(parameters, body, apart).groups()]


def _mentioned(region: Region) -> Iterator[Value]:
    """Every value that stands in a region."""
    yield from region.parameters
    for op in walk(region):
        yield from defined(op)
        yield from used(op)
        for inner in regions(op):
            yield from inner.parameters


@dataclass(frozen=True, slots=True)
class _Ways:
    """What is still needed where control goes from a region.

    after: once the region has ended.
    broken, left: after a `break`, and the values that it assigns.
    again, carried: after a `continue`, and the values that it assigns.
    caught: when an exception arrives, or a `finally` on the way out.
    """

    after: Live = NONE
    broken: Live = NONE
    left: tuple[Value, ...] = ()
    again: Live = NONE
    carried: tuple[Value, ...] = ()
    caught: Live = NONE


class _Function:
    """The values of one function, and which of them are needed at the same time: a walk against the flow of control."""

    def __init__(self, parameters: Sequence[Parameter], body: Region, apart: set[str]) -> None:
        self.versions: dict[str, list[str]] = {}
        own = [parameter.value for parameter in parameters]
        for value in (*own, *_own_values(body)):
            if value.name not in apart and not value.name.isdecimal():
                self.versions.setdefault(stem(value.name), []).append(value.name)
        self.versions = {name: found for name, found in self.versions.items() if len(found) > 1}
        self.known = frozenset(name for found in self.versions.values() for name in found)
        self.conflicts: dict[str, set[str]] = {name: set() for name in self.known}
        if self.known:
            self.assigned(own, self.region(body, _Ways()))

    def groups(self) -> Iterator[list[str]]:
        """The values that share a variable."""
        for versions in self.versions.values():
            groups: list[list[str]] = []
            for name in versions:
                fits = (group for group in groups if not self.conflicts[name].intersection(group))
                group = next(fits, None)
                if group is None:
                    groups.append([name])
                else:
                    group.append(name)
            yield from (group for group in groups if len(group) > 1)

    def assigned(self, values: Iterable[Value], live: Live) -> Live:
        """Notes that these values are assigned, all at once, where `live` is needed; returns what is needed before."""
        names = {value.name for value in values} & self.known
        for name in names:
            others = (live | names).intersection(self.versions[stem(name)]) - {name}
            self.conflicts[name] |= others
            for other in others:
                self.conflicts[other].add(name)
        return live - names

    def names(self, values: Iterable[Value]) -> Live:
        return self.known.intersection(value.name for value in values)

    def region(self, region: Region, ways: _Ways) -> Live:
        """What is needed at the start of a region."""
        live = ways.after | ways.caught
        for op in reversed(region.ops):
            live = self.op(op, live, ways)
        return live

    def op(self, op: Op, live: Live, ways: _Ways) -> Live:
        """What is needed before an op, if `live` is after it."""
        match op:
            case Yield():
                live = ways.after | ways.caught
            case Break():
                self.assigned(ways.left, ways.caught)
                live = ways.broken | ways.caught
            case Continue():
                self.assigned(ways.carried, ways.caught)
                live = ways.again | ways.caught
            case Return() | Raise():
                live = ways.caught
            case If():
                inside = replace(ways, after=self.assigned(op.results, live))
                live = self.region(op.then, inside) | self.region(op.orelse, inside)
            case For():
                live = self.loop_over(op, live, ways)
            case While():
                live = self.loop_while(op, live, ways)
            case Try():
                live = self.guarded(op, live, ways)
            case With():
                swallowed = live - self.names(_own_values(op.body))
                live = self.region(op.body, replace(ways, after=live, caught=ways.caught | swallowed))
                live = self.assigned((op.result,), live)
            case _:
                live = self.assigned(defined(op), live)
        return live | self.names(used(op))

    def otherwise(self, op: For | While, live: Live, ways: _Ways) -> Live:
        """What is needed when a loop has come to its end, besides what its parameters then hold."""
        if op.orelse is None:
            return live
        return self.assigned(op.orelse.parameters, self.region(op.orelse, replace(ways, after=live)))

    def around(self, op: For | While, ended: Live) -> Live:
        """What is needed from one round of a loop to the next, besides its parameters."""
        inside = self.names(value for region in regions(op) for value in (*region.parameters, *_own_values(region)))
        within = self.names(value for region in regions(op) for value in _mentioned(region))
        return (ended | within) - inside

    def loop_over(self, op: For, live: Live, ways: _Ways) -> Live:
        item, *carried = op.body.parameters
        live = self.assigned(op.results, live)
        again = self.around(op, self.otherwise(op, live, ways))
        inside = _Ways(again, live, op.results, again, tuple(carried), ways.caught)
        body = self.assigned((item,), self.region(op.body, inside))
        if continues_through_finally(op.body):
            self.assigned(carried, self.names((item,)))  # each round begins with assigning them
        return again | self.assigned(carried, body | again)

    def loop_while(self, op: While, live: Live, ways: _Ways) -> Live:
        carried = op.condition.parameters
        live = self.assigned(op.results, live)
        ended = self.otherwise(op, live, ways)
        again = self.around(op, ended)
        inside = _Ways(again, live, op.results, again, carried, ways.caught)
        body = self.assigned(op.body.parameters, self.region(op.body, inside))
        condition = self.region(op.condition, replace(ways, after=body | ended))
        return again | self.assigned(carried, condition | again)

    def guarded(self, op: Try, live: Live, ways: _Ways) -> Live:
        if op.finalizer is not None:
            handed_over = self.names((*ways.left, *ways.carried))  # a jump has assigned them before the `finally` runs
            leaving = live | ways.broken | ways.again | ways.caught | handed_over
            live = self.region(op.finalizer, replace(ways, after=leaving))
            ways = replace(ways, caught=ways.caught | live)
        ways = replace(ways, after=live)
        caught = ways.caught
        for handler in op.handlers:
            caught |= self.region(handler.body, ways)
        for handler in op.handlers:
            if handler.types is not None:
                caught |= self.region(handler.types, replace(ways, after=caught))
        after = live if op.orelse is None else self.region(op.orelse, ways)
        return caught | self.region(op.body, replace(ways, after=after, caught=caught))


def _own_values(region: Region) -> Iterator[Value]:
    """The values that a region defines, those of nested functions left out."""
    for op in region.ops:
        yield from defined(op)
        if not isinstance(op, Closure):
            for inner in regions(op):
                yield from inner.parameters
                yield from _own_values(inner)
