"""Runs a forward that gives the same in every round of a loop once, before the loop.

    for %p in %prompts                               if %prompts
      forward %f0 = trace %model(%clean)             then
        %h = read %model@h.3 output                    forward %f0 = trace %model(%clean)
      forward %f1 = trace %model(%p)         ──▶         %h.1 = read %model@h.3 output
        write %model@h.3 output = %h                   yield %h.1
      continue                                       else
                                                       yield unbound
                                                     for %p in %prompts
                                                       forward %f1 = trace %model(%p)
                                                         write %model@h.3 output = %h
                                                       continue

Where the loop has no rounds nothing runs: the forward stands under a condition that says whether there is one. Its
iterable is therefore one whose length can be asked for without reading it: a list, tuple, dict, set or range. Out of
nested loops the forward moves as far as it may.

Legal, where every round would give the same, and nobody can tell one value from several:

- the forward only reads, and computes nothing but values (`plain_forwards`); its arguments, and all that its body uses,
  are made before the loop;
- it stands in the body of a `for` itself, under no condition, and before it in the body nothing leaves the round;
- nothing in the loop may change the model, the arguments or what the body looks at;
- what it gives is only computed with: not written to, not returned, and not put into a container, where each round
  would have given a tensor of its own;
- the model is in evaluation mode, draws nothing at random, and no gradient flows into or through it.

An error of the forward comes before what precedes it in the first round; within a `try` nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used, walk
from nnsight_compiler.ir.values import UNBOUND, Operand, Tuple, Value
from nnsight_compiler.passes.plain_forwards import PlainForwards, Trusted
from nnsight_compiler.passes.remarks import Remarks

NAME = "hoist_forwards"

KindOf = Callable[[str], type | None]
SIZED = (list, tuple, dict, set, frozenset, range, str)
"""What is true if and only if a loop over it has a round, and is not changed by being asked."""
MAKES_SIZED = frozenset({"builtins.list", "builtins.tuple", "builtins.range", "builtins.sorted", "builtins.dict"})


def hoist_forwards(program: Program, remarks: Remarks, trusted: Trusted, kind_of: KindOf) -> Program:
    """The program with forwards that a loop repeats before the loop; the program itself where there are none.

    Args:
        kind_of: gives the type of a parameter, by its name, and has the program rest on it.
    """
    written = PlainForwards(program, trusted)
    names: dict[Value, Value] = {}
    while True:
        hoisting = _Hoisting(PlainForwards(program, trusted), remarks, kind_of, written, names)
        body = hoisting.region(program.body)
        if not hoisting.hoisted:
            return program
        program = replace(program, body=body)


class _Hoisting:
    """Moves forwards out of one loop each; what was moved may move again.

    written: the program before anything moved, in which what a forward gives has the name that `names` has for it: no
    condition stands between it and its uses there, which would hide that it is a tensor.
    """

    def __init__(
        self,
        plain: PlainForwards,
        remarks: Remarks,
        kind_of: KindOf,
        written: PlainForwards,
        names: dict[Value, Value],
    ) -> None:
        self.plain, self.written, self.names = plain, written, names
        self.memory = self.plain.memory
        self.remarks = remarks
        self.kind_of = kind_of
        self.builder = Builder(value.name for value in plain.program.values())
        self.hoisted = False

    def region(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            if isinstance(op, ops.For):
                made += self.loop(op)
            else:
                made.append(op if isinstance(op, (ops.Try, ops.Closure, ops.Forward)) else self.inside(op))
        return region if tuple(made) == region.ops else replace(region, ops=tuple(made))

    def inside(self, op: Op) -> Op:
        return rewrite(op, region=self.region)

    def loop(self, loop: ops.For) -> Iterator[Op]:
        """A loop, and before it what moves out of it."""
        left: list[Op] = []
        leaves = False
        for op in loop.body.ops:
            forward = _forward_of(op)
            why = "" if forward is None else self.why_not(loop, op, forward, leaves)
            if forward is None or why is not None:
                if why:
                    self.remarks.refused(NAME, op.span, f"it stands in the loop of line {loop.span.line}, but {why}")
                leaves = leaves or _leaves(op)
                left.append(op)
                continue
            self.hoisted = True
            self.remarks.fired(NAME, forward.span, f"runs once, before the loop of line {loop.span.line}")
            yield self.guarded(loop, op)
        if len(left) == len(loop.body.ops):
            yield self.inside(loop)
        else:
            yield replace(loop, body=replace(loop.body, ops=tuple(left)))

    def guarded(self, loop: ops.For, op: Op) -> Op:
        """An op under the condition that the loop has a round, with what it gives under the names that it had, and the
        names that it looks up there."""
        results = defined(op) if isinstance(op, ops.If) else self.given(op)
        new = {value: self.builder.fresh(value.name, value.type) for value in results}
        self.names |= {made: self.names.get(value, value) for value, made in new.items()}
        lookups: list[Op] = []
        for lookup in self.lookups(loop, op):
            new[lookup.result] = self.builder.fresh(lookup.result.name)
            lookups.append(replace(lookup, result=new[lookup.result]))

        def rename(value: Value) -> Value:
            return new.get(value, value)

        def inside(region: Region) -> Region:
            renamed = (rewrite(each, operand=rename, region=inside, result=rename) for each in region.ops)
            return replace(region, ops=tuple(renamed))

        (moved,) = inside(Region((), (op,))).ops
        then = Region((), (*lookups, moved, ops.Yield(tuple(map(rename, results)), span=op.span)))
        orelse = Region((), (ops.Yield((UNBOUND,) * len(results), span=op.span),))
        return ops.If(results, loop.iterable, then, orelse, span=op.span)

    def given(self, forward: Op) -> tuple[Value, ...]:
        """The values of a forward that are used outside of it."""
        inside = {id(each) for each in walk(_body(forward))}
        used_outside = {value for each in self.plain.program.walk() if id(each) not in inside for value in used(each)}
        return tuple(value for value in definitions(_body(forward)) if value in used_outside)

    def lookups(self, loop: ops.For, op: Op) -> tuple[ops.Global, ...]:
        """The names that are looked up in a round and that an op uses: they are the same in each."""
        taken = {value for each in (op, *walk(_body(op))) for value in used(each)}
        return tuple(each for each in loop.body.ops if isinstance(each, ops.Global) and each.result in taken)

    # --- when ---

    def why_not(self, loop: ops.For, op: Op, forward: ops.Forward, leaves: bool) -> str | None:
        """Why a forward cannot move before a loop: text where one would have hoped for it, which is where every round
        gives it the same; an empty text where not."""
        own = {value for region in regions(loop) for value in definitions(region)}
        own -= {*defined(op), *definitions(_body(op)), *(each.result for each in self.lookups(loop, op))}
        if self.plain.changes(forward) or any(value in own for each in (op, *walk(_body(op))) for value in used(each)):
            return ""
        why = self.plain.why_not(forward)
        if why is not None:
            return why
        for each in forward.body.ops:
            if not self.plain.is_movable(_any(each)):
                return f"line {each.span.line} does more than compute a value"
        if leaves:
            return "a round may end before it comes to it"
        looked_at = self.plain.inputs(forward).union(*(self.memory.reads(each) for each in forward.body.ops))
        for each in loop.body.ops:
            if self.plain.is_barrier(each) or self.memory.overlap(self.memory.writes(each), looked_at):
                return f"line {each.span.line} may change the model or what it is given"
        for value in self.given(forward):
            first = self.names.get(value, value)
            if self.written.is_told_apart(first) or self.written.is_changed(first):
                return f"each round keeps a `{first.name}` of its own, or changes it"
        if not self.is_sized(loop.iterable):
            return "whether the loop has a round cannot be asked for without reading what it goes over"
        return None

    def is_sized(self, iterable: Operand) -> bool:
        """Whether the iterable is true if it has an item, and may be asked twice."""
        if isinstance(iterable, Tuple):
            return True
        kind = self.kind_of(iterable.name) if isinstance(iterable, Value) else None
        if kind is not None:
            return kind in SIZED
        made = self.plain.origins.definition(iterable)
        return isinstance(made, ops.Build) or (isinstance(made, ops.Call) and made.target in MAKES_SIZED)


def _forward_of(op: Op) -> ops.Forward | None:
    """The forward that an op is, or that it runs under the condition that a loop has a round, as this pass made it."""
    if not isinstance(op, ops.If):
        return op if isinstance(op, ops.Forward) else None
    *lookups, moved, _ = op.then.ops if len(op.then.ops) > 1 else (op, op)
    (last,) = op.orelse.ops if len(op.orelse.ops) == 1 else (None,)
    if not isinstance(last, ops.Yield) or not all(each == UNBOUND for each in last.values):
        return None
    if moved is op or not all(isinstance(each, ops.Global) for each in lookups):
        return None
    return _forward_of(moved)


def _body(op: Op) -> Region:
    return op.then if isinstance(op, ops.If) else cast(ops.Forward, op).body


def _leaves(op: Op, loop: bool = False) -> bool:
    """Whether an op may leave the round that it stands in. `loop`: whether a loop is around it there."""
    if isinstance(op, (ops.Return, ops.Raise)):
        return True
    if isinstance(op, (ops.Break, ops.Continue)):
        return not loop
    inner = loop or isinstance(op, (ops.For, ops.While))
    return any(_leaves(each, inner) for region in regions(op) for each in region.ops)


def _any(op: Op) -> AnyOp:
    return cast(AnyOp, op)
