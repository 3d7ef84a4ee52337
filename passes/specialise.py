"""Specialises a program to one model and to the arguments that its shape depends on.

before    %1 = attribute %model.layers            after   (given layer=3)
          %2 = item %1[%layer]                             %3 = read %model@transformer.h.3 output
          %3 = read %2 output

An interpreter over the IR that knows the model's structure and, where it must, the arguments. It resolves module paths,
inlines helpers that touch the model, folds conditions that decide whether an access happens, and unrolls a loop only
where its variable names a module or decides whether an access happens. Everything else stays as it is.

Legal because only operations that are known to be pure are evaluated here, and because each fact that rests on an
argument or a global is recorded as a guard: the result holds for every call for which the guards do.

Loops and conditions are first kept. When something inside turns out to need the loop's variable, the loop is noted in
`Decisions`, and the interpretation starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType, NoneType
from typing import Any, NoReturn
from typing import Literal as OneOf

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes.apply import Unreachable
from nnsight_compiler.passes.evaluate import Evaluator
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Fact,
    Frame,
    Function,
    Guard,
    Guards,
    Known,
    SiteCalls,
    SiteModule,
    Tracer,
)

MAX_ROUNDS = 100_000


@dataclass(frozen=True, slots=True)
class Subject:
    """What a program is specialised to: one call.

    arguments: the value of each parameter, by name; a parameter that is not bound is missing.
    lower: gives the IR of a helper function.
    save: the function that users import as `save`.
    """

    arguments: Mapping[str, Any]
    globals: Mapping[str, Any]
    closure: Mapping[str, CellType]
    lower: Callable[[FunctionType], Program]
    save: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Specialised:
    """A specialised program, and what it holds for.

    guards, objects: the facts it rests on, and the objects that their texts mention.
    inputs: the arguments of each forward where they are known, by the name of its result.
    models: the wrapped model of each forward.
    unsaved: for a block, exports that hold values of the model which were not saved: name to where they were made.
    unsure: for a block, exports of which only the run can tell whether they are such values.
    """

    program: Program
    guards: tuple[Guard, ...]
    objects: Mapping[str, Any]
    inputs: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]] | None]
    models: Mapping[str, Any]
    unsaved: Mapping[str, Span]
    unsure: Mapping[str, Span]


def specialise(program: Program, subject: Subject) -> Specialised:
    """The program for this call, and for every call for which its guards hold.

    Raises:
        CompileError: a name that no module has, an access that needs what only a run can give, …
    """
    decisions = Decisions()
    while True:
        try:
            return Specialiser(program, subject, decisions).run()
        except Undecided as undecided:
            decisions.unroll |= undecided.unroll
            decisions.fold |= undecided.fold


@dataclass(slots=True)
class Decisions:
    """Which loops are unrolled and which conditions folded, by the identity of their op in the source program. A
    condition on known values is folded in either set."""

    unroll: set[int] = field(default_factory=set)
    fold: set[int] = field(default_factory=set)


class Undecided(Exception):  # noqa: N818  # control flow, not an error
    """The interpretation needs more loops unrolled or conditions folded."""

    def __init__(self, unroll: frozenset[int] = NO_LOOPS, fold: frozenset[int] = NO_LOOPS) -> None:
        self.unroll, self.fold = unroll, fold


class AccessInClosure(Exception):  # noqa: N818  # control flow, not an error
    """A closure that touches the model cannot stay a function; it is inlined where it is called."""


@dataclass(frozen=True, slots=True)
class Completion:
    """How a region ended. `never`: control does not come out of it, and the terminator has been emitted."""

    kind: OneOf["end", "yield", "break", "continue", "return", "never"]
    values: tuple[Abstract, ...] = ()
    span: Span | None = None


END = Completion("end")


@dataclass(slots=True)
class Forwarding:
    """The forward whose body is being interpreted."""

    result: Value
    module: SiteModule
    span: Span


class Specialiser:
    """One interpretation of a program, under fixed decisions."""

    def __init__(self, program: Program, subject: Subject, decisions: Decisions) -> None:
        self.program = program
        self.subject = subject
        self.decisions = decisions
        self.builder = Builder()
        self.guards = Guards()
        self.scope: dict[Value, Abstract] = {}
        self.frame = Frame(subject.globals, subject.closure, program.name, own=True)
        self.forward: Forwarding | None = None
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]] | None] = {}
        self.models: dict[str, Any] = {}
        self.conditions: list[tuple[int, Abstract]] = []
        self.rolled: list[int] = []
        self.inlined: list[str] = []
        self.closures = 0
        self.evaluate = Evaluator(self)

    # --- the whole program ---

    def run(self) -> Specialised:
        parameters = []
        for parameter in self.program.parameters:
            name = parameter.value.name
            value = self.builder.fresh(name)
            fact = Known(self.subject.arguments[name], name) if name in self.subject.arguments else None
            self.scope[parameter.value] = Abstract(value, fact, span=self.program.span)
            parameters.append(replace(parameter, value=value))
        completion = self.region(self.program.body)
        unsaved: dict[str, Span] = {}
        unsure: dict[str, Span] = {}
        if completion.kind == "return":
            (result,) = completion.values
            if self.program.kind == "block":
                result = self.exports(result, unsaved, unsure)
            self.emit(ops.Return(self.use(self.handed_back(result)), span=completion.span or self.program.span))
        guards = tuple(self.guards.guards.values())
        program = replace(
            self.program,
            parameters=tuple(parameters),
            body=Region((), tuple(self.builder.ops)),
            target=next((type(model._module).__name__ for model in self.models.values()), ""),
            given=tuple(str(guard) for guard in guards if guard.kind in ("value", "length")),
        )
        return Specialised(program, guards, self.guards.objects, self.inputs, self.models, unsaved, unsure)

    def exports(self, result: Abstract, unsaved: dict[str, Span], unsure: dict[str, Span]) -> Abstract:
        """The returned tuple of a block, without the values of the model that were not saved."""
        assert isinstance(result.fact, Elements) and result.fact.items is not None
        parts: list[Abstract] = []
        for name, part in zip(self.program.exports, result.fact.items, strict=True):
            if part.live == 2:
                unsaved[name] = part.span
            elif part.live == 1 or _may_hold_values(part.fact):
                unsure[name] = part.span
            hidden = part.live == 2 or part.operand is None or isinstance(part.fact, (Tracer, SiteCalls))
            parts.append(Abstract(Unbound()) if hidden else part)
        return Abstract(Tuple(tuple(self.use(self.handed_back(part)) for part in parts)))

    def handed_back(self, value: Abstract) -> Abstract:
        """A returned value: modules of the model are given as the user holds them, not as torch modules."""
        match value.fact:
            case SiteModule(handle=handle, model=model) if handle._path:
                result = self.builder.fresh("module")
                self.emit(ops.Item(result, model, Literal(handle._path), span=value.span))
                return Abstract(result, span=value.span)
            case Elements(kind="tuple", items=list() as items):
                return self.pack([self.handed_back(item) for item in items])
        return value

    # --- operands ---

    def abstract(self, operand: Operand) -> Abstract:
        """What an operand of the source program stands for."""
        match operand:
            case Value():
                return self.scope[operand]
            case Literal(value=value):
                return Abstract(operand, Known(value))
            case Unbound():
                return Abstract(operand)
            case Tuple(parts=parts):
                return self.pack([self.abstract(part) for part in parts])
            case Slice(lower=lower, upper=upper, step=step):
                return self.evaluate.make_slice(*map(self.abstract, (lower, upper, step)))
            case Module(model=model, path=path):
                return self.evaluate.module(self.scope[model], path)

    def pack(self, parts: list[Abstract]) -> Abstract:
        """A tuple of these values."""
        held = [part.operand for part in parts]
        operand = None if None in held else Tuple(tuple(part for part in held if part is not None))
        loops = NO_LOOPS.union(*(part.loops for part in parts))
        live = max((part.live for part in parts), default=0)
        span = next((part.span for part in parts if part.live == live), self.program.span)
        return Abstract(operand, Elements("tuple", parts), loops, live, span, any(part.at_run for part in parts))

    def use(self, value: Abstract) -> Operand:
        """The operand by which the specialised program refers to a value."""
        if value.operand is None:
            if value.make is not None:
                return value.make()
            if isinstance(value.fact, Elements) and value.fact.kind == "tuple" and value.fact.items is not None:
                return Tuple(tuple(map(self.use, value.fact.items)))
            self.fail(value.span, "this touches the model and cannot be handed on as a value", "call it by name here")
        return value.operand

    def used(self, operand: Operand) -> Operand:
        return self.use(self.abstract(operand))

    def emit(self, op: Op) -> None:
        self.builder.emit(op)

    def span(self, op: Op) -> Span:
        """Where an op stands for the user: at the call, for a helper from another file."""
        return self.frame.override or op.span

    def keep(self, op: Op, fact: Any = None, live: int | None = None) -> Abstract | None:
        """Emits an op of the source program as it stands, with the operands that its values now stand for.

        Its results carry the loops that its operands change with, and whether they are values of the model.
        """
        sources = [self.scope[value] for value in used(op)]
        loops = NO_LOOPS.union(*(source.loops for source in sources)) if sources else NO_LOOPS
        if live is None:
            live = max((source.live for source in sources), default=0)
        at_run = any(source.at_run for source in sources)
        span = self.span(op)
        made: list[Abstract] = []

        def result(value: Value) -> Value:
            new = self.builder.fresh(value.name)
            made.append(Abstract(new, fact, loops, live, span, at_run))
            self.scope[value] = made[-1]
            return new

        new = rewrite(op, operand=lambda value: self.use(self.scope[value]))
        self.emit(replace(rewrite(new, result=result), span=span))
        return made[0] if made else None

    # --- needing to know ---

    def demand(self, value: Abstract, span: Span, what: str) -> Any:
        """The value itself, guarded on. `what` says what it is needed for, in an error."""
        match value.fact:
            case Known(value=known, text=text):
                if text is not None:
                    self.guards.add(text, "value", known)
                return known
            case Elements(kind="tuple", items=list() as items):
                return tuple(self.demand(item, span, what) for item in items)
        return self.unknown(value, span, what)

    def unknown(self, value: Abstract, span: Span, what: str) -> NoReturn:
        loops = value.loops
        if isinstance(value.fact, Elements):
            loops |= value.fact.loops
        if loops - self.decisions.unroll and not value.at_run:
            raise Undecided(unroll=loops)
        if self.closures:
            raise AccessInClosure
        related = ((value.span, "it is made here"),) if value.span.line else ()
        self.fail(
            span,
            f"{what} must be known before the model runs, but only a run can give it",
            "pass it to the function as an argument, or compute it in a call of its own",
            related,
        )

    def fail(self, span: Span, reason: str, way_out: str = "", related: tuple[tuple[Span, str], ...] = ()) -> NoReturn:
        raise CompileError([Diagnostic(self.frame.override or span, reason, way_out, related)])

    def access(self, span: Span) -> Forwarding:
        """Called before each access to a site: conditions around it are folded where they can be."""
        if self.closures:
            raise AccessInClosure
        if self.forward is None:
            self.fail(
                span,
                "a module's values exist only while the model runs",
                "read and write them inside `with model.trace(…)`",
            )
        self.fold_conditions()
        return self.forward

    def fold_conditions(self) -> None:
        """Has the conditions around this place folded where they can be."""
        for identity, condition in self.conditions:
            if isinstance(condition.fact, Known):
                raise Undecided(fold=frozenset({identity}))
            if condition.loops and not condition.at_run:
                raise Undecided(unroll=condition.loops)

    def site(self, value: Abstract, span: Span) -> tuple[Module, int | None]:
        """The module that an access names, as an operand, and its call index."""
        forward = self.access(span)
        match value.fact:
            case SiteModule() as module:
                call = None
            case SiteCalls(module=module, call=int() as call):
                pass
            case _:
                raise AssertionError("not a site")
        if module.handle._root is not forward.module.handle._root:
            self.fail(
                span,
                "this module belongs to another model than the one that this `with` runs",
                "trace that model in a `with` of its own, and use its values here",
                ((forward.span, "the forward"),),
            )
        return Module(forward.module.model, module.handle._path), call

    # --- regions ---

    def region(self, region: Region) -> Completion:
        """Interprets the ops of a region in place."""
        for op in region.ops:
            try:
                completion = self.op(op)
            except Unreachable:
                return Completion("never")
            if completion is not None:
                return completion
        return END

    @contextmanager
    def kept(self, owner: Op, loop: bool = False) -> Iterator[list[Op]]:
        """Opens a region of the specialised program. Containers that code in it may change are no longer followed."""
        loops = frozenset({id(owner)}) if loop else NO_LOOPS
        for op in (inner for part in regions(owner) for inner in walk(part)):
            for value in used(op):
                held = self.scope.get(value)
                if held is not None and isinstance(held.fact, Elements):
                    held.fact.forget(loops)
        if loop:
            self.rolled.append(id(owner))
        with self.builder.region() as made:
            yield made
        if loop:
            self.rolled.pop()

    def op(self, op: Op) -> Completion | None:
        """Interprets one op; a completion where control leaves the region."""
        match op:
            case ops.Global():
                self.scope[op.result] = self.evaluate.read_name(op)
            case ops.Attribute():
                self.scope[op.result] = self.evaluate.attribute(op, self.abstract(op.object), op.name)
            case ops.Read():
                self.scope[op.result] = self.evaluate.attribute(op, self.abstract(op.module), op.port)
            case ops.Item():
                self.scope[op.result] = self.evaluate.item(op)
            case ops.Operator():
                self.scope[op.result] = self.evaluate.apply(op)
            case ops.Call():
                self.scope[op.result] = self.evaluate.calls.call(op)
            case ops.Build():
                self.scope[op.result] = self.evaluate.build(op)
            case ops.Unpack():
                self.evaluate.unpack(op)
            case ops.Bound():
                value = self.abstract(op.value)
                if (isinstance(value.operand, Value) and value.live == 0 and value.fact is None) or isinstance(
                    value.operand, Unbound
                ):
                    self.keep(op)
                else:
                    self.scope[op.result] = value
            case ops.Cell() | ops.Load() | ops.Store():
                self.cell(op)
            case ops.Save():
                self.scope[op.result] = self.evaluate.calls.save(op, self.abstract(op.value))
            case ops.Write():
                self.evaluate.set_attribute(op, self.abstract(op.module), op.port, self.abstract(op.value))
            case ops.SetAttribute():
                self.evaluate.set_attribute(op, self.abstract(op.object), op.name, self.abstract(op.value))
            case ops.SetItem():
                self.evaluate.set_item(op)
            case ops.Closure():
                self.scope[op.result] = self.closure(op)
            case ops.If():
                return self.if_(op)
            case ops.For():
                return self.for_(op)
            case ops.While():
                return self.while_(op)
            case ops.Try():
                return self.try_(op)
            case ops.With():
                return self.with_(op)
            case ops.Forward():
                return self.forward_(op)
            case ops.Yield():
                return Completion("yield", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Break():
                return Completion("break", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Continue():
                return Completion("continue", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Return():
                return Completion("return", (self.abstract(op.value),), self.span(op))
            case ops.Emit():
                self.evaluate.calls.emit_generated(op)
            case ops.Raise():
                self.keep(op)
                return Completion("never")
            case ops.Invoke() | ops.Steps() | ops.Backward() | ops.Grad() | ops.SetGrad() | ops.Skip() | ops.Stop():
                self.fail(
                    op.span,
                    f"`{type(op).__name__.lower()}` is part of the language, but this version does not run it yet",
                    "write one `with model.trace(…)` for each prompt",
                )
            case _:
                for name in used(op):
                    held = self.scope[name]
                    if isinstance(held.fact, Elements):
                        held.fact.forget()
                self.keep(op)
        return None

    # --- cells ---

    def cell(self, op: ops.Cell | ops.Load | ops.Store) -> None:
        """Variables in boxes. What a box holds is followed only where a module is put into it and never replaced."""
        match op:
            case ops.Cell():
                initial = self.abstract(op.initial)
                box = Elements("list", [initial])
                self.keep_with_unknown(op, initial)
                self.scope[op.result].fact = box
            case ops.Store():
                held = self.abstract(op.cell)
                value = self.abstract(op.value)
                self.keep_with_unknown(op, value)
                if isinstance(held.fact, Elements) and held.fact.items is not None:
                    held.fact.items = [value]
            case ops.Load():
                held = self.abstract(op.cell)
                if isinstance(held.fact, Elements) and held.fact.items is not None:
                    (value,) = held.fact.items
                    if not isinstance(value.operand, Unbound):
                        self.scope[op.result] = value
                        return
                kept = self.keep(op)
                assert kept is not None
                if isinstance(held.fact, Elements):
                    kept.loops |= held.fact.loops

    def keep_with_unknown(self, op: ops.Cell | ops.Store, value: Abstract) -> None:
        """Keeps an op that stores a value; a module or a function that touches the model leaves the box empty."""
        if value.operand is not None or isinstance(value.fact, Elements):
            self.keep(op)
        elif isinstance(op, ops.Cell):
            self.keep(replace(op, initial=Unbound()))

    # --- control flow ---

    def bind(self, values: tuple[Value, ...], held: tuple[Abstract, ...]) -> None:
        self.scope.update(zip(values, held, strict=True))

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
                if not self.rolled:
                    self.fail(
                        span,
                        f"this `{completion.kind}` depends on a value that only a run can give, but the loop is unrolled,"
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
                        f"`{self.inlined[-1]}` touches the model and returns early under a condition that only a run can"
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
        self.evaluate.calls.refuse_steps(op, iterable)
        if id(op) in self.decisions.unroll or self.evaluate.mentions_modules(iterable):
            items = self.evaluate.iterate(iterable, op.span)
            return self.unrolled(op, items, tuple(map(self.abstract, op.initial)))
        initial = tuple(map(self.abstract, op.initial))
        if isinstance(iterable.fact, Elements):
            iterable.fact.forget(frozenset({id(op)}))
        parameters, body, ends = self.loop_body(op, op.body, initial, iterable)
        orelse = None if op.orelse is None else self.loop_exit(op, op.orelse, ends)
        results = self.joined(op.results, [*ends, Completion("yield", initial)], frozenset({id(op)}))
        made = Region(parameters, body)
        self.emit(ops.For(results, self.use(iterable), tuple(map(self.use, initial)), made, orelse, span=self.span(op)))
        return None

    def loop_body(
        self, op: ops.For | ops.While, region: Region, carried: tuple[Abstract, ...], iterable: Abstract | None = None
    ) -> tuple[tuple[Value, ...], tuple[Op, ...], list[Completion]]:
        """A region of a kept loop: its parameters, its ops, and how it ended."""
        loops = frozenset({id(op)})
        held: list[Abstract] = []
        if iterable is not None:
            held.append(Abstract(None, None, loops | iterable.loops, iterable.live, iterable.span))
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
        with self.kept(op, loop=True) as made:
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

    def unrolled(self, op: ops.For, items: list[Abstract], carried: tuple[Abstract, ...]) -> Completion | None:
        rolled, self.rolled = self.rolled, []
        try:
            for item in items:
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
        if id(op) in self.decisions.unroll:
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
        try:
            for _ in range(MAX_ROUNDS):
                self.bind(op.condition.parameters, carried)
                condition, *rest = self.region(op.condition).values
                carried = tuple(rest)
                if not self.demand(self.evaluate.truth(condition), op.span, "the condition of this loop"):
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
        self.fail(op.span, f"this loop names modules and does not end within {MAX_ROUNDS} rounds", "bound it")

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
        if self.closures:
            raise AccessInClosure
        result = self.builder.fresh(op.result.name)
        self.scope[op.result] = Abstract(None, Tracer(result), span=span)
        arguments = tuple(replace(argument, value=self.used(argument.value)) for argument in op.arguments)
        self.inputs[result.name] = self.evaluate.calls.known_arguments(op.arguments)
        self.rely_on_options(op.arguments)
        self.models[result.name] = module.handle
        self.forward = Forwarding(result, module, span)
        outer, self.conditions = self.conditions, []
        with self.builder.region() as made:
            completion = self.region(op.body)
        self.forward, self.conditions = None, outer
        self.emit(ops.Forward(result, module.model, op.method, arguments, Region((), tuple(made)), span=span))
        return None if completion.kind in ("end", "yield") else completion

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

    # --- closures ---

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


def _may_hold_values(fact: Fact) -> bool:
    """Whether a container that the program made, and did not save, may hold values of the model."""
    if not isinstance(fact, Elements) or fact.saved:
        return False
    return fact.items is None or any(item.live or _may_hold_values(item.fact) for item in fact.items)


def _touches_model(region: Region) -> bool:
    return any(isinstance(op, (ops.Read, ops.Write, ops.Save)) for op in walk(region))
