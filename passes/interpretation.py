"""One interpretation of a program, while it is specialised: its values, its scope, and what it may rely on.

What control flow does to it is in `control_flow`, expressions are in `evaluate`, calls in `apply`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, rewrite, used, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes import editing
from nnsight_compiler.passes.changes import Changes
from nnsight_compiler.passes.completion import END, AccessInClosure, Completion, Unreachable
from nnsight_compiler.passes.decisions import Decisions, Undecided
from nnsight_compiler.passes.evaluate import Evaluator
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Frame,
    Guards,
    Known,
    SiteCalls,
    SiteModule,
    StepRange,
    immutable,
    size_of,
)
from nnsight_compiler.passes.rows import Part
from nnsight_compiler.passes.subject import Inputs, Subject


@dataclass(slots=True)
class Forwarding:
    """The forward whose body is being interpreted.

    op: the forward in the source program; `index`: the op of its body that is interpreted now.
    depth: how many regions are open around it; `rolled`: how many kept loops, `outer`: which.
    brings: whether it is given an input itself, rather than by invokes.
    invoke: the invoke whose body is being interpreted, and `rows` its result, where it brings an input.
    invokes: those that bring one so far, without their bodies, each with its input where that is known.
    changes: what its body changes; facts hold on inside it, since no stage can begin there.
    steps: the loop over steps that is being interpreted.
    nexts: how often `.next()` was said of the tracer (under the empty path) and of each module.
    """

    result: Value
    module: SiteModule
    span: Span
    op: ops.Forward
    depth: int
    index: int = 0
    rolled: int = 0
    outer: tuple[int, ...] = ()
    brings: bool = True
    invoke: ops.Invoke | None = None
    rows: Value | None = None
    invokes: list[tuple[ops.Invoke, Inputs | None]] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    steps: Op | None = None
    nexts: dict[str, int] = field(default_factory=dict)


class Interpretation:
    """What one interpretation knows, and how it emits the specialised program."""

    def __init__(self, program: Program, subject: Subject, decisions: Decisions) -> None:
        self.program = program
        self.subject = subject
        self.decisions = decisions
        self.builder = Builder()
        self.guards = Guards()
        self.scope: dict[Value, Abstract] = {}
        self.frame = Frame(subject.globals, subject.closure, program.name, own=True)
        self.forward: Forwarding | None = None
        self.session: Span | None = None
        self.observed: dict[str, Abstract] = {}
        self.inputs: dict[str, Inputs | None] = {}
        self.models: dict[str, Any] = {}
        self.invoked: dict[str, tuple[str, ...]] = {}
        self.parts: dict[str, Part] = {}
        self.conditions: list[tuple[int, Abstract]] = []
        self.rolled: list[int] = []
        self.over: set[int] = set()
        """The loops over steps: what depends on the number of a step may stay a condition of the run."""
        self.unrolling: list[Op] = []
        self.inlined: list[str] = []
        self.editing = self.in_backward = False
        self.closures = 0
        self.parameters: list[ops.Parameter] = []
        self.function = program.body
        self.positions: list[Op] = []
        self.stages: dict[str, Frame] = {}
        self.changes = Changes()
        self.reliances = 0
        self.worked = 0
        self.here = program.span
        self.fresh: set[str] = set()
        self.evaluate = Evaluator(self)

    @property
    def one_stage(self) -> bool:
        """Whether no stage can begin: an undecorated trace is one forward."""
        return self.program.kind == "block" and self.session is None

    def op(self, op: Op) -> Completion | None:
        """Interprets one op; a completion where control leaves the region."""
        raise NotImplementedError

    def staged(self, region: Region, index: int) -> Region:
        """Has a stage begin at this op of a region: the ops that then stand in the place of the rest."""
        raise NotImplementedError

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
        self.work(0, sum(map(size_of, parts)))
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

    def handed_over(self, value: Abstract) -> Operand:
        """The operand by which a value is handed to code that the compiler does not see: modules as users hold them."""
        self.evaluate.resolved(value)
        match value.fact:
            case SiteModule(handle=handle, model=model) if handle._path:
                result = self.builder.fresh("module")
                self.emit(ops.Item(result, model, Literal(handle._path), span=value.span))
                return result
            case Elements(kind="tuple", items=list() as items) if self.evaluate.mentions_modules(value):
                return Tuple(tuple(map(self.handed_over, items)))
            case Elements(kind=kind, items=list() as items, keys=keys) if value.operand is None and value.make is None:
                result = self.builder.fresh(kind)
                spelled = [self.handed_over(key) for key in keys] if kind == "dict" else [None] * len(items)
                elements = tuple(map(ops.Element, map(self.handed_over, items), spelled))
                self.emit(ops.Build(result, kind, elements, span=value.span))
                return result
        return self.use(value)

    def emit(self, op: Op) -> None:
        self.work()
        self.builder.emit(op)

    def work(self, more: int = 1, size: int = 0) -> None:
        """Counts ops that are interpreted or emitted, rounds of a loop, or a container of this size: programs grow with
        their loops and helpers, and compiling them must come to an end."""
        self.worked += more
        most = self.subject.most_ops
        if max(self.worked, size) <= most:
            return
        here, way_out = self.frame.override or self.here, "keep what names no module in a loop of its own"
        if size > most:
            self.fail(here, f"this holds more than {most:,} values, itself counted as often as it is held", way_out)
        if not self.unrolling:
            self.fail(here, f"this program is unrolled to more than {most:,} ops", f"call fewer helpers, and {way_out}")
        self.fail(
            self.unrolling[0].span,
            f"this loop names modules, so that it is unrolled round by round, and comes to more than {most:,} ops",
            f"go over fewer modules at once, in several calls, and {way_out}",
            () if here == self.unrolling[0].span else ((here, "it comes this far here"),),
        )

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

        new = rewrite(op, operand=lambda value: self.handed_over(self.scope[value]))
        self.emit(replace(rewrite(new, result=result), span=span))
        return made[0] if made else None

    # --- needing to know ---

    def demand(self, value: Abstract, span: Span, what: str) -> Any:
        """The value itself, guarded on. `what` says what it is needed for, in an error."""
        match value.fact:
            case Known(value=torch.Tensor() as held) if not self.relies_on(held):
                pass  # the program has written to it by now
            case Known(value=known, text=text):
                if not immutable(known) and hasattr(type(known), "__index__"):  # a tensor, or a number of numpy's
                    try:
                        known, text = operator.index(known), text and f"({text}).__index__()"
                    except TypeError as error:
                        self.fail(span, f"{what} must be a whole number: {error}", "give an int, or a tensor of one")
                if text is not None and isinstance(known, slice):  # which has no hash before Python 3.12
                    self.guards.add(f"({text}).__reduce__()[1]", "value", (known.start, known.stop, known.step))
                elif text is not None:
                    self.guards.add(text, "value", known)
                return known
            case Elements(kind="tuple", items=list() as items):
                return tuple(self.demand(item, span, what) for item in items)
        return self.unknown(value, span, what)

    def unknown(self, value: Abstract, span: Span, what: str) -> NoReturn:
        """Called where a value must be known and is not: unrolling a loop, or a stage that begins later, helps."""
        raise NotImplementedError

    def over_steps(self, op: ops.For, steps: StepRange) -> Completion | None:
        """A loop over steps of a generation."""
        raise NotImplementedError

    def in_steps(self, op: ops.With, steps: StepRange) -> Completion | None:
        """A `with` around what happens at steps of a generation."""
        raise NotImplementedError

    def complete(self, made: list[Op]) -> list[Op]:
        """The body of a forward, once all of it is interpreted."""
        raise NotImplementedError

    def made_inside(self, value: Abstract) -> bool:
        """Whether a value depends on what the body of the forward around makes: values of the model, host calls."""
        raise NotImplementedError

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
                raise Undecided(fold={identity})
            loops = condition.loops - self.decisions.roll - self.over
            if loops and not condition.at_run:
                raise Undecided(unroll=set(loops))

    def site(self, value: Abstract, span: Span) -> tuple[Module, int | None, Value | None]:
        """The module that an access names, as an operand, its call index, and the invoke whose rows are meant."""
        forward = self.access(span)
        match value.fact:
            case SiteModule() as module:
                call = None
            case SiteCalls(module=module, call=int() as call):
                pass
            case _:
                raise AssertionError("not a site")
        if not editing.runs(forward.module, module, self.editing):
            edited = module.handle._root._base is forward.module.handle._root._base
            self.fail(
                span,
                "this module belongs to an edited model, and this `with` runs the model without these edits"
                if edited
                else "this module belongs to another model than the one that this `with` runs",
                "trace that model in a `with` of its own, and use its values here",
                ((forward.span, "the forward"),),
            )
        return Module(forward.module.model, module.handle._path), call, forward.rows

    # --- what the program changes ---

    def disturb(self) -> None:
        """Unknown code runs: what globals, attributes and containers hold is no longer known."""
        (self.changes if self.forward is None else self.forward.changes).anything = True

    def change(self, value: Abstract) -> None:
        """A value is written to in place."""
        if value.live or isinstance(value.fact, Elements):
            return
        if isinstance(value.fact, Known):
            if immutable(value.fact.value):  # `n -= 1` makes another number
                return
            self.changes.objects[id(value.fact.value)] = value.fact.value
        elif not isinstance(value.operand, Value) or value.operand.name not in self.fresh:
            self.disturb()

    def relies_on(self, held: Any) -> bool:
        """Whether what a mutable object holds is what it held when the program started. Where it is, that is noted."""
        self.reliances += 1
        return not self.changes.of(held)

    @contextmanager
    def round(self, loop: Op) -> Iterator[None]:
        """One round of a kept loop: whatever any round changes may have been changed before it begins."""
        relied = self.reliances
        if id(loop) in self.decisions.changes:
            self.changes.add(self.decisions.changes[id(loop)])
        known = self.changes.copy()
        yield
        if self.reliances > relied and not known.covers(self.changes):
            found = self.changes.copy()
            # What the interpretation itself makes is another object each time: once is enough to tell objects apart.
            found.anything |= id(loop) in self.decisions.changes
            raise Undecided(changes={id(loop): found})

    # --- regions ---

    def region(self, region: Region) -> Completion:
        """Interprets the ops of a region in place."""
        for index, op in enumerate(region.ops):
            self.here = self.span(op)
            self.work()
            begins = self.forward is None and not self.closures
            if begins and id(op) in self.decisions.stages and id(op) not in self.decisions.whole:
                return self.region(self.staged(region, index))
            if begins and id(op) in self.decisions.ahead:
                return self.region(Region((), (*self.decisions.ahead[id(op)], *region.ops[index + 1 :])))
            if begins:
                self.positions.append(op)
            elif self.forward is not None and region is self.forward.op.body:
                self.forward.index = index
            try:
                completion = self.op(op)
            except Unreachable:
                return Completion("never")
            finally:
                if begins:
                    self.positions.pop()
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

    def bind(self, values: tuple[Value, ...], held: tuple[Abstract, ...]) -> None:
        self.scope.update(zip(values, held, strict=True))
