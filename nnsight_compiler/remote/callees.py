"""On which side calls are, and what they give.

torch.stack(xs)          either side: a known call
model.lm_head(x)         where the model is
metric(p)                the client: no code of this function is in a job
tokenizer.encode(text)   the client, if that object is its own
"""

from __future__ import annotations

from dataclasses import dataclass

from nnsight_compiler.files.classes import TORCH_CLASSES
from nnsight_compiler.files.kinds import (
    TEXT_METHODS,
    THROUGH,
    TREE_METHODS,
    is_known_method,
    trains,
)
from nnsight_compiler.files.vocabulary import Constant, HostName, KnownName, Space
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.traverse import used
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.remote.attributes import Attributes, why_local
from nnsight_compiler.remote.kinds import (
    BELONGING,
    CARRIED,
    DATA,
    MODULES,
    Belonging,
    Carried,
    Closed,
    Data,
    Handle,
    Helper,
    Instance,
    Kind,
    Local,
    Method,
    ModuleClass,
    Modules,
    PlainClass,
    Side,
    surroundings,
)


@dataclass(slots=True)
class Callees(Attributes):
    """Finds what calls are."""

    def call(self, op: ops.Call, live: bool) -> None:
        given = [self.kind(argument.value) for argument in op.arguments]
        callee = self.kind(op.function)
        maker = self.made.get(op.function.name) if isinstance(op.function, Value) else None
        held = self.holding(given)
        functions = [kind for kind in given if isinstance(kind, (Closed, Helper))]
        side, reason = Side.EITHER, ""
        kind: Kind = DATA
        match callee:
            case HostName(name=name) if name in TORCH_CLASSES:
                side, kind, reason = Side.CLIENT, CARRIED, f"the making of a `{name}`"
            case ModuleClass(name=name):
                side, kind, reason = Side.CLIENT, CARRIED, f"the making of a `{name}`"
            case PlainClass(held=made):
                side, kind, reason = Side.CLIENT, Instance(made), f"the making of a `{made.__qualname__}`"
            case Method(held=function):
                side, kind = self.method_of(callee, op.arguments)
                reason = f"the call of `{function.__qualname__}`, which runs what only the client has,"
            case Instance():
                called = self.of_instance(callee, "__call__")
                side = Side.CLIENT
                if isinstance(called, Method):
                    side, kind = self.method_of(called, op.arguments)
                reason = f"the call of a `{callee.kind.__qualname__}`, which runs what only the client has,"
            case Carried():
                side = Side.WORKER if self.is_for_optimisers(op.result) else Side.EITHER
                kind = CARRIED if isinstance(maker, ops.Attribute) and maker.name in TREE_METHODS else DATA
            case HostName(name=name):
                side, reason = Side.CLIENT, f"the call of `{name}`, which is not in the table of known calls,"
            case Space(name=name):
                side, reason = Side.CLIENT, f"the call of `{name}`"
            case Local():
                side = Side.CLIENT
                reason = f"the call of a function that the client alone has{why_local(callee)}"
                if isinstance(maker, ops.Attribute):
                    owner = self.kind(maker.object)
                    reason = f"the call of `.{maker.name}` of an object that the client alone has{why_local(owner)}"
            case Helper(held=function):
                side, kind = self.helper(function, op.arguments)
                reason = f"the call of `{surroundings(function)[0].__name__}`, which runs what only the client has,"
            case Closed(name=name):
                closure = self.closures[name]
                for parameter, given_kind in self.bound(closure.parameters, op.arguments).items():
                    self.put(Value(parameter), given_kind)
                if name in self.waiting:
                    self.enter(closure, live)
                side, kind = self.content(closure.body), self.returned(closure.body)
                reason = f"the call of `{self.closures[name].name}`, which runs what only the client has,"
            case Handle():
                side = Side.WORKER
            case Modules():
                side, kind = self.of_model(maker)
            case Belonging():
                side = Side.EITHER if live else Side.NEAR
                name = maker.name if isinstance(maker, ops.Attribute) else ""
                text = name in TEXT_METHODS or name in ("encode", "decode", "tokenize")
                kind = DATA if text or is_known_method(name) else BELONGING
            case KnownName(target=target) if target.startswith(("random.", "numpy.random.")):
                side, reason = Side.CLIENT, f"the call of `{target}`, which draws from a generator of this process,"
            case KnownName(target=target):
                if target in THROUGH or target in ("builtins.list", "builtins.dict"):
                    kind = MODULES if isinstance(held, Modules) and not functions else DATA
                if target in ("torch.autograd.grad", "torch.autograd.backward") or target.startswith("torch.optim."):
                    side = Side.WORKER  # what it gives cannot be sent
                if any(self.side_of(each) is Side.WORKER for each in functions):
                    side = Side.WORKER
            case Constant() | Data():
                side, reason = self.method(op, maker)
        if side is Side.BOTH:
            side = Side.CLIENT
        if isinstance(held, Local) and side is not Side.WORKER and not (live and side is Side.EITHER):
            side = Side.CLIENT
            if any(self.is_clients(each) for each in functions):
                reason = reason or "a call that is given a function which only the client can run"
        if isinstance(held, Belonging) and side is Side.EITHER and not live:
            side = Side.NEAR
        made_here = isinstance(callee, PlainClass) or kind == CARRIED
        if id(op) in self.refused and not made_here:
            side, reason = Side.CLIENT, reason or self.refused[id(op)]
        if side is Side.CLIENT and not made_here:
            self.clients(op, reason)
        else:
            if side is Side.CLIENT:
                self.reasons.setdefault(id(op), reason)
            self.put(op.result, kind)
            self.set(op, side)

    def is_for_optimisers(self, value: Value) -> bool:
        """Whether only torch's optimisers are given a value: it goes where they are."""
        users = [op for op in self.program.walk() if value in used(op)]
        return bool(users) and all(isinstance(op, ops.Call) and self.is_optimiser(op.function) for op in users)

    def is_optimiser(self, function: Operand) -> bool:
        kind = self.kind(function)
        return isinstance(kind, KnownName) and kind.target.startswith("torch.optim.")

    def of_model(self, maker: Op | None) -> tuple[Side, Kind]:
        """The call of a module, or of a method of one."""
        name = maker.name if isinstance(maker, ops.Attribute) else ""
        if name in TREE_METHODS:
            weights = name in ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict")
            return (Side.WORKER, DATA) if weights else (Side.EITHER, MODULES)
        return Side.WORKER, DATA

    def method(self, op: ops.Call, maker: Op | None) -> tuple[Side, str]:
        """The call of a method of data, or of a barrier."""
        if self.makes_barrier(maker):
            return Side.EITHER, ""
        if not isinstance(maker, ops.Attribute):
            return Side.CLIENT, "the call of a function that only the run can give"
        if trains(op, maker.name):
            return Side.WORKER, ""
        if is_known_method(maker.name) or maker.name in TEXT_METHODS:
            return Side.EITHER, ""
        return Side.CLIENT, f"the call of the method `.{maker.name}`, which is not in the table of known calls,"

    def makes_barrier(self, op: Op | None) -> bool:
        """Whether an op is `tracer.barrier(…)`, whose result invokes call to wait for one another."""
        made = self.made.get(op.function.name) if isinstance(op, ops.Call) and isinstance(op.function, Value) else None
        return isinstance(made, ops.Attribute) and made.name == "barrier"
