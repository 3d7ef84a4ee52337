"""Loops over steps of a generation, while a program is specialised.

    total = 0                                     %c = cell total = 0
    for step in tracer.iter[:]:                   steps %step in %tracer[0:]
        total = total + model.lm_head…    ──▶       %total = load %c
    return total                                    …
                                                    store %c = %total.1
                                                  %total.2 = load %c

What a round hands to the next is in cells. A loop whose variable must be known (it names a layer, a bound), or over
steps that are named one by one, is unrolled into a region for each of its steps. `break` and `continue` become
conditions on the rest of the body.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, used, walk
from nnsight_compiler.ir.values import UNBOUND, Literal, Operand, Value
from nnsight_compiler.passes.completion import AccessInClosure, Completion
from nnsight_compiler.passes.control_flow import ControlFlow
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import Abstract, Elements, Known, StepRange, constant
from nnsight_compiler.passes.step_ranges import steps_op


class StepLoops(ControlFlow):
    """Interprets loops over steps."""

    def complete(self, made: list[Op]) -> list[Op]:
        return list(after_next(made))

    def over_steps(self, op: ops.For, steps: StepRange) -> Completion | None:
        numbers = self._numbers(op, steps)
        initial = tuple(map(self.abstract, op.initial))
        if numbers is not None:
            return self.unrolled(op, map(constant, numbers), initial, lambda number: self._at(op, number))
        if op.orelse is not None:
            self.fail(op.span, "a loop over steps has no `else`", "put it after the loop")
        for value in initial:
            if isinstance(value.fact, Elements):
                value.fact.forget(frozenset({id(op)}))
        with self._inside(op):
            (number, *carried), body, ends = self.loop_body(op, op.body, initial, Abstract(None, span=op.span))
        results = self.joined(op.results, [*ends, Completion("yield", initial)], frozenset({id(op)}))
        rows = None if self.forward is None else self.forward.rows
        loop = _Loop(self.builder, tuple(carried), results, rows, self.span(op))
        for made in loop.lowered(steps, number, body, tuple(map(self.use, initial))):
            self.emit(made)
        return None

    def in_steps(self, op: ops.With, steps: StepRange) -> Completion | None:
        numbers = self._numbers(op, steps)
        if numbers is not None:
            for step in numbers:
                with self._at(op, constant(step)):
                    self.scope[op.result] = constant(step)
                    completion = self.region(op.body)
                self._goes_on(op, completion)
            return None
        number = self.builder.fresh(op.result.name)
        self.scope[op.result] = Abstract(number, None, frozenset({id(op)}), span=self.span(op))
        with self._inside(op), self.round(op), self.kept(op, loop=True) as made:
            self._goes_on(op, self.region(op.body))
        if made:
            stop = Literal(steps.stop)
            region = Region((number,), tuple(made))
            rows = None if self.forward is None else self.forward.rows
            self.emit(ops.Steps(steps.forward, Literal(steps.start), stop, region, rows=rows, span=self.span(op)))
        return None

    def _goes_on(self, op: Op, completion: Completion) -> None:
        if completion.kind not in ("end", "yield"):
            self.fail(
                completion.span or self.span(op),
                "a `with` over steps is not left early",
                "write `for step in tracer.iter[…]:`, which `break` and `continue` leave",
            )

    def _numbers(self, op: ops.For | ops.With, steps: StepRange) -> Sequence[int] | None:
        """The steps of a loop that is unrolled; `None` where it is kept.

        A loop of the forward around it is unrolled, since what is inside happens at other steps than what is around.
        """
        if self.closures:
            raise AccessInClosure
        if self.forward is None or self.forward.result != steps.forward:
            self.fail(self.span(op), "these are steps of a generation that is not running here")
        loops = set(self.rolled) - set(self.forward.outer) - self.decisions.unroll
        if loops:
            raise Undecided(unroll=loops)
        self.fold_conditions()
        if steps.numbers is not None:
            return steps.numbers
        if steps.stop is not None and (id(op) in self.decisions.unroll or steps.stop == steps.start + 1):
            return range(steps.start, steps.stop)
        if id(op) in self.decisions.unroll:
            self.fail(
                self.span(op),
                "the number of the step must be known here before the model runs (it names a module or an index of what"
                " is known then, or there is a loop over steps inside), but this loop has no end",
                f"give it one: `tracer.iter[{steps.start}:{steps.start + 5}]`",
            )
        return None

    @contextmanager
    def _at(self, op: Op, number: Abstract) -> Iterator[None]:
        """What is emitted in it happens at this step."""
        assert isinstance(number.fact, Known)
        step = number.fact.value
        with self._inside(op), self.builder.region() as made:
            yield
        if made:
            self.emit(steps_op(self, step, step + 1, tuple(made), self.span(op)))

    @contextmanager
    def _inside(self, op: Op) -> Iterator[None]:
        assert self.forward is not None
        outer, self.forward.steps = self.forward.steps, op
        self.over.add(id(op))
        yield
        self.forward.steps = outer


class _Loop:
    """A kept loop over steps, with its carried values in cells.

    parameters: the carried values in the body; `results`: the same after the loop. rows: those of the invoke around it.
    """

    def __init__(
        self,
        builder: Builder,
        parameters: tuple[Value, ...],
        results: tuple[Value, ...],
        rows: Operand | None,
        span: Span,
    ) -> None:
        self.builder, self.parameters, self.results, self.rows, self.span = builder, parameters, results, rows, span
        self.cells = tuple(builder.fresh(parameter.name) for parameter in parameters)
        self.broken = builder.fresh("broken")

    def lowered(
        self, steps: StepRange, number: Value, body: tuple[Op, ...], initial: tuple[Operand, ...]
    ) -> Iterator[Op]:
        mentioned = {value for op in walk(Region((), body)) for value in used(op)}
        for cell, parameter, value in zip(self.cells, self.parameters, initial, strict=True):
            # There is at least one round: what each puts there, such as the loop's variable, needs nothing before it.
            first = value if parameter in mentioned else UNBOUND
            yield ops.Cell(cell, parameter.name.partition(".")[0], first, span=self.span)
        breaks = any(isinstance(op, ops.Break) for op in self._jumping(body))
        if breaks:
            yield ops.Cell(self.broken, "broken", Literal(False), span=self.span)
        loads = [
            ops.Load(parameter, cell, None, span=self.span)
            for cell, parameter in zip(self.cells, self.parameters, strict=True)
            if parameter in mentioned
        ]
        made = [*loads, *self.rest(body, 0, flagged=False)]
        if breaks:
            left = self.builder.fresh("left")
            load = ops.Load(left, self.broken, None, span=self.span)
            made = [load, ops.If((), left, Region(), Region((), tuple(made)), span=self.span)]
        if made:
            region = Region((number,), tuple(made))
            start, stop = Literal(steps.start), Literal(steps.stop)
            yield ops.Steps(steps.forward, start, stop, region, rows=self.rows, span=self.span)
        for cell, result in zip(self.cells, self.results, strict=True):
            yield ops.Load(result, cell, None, span=self.span)

    def rest(self, body: Sequence[Op], count: int, flagged: bool) -> list[Op]:
        """The ops of a part of the body without jumps of this loop. It yields `count` values and, where `flagged`,
        whether the round is over."""
        made: list[Op] = []

        def ended(values: tuple[Operand, ...], over: bool) -> list[Op]:
            handed = (*values, Literal(over)) if flagged else values
            return [*made, ops.Yield(handed, span=self.span)] if count or flagged else made

        for index, op in enumerate(body):
            match op:
                case ops.Continue(values=values) | ops.Break(values=values):
                    made += self.stores(values, op.span)
                    if isinstance(op, ops.Break):
                        made.append(ops.Store(self.broken, Literal(True), span=op.span))
                    return ended((UNBOUND,) * count, True)
                case ops.Yield(values=values):
                    return ended(values, False)
                case ops.If(results=results, then=then, orelse=orelse) if self._jumps(op):
                    over = self.builder.fresh("over")
                    branches = [Region((), tuple(self.rest(part.ops, len(results), True))) for part in (then, orelse)]
                    made.append(replace(op, results=(*results, over), then=branches[0], orelse=branches[1]))
                    after = self.rest(body[index + 1 :], count, flagged)
                    if not after:
                        return made
                    handed = tuple(self.builder.fresh() for _ in range(count + flagged))
                    gone: tuple[Operand, ...] = (UNBOUND,) * count + ((Literal(True),) if flagged else ())
                    skipped = Region((), (ops.Yield(gone, span=op.span),) if gone else ())
                    made.append(ops.If(handed, over, skipped, Region((), tuple(after)), span=op.span))
                    return [*made, ops.Yield(handed, span=op.span)] if handed else made
                case ops.With() if self._jumps(op):
                    reason = (
                        "this `with` in a loop over steps is left early, and what it covers may be at several times"
                    )
                    way_out = "put the `break` or `continue` after the `with`"
                    raise CompileError([Diagnostic(op.span, reason, way_out)])
                case _:
                    made.append(op)
                    if isinstance(op, ops.TERMINATORS):
                        return made
        return ended((), False)

    def stores(self, values: tuple[Operand, ...], span: Span) -> list[Op]:
        """What a round hands to the next."""
        triples = zip(self.cells, self.parameters, values, strict=True)
        return [ops.Store(cell, value, span=span) for cell, parameter, value in triples if value != parameter]

    def _jumps(self, op: Op) -> bool:
        return any(True for part in regions(op) for _ in self._jumping(part.ops))

    def _jumping(self, body: Sequence[Op]) -> Iterator[Op]:
        """The jumps of this loop, not those of loops inside it."""
        for op in body:
            if isinstance(op, (ops.Break, ops.Continue)):
                yield op
            elif not isinstance(op, (ops.For, ops.While, ops.Closure)):
                for part in regions(op):
                    yield from self._jumping(part.ops)


def after_next(made: list[Op]) -> Iterator[Op]:
    """The ops of a forward's body. An empty region marks a `tracer.next()`; what stands after it is put into it."""
    group: list[Op] = []
    mark: ops.Steps | None = None
    for op in [*made, None]:
        marks = isinstance(op, ops.Steps) and not op.body.ops
        if op is not None and not marks:
            if mark is None:
                yield op
            group.append(op)
            continue
        if mark is not None and group:
            yield replace(mark, body=Region(mark.body.parameters, tuple(group)))
        group, mark = [], op if isinstance(op, ops.Steps) else None
    for op in walk(Region((), tuple(made))):
        for part in regions(op):
            for inner in part.ops:
                if isinstance(inner, ops.Steps) and not inner.body.ops:
                    reason = "what follows this `tracer.next()` is not all inside of the `with` around it"
                    raise CompileError([Diagnostic(inner.span, reason, "name the step: `with tracer.iter[1]:`")])
