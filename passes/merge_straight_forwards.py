"""Has forwards that stand one after the other run as rows of one, where none depends on another.

    forward %f0 = trace %model(%clean)              strands
      at %model@h.3 output                            strand
        %h = read %model@h.3 output                     forward %f0 = trace %model(%clean)
        %a = save %h                                      …
    %b = attr %a.mean                                     %a = save %h
    %c = call %b()                       ──▶            %b = attr %a.mean
    forward %f1 = trace %model(%corrupt)                %c = call %b()
      at %model@h.3 output                            strand
        %i = read %model@h.3 output                     forward %f1 = trace %model(%corrupt)
        %d = save %i                                      …
    %e = %c - %d                                          %d = save %i
                                                    %e = %c - %d

The code between the first and the last of them is cut into strands, in its order. Each advances to its next forward,
where it waits for those of the others; one that needs what another gives begins when that has waited as often. So a
forward runs with all that come as late as it does, counted by how many others it depends on, one through the other.

Legal, where each op still finds what it would have found. An op runs at a *time*: the number of waits before it. At
each time the strands go on in their order, so that an op may need what an earlier strand made at its time or before.
What changes or shows something outside of a forward comes after all that stand before it, which may fail. It first
moves out of forwards, behind each (`sink`). What may not stand in a strand (`strands`) ends what can be merged: calls
that are not known or draw random numbers, `try`, forwards under conditions, forwards whose rows cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.jumps import jumps
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import definitions, regions, rewrite, walk
from nnsight_compiler.passes.known_calls import FUSED_CALL
from nnsight_compiler.passes.memory import Fresh, Memory, Root
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.side_by_side import Schedule
from nnsight_compiler.passes.sink import Sinking
from nnsight_compiler.passes.strands import Fuses, WhyNot, forward_hindrance, hindrance, is_fused, runs

NAME = "merge_forwards"
"""It is switched on and off with the merging of loops, and its remarks stand under that name."""

_IN_PLACE = (ops.If, ops.For, ops.While, ops.With, ops.Session)
"""Ops in whose regions forwards may be merged."""


def merge_straight_forwards(program: Program, why_not: WhyNot, fuses: Fuses, remarks: Remarks) -> Program:
    """The program with strands; the program itself where no forwards can be rows of one."""
    return _Merging(program, why_not, fuses, remarks).run()


@final
@dataclass(slots=True)
class _Stretch:
    """Ops of a region that follow one another, with nothing among them that may not stand in a strand. `made`: what
    each becomes where its stretch is merged."""

    ops: tuple[Op, ...]
    made: list[tuple[Op, ...]] = field(default_factory=list)


class _Merging:
    def __init__(self, program: Program, why_not: WhyNot, fuses: Fuses, remarks: Remarks) -> None:
        self.program, self.why_not, self.fuses, self.remarks = program, why_not, fuses, remarks
        self.builder = Builder(value.name for value in program.values())

    @cached_property
    def memory(self) -> Memory:
        return Memory.of(self.program, copies=True)

    def run(self) -> Program:
        stretches = [each for region in _straight(self.program.body) for each in self._stretches(region)]
        if not stretches:
            return self.program
        for each in stretches:
            self._sink(each)
        # What sinks makes new ops, which the memory analysis must know.
        made = {id(op): new for each in stretches for op, new in zip(each.ops, each.made, strict=True)}
        memory = Memory.of(replace(self.program, body=_exchanged(self.program.body, made)), copies=True)
        merged: dict[int, tuple[Op, ...]] = {}
        for each in stretches:
            merged |= self._merge(each, memory)
        return replace(self.program, body=_exchanged(self.program.body, merged)) if merged else self.program

    # --- what may be merged ---

    def _stretches(self, region: Region) -> Iterator[_Stretch]:
        """The stretches of a region in which there are forwards that could be rows of one."""
        if not _forwards_in(region.ops):
            return
        held: list[Op] = []
        before: ops.Forward | None = None
        why: tuple[Op, str] | None = None
        for op in region.ops:
            reason = self._hindrance(op)
            if reason is not None:
                if _forwards_in(held):
                    yield _Stretch(tuple(held))
                held, why = [], (op, reason)
            if isinstance(op, ops.Forward):
                if before is not None and why is not None and _model_of(before) == _model_of(op):
                    self._refused(op, *why)
                before, why = op, None if reason is None else (op, reason)
            if reason is None:
                held.append(op)
        if _forwards_in(held):
            yield _Stretch(tuple(held))

    def _hindrance(self, op: Op) -> str | None:
        """Why an op cannot stand in a strand."""
        if isinstance(op, ops.TERMINATORS) or any(True for _ in jumps(Region((), (op,)))):
            return "the code between may leave the loop"
        if isinstance(op, ops.Forward):
            found = forward_hindrance(op) or self.why_not(op)
            if found is not None:
                return found
        who = "it" if isinstance(op, ops.Forward) else "the code between"
        for each in (op, *(inner for region in regions(op) for inner in walk(region))):
            found = hindrance(each, self.memory, who)
            if found is not None:
                return found
        return None

    def _refused(self, forward: ops.Forward, op: Op, why: str) -> None:
        place = f" (line {op.span.line})" if op.span.line else ""
        self.remarks.refused(NAME, forward.span, f"it runs apart from the forward before it: {why}{place}")

    # --- merging ---

    def _sink(self, stretch: _Stretch) -> None:
        """Moves what changes other things behind the forwards of a stretch."""
        for op in stretch.ops:
            if not isinstance(op, ops.Forward):
                stretch.made.append((op,))
                continue
            own = frozenset[Root](Fresh(value.name) for value in definitions(op.body))
            stays, sunk, stuck = Sinking(self.memory, own, self.builder, postpones=False).sink(
                op, partial(is_fused, op, self.fuses)
            )
            if stuck is not None:
                stretch.made.append((op,))
                continue
            fused = (_together(each) if is_fused(op, self.fuses, each) else each for each in sunk)
            stretch.made.append((stays, *fused))

    def _merge(self, stretch: _Stretch, memory: Memory) -> dict[int, tuple[Op, ...]]:
        """The ops of a stretch with what they become: the strands, in the place of the first."""
        whole = range(len(stretch.ops))
        while True:
            schedule = Schedule([new for number in whole for new in stretch.made[number]], memory)
            groups = schedule.groups()
            merged = {id(op) for group in groups for op in group}
            numbers = [number for number in whole if any(id(new) in merged for new in stretch.made[number])]
            if not numbers or len(whole) == numbers[-1] + 1 - numbers[0]:
                break
            whole = range(numbers[0], numbers[-1] + 1)
        for forward, op in schedule.apart():
            self._refused(forward, op, "what stands between them must come after the first")
        if not numbers:
            return {}
        for first, *others in groups:
            lines = ", ".join(str(line) for line in sorted({each.span.line for each in others}))
            self.remarks.fired(NAME, first.span, f"runs as rows of one with the forward of line {lines}")
        made: dict[int, tuple[Op, ...]] = {id(stretch.ops[number]): () for number in whole}
        made[id(stretch.ops[whole[0]])] = (schedule.strands(),)
        return made


def _together(op: Op) -> Op:
    assert isinstance(op, ops.Call)
    return replace(op, target=FUSED_CALL)


def _straight(region: Region) -> Iterator[Region]:
    """The regions in which forwards may be merged."""
    yield region
    for op in region.ops:
        if isinstance(op, _IN_PLACE) and runs(op) and not (isinstance(op, ops.For) and op.together):
            for inner in regions(op):
                yield from _straight(inner)


def _forwards_in(held: Sequence[Op]) -> bool:
    """Whether two forwards of one model are among these."""
    models = [_model_of(op) for op in held if isinstance(op, ops.Forward)]
    return len(set(models)) < len(models)


def _model_of(op: ops.Forward) -> object:
    return op.model, op.method


def _exchanged(region: Region, made: dict[int, tuple[Op, ...]]) -> Region:
    """The region with other ops in the place of these, by their identities."""

    def exchanged(region: Region) -> Region:
        new: list[Op] = []
        for op in region.ops:
            new += made[id(op)] if id(op) in made else (rewrite(op, region=exchanged),)
        return Region(region.parameters, tuple(new))

    return exchanged(region)
