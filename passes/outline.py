"""Cuts the end of a region off as a program of its own, the program of a stage.

    %k = call %choose()                                   %k = call %choose()
    forward %f = trace %model(%prompt)                    %s = stage "which module this is"
      %h = read … %k …                           ──▶        stage patch(model, prompt, k)
    if %h.mean > 0: break                                     forward …, if …: return (1,)
    yield %h                                                  return (0, %h)
                                                          %r = call %s(%model, %prompt, %k)
                                                          if %r[0] == 1: break
                                                          %h = item %r[1]
                                                          yield %h

Legal, since the ops stay the same ones in the same order; only the values that they take and give pass through a call.
A closure is not handed over but made again where it is used, so that the stage knows what it does. So is, where the
caller says which ops these are, what only names something: it is made again on whichever side needs it.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import TERMINATORS, TRANSPARENT, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Operand, Tuple, Value


@dataclass(frozen=True, slots=True)
class Outline:
    """The end of a region, cut off.

    program: takes the values `free`, in their order.
    exports: those of its values that are used after it.
    rest: what stands in the region after the call of the program, whose result is `result`.
    """

    program: Program
    free: tuple[Value, ...]
    exports: tuple[Value, ...]
    result: Value
    rest: tuple[Op, ...]


def _nothing(op: Op) -> bool:
    return False


def outline(
    region: Region,
    index: int,
    function: Region,
    name: str,
    span: Span,
    builder: Builder | None = None,
    names: Callable[[Op], bool] = _nothing,
) -> Outline:
    """Cuts off the ops of a region from the one at `index` on, all but the terminator at its end.

    function: the body of the function that the region belongs to.
    name, span: those of the program that is made.
    builder: gives names to what is added; by default, one that knows those of the function.
    names: whether an op only names something.
    """
    taken = region.ops[index:]
    end = taken[-1:] if isinstance(taken[-1], TERMINATORS) else ()
    taken = taken[: len(taken) - len(end)]
    assert taken, "a terminator alone needs nothing to be known"
    builder = builder or Builder(value.name for value in definitions(function))
    free, closures = _free(taken, function, lambda op: isinstance(op, ops.Closure) or names(op))
    cut = _Cut()
    body = tuple(cut.op(op, loop=False) for op in taken)
    exports, copies = _exports(taken, function, names)
    values: tuple[Operand, ...] = (*((Literal(0),) if cut.leaves else ()), *exports)
    body = (*closures, *body, ops.Return(Tuple(values), span=taken[-1].span))
    parameters = _parameters(free, function, Region((), body))
    program = Program(
        name,
        tuple(map(Parameter, parameters)),
        substitute(Region((), body), dict(zip(free, parameters, strict=True))),
        kind="stage",
        span=replace(span, line=taken[0].span.line, column=taken[0].span.column),
    )
    result = builder.fresh("stage")
    rest = _rest(result, exports, cut.leaves, (*copies, *end), _leaves(taken[-1]), builder, taken[0].span)
    return Outline(program, free, exports, result, rest)


def _free(
    taken: tuple[Op, ...], function: Region, again: Callable[[Op], bool]
) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """The values that ops take from before them, and the ops among what makes these which are made again."""
    made = {value: op for op in walk(function) if again(op) for value in defined(op)}
    chosen: set[Value] = set()
    while True:
        kept = tuple({id(op): op for value, op in made.items() if value in chosen}.values())
        body = Region((), (*kept, *taken))
        inside = {value.name for value in definitions(body)}
        free = dict.fromkeys(value for op in walk(body) for value in used(op) if value.name not in inside)
        if not made.keys() & free.keys():
            return tuple(free), kept
        chosen |= made.keys() & free.keys()


def _exports(
    taken: tuple[Op, ...], function: Region, names: Callable[[Op], bool]
) -> tuple[tuple[Value, ...], tuple[Op, ...]]:
    """The values that ops define and that others use, and the ops that are made again there to name them."""
    inside = {id(op) for op in walk(Region((), taken))}
    outside = {value.name for op in walk(function) if id(op) not in inside for value in used(op)}
    copies: list[Op] = []
    for op in reversed(list(_in_place(taken))):
        if names(op) and any(value.name in outside for value in defined(op)):
            copies.insert(0, op)
            outside.update(value.name for value in used(op))
    again = {value.name for op in copies for value in defined(op)}
    return (
        tuple(value for value in _visible(taken) if value.name in outside and value.name not in again),
        tuple(copies),
    )


def _in_place(taken: tuple[Op, ...]) -> Iterator[Op]:
    """The ops whose values stay visible after them."""
    for op in taken:
        yield op
        if isinstance(op, TRANSPARENT):
            for region in regions(op):
                yield from _in_place(region.ops)


def _visible(taken: tuple[Op, ...]) -> Iterator[Value]:
    return (value for op in _in_place(taken) for value in defined(op))


def _parameters(free: tuple[Value, ...], function: Region, body: Region) -> list[Value]:
    """Names for the values that a stage takes by which Python can call them, and that hide no name from outside."""
    taken = {op.name for op in walk(function) if isinstance(op, (ops.Global, ops.SetGlobal))}
    taken |= {value.name for value in definitions(body)}
    made = []
    for value in free:
        stem, *numbers = value.name.split(".")
        name = stem if stem not in taken and not stem.isdecimal() else "_".join([stem, *numbers])
        name = f"v{name}" if name[:1].isdecimal() else name
        while not name.isidentifier() or keyword.iskeyword(name) or name in taken:
            name = f"{name}_" if name.isidentifier() else "value"
        taken.add(name)
        made.append(Value(name, value.type))
    return made


@dataclass(frozen=True, slots=True)
class _Leave:
    """A terminator by which control leaves the region that is cut off, other than at its end."""

    op: ops.Break | ops.Continue | ops.Return

    @property
    def values(self) -> tuple[Operand, ...]:
        return (self.op.value,) if isinstance(self.op, ops.Return) else self.op.values


class _Cut:
    """Turns the terminators that leave the ops into returns of their number and their values."""

    def __init__(self) -> None:
        self.leaves: list[_Leave] = []

    def op(self, op: Op, loop: bool) -> Op:
        match op:
            case ops.Break() | ops.Continue() if not loop:
                return self.leave(_Leave(op))
            case ops.Return():
                return self.leave(_Leave(op))
            case ops.Closure():
                return op
            case ops.For() | ops.While():
                orelse = None if op.orelse is None else self.region(op.orelse, loop)
                return replace(op, body=self.region(op.body, True), orelse=orelse)
        return rewrite(op, region=lambda region: self.region(region, loop))

    def region(self, region: Region, loop: bool) -> Region:
        return Region(region.parameters, tuple(self.op(op, loop) for op in region.ops))

    def leave(self, leave: _Leave) -> ops.Return:
        self.leaves.append(leave)
        return ops.Return(Tuple((Literal(len(self.leaves)), *leave.values)), span=leave.op.span)


def _leaves(op: Op) -> bool:
    """Whether control never comes out of the end of an op."""
    match op:
        case ops.If(then=then, orelse=orelse):
            return all(region.ops and _leaves(region.ops[-1]) for region in (then, orelse))
        case ops.Forward(body=body) | ops.Session(body=body) | ops.With(body=body):
            return bool(body.ops) and _leaves(body.ops[-1])
    return isinstance(op, TERMINATORS) and not isinstance(op, ops.Yield)


def _rest(
    result: Value,
    exports: Collection[Value],
    leaves: list[_Leave],
    end: tuple[Op, ...],
    never: bool,
    builder: Builder,
    span: Span,
) -> tuple[Op, ...]:
    """Takes the result apart: goes where the ops that were cut off wanted to go, or on with their values."""
    if not leaves:
        return (ops.Unpack(tuple(exports), result, span=span), *end) if exports else end
    way = builder.fresh("way")
    made: list[Op] = [ops.Item(way, result, Literal(0), span=span)]
    for number, leave in enumerate(leaves, start=1):
        values = tuple(builder.fresh("value") for _ in leave.values)
        items = [ops.Item(value, result, Literal(place), span=span) for place, value in enumerate(values, start=1)]
        jump: Op = (
            replace(leave.op, value=values[0]) if isinstance(leave.op, ops.Return) else replace(leave.op, values=values)
        )
        if never and number == len(leaves):
            return (*made, *items, jump)
        test = builder.fresh("left")
        made.append(ops.Operator(test, "==", (way, Literal(number)), span=span))
        stay = Region((), (ops.Yield((), span=span),))
        made.append(ops.If((), test, Region((), (*items, jump)), stay, span=span))
    made += [ops.Item(value, result, Literal(place), span=span) for place, value in enumerate(exports, start=1)]
    return (*made, *end)
