"""Says where gradients are recorded, where they arrive, and what runs when they do.

    forward %f = trace %model(%prompt)               forward %f = trace %model(%prompt)
      %h = read %model@h.1 output                      %h = read %model@h.1 output
      %logits = read %model@lm_head output             require %h
      …                                                %logits = read %model@lm_head output
      backward %loss()                         ──▶     …
        %g = grad %h                                   %1 = track %h
        %0 = %g * 2                                    backward %loss() sparing %model
        set_grad %h = %0                                 at_gradient %1
        %n = call print(%g)                                %g = grad %1
                                                           %0 = %g * 2
                                                           set_grad %1 = %0
                                                       %n = call print(%g)

A value whose gradient is asked for is required where it is made: from there on the forward is recorded, and before it,
nothing is. The weights of the model take no part unless they are named, or the forward has `grad=True`. What a
gradient that is written depends on runs in the backward pass, when that gradient arrives; all else in the body
of a `backward` runs after it, in its order.

Legal, since gradients arrive in the opposite order of the forward, whatever the order in which they are read: a write
that needs a gradient that arrives only later is refused, with both lines. A tensor at a site may have been used by the
model before it came there: then the recording starts where it was made, so that its gradient counts every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal as OneOf

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Module, Value, map_operand, values_in
from nnsight_compiler.passes.arrivals import Arrivals
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.sites import Orders, event_port, forwards, locate
from nnsight_compiler.passes.views import source_of


def record_gradients(program: Program, orders: Orders) -> Program:
    """The program with `require`, `track` and `at_gradient` where its backward passes need them.

    Raises:
        CompileError: a gradient is written that needs one which arrives only later.
    """
    if not any(isinstance(op, (ops.Backward, ops.Gradients)) for op in program.walk()):
        return program
    return _Recording(replace(program, body=_with_reads_before(program.body)), orders).run()


@dataclass(slots=True)
class _Insertions:
    """Ops that are put in: after the op that makes a value, at the start of a forward's body, and at its end."""

    after: dict[str, list[Op]] = field(default_factory=dict)
    start: dict[str, list[Op]] = field(default_factory=dict)
    end: dict[str, list[Op]] = field(default_factory=dict)


