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
`Decisions`, and the interpretation starts again. So it does where a value must be known that only the run of what
precedes gives: a stage then begins at that op (see `staging`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import used
from nnsight_compiler.ir.values import Unbound, Value
from nnsight_compiler.passes import differentiation, editing
from nnsight_compiler.passes.cells import interpret_cell
from nnsight_compiler.passes.completion import AccessInClosure, Completion
from nnsight_compiler.passes.decisions import Decisions, Undecided
from nnsight_compiler.passes.facts import (
    Abstract,
    Elements,
    Fact,
    Frame,
    Guard,
    Known,
    OpenSession,
    SiteCalls,
    SiteModule,
    Tracer,
)
from nnsight_compiler.passes.invokes import interpret_invoke
from nnsight_compiler.passes.names import read_name
from nnsight_compiler.passes.operators import interpret_format, interpret_operator
from nnsight_compiler.passes.remarks import Remark
from nnsight_compiler.passes.rows import Part
from nnsight_compiler.passes.sites import Order
from nnsight_compiler.passes.staging import Staging
from nnsight_compiler.passes.subject import Inputs, Subject


@dataclass(frozen=True, slots=True)
class Specialised:
    """A specialised program, and what it holds for.

    guards, objects: the facts it rests on, and the objects that their texts mention.
    inputs: the arguments of each forward where they are known, by the name of its result; of invokes, as one batch.
    models: the wrapped model of each forward.
    invoked: the invokes of each forward that bring its input, by the names of their results.
    parts: which rows each of these brings, where the inputs are known.
    unsaved: for a block, exports that hold values of the model which were not saved: name to where they were made.
    unsure: for a block, exports of which only the run can tell whether they are such values.
    stages: where the names of each stage come from, by the name of its result.
    orders: in which order the model of each forward runs its modules, as later passes found it.
    recomputed: the attention modules whose attention is computed anew, since their own gives no pattern.
    remarks: what the optimisations did, or did not do and why.
    """

    program: Program
    guards: tuple[Guard, ...]
    objects: Mapping[str, Any]
    inputs: Mapping[str, Inputs | None]
    models: Mapping[str, Any]
    invoked: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, Part]
    unsaved: Mapping[str, Span]
    unsure: Mapping[str, Span]
    stages: Mapping[str, Frame]
    orders: Mapping[str, Order] = field(default_factory=dict)
    recomputed: frozenset[str] = frozenset()
    remarks: tuple[Remark, ...] = ()


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
            decisions.add(undecided.decisions)


class Specialiser(Staging):
    """One interpretation of a program, under fixed decisions."""

    def run(self) -> Specialised:
        parameters = self.parameters
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
            self.emit(ops.Return(self.handed_over(result), span=completion.span or self.program.span))
        guards = tuple(self.guards.guards.values())
        program = replace(
            self.program,
            parameters=tuple(parameters),
            body=Region((), tuple(self.builder.ops)),
            target=next((type(model._module).__name__ for model in self.models.values()), ""),
            given=tuple(str(guard) for guard in guards if guard.kind in ("value", "length")),
        )
        return Specialised(
            program,
            guards,
            self.guards.objects,
            self.inputs,
            self.models,
            self.invoked,
            self.parts,
            unsaved,
            unsure,
            self.stages,
        )

    def exports(self, result: Abstract, unsaved: dict[str, Span], unsure: dict[str, Span]) -> Abstract:
        """The returned tuple of a block, without the values of the model that were not saved."""
        assert isinstance(result.fact, Elements)
        assert result.fact.items is not None
        parts: list[Abstract] = []
        for name, part in zip(self.program.exports, result.fact.items, strict=True):
            if part.live == 2:
                unsaved[name] = part.span
            elif part.live == 1 or _may_hold_values(part.fact):
                unsure[name] = part.span
            hidden = part.live == 2 or part.operand is None or isinstance(part.fact, (Tracer, OpenSession, SiteCalls))
            parts.append(Abstract(Unbound()) if hidden else part)
        return self.pack(parts)

    def op(self, op: Op) -> Completion | None:
        """Interprets one op; a completion where control leaves the region."""
        match op:
            case ops.Global():
                self.scope[op.result] = read_name(self, op)
            case ops.Attribute():
                self.scope[op.result] = self.evaluate.attribute(op, self.abstract(op.object), op.name)
            case ops.Read():
                self.scope[op.result] = self.evaluate.attribute(op, self.abstract(op.module), op.port)
            case ops.Item():
                self.scope[op.result] = self.evaluate.item(op)
            case ops.Operator():
                self.scope[op.result] = interpret_operator(self, op)
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
                elif self.program.kind == "stage" and any(
                    value.operand == parameter.value for parameter in self.parameters
                ):
                    kept = self.keep(op)  # another call may not have it
                    assert kept is not None
                    kept.fact = value.fact
                else:
                    self.scope[op.result] = value
            case ops.Cell() | ops.Load() | ops.Store():
                interpret_cell(self, op)
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
            case ops.Session():
                return self.session_(op)
            case ops.Backward():
                if self.closures:
                    raise AccessInClosure
                return differentiation.backward(self, op)
            case ops.Grad():
                self.scope[op.result] = differentiation.grad(self, op)
            case ops.SetGrad():
                differentiation.set_grad(self, op)
            case ops.Edit():
                editing.make(self, op)
            case ops.Yield():
                return Completion("yield", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Break():
                return Completion("break", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Continue():
                return Completion("continue", tuple(map(self.abstract, op.values)), self.span(op))
            case ops.Return():
                return Completion("return", (self.abstract(op.value),), self.span(op))
            case ops.Format():
                interpret_format(self, op)
            case ops.Emit():
                self.evaluate.calls.emit_generated(op)
            case ops.Raise():
                self.keep(op)
                return Completion("never")
            case ops.Invoke():
                return interpret_invoke(self, op)
            case ops.Skip():
                module = self.evaluate.resolved(self.abstract(op.module))
                if op.call is not None and isinstance(module.fact, SiteModule):
                    module = Abstract(None, SiteCalls(module.fact, op.call), span=op.span)
                self.evaluate.calls.skip(op, module, [(ops.Argument(op.value), self.abstract(op.value))])
            case ops.Stop():
                tracer = self.abstract(op.tracer).fact
                assert isinstance(tracer, Tracer), "only a tracer is stopped"
                self.evaluate.calls.stop(op, tracer.forward, [])
            case ops.Steps():
                self.fail(
                    op.span,
                    "`steps` stands in specialised programs only",
                    "write `for step in tracer.iter[…]:`",
                )
            case _:
                for name in used(op):
                    held = self.scope[name]
                    if isinstance(held.fact, Elements):
                        held.fact.forget()
                match op:
                    case ops.SetGlobal(name=assigned):
                        self.changes.names.add(assigned)
                    case ops.Delete(object=base):
                        self.change(self.abstract(base))
                self.keep(op)
        return None


def _may_hold_values(fact: Fact) -> bool:
    """Whether a container that the program made, and did not save, may hold values of the model."""
    if not isinstance(fact, Elements) or fact.saved:
        return False
    return fact.items is None or any(item.live or _may_hold_values(item.fact) for item in fact.items)
