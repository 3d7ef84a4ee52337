"""What the names and the attributes of a program are, and on which side they are looked up.

model.transformer.h[3]     either side: a module of the model
model.lm_head.weight       where the model is
settings.layer             the client, if that object is its own
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnsight_compiler.files.classes import is_constant, method_of
from nnsight_compiler.files.kinds import (
    ANYTHING,
    GIVEN,
    Own,
    Tree,
    is_known_method,
)
from nnsight_compiler.files.kinds import Kind as FileKind
from nnsight_compiler.files.vocabulary import Constant, HostName, KnownName, Space, builtin, member, part
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.values import Literal, Operand, Value
from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.remote.findings import Findings
from nnsight_compiler.remote.kinds import (
    BELONGING,
    CARRIED,
    DATA,
    LOCAL,
    MODULES,
    PLAIN,
    Belonging,
    Carried,
    Handle,
    Helper,
    Instance,
    Kind,
    Local,
    Method,
    Modules,
    Named,
    Side,
    kind_of,
    why_not_captured,
)


@dataclass(slots=True)
class Attributes(Findings):
    """Finds what names and attributes are."""

    def named(self, name: str, scope: str) -> Kind:
        """What a name holds now."""
        if scope == "free":
            try:
                return kind_of(self.closure[name].cell_contents)
            except (KeyError, ValueError):
                return LOCAL
        if name in self.globals_:
            return kind_of(self.globals_[name])
        return builtin(name) or LOCAL

    def environment(self, name: str, scope: str) -> FileKind:
        """The same, as admission knows it."""
        match self.names.get((name, scope), LOCAL):
            case Space() | KnownName() | Constant() | HostName() as kind:
                return Own() if kind == KnownName("nnsight_compiler.save") else kind
            case Handle() | Modules():
                return GIVEN
            case Helper():
                return Own()
        held = self.globals_.get(name)
        return Tree((held,)) if isinstance(held, nn.Module) else ANYTHING

    def imported(self, op: ops.Import) -> None:
        whole = op.module if op.leaf or op.name else op.module.partition(".")[0]
        if id(op) in self.refused or op.level:
            self.put(op.result, HostName(f"{whole}.{op.name}" if op.name else whole))
            self.set(op, Side.CLIENT)
            return
        kind: Named = Space(whole)
        self.put(op.result, member(Space(whole), op.name) if op.name is not None else kind)
        self.set(op, Side.EITHER)

    def attribute(self, op: ops.Attribute, live: bool) -> None:
        owner, side = self.kind(op.object), Side.EITHER
        kind: Kind = DATA
        match owner:
            case Space():
                kind = member(owner, op.name)
            case HostName(name=whole):
                kind = HostName(f"{whole}.{op.name}")
            case KnownName(target=target):
                kind = part(target, op.name)
                if isinstance(kind, HostName) and is_known_method(op.name):
                    kind = DATA
            case Handle(held=held):
                kind, side = self.of_handle(held, op.name)
            case Modules() if op.name == "result" and self.is_tracer(op.object):
                side = Side.WORKER
            case Modules():
                kind, side = MODULES, Side.WORKER if op.name in self.weights else Side.EITHER
                kind = DATA if side is Side.WORKER else kind
            case Belonging():
                kind, side = BELONGING, Side.EITHER if live else Side.NEAR
            case Carried():
                kind = CARRIED
            case Instance():
                kind = self.of_instance(owner, op.name)
                if isinstance(kind, Local):
                    side = Side.CLIENT
                    told = (
                        f"`{owner.kind.__qualname__}.{op.name}`, which is neither a method nor a constant of the class,"
                    )
                    self.reasons.setdefault(id(op), told)
            case Local(held=held):
                kind, side = attribute_of(held, op.name), Side.CLIENT
                self.reasons.setdefault(id(op), f"`.{op.name}` of an object that the client alone has")
        self.put(op.result, kind)
        self.set(op, side)

    def is_tracer(self, operand: Operand) -> bool:
        """Whether a value is what a forward, or one of its invokes, gives to its body."""
        maker = self.made.get(operand.name) if isinstance(operand, Value) else None
        return isinstance(maker, (ops.Forward, ops.Invoke))

    def of_handle(self, held: Any, name: str) -> tuple[Kind, Side]:
        """What an attribute of a module of the model is."""
        module = held._module  # no module where it stands for something inside of one
        if isinstance(module, nn.Module) and (name in module._parameters or name in module._buffers):
            return DATA, Side.WORKER
        try:
            found = getattr(held, name)
        except (AttributeError, ExperimentError):  # the compiler tells, where it runs
            return MODULES, Side.EITHER
        if is_handle(found):
            return Handle(found), Side.EITHER
        if inspect.ismethod(found) or inspect.isfunction(found):
            return MODULES, Side.EITHER
        if isinstance(found, torch.Tensor):
            return DATA, Side.WORKER
        return (DATA if isinstance(found, PLAIN) else BELONGING), Side.EITHER

    @property
    def weights(self) -> frozenset[str]:
        """The names of all weights and buffers of the models that the program mentions."""
        roots = {id(kind.held._root): kind.held._root for kind in self.kinds.values() if isinstance(kind, Handle)}
        return frozenset(
            name
            for root in roots.values()
            for module in root._module.modules()
            for name in (*module._parameters, *module._buffers)
        )

    def item_of(self, owner: Kind, index: Operand) -> Kind:
        if isinstance(owner, Handle) and isinstance(index, Literal):
            try:
                found = owner.held[index.value]
            except (LookupError, TypeError, ExperimentError):  # the compiler tells, where it runs
                return MODULES
            return Handle(found) if is_handle(found) else MODULES
        return MODULES

    def of_instance(self, owner: Instance, name: str) -> Kind:
        """What an attribute of an object of a plain class is."""
        method = method_of(owner.kind, name)
        if method is not None:
            return Method(method[0], owner, method[1])
        found = inspect.getattr_static(owner.kind, name, None)
        if found is not None and not is_constant(found):
            return LOCAL
        if owner.held is None:
            return CARRIED  # it may be a module
        kind = kind_of(vars(owner.held).get(name, found))
        return kind if isinstance(kind, (Carried, Instance, Helper, KnownName)) else DATA


def why_local(kind: Kind) -> str:
    """Why the client alone has an object of a class of the user's."""
    if not isinstance(kind, Local) or kind.held is None:
        return ""
    reason = why_not_captured(kind.held)
    return "" if reason is None else f" ({reason})"


def attribute_of(held: object, name: str) -> Kind:
    """What an attribute of the client's object is, where that can be told without running any code of its class."""
    own = getattr(held, "__dict__", None)
    if not isinstance(own, dict) or name not in own or inspect.getattr_static(type(held), name, None) is not None:
        return LOCAL
    kind = kind_of(own[name])
    return kind if isinstance(kind, (Local, Handle)) or isinstance(own[name], (bool, int, float, str)) else LOCAL
