"""Runs the model once where several forwards on the same input only read.

    forward %f0 = trace %model(%clean)               forward %f0 = trace %model(%clean)
      %h = read %model@h.3 output                      %h = read %model@h.3 output
    forward %f1 = trace %model(%corrupt)               %0 = read %model@lm_head output
      write %model@h.3 output = %h           ──▶       %l = item %0[:, -1]
    forward %f2 = trace %model(%clean)               forward %f1 = trace %model(%corrupt)
      %0 = read %model@lm_head output                  write %model@h.3 output = %h
      %l = item %0[:, -1]
    return %l                                        return %l

The body of the later moves into the first: the reads, and what is computed from them and from values that are there
already. The rest of it (appends to lists, prints, what needs a value made in between) stays where it was, after the
`with`; so effects keep their order.

Legal, where both forwards compute the same, whenever they run, and nobody can tell their values apart:

- both are a `trace` of one model on the same arguments: the same values, names or constants;
- neither writes, skips, stops, has invokes or gradients, draws at random, or runs code that the compiler does not know;
  nor does anything in the program write to a value of theirs. What is returned, or kept in a container, is saved by
  itself, so that two results are two tensors;
- between them nothing may change the model or the arguments: no code that the compiler does not know, no write to what
  comes from outside. Other forwards may run;
- the model is in evaluation mode, draws nothing at random, and no gradient flows into or through it.

What moves may raise its error earlier than it would have; within a `try` nothing moves.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import cast, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.memory import Root, Site
from nnsight_compiler.passes.plain_forwards import PlainForwards, Trusted
from nnsight_compiler.passes.remarks import Remarks

NAME = "unite_forwards"


def unite_forwards(program: Program, remarks: Remarks, trusted: Trusted) -> Program:
    """The program with one forward where several gave the same; the program itself where there are none."""
    uniting = _Uniting(program, remarks, trusted)
    body = uniting.region(program.body)
    return replace(program, body=body) if uniting.united else program


@final
@dataclass(slots=True)
class _First:
    """A forward that others may join.

    place: its place among the ops that were made of its region. there: what its body defines. written: the storages
    written since.
    """

    forward: ops.Forward
    place: int
    there: set[str]
    written: set[Root] = field(default_factory=set)
    joined: list[Op] = field(default_factory=list)
    count: int = 0


class _Uniting:
    def __init__(self, program: Program, remarks: Remarks, trusted: Trusted) -> None:
        self.plain = PlainForwards(program, trusted)
        self.memory = self.plain.memory
        self.remarks = remarks
        self.builder = Builder(value.name for value in program.values())
        self.united = False

    def region(self, region: Region) -> Region:
        """A region, with forwards that stand in it and give the same as one."""
        made: list[Op] = []
        homes: dict[str, int] = {}
        firsts: dict[Hashable, _First] = {}
        closed: dict[Hashable, str] = {}
        finished: list[_First] = []
        for op in region.ops:
            if isinstance(op, ops.Forward):
                key = self.key(op)
                left = self.joined(op, firsts.get(key), closed.get(key), homes)
                if left is not None:
                    made += left
                    homes |= {value.name: len(made) - 1 for each in left for value in _all_defined(each)}
                    for part in left:
                        self.passed(part, firsts, closed)
                    continue
                homes |= {value.name: len(made) for value in _all_defined(op)}
                made.append(op)
                if key not in firsts:
                    why = self.plain.why_not(op)
                    if why is None:
                        firsts[key] = _First(op, len(made) - 1, {value.name for value in definitions(op.body)})
                        finished.append(firsts[key])
                    elif not self.plain.changes(op):
                        closed[key] = why
                self.passed(op, firsts, closed)
                continue
            homes |= {value.name: len(made) for value in _all_defined(op)}
            made.append(op if isinstance(op, (ops.Try, ops.Closure)) else rewrite(op, region=self.region))
            self.passed(op, firsts, closed)
        for first in finished:
            if first.count:
                forward = first.forward
                body = replace(forward.body, ops=(*forward.body.ops, *first.joined))
                made[first.place] = replace(forward, body=body)
                others = "another forward" if first.count == 1 else f"{first.count} other forwards"
                self.remarks.fired(NAME, forward.span, f"runs in the place of {others} on the same input")
        return region if tuple(made) == region.ops else replace(region, ops=tuple(made))

    def key(self, op: ops.Forward) -> Hashable:
        """What forwards that give the same have in common."""
        given = tuple((self.plain.named(each.value), each.keyword, each.star) for each in op.arguments)
        return self.plain.named(op.model), op.method, given

    def passed(self, op: Op, firsts: dict[Hashable, _First], closed: dict[Hashable, str]) -> None:
        """Takes note of what an op that stands after the forwards may change."""
        if self.plain.is_barrier(op):
            closed |= dict.fromkeys(firsts, _comes_between(op))
            firsts.clear()
            return
        written = self.memory.writes(op)
        for key, first in list(firsts.items()) if written else ():
            first.written |= written
            if self.memory.overlap(written, self.plain.inputs(first.forward)):
                closed[key] = _comes_between(op)
                del firsts[key]

    def joined(
        self, op: ops.Forward, first: _First | None, closed: str | None, homes: dict[str, int]
    ) -> list[Op] | None:
        """Has a forward join the first on its input: what stays of it where it was; `None` where it runs by itself."""
        why = closed if first is None else self.plain.why_not(op)
        if why is not None and not self.plain.changes(op):
            self.remarks.refused(NAME, op.span, f"an equal forward runs before it, but {why}")
        if first is None or why is not None:
            return None
        moved: list[AnyOp] = []
        left: list[Op] = []
        there: set[str] = set()

        own = {value.name for value in definitions(op.body)}

        def is_there(value: Value) -> bool:
            if value.name in own:
                return value.name in there
            return value.name in first.there or homes.get(value.name, -1) < first.place

        for each in map(_any, op.body.ops):
            unchanged = not self.memory.overlap(self.memory.reads(each), first.written)
            if unchanged and self.plain.is_movable(each) and all(map(is_there, used(each))):
                moved.append(each)
                there |= {value.name for value in defined(each)}
            elif self.plain.needs_forward(each):
                why = f"line {each.span.line} needs what is made in between"
                self.remarks.refused(NAME, op.span, f"an equal forward runs before it, but {why}")
                return None
            else:
                left.append(each)
        first.joined += self.saved(moved)
        first.there |= there
        first.count += 1
        self.united = True
        return left

    def saved(self, moved: list[AnyOp]) -> list[Op]:
        """The ops, with what is kept elsewhere copied: equal reads of one forward become one value."""
        made: list[Op] = []
        names: dict[str, Value] = {}
        for op in moved:
            renamed = rewrite(op, operand=lambda value: names.get(value.name, value))
            values = defined(op)
            if len(values) == 1 and self.is_sites(values[0]) and self.plain.is_told_apart(values[0]):
                (value,) = values
                live = names[value.name] = self.builder.fresh(value.name, value.type)
                made.append(rewrite(renamed, result={value: live}.__getitem__))
                made.append(ops.Save(value, live, span=op.span))
            else:
                made.append(renamed)
        return made

    def is_sites(self, value: Value) -> bool:
        return any(isinstance(root, Site) for root in self.memory.roots(value))


def _comes_between(op: Op) -> str:
    return f"line {op.span.line} comes between them, and may change the model or its input"


def _any(op: Op) -> AnyOp:
    return cast(AnyOp, op)


def _all_defined(op: Op) -> tuple[Value, ...]:
    return (*defined(op), *(value for region in regions(op) for value in definitions(region)))
