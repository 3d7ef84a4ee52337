"""From the nodes of a document to objects: the other side of `capture`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from types import CellType, FunctionType
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.compilation import save
from nnsight_compiler.files import vocabulary
from nnsight_compiler.files.checking import check_program, program_from_json
from nnsight_compiler.files.classes import METHODS, OBJECT, OF_FILES, PLAIN_METHODS, TORCH_CLASSES, is_constant
from nnsight_compiler.files.document import array, fields, mapping, only, refuse, string, truth, whole
from nnsight_compiler.files.kinds import ANYTHING, is_instance, kind_of
from nnsight_compiler.files.modules import OWN
from nnsight_compiler.files.namespace import Namespace
from nnsight_compiler.files.values import ValueReader
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.runtime.functions import generate_function, give_defaults
from nnsight_compiler.runtime.names import signature_name
from nnsight_compiler.runtime.tokens import Listener

_LATE = ("namespace", "host", "model")
_MODEL_OPS = (
    ops.Forward, ops.Session, ops.Invoke, ops.Steps, ops.FromEnd, ops.Read, ops.Write, ops.Skip, ops.Save, ops.Stop,
    ops.Backward, ops.Grad, ops.SetGrad, ops.Edit,
)  # fmt: skip


@final
class Restore(ValueReader):
    """Builds the objects of one file, each once."""

    def __init__(self, entries: object, tensors: Mapping[str, torch.Tensor], namespace: Namespace) -> None:
        super().__init__(entries, tensors)
        self.namespace = namespace

    def bind(self, name: str, node: object, where: str) -> None:
        """Gives a global its value, at once or when the experiment first runs."""
        if not self._late(self.namespace, name, node, where):
            self.namespace[name] = self._named(node, where)

    def cell(self, node: object, where: str) -> CellType:
        """The cell of a free variable."""
        made = CellType()
        if not self._late(made, where.rpartition(".")[2], node, where):
            made.cell_contents = self._named(node, where)
        return made

    def _named(self, node: object, where: str) -> Any:
        """What a name stands for."""
        kind, held = only(node, where)
        if kind == "known":
            return self._known(string(held, where), where)
        return self.numbered(whole(held, where), where) if kind == "object" else self.value(node, where)

    def _late(self, place: dict[str, Any] | CellType, name: str, node: object, where: str) -> bool:
        kind, held = only(node, where)
        if kind == "namespace" and string(held, where) not in vocabulary.NAMESPACES:
            refuse(where, f"{held!r:.80} is no module that a file may name")
        if kind == "host":
            module, colon, rest = string(held, where).partition(":")
            names = module.split(".") + (rest.split(".") if rest else [])
            if not colon or not all(each.isidentifier() for each in names):
                refuse(where, f"{held!r:.80} is no name of something to import")
        if kind == "model":
            string(held, where)
        waits = kind in _LATE or (
            kind == "known" and vocabulary.is_target(string(held, where)) and vocabulary.resolve(held) is None
        )
        if waits:
            self.namespace.wait(place, name, kind, held)
        return waits

    def mentioned(self, found: Any) -> None:
        """A function in a value may be called without being named."""
        if isinstance(found, FunctionType):
            self.namespace.inside.append(found.__program__)  # type: ignore[attr-defined]

    def other(self, kind: str, held: object, where: str, depth: int) -> tuple[Any] | None:
        """Code, by its name."""
        match kind:
            case "known" if held in vocabulary.IN_SIGHT:
                refuse(where, f"{held} may only be what a name stands for, not part of a value")
            case "known":
                return (self._known(string(held, where), where),)
            case "package":
                return (save,) if held == "save" else refuse(where, f"{held!r:.80} is no function of this package")
            case "listener":
                return (Listener(whole(held, where, 0, 2**16)),)
            case "method":
                owner, name = array(held, where, 2)
                held = self.value(owner, where, depth + 1)
                known = isinstance(held, nn.Module) or is_instance(held)
                method = getattr(held, string(name, where), None) if known else None
                if not isinstance(getattr(method, "__program__", None), Program):
                    refuse(where, f"{name!r:.80} is no method of a captured object")
                return (method,)
            case _ if kind in _LATE:
                refuse(where, "this may only be what a name stands for, not part of a value")
        return None

    @staticmethod
    def _known(target: str, where: str) -> Any:
        if not vocabulary.is_target(target):
            refuse(where, f"{target!r:.80} is no known call")
        found = vocabulary.resolve(target)
        if found is None:
            refuse(where, f"{target} is not loaded; import {target.partition('.')[0]} before loading this file")
        return found

    def other_entry(self, kind: object, data: object, where: str) -> Any:
        """Functions, classes, modules and objects."""
        match kind:
            case "function":
                return self._function(data, where)
            case "class":
                return self._class(data, where)
            case "module":
                return self._module(data, where)
            case "instance":
                return self._instance(data, where)
            case _:
                refuse(where, f"{kind!r:.80} is no kind of object")

    # --- functions ---

    def _function(self, data: object, where: str) -> FunctionType:
        entry = fields(data, ("kind", "program", "qualified_name", "defaults"), where)
        program = program_from_json(entry["program"], f"{where}.program")
        check_program(program, f"{where}.program")
        body = program
        if any(isinstance(op, _MODEL_OPS) for op in program.walk()):
            body = _refusing(program)
        try:
            made = generate_function(body, self.namespace, None, dict.fromkeys(_optional(program)))
        except (SyntaxError, ValueError, TypeError, LookupError, RecursionError, IRError) as error:
            refuse(where, f"no function can be made of the program: {error}")
        made.__program__ = program  # type: ignore[attr-defined]  # functions take attributes
        made.__qualname__ = string(entry["qualified_name"], f"{where}.qualified_name")
        self.namespace.programs.append(program)
        self.made[self._open[-1]] = made  # it may be among its own defaults
        give_defaults(made, program, self.defaults(entry["defaults"], program, f"{where}.defaults"))
        return made

    def defaults(self, data: object, program: Program, where: str) -> dict[str, Any]:
        """The defaults of a program's optional parameters, by name."""
        held = fields(data, tuple(_optional(program)), where)
        return {name: self.value(node, f"{where}.{name}") for name, node in held.items()}

    # --- classes, modules and objects ---

    def _class(self, data: object, where: str) -> type:
        entry = fields(data, ("kind", "name", "base", "members"), where)
        plain = entry["base"] == OBJECT
        base = object if plain else self._torch_class(entry["base"], f"{where}.base")
        name = string(entry["name"], f"{where}.name")
        members: dict[str, Any] = {}
        owner: list[type] = []
        for member, node in mapping(entry["members"], f"{where}.members").items():
            at = f"{where}.members.{member}"
            special = PLAIN_METHODS if plain else METHODS
            if not member.isidentifier() or member in OWN or (member.startswith("__") and member not in special):
                refuse(at, f"{member!r:.80} is no name of a method")
            kind, held = only(node, at)
            value = self.value(held, at)
            if not plain or kind != "value":
                self.namespace.member_names.add(member)
            if kind != "value" and not isinstance(getattr(value, "__program__", None), Program):
                refuse(at, "a method is a function of the file")
            match kind:
                case "value" if plain and (not is_constant(value) or member in special):
                    refuse(at, "a plain class has methods and constants")
                case "value":
                    members[member] = value
                case "method":
                    members[member] = _of_its_own(value, owner)
                case "static" if member not in PLAIN_METHODS:
                    members[member] = staticmethod(value)
                case "property" if not plain:
                    members[member] = property(_of_its_own(value, owner))
                case _:
                    refuse(at, f"{kind!r:.80} is no kind of member")
        made = type(name.rpartition(".")[2] or "Module", (base,), {**members, "__module__": OF_FILES})
        made.__qualname__ = name
        owner.append(made)
        for node, value in zip(entry["members"].values(), members.values(), strict=True):
            (kind,) = node
            function = value.fget if kind == "property" else value.__func__ if kind == "static" else value
            if kind != "value":
                program = function.__program__
                self.namespace.methods[id(program)] = program, None if kind == "static" else made
        return made

    def _instance(self, data: object, where: str) -> object:
        entry = fields(data, ("kind", "class", "attributes"), where)
        kind = self.value(entry["class"], f"{where}.class")
        if not (isinstance(kind, type) and kind.__module__ == OF_FILES and kind.__base__ is object):
            refuse(f"{where}.class", "this is no plain class of the file")
        made: object = object.__new__(kind)
        self.made[self._open[-1]] = made
        self.namespace.instances.append(made)
        for name, node in mapping(entry["attributes"], f"{where}.attributes").items():
            at = f"{where}.attributes.{name}"
            check_attribute(made, name, at)
            value = self.value(node, at)
            if kind_of(value) != ANYTHING:
                self.namespace.member_names.add(name)  # a call of it is one of what it is now
            vars(made)[name] = value
        return made

    @staticmethod
    def _torch_class(data: object, where: str) -> type[nn.Module]:
        name = string(data, where)
        if name not in TORCH_CLASSES:
            refuse(where, f"{name!r:.80} is no module of torch's")
        return TORCH_CLASSES[name]

    def _module(self, data: object, where: str) -> nn.Module:
        names = ("kind", "class", "training", "parameters", "buffers", "modules", "non_persistent", "attributes")
        entry = fields(data, names, where)
        kind, held = only(entry["class"], f"{where}.class")
        if kind == "known":
            found: Any = self._torch_class(held, f"{where}.class")
        else:
            found = self.value(entry["class"], f"{where}.class")
            if not (isinstance(found, type) and found.__module__ == OF_FILES and issubclass(found, nn.Module)):
                refuse(f"{where}.class", "this is no class of the file")
        made: nn.Module = found.__new__(found)
        nn.Module.__init__(made)
        self.made[self._open[-1]] = made
        self.namespace.modules.append(made)
        made.training = truth(entry["training"], f"{where}.training")
        taken: set[str] = set()
        for word, wanted in (("parameters", nn.Parameter), ("buffers", torch.Tensor), ("modules", nn.Module)):
            into: dict[str, Any] = getattr(made, f"_{word}")
            for name, node in mapping(entry[word], f"{where}.{word}").items():
                at = f"{where}.{word}.{name}"
                if not name or "." in name or name in OWN or name in taken or name.startswith("__"):
                    refuse(at, f"{name!r:.80} is no name for a part of a module")
                taken.add(name)
                if word == "modules":
                    self.namespace.member_names.add(name)  # a call of it is one of a module
                part = None if node is None else self.value(node, at)
                if part is not None and not isinstance(part, wanted):
                    refuse(at, f"a {type(part).__name__} stands where a {wanted.__name__} must")
                into[name] = part
        for each in array(entry["non_persistent"], f"{where}.non_persistent"):
            made._non_persistent_buffers_set.add(string(each, f"{where}.non_persistent"))
        for name, node in mapping(entry["attributes"], f"{where}.attributes").items():
            at = f"{where}.attributes.{name}"
            if not name.isidentifier() or name in OWN or name in taken or name.startswith("__"):
                refuse(at, f"{name!r:.80} is no name for an attribute")
            vars(made)[name] = self.value(node, at)
        if isinstance(made, nn.RNNBase):
            try:
                made._init_flat_weights()
            except (AttributeError, TypeError, RuntimeError) as error:
                refuse(where, f"no {found.__name__} is like this: {error}")
        return made


