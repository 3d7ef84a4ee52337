"""Which values may share storage, and what every op reads and writes: the alias analysis of specialised programs.

A *root* is an abstract storage. Each value has the roots that it may be, or be a view of; each root may hold others (a
list its items, a closure what it captures). Both grow to a fixpoint over all ops, whatever their order, so that an
answer holds at every point of the program; what happens before what is told by the order of the ops.

    %h = read %model@h.3.output          roots {site h.3.output}
    %s = item %h[:, -1]                  roots {site h.3.output}: a view
    %t = call torch.stack([%s])          roots {fresh t}
    %l = list [%s]                       roots {fresh l}, which holds {site h.3.output}
    call method.append(%l, %t)           writes {fresh l}; it now holds {fresh t} too

Sites of one forward are kept apart as roots, and yet may all share storage, since what one layer returns the next
takes: `overlap` says so. Whoever orders ops by their sites compares the roots themselves.

In doubt, values alias. Taken on trust: reading an attribute changes nothing, and the attributes in `PLAIN` are numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from typing import cast

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Argument, Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import operands, regions
from nnsight_compiler.ir.values import Module, Operand
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.origins import Origins
from nnsight_compiler.passes.points_to import PLAIN, PointsTo
from nnsight_compiler.passes.roots import (
    ANY_NAME,
    ANYTHING,
    NOTHING,
    Fresh,
    Gradient,
    Name,
    Outside,
    Root,
    Roots,
    Site,
    Weight,
)

__all__ = ["PLAIN", "Fresh", "Gradient", "Memory", "Name", "Outside", "Root", "Roots", "Site", "Weight"]


SETTINGS = Name("settings", "torch")
"""What calls such as `torch.set_default_dtype` set, and in a program that has one, all other calls go by."""


class Memory:
    """The answers for one program. Only ops of that very program may be asked about.

    origins: definitions of values, and what is known of calls.
    copies: whether to count on the copies that a run makes: of values of the model where they are put into something
        from outside, and of what a forward is given where its body writes in place.
    """

    def __init__(self, program: Program, *, copies: bool = False) -> None:
        self.program = program
        self.origins = Origins(program)
        self._points_to = PointsTo(program, self.origins, copies)
        self._holdings = self._points_to.holdings
        self._effects: dict[tuple[int, bool], Roots] = {}
        self._open: set[int] = set()
        self._sets = any(isinstance(op, ops.Call) and self._is_setter(op) for op in program.walk())

    @staticmethod
    def of(program: Program, *, copies: bool = False) -> Memory:
        """The answers for a program. Passes that leave its ops as they are share them."""
        held = _latest.found.get(copies)
        if held is None or held.program.body is not program.body:
            held = _latest.found[copies] = Memory(program, copies=copies)
        return held

    def roots(self, operand: Operand) -> Roots:
        """The storages that an operand may be, or be a view of; empty for plain scalars."""
        return self._points_to.roots(operand)

    def reachable(self, operand: Operand) -> Roots:
        """The operand's roots and, for what may be a container or an object, all that they hold."""
        return self._points_to.reachable(operand)

    def named(self, operand: Operand) -> Roots:
        """What is reachable without asking what a site may be besides itself."""
        return self._points_to.named(operand)

    def reads(self, op: Op) -> Roots:
        """The storages whose contents the op, or anything in its regions, may look at."""
        return self._effect(op, writes=False)

    def writes(self, op: Op) -> Roots:
        """The storages that the op, or anything in its regions, may change.

        Running the model is not counted: it may change any value that is `live`.
        """
        return self._effect(op, writes=True)

    def overlap(self, first: Iterable[Root], second: Iterable[Root]) -> bool:
        """Whether any two of these roots may be the same storage."""
        first, second = frozenset(first), frozenset(second)
        if not first.isdisjoint(second):
            return True
        # What the program makes is the same only where it is equal.
        shared, others = ([root for root in roots if not isinstance(root, Fresh)] for roots in (first, second))
        return bool(shared and others) and any(self._same(root, other) for root in shared for other in others)

    def may_alias(self, first: Operand, second: Operand) -> bool:
        """Whether two values may share storage, or hold values that do."""
        return self.overlap(self.reachable(first), self.reachable(second))

    def conflict(self, first: Op, second: Op) -> bool:
        """Whether the order of two ops matters: one writes what the other reads or writes."""
        wrote, writes = self.writes(first), self.writes(second)
        return (
            self.overlap(wrote, writes)
            or self.overlap(wrote, self.reads(second))
            or self.overlap(writes, self.reads(first))
        )

    def live(self, operand: Operand) -> bool:
        """Whether the value may share storage with a site: the model may change it, or it the model."""
        return any(isinstance(root, (Site, Gradient)) or self.entered(root) for root in self.reachable(operand))

    def entered(self, root: Root) -> bool:
        """Whether the storage may be given to the model: as an input, or in the place of a site's value."""
        if any(root in given for given in self._holdings.given.values()):
            return True
        holders = [holder for holder in self._holdings.held if isinstance(holder, tuple) or holder == "gradient"]
        return any(root in self._holdings.reach(self._holdings.held[holder]) for holder in holders)

    def escaped(self, operand: Operand) -> bool:
        """Whether the value was put into a container, an object, a closure or a cell, or given to a host call."""
        return any(map(self.is_held, self.roots(operand)))

    def is_held(self, root: Root) -> bool:
        """Whether a container, an object, a closure, a cell or host code may hold the storage."""
        return any(root in held for held in self._holdings.held.values())

    def is_kept(self, root: Root) -> bool:
        """Whether anything but the model may hold the storage."""
        return any(root in held for holder, held in self._holdings.held.items() if not isinstance(holder, tuple))

    def outlives(self, root: Root) -> bool:
        """Whether the storage may be reached when the program is over without having given a result."""
        found: list[Hashable] = [root]
        for each in found:
            if not isinstance(each, Fresh):
                return True
            found += [
                holder
                for holder, held in self._holdings.held.items()
                if each in held and not isinstance(holder, tuple) and holder not in found
            ]
        return False

    def calls_closures(self, op: Op) -> bool:
        """Whether the op may run a closure of the program's."""
        return bool(self._points_to.called(op))

    def _same(self, first: Root, second: Root) -> bool:
        match first, second:
            case (Site(), Site()):
                rows = {first.rows, second.rows}
                return first.forward == second.forward and (len(rows) == 1 or "" in rows)
            case (Gradient(), Gradient()) | (Outside() | Weight(), Outside() | Weight()):
                return True
            case (Site(forward=forward), Outside() | Weight() as other):
                return self._same_inside(forward, other)
            case (Outside() | Weight() as other, Site(forward=forward)):
                return self._same_inside(forward, other)
            case (Name(), Name()):
                return first == second or not first.name or not second.name
            case _:
                return first == second

    def _same_inside(self, forward: str, root: Outside | Weight) -> bool:
        if isinstance(root, Weight) and root.model == self._points_to.models.get(forward):
            return True
        return root in self._holdings.given.get(forward, ())

    def _effect(self, op: Op, *, writes: bool) -> Roots:
        found = self._effects.get((id(op), writes))
        if found is not None:
            return found
        if id(op) in self._open:
            return NOTHING
        self._open.add(id(op))
        own = self._own_writes(cast(AnyOp, op)) if writes else self._own_reads(cast(AnyOp, op))
        if self._sets and not writes and isinstance(op, (ops.Call, ops.Operator, ops.Format)):
            own |= {SETTINGS}
        inner = [] if isinstance(op, ops.Closure) else list(regions(op))
        if isinstance(op, (ops.Call, ops.For, ops.Unpack, ops.With)):
            inner += [self.origins.closures[root].body for root in self._points_to.called(op)]
        result = own.union(*(self._effect(part, writes=writes) for region in inner for part in region.ops))
        self._open.discard(id(op))
        if not self._open or not self.origins.closures:
            # Inside a closure that calls itself, the answer is still partial.
            self._effects[(id(op), writes)] = result
        return result

    def _own_reads(self, op: AnyOp) -> Roots:
        match op:
            case ops.Global(name=name, scope=scope):
                return frozenset({Name(scope, name)})
            case ops.Read():
                return self._points_to.sites(op)
            case ops.Load(cell=base) | ops.Attribute(object=base) | ops.Item(object=base):
                return self._holdings.spread(self.roots(base))
            case ops.Build(elements=elements):
                starred = [self.roots(element.value) for element in elements if element.starred]
                return self._holdings.spread(NOTHING.union(*starred))
            case ops.Cell() | ops.Store() | ops.SetGlobal() | ops.Closure() | ops.Stage() | ops.Bound() | ops.Import():
                return NOTHING
            case ops.Yield() | ops.Continue() | ops.Break() | ops.Emit() | ops.Captured():
                return NOTHING
            case ops.Require():
                return NOTHING
            case ops.Track(value=value):
                return frozenset(root for root in self.roots(value) if isinstance(root, (Site, Fresh)))
            case ops.Call():
                known = self.origins.known(op)
                arguments = NOTHING.union(*(self.reachable(argument.value) for argument in self.origins.arguments(op)))
                if known is not None and known.behaviour is Behaviour.CONTAINER:
                    receiver = [self.roots(part.value) for part in self.origins.at(op, known.mutates)]
                    return self._holdings.spread(NOTHING.union(*receiver, *map(self._iterated, op.arguments)))
                if known is None and not isinstance(op.function, Module):
                    return arguments | self._anything(op)
                return arguments | self.roots(op.function) if isinstance(op.function, Module) else arguments
            case _:
                return NOTHING.union(*map(self.reachable, operands(op)))

    def _iterated(self, argument: Argument) -> Roots:
        return self.reachable(argument.value) if not self.origins.is_tensor(argument.value) else NOTHING

    def _own_writes(self, op: AnyOp) -> Roots:
        match op:
            case ops.SetGlobal(name=name, scope=scope):
                return frozenset({Name(scope, name)})
            case ops.Cell(result=cell) | ops.Store(cell=cell):
                return self.roots(cell)
            case ops.SetAttribute(object=base) | ops.SetItem(object=base) | ops.Delete(object=base):
                return self._holdings.spread(self.roots(base))
            case ops.Operator(operands=parts, in_place=True):
                return self._holdings.spread(self.roots(parts[0]))
            case ops.Write() | ops.Skip():
                return self._points_to.sites(op)
            case ops.Cache(result=made):
                return frozenset({Fresh(made.name)})
            case ops.Record(cache=cache):
                return self.roots(cache)
            case ops.SetGrad():
                return frozenset({Gradient("")})
            case ops.Backward():
                return frozenset({ANYTHING, Gradient("")})
            case ops.For(iterable=iterable):
                return self._holdings.reach(self.roots(iterable)) & self.origins.iterators
            case ops.Unpack(value=value):
                return self._holdings.reach(self.roots(value)) & self.origins.iterators
            case ops.Build(elements=elements):
                starred = [self.roots(element.value) for element in elements if element.starred]
                return self._holdings.reach(NOTHING.union(*starred)) & self.origins.iterators
            case ops.Operator(operator="in" | "not in", operands=parts):
                return self._holdings.reach(self.roots(parts[-1])) & self.origins.iterators
            case ops.With(context=context):
                definition = self.origins.definition(context)
                known = isinstance(definition, ops.Call) and self.origins.known(definition) is not None
                return NOTHING if known else frozenset({ANYTHING}) | self._holdings.reach(self.roots(context))
            case ops.Call():
                return self._call_writes(op)
            case _:
                return NOTHING

    def _is_setter(self, op: ops.Call) -> bool:
        known = self.origins.known(op)
        return known is not None and known.mode

    def _call_writes(self, op: ops.Call) -> Roots:
        known = self.origins.known(op)
        arguments = NOTHING.union(*(self._holdings.reach(self.roots(argument.value)) for argument in op.arguments))
        consumed = arguments & self.origins.iterators
        if isinstance(op.function, Module):
            return consumed
        if known is None:
            return self._anything(op)
        if known.mode:
            return frozenset({SETTINGS})
        changed = list(self.origins.at(op, known.mutates))
        if known.behaviour is Behaviour.CONTAINER:
            return self._holdings.spread(consumed.union(*(self.roots(part.value) for part in changed)))
        return self._holdings.spread(consumed.union(*(self.reachable(part.value) for part in changed)))

    def _anything(self, op: ops.Call) -> Roots:
        """What a host call may look at and change; a call of the program's own closure does what its body does."""
        roots = self.roots(op.function)
        if roots and roots <= self.origins.closures.keys():
            return NOTHING
        outside: Roots = frozenset({ANYTHING, ANY_NAME})
        return self._holdings.spread(self._holdings.reach(outside.union(*map(self.roots, operands(op)))))


class _Latest(threading.local):
    """The analyses that this thread made last, by `copies`."""

    def __init__(self) -> None:
        self.found: dict[bool, Memory] = {}


_latest = _Latest()
