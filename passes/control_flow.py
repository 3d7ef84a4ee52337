"""Control flow, while a program is specialised: what is kept, what is folded, what is unrolled.

A kept region becomes a region of the specialised program; a folded condition or an unrolled loop leaves only the ops of
what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import NoneType

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, ModelError
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes import editing
from nnsight_compiler.passes.completion import AccessInClosure, Completion
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import (
    Abstract,
    Elements,
    Function,
    Known,
    OpenSession,
    SiteModule,
    Tracer,
    holds_values,
)
from nnsight_compiler.passes.interpretation import Forwarding, Interpretation
from nnsight_compiler.passes.invokes import brings_input, first_inputs, settle


class ControlFlow(Interpretation):
    """Interprets conditions, loops, forwards and closures."""

    def leave(self, completion: Completion, end: type[ops.Yield] | type[ops.Continue] = ops.Yield) -> None:
        """Ends an open region of the specialised program with the terminator that the completion stands for."""
        span = completion.span or self.program.span
        match completion.kind:
            case "end":
                if end is ops.Continue:
                    self.emit(ops.Continue((), span=span))
            case "yield":
                self.emit(end(tuple(map(self.use, completion.values)), span=span))
            case "continue" | "break":
                if not self.rolled and self.forward is None and self.unrolling:
                    raise Undecided(roll={id(self.unrolling[-1])})
                if not self.rolled:
                    self.fail(
                        span,
                        f"this `{completion.kind}` depends on a value that only a run can give, but the loop is"
                        f" unrolled,"
                        " since its variable names modules of the model",
                        "move the condition out of the loop, or keep a flag and test it",
                    )
                kind = ops.Continue if completion.kind == "continue" else ops.Break
                self.emit(kind(tuple(map(self.use, completion.values)), span=span))
            case "return":
                if self.forward is not None:
                    self.fail(
                        span,
                        "whether this `return` happens depends on a value of the forward that is running",
                        "assign the result in both branches, and return it after the `with`",
                        ((self.forward.span, "the forward"),),
                    )
                if self.inlined:
                    self.fail(
                        span,
                        f"`{self.inlined[-1]}` touches the model and returns early under a condition that only a run"
                        f" can"
                        " decide",
                        "assign the result in both branches, and return it at the end",
                    )
                self.emit(ops.Return(self.use(completion.values[0]), span=span))

    def joined(self, values: tuple[Value, ...], ends: list[Completion], loops: frozenset[int]) -> tuple[Value, ...]:
        """Fresh results for a kept `if` or loop."""
        results = []
        for index, value in enumerate(values):
            sources = [end.values[index] for end in ends if end.kind in ("yield", "break", "continue")]
            new = self.builder.fresh(value.name)
            live = max((source.live for source in sources), default=0)
            span = next((source.span for source in sources if source.live == live), self.program.span)
            all_loops = loops.union(*(source.loops for source in sources))
            at_run = any(source.at_run for source in sources)
            self.scope[value] = Abstract(new, None, all_loops, live, span, at_run)
            for source in sources:
                if isinstance(source.fact, Elements):
                    source.fact.forget()
            results.append(new)
        return tuple(results)

    def if_(self, op: ops.If) -> Completion | None:
        condition = self.evaluate.truth(self.abstract(op.condition))
        fact = condition.fact
        if isinstance(fact, Known) and (fact.text is None or id(op) in self.decisions.fold | self.decisions.unroll):
            taken = op.then if self.demand(condition, op.span, "this condition") else op.orelse
            completion = self.region(taken)
            if completion.kind not in ("end", "yield"):
                return completion
            self.bind(op.results, completion.values)
            return None
        regions, ends = [], []
        for region in (op.then, op.orelse):
            with self.kept(op) as made:
                self.conditions.append((id(op), condition))
                end = self.region(region)
                if self.needs_folding(end):
                    self.fold_conditions()
                    if self.forward is not None and not self.one_stage and not self.made_inside(condition):
                        self.unknown(condition, op.span, "this condition")
                self.conditions.pop()
                self.leave(end)
            regions.append(Region((), tuple(made)))
            ends.append(end)
        # Where a result must be known, folding the condition makes it so, as unrolling does for what a loop carries.
        loops = condition.loops | {id(op)} if isinstance(fact, Known) else condition.loops
        results = self.joined(op.results, ends, loops)
        self.emit(ops.If(results, self.use(condition), regions[0], regions[1], span=self.span(op)))
        if all(end.kind not in ("end", "yield") for end in ends):
            return Completion("never")
        return None

    def needs_folding(self, end: Completion) -> bool:
        """Whether the specialised program has no op for leaving a condition in this way."""
        match end.kind:
            case "return":
                return self.forward is not None or bool(self.inlined)
            case "break" | "continue":
                return not self.rolled
        return False

    def for_(self, op: ops.For) -> Completion | None:
        iterable = self.abstract(op.iterable)
        steps = self.evaluate.steps_of(iterable, op.span)
        if steps is not None:
            return self.over_steps(op, steps)
        if id(op) in self.decisions.roll:
            self.stage_body(op.body)
        elif id(op) in self.decisions.unroll or self.evaluate.mentions_modules(iterable):
            stages = self.forward is None and not self.closures and not emits(op.body)
            if stages and not self.evaluate.listable(iterable):
                raise Undecided(roll={id(op)})
            self.unrolling.append(op)
            try:
                items = self.evaluate.iterate(iterable, op.span)
            finally:
                self.unrolling.pop()
            return self.unrolled(op, items, tuple(map(self.abstract, op.initial)))
        initial = tuple(map(self.abstract, op.initial))
        if isinstance(iterable.fact, Elements):
            iterable.fact.forget(frozenset({id(op)}))
        parameters, body, ends = self.loop_body(op, op.body, initial, iterable)
        orelse = None if op.orelse is None else self.loop_exit(op, op.orelse, ends)
        results = self.joined(op.results, [*ends, Completion("yield", initial)], frozenset({id(op)}))
        made = Region(parameters, body)
        over = self.handed_over(iterable) if id(op) in self.decisions.roll else self.use(iterable)
        self.emit(ops.For(results, over, tuple(map(self.use, initial)), made, orelse, span=self.span(op)))
        return None

    def stage_body(self, region: Region) -> None:
        """Has each round of a loop be a stage: what a kept loop's variable names is known only to its round."""
        first = region.ops[0]
        if id(first) not in self.decisions.stages and not isinstance(first, ops.TERMINATORS):
            raise Undecided(stages={id(first): "what this round of the loop is for"})

    def loop_body(
        self, op: ops.For | ops.While, region: Region, carried: tuple[Abstract, ...], iterable: Abstract | None = None
    ) -> tuple[tuple[Value, ...], tuple[Op, ...], list[Completion]]:
        """A region of a kept loop: its parameters, its ops, and how it ended."""
        loops = frozenset({id(op)})
        held: list[Abstract] = []
        if iterable is not None:
            live = max(iterable.live, 1 if holds_values(iterable.fact) else 0)
            held.append(Abstract(None, None, loops | iterable.loops, live, iterable.span))
        for value in carried:
            if isinstance(value.fact, Elements):
                value.fact.forget(loops)
            held.append(
                Abstract(None, None, loops | value.loops, max(value.live, 1 if self.forward else 0), value.span)
            )
        parameters = tuple(self.builder.fresh(parameter.name) for parameter in region.parameters)
        for parameter, value_made, abstract in zip(region.parameters, parameters, held, strict=True):
            abstract.operand = value_made
            self.scope[parameter] = abstract
        outer, self.conditions = self.conditions, self.conditions if self.forward else []
        with self.round(op), self.kept(op, loop=True) as made:
            end = self.region(region)
            self.leave(end, ops.Yield if isinstance(op, ops.While) and region is op.condition else ops.Continue)
        self.conditions = outer
        return parameters, tuple(made), [end]

    def loop_exit(self, op: ops.For | ops.While, region: Region, ends: list[Completion]) -> Region:
        """The `else` of a kept loop."""
        for value in region.parameters:
            self.scope[value] = Abstract(self.builder.fresh(value.name), None, frozenset({id(op)}), 1)
        parameters = tuple(self.scope[value].operand for value in region.parameters)
        with self.kept(op) as made:
            end = self.region(region)
            self.leave(end)
        ends.append(end)
        return Region(tuple(value for value in parameters if isinstance(value, Value)), tuple(made))

    def unrolled(
        self,
        op: ops.For,
        items: Iterable[Abstract],
        carried: tuple[Abstract, ...],
        around: Callable[[Abstract], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> Completion | None:
        """The rounds of a loop one after the other; `around` is what each is interpreted in."""
        rolled, self.rolled = self.rolled, []
        self.unrolling.append(op)
        try:
            for item in items:
                with around(item):
                    self.bind(op.body.parameters, (item, *carried))
                    completion = self.region(op.body)
                if completion.kind == "break":
                    self.bind(op.results, completion.values)
                    return None
                if completion.kind not in ("end", "continue", "yield"):
                    return completion
                carried = completion.values
        finally:
            self.rolled = rolled
            self.unrolling.pop()
        return self.loop_else(op, carried)

    def loop_else(self, op: ops.For | ops.While, carried: tuple[Abstract, ...]) -> Completion | None:
        if op.orelse is not None:
            self.bind(op.orelse.parameters, carried)
            completion = self.region(op.orelse)
            if completion.kind not in ("end", "yield"):
                return completion
            carried = completion.values
        self.bind(op.results, carried)
        return None

    def while_(self, op: ops.While) -> Completion | None:
        initial = tuple(map(self.abstract, op.initial))
        if id(op) in self.decisions.roll:
            self.stage_body(op.body)
        elif id(op) in self.decisions.unroll:
            return self.unrolled_while(op, initial)
        head, condition, tests = self.loop_body(op, op.condition, initial)
        parameters, body, ends = self.loop_body(op, op.body, initial)
        orelse = None if op.orelse is None else self.loop_exit(op, op.orelse, ends)
        after = [replace(test, values=test.values[1:]) for test in tests]
        results = self.joined(op.results, [*ends, *after], frozenset({id(op)}))
        self.emit(
            ops.While(
                results,
                tuple(map(self.use, initial)),
                Region(head, condition),
                Region(parameters, body),
                orelse,
                span=self.span(op),
            )
        )
        return None

    def unrolled_while(self, op: ops.While, carried: tuple[Abstract, ...]) -> Completion | None:
        rolled, self.rolled = self.rolled, []
        self.unrolling.append(op)
        try:
            while True:  # each round counts as work
                self.bind(op.condition.parameters, carried)
                condition, *rest = self.region(op.condition).values
                carried = tuple(rest)
                condition = self.evaluate.truth(condition)
                if self.forward is None and not self.closures and not isinstance(condition.fact, Known | Elements):
                    raise Undecided(roll={id(op)})
                if not self.demand(condition, op.span, "the condition of this loop"):
                    return self.loop_else(op, carried)
                self.bind(op.body.parameters, carried)
                completion = self.region(op.body)
                if completion.kind == "break":
                    self.bind(op.results, completion.values)
                    return None
                if completion.kind not in ("end", "continue", "yield"):
                    return completion
                carried = completion.values
        finally:
            self.rolled = rolled
            self.unrolling.pop()

    def try_(self, op: ops.Try) -> Completion | None:
        if self.forward is not None:
            self.fail(op.span, "`try` cannot surround part of a forward", "put it around the whole `with`")
        with self.kept(op) as body:
            self.leave(self.region(op.body))
        handlers = []
        for handler in op.handlers:
            types = None
            if handler.types is not None:
                with self.kept(op) as made:
                    self.leave(self.region(handler.types))
                types = Region((), tuple(made))
            (exception,) = handler.body.parameters
            value = self.builder.fresh(exception.name)
            self.scope[exception] = Abstract(value)
            with self.kept(op) as made:
                self.leave(self.region(handler.body))
            handlers.append(ops.Handler(types, Region((value,), tuple(made))))
        rest: list[Region | None] = []
        for region in (op.orelse, op.finalizer):
            if region is None:
                rest.append(None)
                continue
            with self.kept(op) as made:
                self.leave(self.region(region))
            rest.append(Region((), tuple(made)))
        self.emit(ops.Try(Region((), tuple(body)), tuple(handlers), rest[0], rest[1], span=self.span(op)))
        return None

    def with_(self, op: ops.With) -> Completion | None:
        context = self.abstract(op.context)
        steps = self.evaluate.steps_of(context, op.span)
        if steps is not None:
            return self.in_steps(op, steps)
        if context.at_run or isinstance(context.fact, Known):
            self.disturb()  # what entering and leaving it does is not known
        result = self.builder.fresh(op.result.name)
        self.scope[op.result] = Abstract(result, None, context.loops, context.live, self.span(op))
        with self.builder.region() as made:
            completion = self.region(op.body)
        self.emit(ops.With(result, self.use(context), Region((), tuple(made)), span=self.span(op)))
        return None if completion.kind in ("end", "yield") else completion

    def forward_(self, op: ops.Forward) -> Completion | None:
        span = self.span(op)
        if self.forward is not None:
            self.fail(
                span,
                "a forward cannot run inside the body of another",
                "close the first `with` before this one; its values can be used here",
                ((self.forward.span, "the forward around it"),),
            )
        module = self.evaluate.model(self.abstract(op.model), span, op.method)
        self.check_arguments(module, op, span)
        if self.closures:
            raise AccessInClosure
        result = self.builder.fresh(op.result.name)
        self.scope[op.result] = Abstract(None, Tracer(result), span=span)
        arguments = tuple(replace(argument, value=self.used(argument.value)) for argument in op.arguments)
        if op.method != "generate":
            self.rely_on_options(op.arguments)
        self.models[result.name] = module.handle
        captured = editing.captured(self, module, span)
        self.observed = {}
        brings = brings_input(self, op.arguments)
        self.inputs[result.name] = first_inputs(self, module.handle, op) if brings else None
        running = Forwarding(
            result,
            module,
            span,
            op,
            self.builder.depth,
            rolled=len(self.rolled),
            outer=tuple(self.rolled),
            brings=brings,
        )
        self.forward = running
        outer, self.conditions = self.conditions, []
        with self.builder.region() as made:
            editing.apply(self, running, captured)
            completion = self.region(op.body)
        made = self.complete(made)
        self.changes.add(running.changes)
        self.forward, self.conditions = None, outer
        body = Region((), settle(self, running, op, made))
        self.emit(ops.Forward(result, module.model, op.method, arguments, body, span=span))
        return None if completion.kind in ("end", "yield") else completion

    def session_(self, op: ops.Session) -> Completion | None:
        """Several forwards as one: transparent, since values leave each forward for those after it in any case."""
        span = self.span(op)
        if self.forward is not None or self.session is not None:
            around = self.session if self.forward is None else self.forward.span
            assert around is not None
            what = "a session" if self.forward is None else "a forward"
            self.fail(
                span,
                f"a session cannot begin inside {what}",
                "open one session, and the traces inside it, one after the other",
                ((around, f"{what} around it"),),
            )
        model = self.evaluate.model(self.abstract(op.model), span, "session")
        if op.arguments:
            names = ", ".join(each.keyword or "positional" for each in op.arguments)
            self.fail(
                span,
                f"`.session()` takes no arguments ({names}): its traces run in this process, one after the other",
                "write `with model.session():`",
            )
        if self.closures:
            raise AccessInClosure
        result = self.builder.fresh(op.result.name)
        self.scope[op.result] = Abstract(None, OpenSession(), span=span)
        self.session = span
        with self.builder.region() as made:
            completion = self.region(op.body)
        self.session = None
        self.emit(ops.Session(result, model.model, (), Region((), tuple(made)), span=span))
        return None if completion.kind in ("end", "yield") else completion

    def check_arguments(self, module: SiteModule, op: ops.Forward, span: Span) -> None:
        """Refuses what the model would refuse of an undecorated trace: arguments that a forward would ignore."""
        names = {argument.keyword for argument in op.arguments if argument.keyword is not None}
        for argument in op.arguments:
            if argument.star == "**":
                names.update(self.evaluate.calls.known_names(self.abstract(argument.value)))
        try:
            module.handle._check_arguments(op.method, names)
        except ModelError as error:
            self.fail(span, str(error))

    def rely_on_options(self, arguments: tuple[ops.Argument, ...]) -> None:
        """Guards on the switches and counts among a forward's keyword arguments: they may decide which modules run."""
        for argument in arguments:
            fact = self.abstract(argument.value).fact
            if not isinstance(fact, Known) or fact.text is None:
                continue
            if argument.keyword is not None and isinstance(fact.value, (int, NoneType)):
                self.guards.add(fact.text, "value", fact.value)
            elif argument.star == "**" and isinstance(fact.value, dict):
                for name, value in fact.value.items():
                    if isinstance(value, (int, NoneType)):
                        self.guards.add(f"{fact.text}[{name!r}]", "value", value)

    def closure(self, op: ops.Closure) -> Abstract:
        """A nested function: kept as a function where it does not touch the model, and known for inlining."""
        fact = Function(op, dict(self.scope), self.frame)
        forward, outer = self.forward, (self.conditions, self.rolled, self.inlined)
        made_parameters = [self.builder.fresh(parameter.value.name) for parameter in op.parameters]
        held = [Abstract(value, span=op.span) for value in made_parameters]
        self.bind(tuple(parameter.value for parameter in op.parameters), tuple(held))
        self.closures, self.conditions, self.rolled, self.inlined, self.forward = self.closures + 1, [], [], [], None
        try:
            with self.kept(op) as made:
                self.leave(self.region(op.body))
        except AccessInClosure:
            return Abstract(None, fact, span=self.span(op))
        except CompileError:
            if not _touches_model(op.body):
                raise
            return Abstract(None, fact, span=self.span(op))
        finally:
            self.closures -= 1
            self.forward, (self.conditions, self.rolled, self.inlined) = forward, outer
        result = self.builder.fresh(op.result.name)
        parameters = tuple(
            replace(parameter, value=value) for parameter, value in zip(op.parameters, made_parameters, strict=True)
        )
        defaults = tuple(map(self.used, op.defaults))
        self.emit(replace(op, result=result, parameters=parameters, defaults=defaults, body=Region((), tuple(made))))
        return Abstract(result, fact, span=self.span(op))


def emits(region: Region) -> bool:
    """Whether a region hands out values of the generator that it belongs to."""
    inner = (part for op in region.ops if not isinstance(op, ops.Closure) for part in regions(op))
    return any(isinstance(op, ops.Emit) for op in region.ops) or any(map(emits, inner))


def _touches_model(region: Region) -> bool:
    return any(isinstance(op, (ops.Read, ops.Write, ops.Save, ops.Backward)) for op in walk(region))
