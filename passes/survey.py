"""Specialises as much of a program as can be, and says what is wrong with the rest.

    %0 = attr %model.layrs                            (a mistake, noted)
    %1 = item %0[%layer]               ──▶    %1 = item %unchecked[%layer]
    %2 = attr %1.output                       %2 = attr %1.output

What `specialise` refuses is noted, and a parameter of its own stands in for its results: a value of which nothing is
known. So the ops after it are looked at too. What needs to know such a value, or an argument that was not given, cannot
be checked, which is noted as well, and is no mistake.

Legal for finding mistakes only: the program is never run. In a forward with a stand-in, which may be anything that the
forward holds, the model's output is read as well, so that no write seems to go unnoticed.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ModelError, excerpt
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, definitions, regions, used, walk
from nnsight_compiler.ir.values import Module, Value, values_in
from nnsight_compiler.passes.completion import Completion
from nnsight_compiler.passes.decisions import Decisions, Undecided
from nnsight_compiler.passes.evaluate import PORTS
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements, Iteration, SiteModule
from nnsight_compiler.passes.specialise import Specialised, Specialiser
from nnsight_compiler.passes.subject import Subject


@final
@dataclass(frozen=True, slots=True)
class Unchecked:
    """A place that could not be checked, and why."""

    span: Span
    reason: str

    def __str__(self) -> str:
        return "\n".join([f"{self.span}: {self.reason}", *excerpt(self.span)])


class UncheckedError(CompileError):
    """Something that cannot be checked for want of a value. It holds no mistake."""

    def __init__(self, *unchecked: Unchecked) -> None:
        super().__init__(())
        self.unchecked = unchecked


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """A program as far as it can be specialised, its mistakes, and what could not be checked."""

    specialised: Specialised
    diagnostics: tuple[Diagnostic, ...]
    unchecked: tuple[Unchecked, ...]


def survey(program: Program, subject: Subject) -> Survey:
    """Specialises what can be specialised, and looks at all of it."""
    decisions = Decisions()
    while True:
        surveyor = Surveyor(program, subject, decisions)
        try:
            specialised = surveyor.run()
        except Undecided as undecided:
            decisions.add(undecided.decisions)
            continue
        return Survey(specialised, tuple(surveyor.diagnostics), tuple(surveyor.unchecked))


class Surveyor(Specialiser):
    """One interpretation of a program that goes on after a mistake."""

    def __init__(self, program: Program, subject: Subject, decisions: Decisions) -> None:
        super().__init__(program, subject, decisions)
        self.diagnostics: list[Diagnostic] = []
        self.unchecked: list[Unchecked] = []
        self.stand_ins: list[Value] = []
        self.misgiven: set[int] = set()
        self.receivers: dict[str, Value] = {}
        names = (parameter.value.name for parameter in program.parameters)
        self.causes = {name: f"`{name}`, which was not given" for name in names if name not in subject.arguments}
        """Why a value of the specialised program is not known here, by its name."""

    def run(self) -> Specialised:
        found = super().run()
        made = [ops.Parameter(value, "keyword_only", optional=True) for value in self.stand_ins]
        own = found.program.parameters
        last = len(own) - any(parameter.kind == "var_keyword" for parameter in own)
        return replace(found, program=replace(found.program, parameters=(*own[:last], *made, *own[last:])))

    def op(self, op: Op) -> Completion | None:
        if self.closures or self.inlined:  # what is refused there may still be kept as a call
            return super().op(op)
        state = self.forward, [*self.conditions], [*self.rolled], self.frame
        try:
            return super().op(op)
        except UncheckedError as error:
            self.unchecked += error.unchecked
            cause = f"line {op.span.line}, which could not be checked"
        except CompileError as error:
            self.diagnostics += error.diagnostics
            cause = f"line {op.span.line}, where a mistake was found"
        except ModelError as error:
            self.unchecked.append(Unchecked(op.span, str(error)))
            cause = f"line {op.span.line}, which could not be checked"
        self.forward, self.conditions, self.rolled, self.frame = state
        self.lose(op, cause)
        return None

    def lose(self, op: Op, cause: str) -> None:
        """Has unknown values stand in for the results of an op, and for what it may have changed."""
        for value in (*defined(op), *(each for part in regions(op) for each in definitions(part))):
            stand_in = self.builder.fresh("unchecked")
            self.stand_ins.append(stand_in)
            self.causes[stand_in.name] = cause
            self.scope[value] = Abstract(stand_in, None, NO_LOOPS, 1 if self.forward else 0, self.span(op))
        for value in used(op):
            held = self.scope[value]
            if isinstance(held.fact, Elements) and held.fact.mutable:
                held.fact.forget()
                self.causes.update(dict.fromkeys((each.name for each in _values(held)), cause))
        if self.forward is not None:
            self.read_output(op)

    def read_output(self, op: Op) -> None:
        """Reads the model's output, since an op may read anything of the forward."""
        assert self.forward is not None
        root = Module(self.forward.module.model, "")
        super().emit(ops.Read(self.builder.fresh(), root, "output", span=self.span(op)))

    # --- what is not known ---

    def emit(self, op: Op) -> None:
        super().emit(op)
        if self.forward is not None and isinstance(op, (ops.Attribute, ops.SetAttribute)) and op.name in PORTS:
            self.read_output(op)  # of what may be a module
        if isinstance(op, ops.Global) and not self.has_value(op):
            self.causes[op.result.name] = f"`{op.name}`, which has no value yet"
        everything = (op, *(inner for part in regions(op) for inner in walk(part)))
        cause = self.cause(value for inner in everything for value in used(inner))
        if isinstance(op, ops.Attribute):
            self.receivers.update((op.result.name, value) for value in values_in(op.object))
        if cause is not None:
            for value in (*defined(op), *self.changed(op)):
                self.causes.setdefault(value.name, cause)

    def has_value(self, op: ops.Global) -> bool:
        """Whether a name of the surroundings stands for anything now."""
        if op.scope == "global":
            return op.name in self.subject.globals or hasattr(builtins, op.name)
        try:
            self.subject.closure[op.name].cell_contents  # noqa: B018  # it raises where the cell is empty
        except (KeyError, ValueError):
            return False
        return True

    def changed(self, op: Op) -> Iterator[Value]:
        """The values that an op may put another into."""
        match op:
            case ops.SetItem(object=held) | ops.SetAttribute(object=held) | ops.Store(cell=held):
                yield from values_in(held)
            case ops.Call(function=Value(name=name)) if name in self.receivers:
                yield self.receivers[name]

    def cause(self, values: Iterable[Value]) -> str | None:
        return next((self.causes[value.name] for value in values if value.name in self.causes), None)

    def unknown(self, value: Abstract, span: Span, what: str) -> NoReturn:
        place = self.frame.override or span
        may_unroll = bool(value.loops - self.decisions.unroll - self.decisions.roll) and not value.at_run
        cause = self.cause(_values(value))
        if cause is not None and not may_unroll and not self.closures:
            raise UncheckedError(Unchecked(place, f"{what} depends on {cause}"))
        try:
            super().unknown(value, span, what)
        except Undecided as undecided:
            if not undecided.decisions.stages:
                raise
            # A stage would begin here: the experiment itself finds out, and goes on then.
            raise UncheckedError(Unchecked(place, f"{what} depends on {_only_a_run(value.span)}")) from None

    # --- loops of which only a run tells how often they go round ---

    def stage_body(self, region: Region) -> None:
        """In an experiment each round is a stage. Here it is looked at once, for any value of the loop's variable."""

    @contextmanager
    def round(self, loop: Op) -> Iterator[None]:
        if id(loop) in self.decisions.roll:
            cause = self.cause(value for each in used(loop) for value in _values(self.scope[each]))
            for value in (each for part in regions(loop) for each in part.parameters if each in self.scope):
                for made in _values(self.scope[value]):
                    self.causes[made.name] = cause or _only_a_run(loop.span)
        with super().round(loop):
            yield

    # --- forwards ---

    def check_arguments(self, module: SiteModule, op: ops.Forward, span: Span) -> None:
        try:
            super().check_arguments(module, op, span)
        except CompileError as error:
            if op.method == "generate":
                raise
            self.diagnostics += error.diagnostics
            self.misgiven.add(id(op))

    def forward_(self, op: ops.Forward) -> Completion | None:
        known = set(self.inputs)
        completion = super().forward_(op)
        if id(op) in self.misgiven:  # the model would refuse them too
            self.inputs.update(dict.fromkeys(self.inputs.keys() - known))
        return completion


def _only_a_run(span: Span) -> str:
    return f"line {span.line}, known only when the experiment runs" if span.line else "what only a run can give"


def _values(value: Abstract) -> Iterator[Value]:
    """The values of the specialised program that an abstract one is made of."""
    if value.operand is not None:
        yield from values_in(value.operand)
    match value.fact:
        case Elements(items=list() as parts):
            for part in parts:
                yield from _values(part)
        case Iteration(bases=bases):
            for part in bases:
                yield from _values(part)
