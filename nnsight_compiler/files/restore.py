"""From the nodes of a document to objects: the other side of `capture`."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.compilation import save
from nnsight_compiler.files import vocabulary
from nnsight_compiler.files.checking import check_program, program_from_json
from nnsight_compiler.files.format import array, fields, mapping, only, refuse, string, truth, whole
from nnsight_compiler.files.modules import METHODS, OWN, TORCH_CLASSES
from nnsight_compiler.files.namespace import Namespace
from nnsight_compiler.files.tensors import TensorSource, read_dtype
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import literal_from_json
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.runtime.functions import generate_function, give_defaults
from nnsight_compiler.runtime.names import signature_name

MAX_DEPTH = 100
_LATE = ("namespace", "host", "model")
_MODEL_OPS = (
    ops.Forward, ops.Session, ops.Invoke, ops.Steps, ops.FromEnd, ops.Read, ops.Write, ops.Skip, ops.Save, ops.Stop,
    ops.Backward,
    ops.Grad, ops.SetGrad,
)  # fmt: skip


@final
class Restore:
    """Builds the objects of one file, each once."""

    def __init__(self, entries: object, tensors: Mapping[str, torch.Tensor], namespace: Namespace) -> None:
        self.entries = array(entries, "objects")
        self.tensors = TensorSource(dict(tensors))
        self.namespace = namespace
        self._made: dict[int, Any] = {}
        self._open: list[int] = []

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

    def finish(self) -> None:
        """Builds what nothing has asked for yet, so that all of a file is known to be sound."""
        for number in range(len(self.entries)):
            self.numbered(number, f"objects[{number}]")
        self.tensors.finish()

    # --- values ---

    def value(self, node: object, where: str, depth: int = 0) -> Any:
        """The value of a node."""
        if depth > MAX_DEPTH:
            refuse(where, f"values are nested more than {MAX_DEPTH} deep")
        kind, held = only(node, where)
        match kind:
            case "object":
                found = self.numbered(whole(held, where), where)
                if isinstance(found, FunctionType):
                    self.namespace.inside.append(found.__program__)  # type: ignore[attr-defined]
                return found
            case "tuple" | "frozenset":
                parts = [self.value(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(array(held, where))]
                return tuple(parts) if kind == "tuple" else frozenset(self._hashable(part, where) for part in parts)
            case "slice":
                return slice(*(self.value(part, where, depth + 1) for part in array(held, where, 3)))
            case "range":
                parts = [self.value(part, where, depth + 1) for part in array(held, where, 3)]
                if not all(type(part) is int for part in parts) or parts[2] == 0:
                    refuse(where, "no range is like this")
                return range(*parts)
            case "size":
                return torch.Size([whole(part, where, 0, 2**48) for part in array(held, where)])
            case "dtype":
                return read_dtype(held, where)
            case "device":
                try:
                    return torch.device(string(held, where))
                except RuntimeError:
                    refuse(where, f"{held!r:.80} is no device")
            case "known":
                return self._known(string(held, where), where)
            case "package":
                return save if held == "save" else refuse(where, f"{held!r:.80} is no function of this package")
            case "method":
                owner, name = array(held, where, 2)
                module = self.value(owner, where, depth + 1)
                method = getattr(module, string(name, where), None) if isinstance(module, nn.Module) else None
                if not isinstance(getattr(method, "__program__", None), Program):
                    refuse(where, f"{name!r:.80} is no method of a captured module")
                return method
            case _ if kind in _LATE:
                refuse(where, "this may only be what a name stands for, not part of a value")
            case _:
                try:
                    return literal_from_json(kind, held, where).value
                except IRError as error:
                    refuse(where, str(error))

    @staticmethod
    def _hashable(value: Any, where: str) -> Any:
        try:
            hash(value)
        except TypeError:
            refuse(where, f"a {type(value).__name__} cannot stand in a set, or be a key")
        return value

    @staticmethod
    def _known(target: str, where: str) -> Any:
        if not vocabulary.is_target(target):
            refuse(where, f"{target!r:.80} is no known call")
        found = vocabulary.resolve(target)
        if found is None:
            refuse(where, f"{target} is not loaded; import {target.partition('.')[0]} before loading this file")
        return found

    # --- objects ---

    def numbered(self, number: int, where: str) -> Any:
        """The object of a number, made when it is first asked for."""
        if number >= len(self.entries):
            refuse(where, f"there is no object {number}")
        if number in self._made:
            return self._made[number]
        if number in self._open or len(self._open) > MAX_DEPTH:
            refuse(where, f"the object {number} contains itself, or is nested too deeply")
        self._open.append(number)
        made = self._entry(self.entries[number], f"objects[{number}]")
        self._open.pop()
        self._made[number] = made
        return made

    def _entry(self, data: object, where: str) -> Any:
        kind = mapping(data, where).get("kind")
        match kind:
            case "tensor":
                return self.tensors.make(data, where)
            case "list" | "set":
                items = array(fields(data, ("kind", "items"), where)["items"], f"{where}.items")
                parts = [self.value(part, f"{where}.items[{i}]") for i, part in enumerate(items)]
                return parts if kind == "list" else {self._hashable(part, where) for part in parts}
            case "dict":
                made = {}
                for i, item in enumerate(array(fields(data, ("kind", "items"), where)["items"], f"{where}.items")):
                    at = f"{where}.items[{i}]"
                    key, held = array(item, at, 2)
                    made[self._hashable(self.value(key, at), at)] = self.value(held, at)
                return made
            case "function":
                return self._function(data, where)
            case "class":
                return self._class(data, where)
            case "module":
                return self._module(data, where)
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
        self._made[self._open[-1]] = made  # it may be among its own defaults
        give_defaults(made, program, self.defaults(entry["defaults"], program, f"{where}.defaults"))
        return made

    def defaults(self, data: object, program: Program, where: str) -> dict[str, Any]:
        """The defaults of a program's optional parameters, by name."""
        held = fields(data, tuple(_optional(program)), where)
        return {name: self.value(node, f"{where}.{name}") for name, node in held.items()}

    # --- modules ---

    def _class(self, data: object, where: str) -> type[nn.Module]:
        entry = fields(data, ("kind", "name", "base", "members"), where)
        base = self._torch_class(entry["base"], f"{where}.base")
        name = string(entry["name"], f"{where}.name")
        members: dict[str, Any] = {}
        for member, node in mapping(entry["members"], f"{where}.members").items():
            at = f"{where}.members.{member}"
            if not member.isidentifier() or member in OWN or (member.startswith("__") and member not in METHODS):
                refuse(at, f"{member!r:.80} is no name of a method")
            kind, held = only(node, at)
            value = self.value(held, at)
            self.namespace.member_names.add(member)
            if kind != "value" and not isinstance(getattr(value, "__program__", None), Program):
                refuse(at, "a method is a function of the file")
            match kind:
                case "method" | "value":
                    members[member] = value
                case "static":
                    members[member] = staticmethod(value)
                case "property":
                    members[member] = property(value)
                case _:
                    refuse(at, f"{kind!r:.80} is no kind of member")
        made = type(name.rpartition(".")[2] or "Module", (base,), {**members, "__module__": "experiment_file"})
        made.__qualname__ = name
        for node, value in zip(entry["members"].values(), members.values(), strict=True):
            (kind,) = node
            function = value.fget if kind == "property" else value.__func__ if kind == "static" else value
            if kind != "value":
                program = function.__program__
                self.namespace.methods[id(program)] = program, None if kind == "static" else made
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
            if not (isinstance(found, type) and found.__module__ == "experiment_file"):
                refuse(f"{where}.class", "this is no class of the file")
        made: nn.Module = found.__new__(found)
        nn.Module.__init__(made)
        self._made[self._open[-1]] = made
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