class _Recording:
    def __init__(self, program: Program, orders: Orders) -> None:
        self.program = program
        self.orders = orders
        self.memory = Memory.of(program)
        self.builder = Builder(value.name for value in program.values())
        self.put = _Insertions()
        self.wholes: dict[str, Value] = {}
        self.homes: dict[str, ops.Forward] = {}
        self.required: set[tuple[str, str]] = set()
        self.tracks: dict[tuple[int, str], Value] = {}
        self.around: dict[int, ops.Forward | None] = {id(op): None for op in program.walk()}
        self.forwards = list(forwards(program.body))
        for forward in self.forwards:
            for value in definitions(forward.body):
                self.homes[value.name] = forward
            self.around.update((id(op), forward) for op in walk(forward.body))

    def run(self) -> Program:
        parameters = tuple(parameter.value.name for parameter in self.program.parameters)
        body = self._region(self.program.body, None, frozenset(parameters))
        return replace(self.program, body=self._with_insertions(body))

    # --- which values ---

    def _wanted(self, op: ops.Backward | ops.Gradients) -> list[Value]:
        """The values whose gradient is asked for, in the order of the source."""
        if isinstance(op, ops.Gradients):
            return list(dict.fromkeys(values_in(op.inputs)))
        own = (each for each in _own_ops(op.body) if isinstance(each, (ops.Grad, ops.SetGrad)))
        return list(dict.fromkeys(value for each in own for value in values_in(each.value)))

    def _definition(self, value: Value) -> Op | None:
        return self.memory.origins.definition(value)

    def _unsaved(self, value: Value) -> tuple[Value, Value | None]:
        """The value itself, for one that was saved, and the save: the gradient of a copy is that of what was copied."""
        save: Value | None = None
        while isinstance(op := self._definition(value), ops.Save) and isinstance(op.value, Value):
            save, value = op.result, op.value
        if save is not None and self.homes.get(save.name) is not self.homes.get(value.name):
            save = None
        return value, save

    # --- the tree ---

    def _region(self, region: Region, forward: ops.Forward | None, visible: frozenset[str]) -> Region:
        made: list[Op] = []
        for op in region.ops:
            inner = op if isinstance(op, ops.Forward) else forward
            for each in _backwards(op):
                for value in self._wanted(each):
                    self._track(each, value, op, inner, made)
            if isinstance(op, (ops.Backward, ops.Gradients)):
                made.extend(self._recorded(op, forward, visible))
            else:
                made.append(rewrite(op, region=lambda part: self._region(part, inner, visible)))  # noqa: B023
            visible = visible | {value.name for value in defined(op)}
        return Region(region.parameters, tuple(made))

    def _track(self, backward: Op, value: Value, op: Op, forward: ops.Forward | None, made: list[Op]) -> None:
        """Has the value tracked, in this region or in one inside it."""
        around = self.around[id(backward)]
        if (id(backward), value.name) in self.tracks or forward is not around:
            return  # it is tracked in the body of the forward that is around the backward pass
        real, save = self._unsaved(value)
        home = self.homes.get(real.name)
        elsewhere = home is not None and home is not forward
        if save is None and not elsewhere and any(real in set(definitions(part)) for part in regions(op)):
            return  # it is tracked in a region inside this one
        source = source_of(real, self.memory.origins)
        tracked = self.builder.fresh()
        self.tracks[id(backward), value.name] = tracked
        self._require(source or real)
        source = self.wholes.get(source.name, source) if source is not None else None
        track = ops.Track(tracked, real, source if source != real else None, span=self._span(backward, value))
        if save is not None:
            self.put.after.setdefault(save.name, []).append(track)
        elif elsewhere and home is not None:
            self.put.end.setdefault(home.result.name, []).append(track)
        else:
            made.append(track)

    def _span(self, backward: Op, value: Value) -> Span:
        if isinstance(backward, ops.Backward):
            for each in walk(backward.body):
                if isinstance(each, (ops.Grad, ops.SetGrad)) and value in values_in(each.value):
                    return each.span
        return backward.span

    # --- where recording starts ---

    def _require(self, value: Value) -> None:
        home, op = self.homes.get(value.name), self._definition(value)
        if home is None or op is None or ("", value.name) in self.required:
            return
        self.required.add(("", value.name))
        if isinstance(op, ops.Read) and isinstance(op.module, Module):
            self._begin(home, op, op.module)
            if op.rows is not None:  # what an invoke sees is a part of what the model goes on with
                whole = replace(op, result=self.builder.fresh(), rows=None)
                self.wholes[value.name] = whole.result
                self._begin_at(home, whole, None)
                return
        self.put.after.setdefault(value.name, []).append(ops.Require(value, span=op.span))

    def _begin(self, forward: ops.Forward, read: ops.Read, module: Module) -> None:
        """Starts the recording where the tensors at a site were made, if they may have been used before they came
        there."""
        order = self.orders(forward)
        at: OneOf["output", "input"] = "output" if read.port == "output" else "input"
        place = locate(module.path, at, read.call, read.span, order)
        for path, port, call, leaf in order.beginnings(place.path, at, place.call or 0, read.port == "input"):
            key = forward.result.name, f"{path} {port} {call} {leaf}"
            if key in self.required:
                continue
            self.required.add(key)
            number = None if order.count(path) == 1 else call
            result = self.builder.fresh()
            self._begin_at(forward, ops.Read(result, Module(module.model, path), port, number, span=read.span), leaf)

    def _begin_at(self, forward: ops.Forward, read: ops.Read, leaf: int | None) -> None:
        start = self.put.start.setdefault(forward.result.name, [])
        start += [read, ops.Require(read.result, leaf, span=read.span)]

    # --- the backward pass ---

    def _recorded(
        self, op: ops.Backward | ops.Gradients, forward: ops.Forward | None, visible: frozenset[str]
    ) -> list[Op]:
        tracks = {value: self.tracks[id(op), value.name] for value in self._wanted(op)}
        if isinstance(op, ops.Gradients):
            return [replace(op, inputs=map_operand(op.inputs, lambda value: tracks[value]))]
        arrivals = Arrivals(op, tracks, self._rank, self.memory)
        body = tuple(
            ops.AtGradient(tracks[value], Region((), tuple(map(_tracking(tracks), part))), span=part[0].span)
            for value, part in arrivals.pieces
        )
        before = self._region(Region((), arrivals.before), forward, visible).ops
        after = self._region(Region((), arrivals.after), forward, visible).ops
        new = replace(op, body=Region((), body), sparing=self._spared(visible))
        return [*before, new, *after]

    def _spared(self, visible: frozenset[str]) -> tuple[Value, ...]:
        """The models whose weights take no part: those of forwards that do not ask for their gradients."""
        models = {
            each.model: any(part.keyword == "grad" and part.value != Literal(False) for part in each.arguments)
            for each in reversed(self.forwards)
        }
        return tuple(
            model for model, asked in models.items() if isinstance(model, Value) and not asked and model.name in visible
        )

    def _rank(self, value: Value) -> tuple[int, int, int]:
        """When a value is made: in which forward, at which time of it, and where in the source. Gradients arrive in the
        opposite order."""
        waiting, seen = [self._unsaved(value)[0]], set[str]()
        order = {each.result.name: number for number, each in enumerate(self.forwards)}
        found = (-1, -1)
        while waiting:
            each = waiting.pop()
            if each.name in seen:
                continue
            seen.add(each.name)
            op, home = self._definition(each), self.homes.get(each.name)
            if isinstance(op, ops.Read) and home is not None and isinstance(op.module, Module):
                at = locate(op.module.path, event_port(op.port), op.call, op.span, self.orders(home))
                found = max(found, (order[home.result.name], at.time))
            elif op is not None:
                waiting.extend(used(op))
        numbers = {each.name: number for number, each in enumerate(self.program.values())}
        return *found, numbers[value.name]

    # --- putting ops in ---

    def _with_insertions(self, region: Region) -> Region:
        made: list[Op] = []
        for parameter in region.parameters:
            made.extend(self.put.after.get(parameter.name, ()))
        for op in region.ops:
            new = rewrite(op, region=self._with_insertions)
            if isinstance(new, ops.Forward):
                start, end = (table.get(new.result.name, []) for table in (self.put.start, self.put.end))
                new = replace(new, body=Region((), _ended((*start, *new.body.ops), tuple(end))))
            made.append(new)
            for value in defined(op):
                made.extend(self.put.after.get(value.name, ()))
        return Region(region.parameters, tuple(made))


