"""Refuses accesses to modules that do not run, writes that could reach nothing, and writes to weights or inputs.

    forward %f0 = trace %model(%prompt)
      write %model@lm_head output = %0          an error: nothing is read from the model after it
    return %0

Nothing is changed, so this is legal for any program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, used, walk
from nnsight_compiler.ir.values import Module
from nnsight_compiler.passes.in_place_writes import in_place, targets
from nnsight_compiler.passes.looked_on import is_looked_on
from nnsight_compiler.passes.memory import Memory, Root, Site, Weight
from nnsight_compiler.passes.moments import Moment, first_step, last_step, with_steps
from nnsight_compiler.passes.roots import is_outside
from nnsight_compiler.passes.sites import RESULT, Order, Orders, Place, event_port, forwards, locate, place_of


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
