"""Moves what a forward's body does to things outside of it behind the forward.

    at %model@lm_head output                        at %model@lm_head output
      %3 = read %model@lm_head output                 %3 = read %model@lm_head output
      %4 = item %3[0, -1]                             %4 = item %3[0, -1]
      %5 = attr %scores.append               ──▶      %5 = save %4
      %6 = call %5(%4) as method.append             %6 = attr %scores.append
                                                    %7 = call %6(%5) as method.append

What is left at the sites changes nothing but the values there and what the forward itself makes: it can run again, and
in another order than other forwards. What others see moves as `postponed`, where lines that stay may fail behind it:
where it stood, a `keep` notes that the forward came to it, so that it runs although a later line fails.

    at %model@h.3 output                            at %model@h.3 output
      %3 = read %model@h.3 output                     %3 = read %model@h.3 output
      %4 = call %print(%3) as builtins.print          %4 = save %3
      %5 = item %3[0, %p]                    ──▶      %6 = keep True
                                                      %5 = item %3[0, %p]
                                                    postponed %6
                                                      %7 = call %print(%4) as builtins.print

Legal, where nothing that moves is needed at a site, and nothing that stays, and would have run after it, changes what
it looks at or looks at what it changes. A value of the model is copied where it was used. What moves keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used, walk
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Literal, Operand, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.known_calls import FUSED_CALL
from nnsight_compiler.passes.memory import Gradient, Memory, Roots, Site

Sunk = tuple[ops.Forward, tuple[Op, ...], tuple[Op, str] | None]
"""The forward, what moves behind it, and the op that cannot with the reason."""


class Sinking:
    """Takes out of forwards what changes other things than these: `own` is what their round makes. `postpones`: what
    others see moves as `postponed`; else it stays where a line behind it may fail."""

    def __init__(self, memory: Memory, own: Roots, builder: Builder, postpones: bool) -> None:
        self.memory, self.own, self.builder, self.postpones = memory, own, builder, postpones

    def sink(self, forward: ops.Forward, late: Callable[[Op], bool]) -> Sunk:
        """The forward without what changes things that rounds have in common, and as far as that goes, without what
        had better run `late`."""
        made = self._sink(forward, late)
        return made if made[2] is None else self._sink(forward, lambda _: False)

    def _sink(self, forward: ops.Forward, late: Callable[[Op], bool]) -> Sunk:
        units = [(at, op) for at in forward.body.ops if isinstance(at, ops.At) for op in at.body.ops]
        moving: dict[int, Op] = {}
        moved: set[str] = set()
        for _, op in units:
            outside = touches_common(op, self.own, self.memory) or isinstance(op, (ops.Backward, ops.Gradients))
            if outside or late(op) or any(value.name in moved for value in used_within(op)):
                moving[id(op)] = op
                moved.update(value.name for value in defined_within(op))
        if not moving:
            return forward, (), None
        _with_lookups([op for _, op in units], moving)
        for number, (_, op) in enumerate(units):
            if id(op) not in moving:
                continue
            if any(_is_access(inner) for inner in _within(op)) or any(
                isinstance(root, Site) for root in writes_of(op, self.memory)
            ):
                return forward, (), (op, "what is written to the model depends on what a round does outside of it")
            lasting = lasts(op, self.memory)
            for _, later in units[number + 1 :]:
                if id(later) in moving:
                    continue
                if _conflict(op, later, self.memory):
                    return forward, (), (later, "a later line of the trace changes what an earlier one looks at")
                if lasting and not self.postpones and _may_fail(later):
                    return forward, (), (later, "a later line of the trace may fail, after what an earlier one shows")
        groups = _runs([op for _, op in units], moving)
        marked = _before_failures(groups, units[-1][1], self.memory) if self.postpones else 0
        for op in (each for group in groups[:marked] for each in group):
            if isinstance(op, (ops.Backward, ops.Gradients)) or late(op):
                return forward, (), (op, "a later line of the trace may fail, after what an earlier one shows")
        return self._split(forward, moving, groups[:marked])

    def _split(self, forward: ops.Forward, moving: dict[int, Op], groups: Sequence[Sequence[Op]]) -> Sunk:
        """The forward without what moves, of which these groups are postponed."""
        ends, waiting = {id(group[-1]) for group in groups}, {id(op) for group in groups for op in group}
        sunk: list[Op] = []
        held: list[Op] = []
        stay: list[Op] = []
        gone = {value.name for op in moving.values() for value in defined_within(op)}
        for at in forward.body.ops:
            if not isinstance(at, ops.At):
                stay.append(at)
                continue
            here: list[Op] = []
            copied: dict[Value, Value] = {}
            for op in at.body.ops:
                if id(op) not in moving:
                    here.append(op)
                    copied.clear()  # it may have changed what was copied
                    continue
                for value in dict.fromkeys(used_within(op)):
                    inside = value.name not in gone and any(value in defined(each) for each in walk(forward.body))
                    if inside and value not in copied and self.memory.live(value):
                        kept = self.builder.fresh(value.name)
                        here.append(ops.Save(kept, value, span=op.span))
                        copied[value] = kept
                (held if id(op) in waiting else sunk).append(_with(op, dict(copied)))
                if id(op) in ends:
                    reached, made = _postponed(held, self.builder)
                    here.append(reached)
                    sunk.append(made)
                    held = []
            if here:
                stay.append(replace(at, body=Region(at.body.parameters, tuple(here))))
        return replace(forward, body=Region(forward.body.parameters, tuple(stay))), tuple(sunk), None


def _before_failures(groups: Sequence[Sequence[Op]], last: Op, memory: Memory) -> int:
    """How many of these groups, which move, come before a line that stays and may fail, up to the last that others
    see."""
    followed = groups if groups[-1][-1] is not last else groups[:-1]
    return max(
        (number for number, group in enumerate(followed, 1) if any(lasts(op, memory) for op in group)), default=0
    )


def waits(op: Op) -> bool:
    """Whether a round waits for others at this op: what follows belongs to its next part."""
    return isinstance(op, (ops.Forward, ops.Backward, ops.Gradients)) or (
        isinstance(op, ops.Call) and op.target == FUSED_CALL
    )


def waits_within(op: Op) -> bool:
    """Whether an op waits for others, or one in it."""
    return any(map(waits, _within(op)))


def writes_of(op: Op, memory: Memory) -> Roots:
    """What an op of a round changes. A backward pass fills gradients, at which no round looks but in its own body."""
    if isinstance(op, ops.Backward):
        return frozenset(root for root in memory.writes(op) if isinstance(root, Gradient))
    return memory.writes(op)


def common(roots: Roots, own: Roots) -> Roots:
    """What of these storages rounds have in common: not what one makes itself, and not what stands in its forwards."""
    return frozenset(root for root in roots if root not in own and not isinstance(root, (Gradient, Site)))


def shows(op: Op, memory: Memory) -> bool:
    """Whether an op, or one in it, shows or measures something."""
    calls = (each for each in _within(op) if isinstance(each, ops.Call))
    return any((row := memory.origins.known(each)) and row.behaviour is Behaviour.HARMLESS for each in calls)


def touches_common(op: Op, own: Roots, memory: Memory) -> bool:
    """Whether an op changes what rounds have in common, or shows something."""
    return bool(common(writes_of(op, memory), own)) or shows(op, memory)


def lasts(op: Op, memory: Memory) -> bool:
    """Whether what an op does is seen where the program fails later: not what it does to things that only the program
    has."""
    changed = (root for root in writes_of(op, memory) if not isinstance(root, (Gradient, Site)))
    return shows(op, memory) or any(map(memory.outlives, changed))


def _may_fail(op: Op) -> bool:
    """Whether an op may fail at a run: all but what only names, keeps or takes apart a tensor of which the shape is
    known, by constants."""
    return any(map(_may_fail_itself, _within(op)))


def _may_fail_itself(op: Op) -> bool:
    match op:
        case ops.Read() | ops.Save() | ops.At() | ops.Require() | ops.Global():
            return False
        case ops.Attribute(object=owner):
            return not _is_shaped(owner)
        case ops.Item(object=owner, index=index):
            return any(True for _ in values_in(index)) or not _is_shaped(owner)
        case ops.SetItem(object=owner, index=index, value=value):
            return any(True for _ in values_in(index)) or not (_is_shaped(owner) and _is_plain(value))
        case ops.Write(value=value):
            return not _is_plain(value)
        case ops.Operator(operands=parts, operator=operator):
            shaped = any(map(_is_shaped, parts)) and all(map(_is_plain, parts))
            return not shaped or operator not in ("+", "-", "*", "/")
        case _:
            return True


def _is_shaped(operand: Operand) -> bool:
    """Whether an operand is a tensor of which the shape is known, so that what is done to it was tried."""
    return isinstance(operand, Value) and isinstance(operand.type, TensorType) and operand.type.shape is not None


def _is_plain(operand: Operand) -> bool:
    return _is_shaped(operand) or (isinstance(operand, Literal) and type(operand.value) in (int, float))


def _runs(units: Sequence[Op], moving: Mapping[int, Op]) -> list[list[Op]]:
    """The ops that move, in groups between which others stay."""
    return [list(group) for moves, group in groupby(units, lambda op: id(op) in moving) if moves]


def _postponed(held: Sequence[Op], builder: Builder) -> tuple[ops.Save, ops.Postponed]:
    """What notes that a round came to some ops, and these ops, which run later."""
    reached = builder.fresh("reached")
    span = held[0].span
    return ops.Save(reached, Literal(True), copy=False, span=span), ops.Postponed(
        reached, Region((), tuple(held)), span=span
    )


def _conflict(op: Op, later: Op, memory: Memory) -> bool:
    """Whether an op cannot run behind a later one."""
    changed, wrote = common(writes_of(op, memory), frozenset()), common(writes_of(later, memory), frozenset())
    looked = common(memory.reads(op), frozenset())
    return memory.overlap(wrote, changed | looked) or memory.overlap(changed, memory.reads(later))


def postponed(body: tuple[Op, ...], own: Roots, memory: Memory, builder: Builder) -> tuple[Op, ...]:
    """The ops of a round with what changes things that rounds have in common, and what depends on that, behind the last
    one at which it waits for others; as they are where something that stays before that would notice."""
    last = max(number for number, op in enumerate(body) if waits(op))
    early, rest = body[: last + 1], body[last + 1 :]
    moving: dict[int, Op] = {}
    moved: set[str] = set()
    for op in early:
        if touches_common(op, own, memory) or any(value.name in moved for value in used_within(op)):
            moving[id(op)] = op
            moved.update(value.name for value in defined_within(op))
    behind = moving | {id(op): op for op in rest}
    _with_lookups(body, behind)
    for number, op in enumerate(early):
        after = (each for each in early[number + 1 :] if id(each) not in behind)
        if id(op) in behind and (waits(op) or any(_conflict(op, each, memory) for each in after)):
            return body
    groups = _runs(early, behind)
    seen = [number for number, group in enumerate(groups, 1) if any(lasts(op, memory) for op in group)]
    waiting = {id(group[-1]): group for group in groups[: max(seen, default=0)]}
    stay: list[Op] = []
    late: list[Op] = []
    for op in early:
        if id(op) not in behind:
            stay.append(op)
        elif not waiting:
            late.append(op)
        elif id(op) in waiting:
            for marks, part in groupby(waiting.pop(id(op)), lambda each: isinstance(each, ops.Postponed)):
                if marks:
                    late += part
                    continue
                reached, made = _postponed(list(part), builder)
                stay.append(reached)
                late.append(made)
    return (*stay, *late, *rest)


def _with_lookups(units: Sequence[Op], moving: dict[int, Op]) -> None:
    """Has a method that is looked up for calls alone move with the calls."""
    users: dict[str, list[int]] = {}
    for op in units:
        for value in used_within(op):
            users.setdefault(value.name, []).append(id(op))
    for op in reversed(units):
        if isinstance(op, ops.Attribute) and all(each in moving for each in users.get(op.result.name, [0])):
            moving[id(op)] = op


def _with(op: Op, copies: dict[Value, Value]) -> Op:
    def exchanged(region: Region) -> Region:
        return Region(region.parameters, tuple(_with(inner, copies) for inner in region.ops))

    return rewrite(op, operand=lambda value: copies.get(value, value), region=exchanged)


def _is_access(op: Op) -> bool:
    return isinstance(op, (ops.Read, ops.Write, ops.Skip, ops.Stop))


def _within(op: Op) -> Iterator[Op]:
    yield op
    for region in regions(op):
        yield from walk(region)


def used_within(op: Op) -> Iterator[Value]:
    """What an op uses, or one in it."""
    for each in _within(op):
        yield from used(each)


def defined_within(op: Op) -> Iterator[Value]:
    """What an op defines, or one in it."""
    for each in _within(op):
        yield from defined(each)