def _with_reads_before(region: Region) -> Region:
    """The region with what the bodies of its backward passes read of the model before these, and with the values whose
    gradients they ask for."""
    made: list[Op] = []
    for op in region.ops:
        op = rewrite(op, region=_with_reads_before)
        if isinstance(op, ops.Backward):
            ahead = _ahead(op.body)
            made.extend(each for each in op.body.ops if id(each) in ahead)
            op = replace(op, body=Region((), tuple(each for each in op.body.ops if id(each) not in ahead)))
        made.append(op)
    return Region(region.parameters, tuple(made))


def _ahead(body: Region) -> set[int]:
    """The ops of a backward's body that make the values whose gradients it asks for, and those that read the model."""
    makers = {value.name: op for op in body.ops for value in defined(op)}
    waiting: list[Op] = [op for op in body.ops if isinstance(op, ops.Read)]
    for op in _own_ops(body):
        if isinstance(op, (ops.Grad, ops.SetGrad)):
            waiting += [makers[value.name] for value in values_in(op.value) if value.name in makers]
    found: dict[int, Op] = {}
    while waiting:
        op = waiting.pop()
        if isinstance(op, (ops.Grad, ops.Backward, ops.Gradients)):
            raise CompileError(
                [
                    Diagnostic(
                        op.span,
                        "this asks for the gradient of a gradient, in the pass that gives it",
                        "pass `create_graph=True`, and take it in a backward pass of its own",
                    )
                ]
            )
        if id(op) not in found:
            found[id(op)] = op
            waiting += [makers[value.name] for value in used(op) if value.name in makers]
    return set(found)


def _ended(body: tuple[Op, ...], end: tuple[Op, ...]) -> tuple[Op, ...]:
    """The ops with more at their end, before a terminator."""
    if body and isinstance(body[-1], ops.TERMINATORS):
        return *body[:-1], *end, body[-1]
    return *body, *end


def _tracking(tracks: dict[Value, Value]) -> Callable[[Op], Op]:
    """Has the gradients that an op reads and writes be those of tracked values."""

    def inside(region: Region) -> Region:
        return Region(region.parameters, tuple(map(change, region.ops)))

    def change(op: Op) -> Op:
        if isinstance(op, (ops.Grad, ops.SetGrad)):
            return replace(op, value=map_operand(op.value, lambda value: tracks.get(value, value)))
        return rewrite(op, region=inside)

    return change


def _own_ops(region: Region) -> Iterator[Op]:
    """The ops of a backward's body, without those of other backward passes inside it."""
    for op in region.ops:
        yield op
        if not isinstance(op, ops.Backward):
            for part in regions(op):
                yield from _own_ops(part)


def _backwards(op: Op) -> Iterator[ops.Backward | ops.Gradients]:
    if isinstance(op, (ops.Backward, ops.Gradients)):
        yield op
    for part in regions(op):
        for each in part.ops:
            yield from _backwards(each)
