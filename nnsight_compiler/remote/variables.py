"""Variables that a segment shares with the code around it: what is in them goes there, and what is assigned comes back.

    client                                          segment(model, prompt, best)
    %r = call %segment(%model, %prompt, %0)             %best.0 = cell best = %best
    (value, ((1, assigned),)) = %r           ◀──        store %best.0 = %loss
    store %best = assigned                              return (value, ((1, %loss),))

A cell cannot be sent. For each that a segment assigns it tells whether it did: 0 where not, 1 with the value, 2 where
it was deleted. Where the segment raises an error, the variables stay as they were before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import TRANSPARENT, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import regions, rewrite, walk
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Operand, Tuple, Value

ASSIGNED, DELETED = Literal(1), Literal(2)


@final
@dataclass(frozen=True, slots=True)
class Owning:
    """A program with variables of its own.

    takes: the parameters that stand for what is in a variable around it.
    unused: those that stood for a variable whose value is not needed; they are parameters no more.
    assigned: those whose variables it assigns. If there are any, its result is a pair: what it was, and for each of
        them how it was assigned, with the value.
    """

    program: Program
    takes: frozenset[Value]
    unused: frozenset[Value]
    assigned: tuple[Value, ...]


def own_variables(program: Program, names: Mapping[Value, str], later: Collection[Value], builder: Builder) -> Owning:
    """The program with variables of its own in the place of those around it.

    names: the parameters that stand for variables, with what these are called.
    later: those of them which others read.
    """
    taken = frozenset(parameter for parameter in names if _reads_first(program.body.ops, parameter))
    assigned = tuple(
        parameter
        for parameter in names
        if parameter in later and any(isinstance(op, ops.Store) and op.cell == parameter for op in program.walk())
    )
    builder.take(parameter.value.name for parameter in program.parameters)
    own = {parameter: builder.fresh(parameter.name) for parameter in names}
    hows = {own[parameter].name: builder.fresh("how") for parameter in assigned}
    span = program.span
    ahead: list[Op] = [
        ops.Cell(own[parameter], name, parameter if parameter in taken else UNBOUND, span=span)
        for parameter, name in names.items()
    ]
    ahead += [ops.Cell(how, "assigned", Literal(0), span=span) for how in hows.values()]
    labels = {own[parameter].name: name for parameter, name in names.items()}
    body = _noted(substitute(program.body, dict(own)), hows, labels, builder, True)
    unused = names.keys() - taken
    kept = tuple(parameter for parameter in program.parameters if parameter.value not in unused)
    made = replace(program, parameters=kept, body=Region((), (*ahead, *body.ops)))
    return Owning(made, taken, frozenset(unused), assigned)


def _reads_first(body: Iterable[Op], cell: Value) -> bool:
    """Whether ops may read a variable before they have assigned it."""
    for op in body:
        match op:
            case ops.Store(cell=stored) if stored == cell:
                return False
            case ops.Load(cell=read) if read == cell:
                return True
        if isinstance(op, TRANSPARENT) and not isinstance(op, ops.Steps):
            inner = [each for region in regions(op) for each in region.ops]
            if _reads_first(inner, cell):
                return True
            if any(isinstance(each, ops.Store) and each.cell == cell for each in inner):
                return False
        elif any(isinstance(each, ops.Load) and each.cell == cell for region in regions(op) for each in walk(region)):
            return True
    return False


def _noted(region: Region, hows: Mapping[str, Value], labels: Mapping[str, str], builder: Builder, own: bool) -> Region:
    """Notes each assignment, and has the function itself, but not those inside it, return what was noted."""
    made: list[Op] = []
    for op in region.ops:
        if isinstance(op, ops.Return) and own and hows:
            made += _returned(op, hows, labels, builder)
            continue
        inside = own and not isinstance(op, ops.Closure)
        made.append(rewrite(op, region=lambda held, inside=inside: _noted(held, hows, labels, builder, inside)))  # type: ignore[misc]
        if isinstance(op, ops.Store) and isinstance(op.cell, Value) and op.cell.name in hows:
            made.append(ops.Store(hows[op.cell.name], DELETED if op.value == UNBOUND else ASSIGNED, span=op.span))
    return Region(region.parameters, tuple(made))


def _returned(op: ops.Return, hows: Mapping[str, Value], labels: Mapping[str, str], builder: Builder) -> list[Op]:
    made: list[Op] = []
    held: list[Operand] = []
    span = op.span
    for name, cell in hows.items():
        how, given, full, value = builder.fresh("how"), builder.fresh("given"), builder.fresh(), builder.fresh()
        load = Region((), (ops.Load(value, Value(name), labels[name], span=span), ops.Yield((value,), span=span)))
        made += [
            ops.Load(how, cell, "assigned", span=span),
            ops.Operator(full, "==", (how, ASSIGNED), span=span),
            ops.If((given,), full, load, Region((), (ops.Yield((NONE,), span=span),)), span=span),
        ]
        held.append(Tuple((how, given)))
    return [*made, replace(op, value=Tuple((op.value, Tuple(tuple(held)))))]


def assign(hows: Value, cells: tuple[Value, ...], builder: Builder, span: Span) -> list[Op]:
    """Assigns the variables as a segment says that it did."""
    made: list[Op] = []
    for number, cell in enumerate(cells):
        held, how, value = builder.fresh(), builder.fresh("how"), builder.fresh()
        assigned, deleted = builder.fresh(), builder.fresh()
        stay = Region((), (ops.Yield((), span=span),))
        store = (ops.Item(value, held, Literal(1), span=span), ops.Store(cell, value, span=span))
        made += [
            ops.Item(held, hows, Literal(number), span=span),
            ops.Item(how, held, Literal(0), span=span),
            ops.Operator(assigned, "==", (how, ASSIGNED), span=span),
            ops.If((), assigned, Region((), (*store, *stay.ops)), stay, span=span),
            ops.Operator(deleted, "==", (how, DELETED), span=span),
            ops.If((), deleted, Region((), (ops.Store(cell, UNBOUND, span=span), *stay.ops)), stay, span=span),
        ]
    return made


def cells_of(region: Region) -> dict[str, str]:
    """The names of the values that are cells, and of their variables."""
    return {op.result.name: op.name for op in walk(region) if isinstance(op, ops.Cell)}
