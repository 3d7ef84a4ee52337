"""The order of a model's sites, as passes see it, and the checks that need nothing but that order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf
from typing import Protocol

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Port, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, used, walk
from nnsight_compiler.ir.values import Module
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.looked_on import is_looked_on
from nnsight_compiler.passes.memory import Memory, Root, Site, Weight
from nnsight_compiler.passes.moments import Moment, first_step, last_step, with_steps
from nnsight_compiler.passes.roots import is_outside

PlacePort = OneOf["output", "skip", "input", "result"]

RESULT = 1 << 62
"""The time of what a generation returns: after everything."""

ATTENTION_VALUES = ("pattern", "scores", "q", "k", "v", "z")
"""What attention modules compute, by names that are the same on every architecture."""


class ModuleEvent(Protocol):
    """A module receives its arguments (`input`) or returns (`output`), for the `call`-th time in the forward."""

    @property
    def path(self) -> str: ...
    @property
    def port(self) -> str: ...
    @property
    def call(self) -> int: ...


class Order(Protocol):
    """When the modules of a model, and the operations inside of them that a program names, run within one forward.

    events: every event, in order.
    how: how that was found out: `registered` if it is only assumed.
    draws: the path of a module that drew random numbers, or changed a buffer of its own; empty where none did.
    keeps: the path of a module that changed an attribute of its own; empty where none did.
    effects: the modules whose calls did more than return.
    """

    @property
    def events(self) -> Sequence[ModuleEvent]: ...
    @property
    def how(self) -> str: ...
    @property
    def draws(self) -> str: ...
    @property
    def keeps(self) -> str: ...
    @property
    def effects(self) -> Collection[str]: ...

    def time(self, path: str, port: OneOf["output", "input"], call: int = 0) -> int:
        """The place of an event in the forward. Raises `KeyError` where it does not happen."""

    def count(self, path: str) -> int:
        """How often a module runs."""

    def pieces(self, path: str, port: OneOf["output", "input"], call: int = 0) -> Collection[int]:
        """Numbers of the pieces of memory behind the tensors at an event."""

    def is_changed_later(self, path: str, port: OneOf["output", "input"], call: int = 0) -> bool:
        """Whether the model writes in place to a tensor that stood there."""

    def is_tensor(self, path: str, port: OneOf["output", "input"], call: int = 0) -> bool:
        """Whether a single tensor stands there."""

    def within(self, path: str, call: int = 0) -> Mapping[str, int]:
        """How often each module runs inside one call of a module."""

    def begins_after(self, path: str, port: OneOf["output", "input"], call: int = 0) -> str | None:
        """The first module that begins to run after an event; `None` where none does."""

    def why_not(self, path: str) -> tuple[str, str] | None:
        """Why an operation cannot be addressed, and the way out; `None` where it only does not run."""

    def beginnings(
        self, path: str, port: OneOf["output", "input"], call: int, first: bool
    ) -> Sequence[tuple[str, Port, int, int]]:
        """Where the tensors at an event (at an input, those of the `first` argument alone) stood first, and what the
        module that made them was given: path, port, call, and the number of the tensor in what stands there."""

    def giver(self, path: str, port: OneOf["output", "input"], part: str = "") -> str | None:
        """The module whose very output stands at an event (at an input, as the first argument), or is the `part` of
        that name of a mapping there; each of the two runs once. `None` where there is none."""


Orders = Callable[[ops.Forward], Order]
"""Gives the order in which the model of a forward runs its modules."""


@dataclass(frozen=True, slots=True)
class Place:
    """A site, at its time in the forward. `call` is `None` for a module that runs once. Times of inputs and outputs are
    even; a module is skipped just after its input."""

    path: str
    port: PlacePort
    call: int | None
    time: int


def event_port(port: str) -> PlacePort:
    """Where a port lives: `input` and `inputs` are the same event."""
    match port:
        case "output" | "skip" | "result":
            return port
        case _:
            return "input"


def place_of(op: ops.Read | ops.Write | ops.Skip, order: Order) -> Place:
    """The site that an access names.

    Raises:
        CompileError: the module does not run, runs several times, or not as often as asked for.
    """
    assert isinstance(op.module, Module), "places are asked for after specialise"
    port = event_port("skip" if isinstance(op, ops.Skip) else op.port)
    return locate(op.module.path, port, op.call, op.span, order)


def locate(path: str, port: PlacePort, call: int | None, span: Span, order: Order) -> Place:
    """The place of a site in the forward; errors point to `span`."""
    if port == "result":
        return Place(path, port, None, RESULT)
    count = order.count(path)
    name = path or "the model"
    inner = path.rpartition(":")[2]
    access = inner if inner in ATTENTION_VALUES and ":" in path else port
    if count == 0 and ":" in path:
        raise CompileError([_no_operation(path, span, order)])
    if count == 0:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is never called in this forward",
                    "its values do not exist there; address a module that runs, such as one around it or inside it",
                )
            ]
        )
    if call is None and count > 1:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is called {count} times in one forward",
                    f"say which call is meant: `.calls[0].{access}` to `.calls[{count - 1}].{access}`",
                )
            ]
        )
    if call is not None and not -count <= call < count:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is called {count} times in one forward; there is no call {call}",
                    f"calls count from 0 to {count - 1}",
                )
            ]
        )
    number = 0 if call is None else call % count
    time = 2 * order.time(path, "input", number) + 1 if port == "skip" else 2 * order.time(path, port, number)
    return Place(path, port, None if count == 1 else number, time)


def _no_operation(path: str, span: Span, order: Order) -> Diagnostic:
    told = order.why_not(path)
    if told is not None:
        return Diagnostic(span, *told)
    module, _, name = path.rpartition(":")
    if name in ATTENTION_VALUES:
        return Diagnostic(
            span,
            f"`{path}` is never computed in this forward: `{module}` takes another way on these inputs",
            f"`print(….source)` of `{module}` shows its operations, which can be read and written",
        )
    return Diagnostic(
        span,
        f"`{path}` is never run in this forward",
        "its lines are not reached on these inputs; address an operation that runs",
    )


def operations(region: Region) -> frozenset[str]:
    """The paths of the operations inside of modules that a specialised program reads and writes."""
    accesses = (op for op in walk(region) if isinstance(op, (ops.Read, ops.Write, ops.Skip)))
    paths = (op.module.path for op in accesses if isinstance(op.module, Module))
    return frozenset(path for path in paths if ":" in path)


def forwards(region: Region) -> Iterator[ops.Forward]:
    """Every forward of a program."""
    return (op for op in walk(region) if isinstance(op, ops.Forward))


def check_sites(program: Program, orders: Orders) -> Program:
    """Refuses accesses to modules that do not run, writes that nothing can notice, and writes to weights. The program
    itself is returned.

    A write is noticed by a read of a site after it, by a later read of its own site, or by a use of the value that was
    written in place.
    """
    wrong = list(_scanned_in_part(program))
    memory = Memory.of(program, copies=True)
    wrong.extend(_written_weights(program, memory))
    everything = list(program.walk())
    index = {id(op): number for number, op in enumerate(everything)}
    for forward in forwards(program.body):
        order = orders(forward)
        body = list(walk(forward.body))
        places: dict[int, Place] = {}
        for op in body:
            if isinstance(op, (ops.Read, ops.Write, ops.Skip)):
                try:
                    places[id(op)] = place_of(op, order)
                except CompileError as error:
                    wrong.extend(_unobserved(op, body, error))
        if wrong:
            continue
        wrong.extend(_unnoticed(everything, index, forward, body, places, memory, order))
        wrong.extend(_written_through(everything, body, memory))
        wrong.extend(_written_inputs(forward, body, memory))
    if wrong:
        raise CompileError(wrong)
    return program


def _scanned_in_part(program: Program) -> Iterator[Diagnostic]:
    """Forwards that are scans beside others that are not: the values of the ones would be of no use to the others."""
    runs = [op for op in forwards(program.body) if op.method != "scan"]
    for op in forwards(program.body) if runs else ():
        if op.method == "scan":
            yield Diagnostic(
                op.span,
                "this is a scan, whose values have shapes only, and the same program runs a forward on numbers",
                "scan in a function of its own",
                ((runs[0].span, "the forward"),),
            )


def _unobserved(op: ops.Read | ops.Write | ops.Skip, body: list[Op], error: CompileError) -> Iterator[Diagnostic]:
    """The mistake of an access to what does not run; where the body calls it, what would make its values known."""
    assert isinstance(op.module, Module)
    path = op.module.path
    for call in body:
        if not isinstance(call, ops.Call) or not isinstance(call.function, Module):
            continue
        called = call.function.path
        if path == called or path.startswith(f"{called}."):
            yield Diagnostic(
                op.span,
                f"`{path}` is called in the body, and no part of the model's forward: its values are not observed",
                "write `hook=True` among the arguments of the call, and read what is inside after that line",
                ((call.span, "it is called here"),),
            )
            return
    yield from error.diagnostics


def _written_weights(program: Program, memory: Memory) -> Iterator[Diagnostic]:
    """Writes to weights of the model: they would outlive the run."""
    for op in program.walk():
        if not in_place(op, memory):
            continue
        paths = sorted(root.path for root in targets(op, memory) if isinstance(root, Weight))
        if paths:
            yield Diagnostic(
                op.span,
                f"this writes to `{paths[0]}`, a weight of the model, and an experiment leaves the model as it was",
                "work on a copy (`weight.clone()`), or change the torch module itself, outside of the experiment",
            )


def _written_inputs(forward: ops.Forward, body: list[Op], memory: Memory) -> Iterator[Diagnostic]:
    """In-place writes to what a forward was given, in its own body. What may be something else is no mistake: the model
    sees what it was given as it was at the `with`. So what came from outside is not taken for a value of the program's
    which a host call may have put there."""
    given: set[Root] = set()
    for argument in forward.arguments:
        roots = memory.roots(argument.value)
        given |= {root for root in roots if is_outside(root)} or roots
    for op in body:
        changed = targets(op, memory) if in_place(op, memory) else frozenset()
        if changed and changed <= given:
            yield Diagnostic(
                op.span,
                "this changes an input of the forward that is running, and the model may or may not have read it yet",
                "write to the `.input` of a module, or change the input before the `with`",
                ((forward.span, "the forward"),),
            )


def _written_through(everything: list[Op], body: list[Op], memory: Memory) -> Iterator[Diagnostic]:
    """In-place writes to a site that was assigned a value of the program's which is used again: the site has a copy of
    it, so that the write would not be seen there.
    """
    reported: set[Span] = set()
    for number, write in enumerate(body):
        if not isinstance(write, ops.Write) or not isinstance(write.module, Module):
            continue
        own = {root for root in memory.roots(write.value) if not isinstance(root, Site)}
        for op in body[number + 1 :] if own else ():
            if not in_place(op, memory) or op.span in reported:
                continue
            sites = (root for root in targets(op, memory) if isinstance(root, Site))
            if not any((site.module, site.port) == (write.module.path, write.port) for site in sites):
                continue
            after = itertools.islice(itertools.dropwhile(lambda each: each is not op, everything), 1, None)  # noqa: B023
            if any(memory.roots(value) & own for each in after for value in used(each)):
                reported.add(op.span)
                yield Diagnostic(
                    op.span,
                    "this writes in place to a site that was assigned a value, and the value is used again after it",
                    "write to the value before it is assigned, or assign a copy: `value.clone()`",
                    ((write.span, "it is assigned here"),),
                )


def _unnoticed(
    everything: list[Op],
    index: Mapping[int, int],
    forward: ops.Forward,
    body: list[Op],
    places: dict[int, Place],
    memory: Memory,
    order: Order,
) -> Iterator[Diagnostic]:
    around = {id(op): steps for op, steps in with_steps(forward.body)}
    reads = [op for op in body if isinstance(op, ops.Read)]
    last = {id(op): _last(around[id(op)], places[id(op)].time) for op in reads}
    edits = {id(each) for op in body if isinstance(op, ops.Applied) for each in walk(op.body)}
    if is_looked_on(forward):  # its tokens tell
        return
    for op in body:
        times = _written(op, forward, places, memory, order)
        if not times or id(op) in edits:  # an edit holds for every forward, whatever is read there
            continue
        steps = around[id(op)]
        begins = 0 if steps is None else first_step(steps)
        sites = {root for root in memory.writes(op) if isinstance(root, Site) and root.forward == forward.result.name}
        first = begins, min(times)
        if any(
            (last[id(read)], index[id(read)]) > (first, index[id(op)]) and memory.overlap(memory.reads(read), sites)
            for read in reads
        ):
            continue
        noticed = any(
            memory.roots(value) & sites
            for other in itertools.islice(everything, index[id(op)] + 1, None)
            if not any(inner is other for part in regions(op) for inner in walk(part))
            for value in (*used(other), *([other.result] if isinstance(other, ops.Read) else []))
        )
        if not noticed:
            what = "skip" if isinstance(op, ops.Skip) else "write"
            yield Diagnostic(
                op.span,
                f"this {what} can reach nothing: nothing is read from the model after it",
                "read or save something that it changes, such as `model.output`, in the same `with`",
            )


def _last(steps: ops.Steps | None, time: int) -> Moment:
    """When an access happens for the last time."""
    return (math.inf if time == RESULT else 0 if steps is None else last_step(steps)), time


def _written(op: Op, forward: ops.Forward, places: dict[int, Place], memory: Memory, order: Order) -> list[int]:
    """The times of the sites that an op itself writes: those of its regions are asked about themselves."""
    if isinstance(op, (ops.Write, ops.Skip)):
        return [places[id(op)].time]
    if any(True for _ in regions(op)) or not in_place(op, memory):
        return []
    return [
        locate(root.module, event_port(root.port), root.call, op.span, order).time
        for root in memory.writes(op)
        if isinstance(root, Site) and root.forward == forward.result.name
    ]


def in_place(op: Op, memory: Memory) -> bool:
    """Whether an op is known to write its operand in place. A host call may write to what it is given, but is taken to
    do so to the copy that it gets where its values come from different sites."""
    match op:
        case ops.SetItem() | ops.Delete() | ops.SetAttribute():
            return True
        case ops.Operator(in_place=changes):
            return changes
        case ops.Call():
            return memory.origins.known(op) is not None
    return False


def targets(op: Op, memory: Memory) -> frozenset[Root]:
    """The storages that an op changes by name."""
    match op:
        case ops.SetItem(object=base) | ops.SetAttribute(object=base) | ops.Delete(object=base):
            return memory.roots(base)
        case ops.Operator(operands=parts):
            return memory.roots(parts[0])
        case ops.Call():
            known = memory.origins.known(op)
            assert known is not None
            changed = memory.origins.at(op, known.mutates)
            of = memory.roots if known.behaviour is Behaviour.CONTAINER else memory.named
            return frozenset[Root]().union(*(of(argument.value) for argument in changed))
    return memory.writes(op)