def check_attribute(held: object, name: str, where: str) -> None:
    """Refuses a name for an attribute of an object that would hide what its class has, or is Python's own."""
    if not name.isidentifier() or name.startswith("__") or callable(getattr(type(held), name, None)):
        refuse(where, f"{name!r:.80} is no name for an attribute")


def _of_its_own(function: FunctionType, owner: list[type]) -> Any:
    """A method that takes an object of its class first, and no other: it was admitted for these.

    Args:
        owner: holds the class, once it is made.
    """

    @wraps(function)
    def method(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(module) not in owner:
            (made,) = owner
            raise TypeError(f"`{made.__qualname__}.{function.__name__}` takes no {type(module).__name__}")
        return function(module, *args, **kwargs)

    return method


def _optional(program: Program) -> list[str]:
    return [signature_name(parameter.value) for parameter in program.parameters if parameter.optional]


def _refusing(program: Program) -> Program:
    """A program with the same signature that says why it cannot run: its own takes part in a forward."""
    error, raised, span = Value("error"), Value("raised"), program.span
    text = f"`{program.name}` reads or writes values of a model, and can only be called by an experiment"
    return Program(
        program.name,
        program.parameters,
        Region(
            (),
            (
                ops.Global(error, "RuntimeError", span=span),
                ops.Call(raised, error, (ops.Argument(Literal(text)),), span=span),
                ops.Raise(raised, span=span),
            ),
        ),
        "function",
        span=span,
    )
