"""Which steps of a generation a program names: `tracer.iter[…]`, `tracer.all()`, `.next()`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import NONE, Literal, Slice, Value
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import Abstract, Elements, Iteration, Known, Method, SiteModule, StepRange, Tracer

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Forwarding, Interpretation

WAYS = "write `tracer.iter[:]` for every step, `tracer.iter[1:3]`, `tracer.iter[2]` or `tracer.iter[[0, 2]]`"


class StepRanges:
    """Tells the steps that a program names."""

    specialiser: Interpretation

    def steps_of(self, value: Abstract, span: Span) -> StepRange | None:
        """The steps that a loop or a `with` is over; `None` where it is over something else."""
        match value.fact:
            case StepRange() as steps:
                return steps
            case Iteration(kind="same", bases=(base,)):
                return self.steps_of(base, span)
            case Method(receiver=Abstract(fact=Tracer()), name="iter"):
                self.specialiser.fail(span, "which steps are meant is not said", WAYS)
            case Method(receiver=Abstract(fact=Tracer()), name="all"):
                self.specialiser.fail(span, "`.all` is a method", "write `tracer.all()`")
            case Iteration(bases=bases) if any(self.steps_of(base, span) is not None for base in bases):
                self.specialiser.fail(
                    span,
                    f"steps of a generation are looped over by themselves, not through `{value.fact.kind}`",
                    "write `for step in tracer.iter[…]:`; the variable is the step's number",
                )
        return None

    def step_item(self, op: ops.Item, tracer: Tracer, index: Abstract) -> Abstract:
        """`tracer.iter[index]`."""
        self.refuse_steps_of_trace(op.span)
        what = "which steps are meant"
        match index.fact:
            case _ if isinstance(op.index, Slice):
                bounds = map(self.specialiser.abstract, (op.index.lower, op.index.upper, op.index.step))
                found: Any = slice(*(self.specialiser.demand(bound, op.span, what) for bound in bounds))
            case Elements(kind="list", items=list() as items):
                found = [self.specialiser.demand(item, op.span, what) for item in items]
            case Known(value=list() | range() as held, text=str() as text) if self.specialiser.relies_on(held):
                self.specialiser.guards.add(f"tuple({text})", "value", tuple(held))
                found = list(held)
            case _:
                found = self.specialiser.demand(index, op.span, what)
        return Abstract(None, self._range(found, tracer.forward, op.span), span=op.span)

    def _range(self, found: Any, forward: Value, span: Span) -> StepRange:
        fail = self.specialiser.fail
        if isinstance(found, slice):
            start, stop = found.start, found.stop
            if found.step not in (None, 1):
                fail(span, f"steps go one by one, not by {found.step!r}", "name them: `tracer.iter[[0, 2, 4]]`")
            for bound in (start, stop):
                self._check(bound, span, allow_none=True)
            start = start or 0
            if stop is not None and stop <= start:
                fail(span, f"`tracer.iter[{start}:{stop}]` is over no step", WAYS)
            return StepRange(forward, start, stop)
        numbers = tuple(found) if isinstance(found, (list, tuple)) else (found,)
        if not numbers:
            fail(span, "`tracer.iter[[]]` is over no step", WAYS)
        for number in numbers:
            self._check(number, span)
        return StepRange(forward, numbers=numbers)

    def _check(self, number: Any, span: Span, allow_none: bool = False) -> None:
        if number is None and allow_none:
            return
        if not isinstance(number, int) or isinstance(number, bool):
            self.specialiser.fail(span, f"a step is a whole number, not {number!r}", WAYS)
        if number < 0:
            self.specialiser.fail(
                span,
                f"steps count from the first, since how many there will be is not known: there is no step {number}",
                "count from 0; what the last step gave is what a loop over `tracer.iter[:]` leaves behind",
            )

    def refuse_steps_of_trace(self, span: Span) -> None:
        running = self._running(span)
        if running.op.method == "trace":
            self.specialiser.fail(
                span,
                "`trace` runs one forward, which has no steps",
                "write `with model.generate(…, max_new_tokens=…) as tracer:`",
                ((running.span, "the forward"),),
            )

    def _running(self, span: Span) -> Forwarding:
        if self.specialiser.forward is None:
            self.specialiser.fail(
                span, "steps exist only while the model generates", "use it inside `with model.generate(…) as tracer:`"
            )
        return self.specialiser.forward

    # --- `.next()` ---

    def next_step(self, op: ops.Call) -> Abstract:
        """`tracer.next()`: what follows in the source belongs to the next step. An empty region marks the place."""
        running = self._next(op, "tracer.next()")
        step = running.nexts[""] = running.nexts.get("", 0) + 1
        self.specialiser.emit(steps_op(self.specialiser, step, step + 1, (), self.specialiser.span(op)))
        return Abstract(NONE, Known(None))

    def next_of(self, op: ops.Call, module: SiteModule) -> Abstract:
        """`module.next()`: the module, at the step after the one that was asked for last."""
        running = self._next(op, "module.next()")
        path = module.handle._path
        step = running.nexts[path] = running.nexts.get(path, running.nexts.get("", 0)) + 1
        return Abstract(None, SiteModule(module.handle, module.model, module.text, step), span=op.span)

    def _next(self, op: ops.Call, spelled: str) -> Forwarding:
        specialiser = self.specialiser
        self.refuse_steps_of_trace(op.span)
        running = specialiser.access(op.span)
        if running.steps is not None:
            specialiser.fail(
                op.span,
                f"`{spelled}` inside a loop over steps would mean two steps at once",
                "name the step in the loop: `tracer.iter[…]`",
                ((running.steps.span, "the loop"),),
            )
        loops = set(specialiser.rolled) - specialiser.decisions.unroll
        if loops:
            raise Undecided(unroll=loops)
        if specialiser.conditions:
            specialiser.fail(
                op.span,
                f"whether this `{spelled}` happens depends on a value that only the run gives",
                "name the step: `with tracer.iter[1]:`",
            )
        return running


def steps_op(
    specialiser: Interpretation, start: int, stop: int | None, body: tuple[ops.Op, ...], span: Span
) -> ops.Steps:
    """A region of the specialised program for these steps, whose number it does not use."""
    assert specialiser.forward is not None
    region = ops.Region((specialiser.builder.fresh("step"),), body)
    running = specialiser.forward
    return ops.Steps(running.result, Literal(start), Literal(stop), region, rows=running.rows, span=span)
