"""Cuts a program into segments, which run where the model is, and the code of the client's that calls them.

    for prompt in prompts:                              for prompt in prompts:
        with model.trace(prompt):                           (p,) = segment_0(model, prompt)
            h = model.layers[3].output           ──▶
        p = h[0, -1].softmax(-1)
        scores.append(metric(p))                            scores.append(metric(p))

A segment is a run of ops of one region, from the first to the last that needs the model, with none of the client's
between; then come the ops without effects that make less of what the segment gives. An op that holds both is gone into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import CellType
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import defined, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Operand, Value
from nnsight_compiler.passes.outline import Outline, outline
from nnsight_compiler.remote.extents import CONTEXTS, Extents
from nnsight_compiler.remote.kinds import Called, Handle, Helper
from nnsight_compiler.remote.segments import Outlined, of_model
from nnsight_compiler.remote.sides import Sides
from nnsight_compiler.remote.variables import assign, cells_of, own_variables


class Cutter:
    """Makes the client's program of a program, and the segments that it calls.

    called: what the client's program takes before the parameters of the program: segments, and helpers.
    """

    def __init__(
        self,
        sides: Sides,
        globals_: dict[str, Any],
        closure: Mapping[str, CellType],
    ) -> None:
        self.sides = sides
        self.globals = globals_
        self.closure = closure
        self.program = sides.program
        self.builder = Builder(value.name for value in sides.program.values())
        self.cells = cells_of(self.program.body)
        self.called: dict[Value, Outlined | Called] = {}
        self.extents = Extents(sides)

    def run(self) -> Program:
        body = self.without_unused(self.region(self.program.body, ()))
        known: dict[Value, Operand] = {}
        body = substitute(self.with_helpers(body, known), known)
        called = {value for op in walk(body) for value in used(op)}
        self.called = {value: each for value, each in self.called.items() if value in called}
        parameters = tuple(Parameter(value, "positional_only") for value in self.called)
        parameters += self.program.parameters
        return replace(self.program, kind="function", parameters=parameters, body=body)

    def without_unused(self, body: Region) -> Region:
        """The client's code without what names things, or is a function, for segments only."""
        while True:
            needed = {value.name for op in walk(body) for value in used(op)}
            kept = self._needed(body, needed)
            if kept == body:
                return body
            body = kept

    def with_helpers(self, body: Region, known: dict[Value, Operand]) -> Region:
        """The client's code with parameters for the functions that have segments of their own."""

        def taken(region: Region) -> Region:
            made = []
            for op in region.ops:
                kind = self.sides.kind(op.result) if isinstance(op, ops.Global) else None
                if isinstance(op, ops.Global) and isinstance(kind, Helper) and self.sides.needs_model(kind):
                    called = self.sides.called(kind)
                    held = next((value for value, each in self.called.items() if each == called), None)
                    known[op.result] = held or self.calls(op.name, called)
                else:
                    made.append(rewrite(op, region=taken))
            return Region(region.parameters, tuple(made))

        return taken(body)

    def _needed(self, region: Region, needed: set[str]) -> Region:
        return replace(
            region,
            ops=tuple(
                rewrite(op, region=lambda held: self._needed(held, needed))
                for op in region.ops
                if not (isinstance(op, ops.Closure) or self.extents.names(op))
                or any(value.name in needed for value in defined(op))
            ),
        )

    # --- regions ---

    def region(self, region: Region, contexts: tuple[ops.With, ...]) -> Region:
        """contexts: what stands around on the client, and must hold for the segments too."""
        made: list[Op] = []
        places: dict[int, int] = {}
        index, floor = 0, 0
        while index < len(region.ops):
            places[index] = len(made)
            if not self.extents.is_segment(region.ops[index]):
                made += self.clients(region.ops[index], contexts)
                index += 1
                continue
            extent = self.extents.extent(region.ops, index, floor)
            del made[places[extent.start] :]
            made += extent.ahead
            made += self.cut(extent.taken, contexts)
            index = floor = extent.end
        return Region(region.parameters, tuple(made))

    def clients(self, op: Op, contexts: tuple[ops.With, ...]) -> Iterator[Op]:
        """An op as it runs on the client."""
        self.extents.graphs.check_client(op)
        match op:
            case ops.Save():  # there is no forward to keep it from
                yield replace(op, copy=False)
            case ops.Closure():
                yield rewrite(op, region=lambda region: self.region(region, ()))
            case ops.With():
                target = self.context(op)
                yield rewrite(op, region=lambda region: self.region(region, (*contexts, op) if target else contexts))
            case ops.Edit():
                return  # made again in the segments that use it
            case _:
                yield rewrite(op, region=lambda region: self.region(region, contexts))

    def context(self, op: ops.With) -> bool:
        made = self.sides.made.get(op.context.name) if isinstance(op.context, Value) else None
        return isinstance(made, ops.Call) and self.sides.target(made) in CONTEXTS

    def calls(self, name: str, called: Outlined | Called) -> Value:
        # Python must be able to pass it: parameters have plain names, which hide no name from outside.
        taken = {op.name for op in self.program.walk() if isinstance(op, (ops.Global, ops.SetGlobal))}
        taken |= {value.name.partition(".")[0] for value in (*self.program.values(), *self.called)}
        number = len(self.called)
        while f"{name}_{number}" in taken:
            number += 1
        value = self.builder.fresh(f"{name}_{number}")
        self.called[value] = called
        return value

    # --- cutting ---

    def cut(self, taken: tuple[Op, ...], contexts: tuple[ops.With, ...]) -> Iterator[Op]:
        span = taken[0].span
        self.extents.graphs.check(taken)
        for context in reversed(contexts):
            taken = (replace(context, result=self.builder.fresh(context.result.name), body=Region((), taken)),)
        made = outline(
            Region((), taken),
            0,
            self.program.body,
            self.program.name,
            self.program.span,
            self.builder,
            self.extents.names,
        )
        yield from self.call(made, taken, span)

    def call(self, made: Outline, taken: tuple[Op, ...], span: Span) -> Iterator[Op]:
        """The call of a segment, and what becomes of its result."""
        parameters = [parameter.value for parameter in made.program.parameters]
        variables = {
            parameter: self.cells[value.name]
            for parameter, value in zip(parameters, made.free, strict=True)
            if value.name in self.cells
        }
        inside = set(map(id, walk(Region((), taken))))
        read = {op.cell for op in self.program.walk() if isinstance(op, ops.Load) and id(op) not in inside}
        later = [parameter for parameter, value in zip(parameters, made.free, strict=True) if value in read]
        own = own_variables(replace(made.program, span=span), variables, later, self.builder)
        program, model = of_model(own.program, self.module)
        values: list[Value] = []
        for parameter, value in zip(parameters, made.free, strict=True):
            if parameter in own.takes:
                values.append(self.builder.fresh(variables[parameter]))
                yield ops.Load(values[-1], value, None, span=span)
            elif parameter not in own.unused:
                values.append(value)
        outlined = Outlined(
            program,
            tuple(
                variables[parameter] if parameter in own.takes else self.shown(value)
                for parameter, value in zip(parameters, made.free, strict=True)
                if parameter not in own.unused
            ),
            (*map(self.shown, made.exports), *(variables[parameter] for parameter in own.assigned)),
            tuple(op.span for op in walk(Region((), taken))),
            self.globals,
            self.closure,
            model or self.sides.model,
        )
        segment = self.calls("segment", outlined)
        arguments = tuple(map(Argument, values))
        if not own.assigned:
            yield ops.Call(made.result, segment, arguments, span=span)
        else:
            both, hows = self.builder.fresh(), self.builder.fresh("hows")
            yield ops.Call(both, segment, arguments, span=span)
            yield ops.Item(made.result, both, Literal(0), span=span)
            yield ops.Item(hows, both, Literal(1), span=span)
            by_parameter = dict(zip(parameters, made.free, strict=True))
            yield from assign(hows, tuple(by_parameter[parameter] for parameter in own.assigned), self.builder, span)
        for op in made.rest:
            yield from self.clients(op, ())

    def shown(self, value: Value) -> str:
        """What a value is called in the source, as far as it has a name there."""
        match self.sides.made.get(value.name):
            case ops.Attribute(object=Value() as owner, name=name):
                return f"{self.shown(owner)}.{name}"
            case ops.Item(object=Value() as owner):
                return f"{self.shown(owner)}[…]"
            case ops.Global(name=name):
                return name
        stem = value.name.partition(".")[0]
        return "…" if stem.isdecimal() else stem

    def module(self, op: ops.Global) -> Any:
        kind = self.sides.names.get((op.name, op.scope))
        return kind.held if isinstance(kind, Handle) else None
