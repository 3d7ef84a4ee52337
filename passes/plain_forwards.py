"""Forwards that only read: what such a forward computes depends on its model and its input alone, so that one may serve
where the program has several, or has one run again.

Whether a forward is one, which ops of its body may run where another forward runs, and what may change what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions, used, walk
from nnsight_compiler.ir.values import Module, Operand, Value
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.known_calls import CHANGES_MODULES, MODULE_CALL
from nnsight_compiler.passes.memory import Memory, Root, Site, Weight
from nnsight_compiler.passes.roots import Roots, is_outside

Trusted = Callable[[ops.Forward], str | None]
"""Says why a model, or what it is given, may have one run of it differ from two, or tell them apart; `None` where it
cannot: it is in evaluation mode, draws nothing at random, and no gradients flow through it."""


class PlainForwards:
    """The answers for one program. Only ops of that very program may be asked about.

    memory: counts on the copies that a run makes, so that a write to a site is none to the forward's input.
    kept: does not, and knows of all that may hold a value: what is put into two places must be two tensors.
    """

    def __init__(self, program: Program, trusted: Trusted) -> None:
        self.program = program
        self.memory = Memory.of(program, copies=True)
        self.kept = Memory.of(program)
        self.origins = self.memory.origins
        self.trusted = trusted
        everything = [cast(AnyOp, op) for op in program.walk()]
        self.gradients = any(isinstance(op, (ops.Backward, ops.Gradients)) for op in everything)
        self.tracers = {value.name for op in everything for value in used(op)}
        self.written: dict[str, Op] = {}
        changed: set[Root] = set()
        returned: set[Root] = set()
        for op in everything:
            if isinstance(op, (ops.Return, ops.Emit)):
                returned |= self.kept.reachable(op.value)
            if not any(True for _ in regions(op)):
                changed |= self.kept.writes(op)
                for root in self.kept.writes(op):
                    if isinstance(root, Site):
                        self.written.setdefault(root.forward, op)
        self.changed, self.returned = frozenset(changed), frozenset(returned)

    def why_not(self, forward: ops.Forward) -> str | None:
        """Why a forward does more than read; `None` if it does not."""
        if forward.method != "trace":
            return "it is no single run of the model"
        if self.gradients or any(argument.keyword == "grad" for argument in forward.arguments):
            return "gradients are asked for, and what is recorded of a forward serves one backward pass"
        if forward.result.name in self.written:
            return f"line {self.written[forward.result.name].span.line} may change a value of it"
        for op in walk(forward.body):
            why = self._why_not(cast(AnyOp, op))
            if why is not None:
                return f"line {op.span.line} {why}"
        if forward.result.name in self.tracers:
            return "its tracer is used"
        return self.trusted(forward)

    def changes(self, forward: ops.Forward) -> bool:
        """Whether a forward is meant to change the model, so that no one would have it be one with another."""
        op = self.written.get(forward.result.name)
        return op is not None and not (isinstance(op, ops.Call) and self.origins.known(op) is None)

    def _why_not(self, op: AnyOp) -> str | None:
        match op:
            case ops.Write() | ops.Skip():
                return "changes the model"
            case ops.Applied():
                return "is an edit of the model"
            case ops.Read(rows=None) | ops.Save():
                return None
            case ops.Call() if not isinstance(op.function, Module):
                known = self.origins.known(op)
                if known is None or self.memory.calls_closures(op):
                    return "runs code that the compiler does not know"
                return "draws at random or sets what others go by" if known.random or known.mode else None
            case ops.Return() | ops.Stage() | ops.Edit() | ops.Session() | ops.Closure():
                return "is more than a read"
            case _:
                return "is more than a read" if ops.Effect.MODEL in op.effects else None

    def is_movable(self, op: AnyOp) -> bool:
        """Whether an op of such a forward's body, if all that it needs is there, may run where another forward runs: it
        computes a value, and does nothing else."""
        if self.memory.writes(op):
            return False
        match op:
            case ops.Read() | ops.Save() | ops.Global() | ops.Attribute() | ops.Format():
                return True
            case ops.Operator(in_place=in_place):
                return not in_place
            case ops.Item(object=base):
                return self.origins.is_tensor(base) or self.origins.is_from_model(base)
            case ops.Build(kind=kind):
                return kind == "tuple"
            case ops.Call(function=Module()):
                return op.target == MODULE_CALL and all(each.keyword != "hook" for each in op.arguments)
            case ops.Call():
                known = self.origins.known(op)
                return known is not None and known.behaviour in (Behaviour.PURE, Behaviour.VIEW) and not known.iterator
            case _:
                return False

    def needs_forward(self, op: Op) -> bool:
        """Whether an op of such a body must stay in a forward: it reads a site, or weights, through which gradients
        would flow elsewhere."""
        inner = (op, *(each for region in regions(op) for each in walk(region)))
        return any(
            isinstance(each, (ops.Read, ops.Forward))
            or (isinstance(each, ops.Call) and isinstance(each.function, Module))
            or any(isinstance(root, Weight) for root in self.memory.reads(each))
            for each in inner
        )

    def is_barrier(self, op: Op) -> bool:
        """Whether an op, or anything in it, may change the model: it writes to what comes from outside, or runs code
        that the compiler does not know."""
        if any(is_outside(root) for root in self.memory.writes(op)):
            return True
        inner = (op, *(each for region in regions(op) for each in walk(region)))
        return any(
            isinstance(each, ops.SetGlobal) or (isinstance(each, ops.Call) and self._changes_modules(each))
            for each in inner
        )

    def _changes_modules(self, op: ops.Call) -> bool:
        known = self.origins.known(op)
        if known is None:
            return not isinstance(op.function, Module)
        receiver = [each.value for each in self.origins.arguments(op)[:1]]
        return known.mode or (
            known.target in CHANGES_MODULES
            and not any(self.origins.is_tensor(each) or self.origins.is_from_model(each) for each in receiver)
        )

    def is_told_apart(self, value: Value) -> bool:
        """Whether what a forward gave is returned, or put where others find it, so that two of it must be two."""
        roots = self.kept.roots(value)
        return bool(roots & self.returned) or any(map(self.kept.is_kept, roots))

    def is_changed(self, value: Value) -> bool:
        """Whether anything in the program may write to what a forward gave."""
        return self.kept.overlap(self.kept.roots(value), self.changed)

    def inputs(self, forward: ops.Forward) -> Roots:
        """The storages of what a forward is given."""
        return frozenset[Root]().union(*(self.memory.reachable(each.value) for each in forward.arguments))

    def named(self, operand: Operand) -> Operand | tuple[str, str]:
        """An operand, or, where it is looked up by a name, that name."""
        found = self.origins.definition(operand)
        return (found.scope, found.name) if isinstance(found, ops.Global) else operand
