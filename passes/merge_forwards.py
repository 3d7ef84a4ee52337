"""Has the rounds of a loop advance side by side, so that their forwards run as rows of one.

    for %p in %0                                        together %p in %0
      forward %1 = trace %model(%corrupt)                 forward %1 = trace %model(%corrupt)
        at %model@h.3 output                                at %model@h.3 output
          %2 = read %model@h.3 output                         %2 = read %model@h.3 output
          set_item %2[:, %p] = %source           ──▶          set_item %2[:, %p] = %source
        at %model@lm_head output                            at %model@lm_head output
          %3 = read %model@lm_head output                     %3 = read %model@lm_head output
          %4 = item %3[0, -1]                                 %4 = item %3[0, -1]
          %5 = attr %scores.append                            %5 = save %4
          %6 = call %5(%4) as method.append               %6 = attr %scores.append
      continue                                            %7 = call %6(%5) as method.append
                                                          continue

What a round does to things outside of its forwards first moves out of them, behind each, and then behind the last one
(`sink`). Each round is a sequence of parts, with a forward between any two, or something else that rounds wait for.
What others see moves as `postponed`, where a line that stays may fail behind it:

    print(%p)                                               %reached = keep True
    forward %1 = trace %model(%corrupt)                     forward %1 = trace %model(%corrupt)
      …                                            ──▶        …
                                                            postponed %reached
                                                              print(%p)

Legal, where each thing that rounds have in common, and that one of them changes, is touched in one part alone: all
rounds pass that part one after the other, in their order, so that each finds what it would have found. The same holds
of what is carried from round to round, and of prints. Nothing is merged

- where a round may end the loop or the function, or runs its forward under a condition, in a loop or in a `try`;
- where a round shows or changes something that outlives it before its last forward, and that cannot move: a round
  before it may still fail, and then it must not have happened;
- where a call in a round is not known, draws random numbers or sets how torch computes: it may change, or see,
  anything;
- where the model itself keeps or draws something as it runs: in training mode, with state of its own;
- where the rows of a site cannot be told, a module is skipped or the forward stopped, or the forward has invokes of its
  own.

A call of a module in a trace moves behind its forward where it treats each vector by itself (see `fuse_calls`): the
calls of all rounds are then one, on a stack. A backward pass moves too. Those of several rounds run as one, from the
sum of their losses: each loss depends on rows of its own, whose part of the gradient is that of its own pass.

What a run finds out (inputs of unequal shapes, a model that mixes rows) never merges what must stay apart: such
forwards run one by one. An exception ends the loop when the rounds before have ended, and when the round that fails has
done what it had come to; those after it may have begun, and nothing is seen of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.jumps import jumps
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.known_calls import FUSED_CALL
from nnsight_compiler.passes.memory import Fresh, Memory, Root, Roots
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.sink import Sinking, common, lasts, postponed, shows, used_within, waits, writes_of
from nnsight_compiler.passes.strands import Fuses, WhyNot, forward_hindrance, hindrance, is_fused, runs

NAME = "merge_forwards"


def merge_forwards(program: Program, why_not: WhyNot, fuses: Fuses, remarks: Remarks) -> Program:
    """The program with loops whose rounds run together; the program itself where there are none."""
    return _Merging(program, why_not, fuses, remarks).run()


class _RefusedError(Exception):
    """Why the rounds of a loop cannot run together, and the op that shows it."""

    def __init__(self, op: Op, reason: str) -> None:
        self.op, self.reason = op, reason


class _Merging:
    """The loops of one program, each with what it becomes and what its rounds make, by its identity."""

    def __init__(self, program: Program, why_not: WhyNot, fuses: Fuses, remarks: Remarks) -> None:
        self.program, self.why_not, self.fuses, self.remarks = program, why_not, fuses, remarks
        self.builder = Builder(value.name for value in program.values())
        self.loops = list(_innermost(program.body))
        self.made: dict[int, ops.For] = {}
        self.tried: list[ops.For] = []  # which the memory analysis knows by their identities
        self.own: dict[int, Roots] = {}

    def run(self) -> Program:
        program = self.program
        self._each(self.loops, self._sink)
        # What sinks makes new ops, which the memory analysis must know. A loop that has to stay is put back, and those
        # that are left are looked at again, on an analysis without it.
        while self.made:
            left = [loop for loop in self.loops if id(loop) in self.made]
            memory = Memory.of(replace(program, body=_exchanged(program.body, self.made)), copies=True)
            self._each(left, partial(self._postpone, memory))
            if len(self.made) == len(left):
                for loop in left:
                    self.remarks.fired(NAME, loop.span, "the forwards of this loop's rounds run as rows of one")
                return replace(program, body=_exchanged(program.body, self.made))
        return program

    def _each(self, loops: Iterable[ops.For], step: Callable[[ops.For], None]) -> None:
        """Does this with each of these loops. One for which it is refused stays as it is."""
        for loop in loops:
            try:
                step(loop)
            except _RefusedError as refused:
                place = f" (line {refused.op.span.line})" if refused.op.span.line else ""
                self.remarks.refused(NAME, loop.span, f"{refused.reason}{place}")
                self.made.pop(id(loop), None)

    def _sink(self, loop: ops.For) -> None:
        """Moves what rounds have in common behind each of their forwards."""
        memory = Memory.of(self.program, copies=True)
        _require_plain(self.program, memory, loop)
        forwards = [op for op in loop.body.ops if isinstance(op, ops.Forward)]
        for forward in forwards:
            reason = forward_hindrance(forward) or self.why_not(forward)
            if reason is not None:
                raise _RefusedError(forward, reason)
        own = frozenset[Root](Fresh(value.name) for op in walk(loop.body) for value in defined(op))
        sinking = Sinking(memory, own, self.builder, postpones=True)
        body: list[Op] = []
        for op in loop.body.ops:
            if not isinstance(op, ops.Forward):
                body.append(op)
                continue
            stays, sunk, stuck = sinking.sink(op, partial(is_fused, op, self.fuses))
            if stuck is not None:
                raise _RefusedError(*stuck)
            body.append(stays)
            for each in sunk:
                if isinstance(each, ops.Call) and is_fused(op, self.fuses, each):
                    each = replace(each, target=FUSED_CALL)
                body.append(each)
        self.own[id(loop)] = own
        self.made[id(loop)] = replace(loop, body=Region(loop.body.parameters, tuple(body)), together=True)

    def _postpone(self, memory: Memory, loop: ops.For) -> None:
        """Moves it on, behind the last forward. What ops may touch does not depend on their order, so that the analysis
        holds before and after."""
        made = self.made[id(loop)]
        late = postponed(made.body.ops, self.own[id(loop)], memory, self.builder)
        made = self.made[id(loop)] = replace(made, body=Region(made.body.parameters, late))
        self.tried.append(made)
        _require_apart(memory, made)


def _innermost(region: Region) -> Iterator[ops.For]:
    """The loops that run forwards, but for those around another such loop."""
    for op in region.ops:
        if runs(op):
            inner = [each for part in regions(op) for each in _innermost(part)]
            if isinstance(op, ops.For) and not inner:
                yield op
            yield from inner


def _exchanged(region: Region, made: Mapping[int, Op]) -> Region:
    """The region with other ops in the place of these, by their identities."""

    def exchanged(region: Region) -> Region:
        new = tuple(made.get(id(op)) or rewrite(op, region=exchanged) for op in region.ops)
        return Region(region.parameters, new)

    return exchanged(region)


# --- what a round may consist of ---


def _require_plain(program: Program, memory: Memory, loop: ops.For) -> None:
    if any(isinstance(op, ops.Try) and any(inner is loop for inner in walk(_whole(op))) for op in program.walk()):
        raise _RefusedError(loop, "an exception in one round is handled around the loop, when others have begun")
    last = max(number for number, op in enumerate(loop.body.ops) if runs(op) or isinstance(op, ops.Forward))
    for op, _ in jumps(Region((), loop.body.ops[:last])):
        if isinstance(op, ops.Continue):
            raise _RefusedError(op, "the forward runs under a condition: a round may go on to the next before it")
    for op, _ in jumps(loop.body):
        if isinstance(op, ops.Break):
            raise _RefusedError(op, "a round may end the loop")
    for op in walk(loop.body):
        why = hindrance(op, memory, "a round")
        if why is not None:
            raise _RefusedError(op, why)


def _whole(op: ops.Try) -> Region:
    return Region((), tuple(inner for region in regions(op) for inner in region.ops))


# --- what rounds have in common ---


def _require_apart(memory: Memory, loop: ops.For) -> None:
    """Refuses rounds in which something in common is touched in more than one part, and changed in one."""
    own = frozenset[Root](Fresh(value.name) for op in walk(loop.body) for value in defined(op))
    own |= _hidden(memory.program, loop)
    touches = list(_parts(loop.body, memory))
    given: list[tuple[Op, Roots]] = [(loop, memory.reachable(loop.iterable))]
    for forward in loop.body.ops:
        if isinstance(forward, ops.Forward):
            given.append(
                (forward, frozenset[Root]().union(*(memory.reachable(each.value) for each in forward.arguments)))
            )
    written: list[tuple[object, Op, Roots]] = []
    shown: dict[object, Op] = {}
    for part, op in touches:
        changed = common(writes_of(op, memory), own)
        if changed:
            written.append((part, op, changed))
        if shows(op, memory):
            shown.setdefault(part, op)
    if len(shown) > 1:
        raise _RefusedError(list(shown.values())[1], "rounds print, or measure, before and after their forwards")
    end = sum(map(waits, loop.body.ops))
    for part, op in touches:
        if part != end and lasts(op, memory) and (shows(op, memory) or common(writes_of(op, memory), own)):
            raise _RefusedError(op, "a round may fail after the next one changed or showed something")
    for part, op, changed in written:
        for each, roots in given:
            if memory.overlap(changed, common(roots, own)):
                what = "goes over" if each is loop else "gives to a forward"
                raise _RefusedError(op, f"a round may change what the loop {what}")
        for other, each in touches:
            if other == part:
                continue
            if memory.overlap(changed, common(writes_of(each, memory) | memory.reads(each), own)):
                raise _RefusedError(op, f"a round changes what the next one looks at before that ({_line(each)})")
    _require_carried_late(loop)


def _hidden(program: Program, loop: ops.For) -> Roots:
    """The iterators that the loop goes over and nothing else has a name for, as in `enumerate(zip(…))`."""
    uses: dict[str, int] = {}
    made: dict[str, Op] = {}
    for op in program.walk():
        for value in used(op):
            uses[value.name] = uses.get(value.name, 0) + 1
        made.update((value.name, op) for value in defined(op))
    found: set[Root] = set()
    waiting = [loop.iterable]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Value) and uses[each.name] == 1 and isinstance(call := made.get(each.name), ops.Call):
            found.add(Fresh(each.name))
            waiting += [argument.value for argument in call.arguments]
    return frozenset(found)


def _require_carried_late(loop: ops.For) -> None:
    """Refuses values that one round hands to the next, unless they are used in the last part alone."""
    carried = {value.name for value in loop.body.parameters[1:]}
    if not carried:
        return
    last = max(number for number, op in enumerate(loop.body.ops) if waits(op))
    for op in loop.body.ops[: last + 1]:
        if any(value.name in carried for value in used_within(op)):
            raise _RefusedError(op, "a round needs before its forward what the round before it gives after its own")
    for op in walk(loop.body):
        if isinstance(op, ops.Continue) and op is not loop.body.ops[-1]:
            raise _RefusedError(op, "a round hands on values in more than one place")


def _parts(body: Region, memory: Memory) -> Iterator[tuple[object, Op]]:
    """Each op of a round with the part that it is in: a number between forwards, a pair inside of one."""
    part = 0
    for op in body.ops:
        if isinstance(op, ops.Forward):
            for at in op.body.ops:
                yield from (((part, "forward"), inner) for region in regions(at) for inner in region.ops)
        elif isinstance(op, ops.Postponed):
            yield from ((part, inner) for inner in op.body.ops)
        else:
            yield part, op
        part += waits(op)


def _line(op: Op) -> str:
    return f"line {op.span.line}" if op.span.line else "elsewhere"
