"""What a program takes from outside of itself, parted into code and data.

    vector = torch.randn(768)                          code   experiment steer(prompt, vector):
    @intervene                                                    model = global …, F = global …
    def steer(model, prompt):                                     with model.trace(prompt): …
        with model.trace(prompt):               ──▶
            h = F.normalize(vector)                    data   prompt, vector
            model.layers[3].output += h

Plain data, wherever it comes from, is a parameter of the program that is sent, so that a new vector or prompt is new
data for code that is known. Functions, libraries, modules and the model are names that the code reads, and so are
objects of plain classes, whose attributes are data again. What shares a tensor with the code goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import CellType
from typing import Any, NamedTuple

import torch

from nnsight_compiler.files.cannot import WAY_OUT, CannotCaptureError
from nnsight_compiler.files.capture import Capture
from nnsight_compiler.files.edits import edits_document
from nnsight_compiler.files.format import FORMAT, VERSION
from nnsight_compiler.files.saving import once, producer, sources
from nnsight_compiler.files.values import Node
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import Diagnostic, FileError
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.ir.values import Literal, Operand, Value
from nnsight_compiler.options import DEFAULT, Options
from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.remote.data import DataWriter, Holding, holds_modules, is_data
from nnsight_compiler.remote.job import Job
from nnsight_compiler.remote.random_state import KEY as RANDOM
from nnsight_compiler.remote.random_state import draws
from nnsight_compiler.runtime.support import UNBOUND

_CHANGING = frozenset(words("append clear extend insert pop popitem remove reverse setdefault sort update"))
"""Methods of containers that change them."""
_WAY_OUT = "compute what the traces need of it before them, as numbers, strings or tensors"
ELSEWHERE = frozenset({"remote", "blocking"})
"""Arguments of a trace that say where it runs, and are not sent there."""


class Sent(NamedTuple):
    """A job, and the objects of this process that its tables of objects are of: what a run changes, it changes there.

    model: the model that the code reads, as it is here.
    """

    job: Job
    data: tuple[object, ...]
    code: tuple[object, ...]
    model: Any


def sent(
    program: Program,
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
    values: Mapping[str, Any],
    model_name: Any,
    options: Options = DEFAULT,
) -> Sent:
    """The job of running a program on these values of its parameters.

    Args:
        values: by the names of the parameters; those without a value are left out.
        model_name: gives the name of a model at the service.

    Raises:
        FileError: something that it takes is neither data nor code that can be sent; each with its line.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise FileError(
            f"{program.name} cannot be sent: `torch.autocast` holds here, and not where it would run\n"
            "  way out: call it outside of that context, or within `torch.autocast(…, enabled=False)`"
        )
    bound: frozenset[int] = frozenset()
    while True:
        made = _Made(program, globals_, closure, values, bound)
        found = made.shared()
        if found <= bound:
            break
        bound |= found
    writer, capture, problems = made.writer, made.capture, made.problems
    if problems:
        problems = [replace(each, way_out=_WAY_OUT) if each.way_out == WAY_OUT else each for each in problems]
        raise FileError(f"{program.name} cannot be sent:", once(problems))
    if capture.model is None:
        raise FileError(f"{program.name} cannot be sent: it runs no model")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "producer": producer(),
        "qualified_name": program.name,
        "documentation": None,
        **made.body,
        "defaults": {},
        "globals": capture.globals,
        "objects": capture.objects,
        "sources": sources(capture.programs),
    }
    try:
        gradients = writer.gradients(capture.held)
    except CannotCaptureError as error:
        reason = f"a gradient (`.grad`) cannot be sent: {error.reason}"
        raise FileError(f"{program.name} cannot be sent:", [Diagnostic(program.span, reason, error.way_out)]) from None
    edits, tensors = None, {**capture.tensors.finish(), **writer.tensors.finish()}
    if capture.model._edits:
        edits, more = edits_document(capture.model, Capture(edits_of=capture.model._base, prefix="edits"))
        tensors |= more
    if draws(capture.programs):
        tensors[RANDOM] = torch.get_rng_state()
    job = Job(
        model_name(capture.model),
        document,
        made.arguments,
        writer.objects,
        tensors,
        made.attributes,
        gradients,
        _renamed(program, capture.model._rename),
        edits,
        options,
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    return Sent(job, tuple(writer.held), tuple(capture.held), capture.model)


class _Made:
    """The parts of a job, made of a program and the values of its parameters.

    bound: the `id` of what goes with the code, though it is data.
    """

    def __init__(
        self,
        program: Program,
        globals_: Mapping[str, Any],
        closure: Mapping[str, CellType],
        values: Mapping[str, Any],
        bound: frozenset[int],
    ) -> None:
        def goes_as_data(value: Any) -> bool:
            return id(value) not in bound and is_data(value)

        self.parting = _Parting(program, globals_, closure, values, goes_as_data)
        self.problems = list(self.parting.problems)
        self.writer = DataWriter("data")
        self.arguments: dict[str, Node] = {}
        self.attributes: dict[int, dict[str, Node]] = {}
        self.capture = Capture(prefix="code", may_be_edited=True, lifted=goes_as_data)
        self.body = self.capture.experiment(self.parting.program, self.parting.code, {})
        self.capture.modules.finish()
        self.problems += self.capture.problems
        for name, (value, told, span) in self.parting.data.items():
            self._write(self.arguments, name, value, told, span)
        for held, attributes in self.capture.classes.fields:
            number = self.capture.number(held, {})
            of_object: dict[str, Node] = {}
            for name, value in attributes.items():
                self._write(of_object, name, value, f".{name}", program.span)
            self.attributes[number] = of_object

    def _write(self, into: dict[str, Node], name: str, value: Any, told: str, span: Span) -> None:
        try:
            into[name] = self.writer.value(value, told)
        except CannotCaptureError as error:
            self.problems.append(Diagnostic(span, f"`{told}`{error.trail}: {error.reason}", error.way_out))

    def shared(self) -> frozenset[int]:
        """The `id` of the data that holds what the code holds too: both must be one object there, as here."""
        code = Holding()
        for held in self.capture.held:
            code.add(held)
        values = [value for value, _, _ in self.parting.data.values()]
        values += [value for _, attributes in self.capture.classes.fields for value in attributes.values()]
        return frozenset(id(value) for value in values if code.shares(value))


def _renamed(program: Program, rename: Mapping[Any, Any]) -> dict[str, str | list[str]]:
    """The names of a model's own, as data."""
    for key in rename:
        if not isinstance(key, str):
            raise FileError(
                f"{program.name} cannot be sent: names are given to the modules of the class `{key.__qualname__}`\n"
                "  way out: rename modules by their paths: `rename={'transformer.h': 'blocks'}`"
            )
    return {path: names if isinstance(names, str) else list(names) for path, names in rename.items()}


class _Parting:
    """A program whose parameters are data, and whose names are code.

    data: for each parameter, its value, what it is called in the source, and where.
    code: the names that it reads. is_data: says which values are data.
    """

    def __init__(
        self,
        program: Program,
        globals_: Mapping[str, Any],
        closure: Mapping[str, CellType],
        values: Mapping[str, Any],
        is_data: Callable[[Any], bool],
    ) -> None:
        self.is_data = is_data
        self.data: dict[str, tuple[Any, str, Any]] = {}
        self.code: dict[str, Any] = {}
        self.problems: list[Diagnostic] = []
        self._taken = {value.name for value in program.values()} | {
            op.name for op in program.walk() if isinstance(op, (ops.Global, ops.SetGlobal))
        }
        self._named: dict[tuple[str, str], str] = {}
        self._displays: dict[int, tuple[Value, str]] = {}
        self._built: list[Op] = []
        self._lifted: dict[tuple[str, str], Value] = {}
        self._set = {(op.name, op.scope) for op in program.walk() if isinstance(op, ops.SetGlobal)}
        parameters, first = [], []
        mapping: dict[Value, Operand] = {}
        if program.kind == "block":
            program, values = _spread(program, values)
        for parameter in program.parameters:
            value = values.get(parameter.value.name, UNBOUND)
            if value is UNBOUND or self.is_data(value):
                made = Value(self._identifier(parameter.value.name), parameter.value.type)
                mapping[parameter.value] = made
                parameters.append(Parameter(made))
                if value is not UNBOUND:
                    self.data[made.name] = value, parameter.value.name, program.span
            elif holds_modules(value):
                mapping[parameter.value] = self._display(value, parameter.value.name, program.span)
            else:
                self._taken.discard(parameter.value.name)
                name = self._fresh(parameter.value.name)
                self.code[name] = value
                first.append(ops.Global(parameter.value, name, span=program.span))
        body = self._region(program.body, globals_, closure)
        parameters += [Parameter(value) for value in self._lifted.values()]
        body = substitute(Region((), (*first, *self._built, *body.ops)), mapping)
        self.program = Program(
            program.name, tuple(parameters), body, "block" if program.kind == "block" else "experiment",
            exports=program.exports, span=program.span,
        )  # fmt: skip
        self._check_displays()

    def _display(self, held: Any, told: str, span: Span) -> Value:
        """A container with modules of the model in it, made by the program itself: they are names, and no data."""
        if id(held) in self._displays:
            return self._displays[id(held)][0]
        made = Value(self._fresh(told))
        self._displays[id(held)] = made, told
        if isinstance(held, dict):
            elements = [ops.Element(self._part(held[key], told, span), self._part(key, told, span)) for key in held]
        else:
            elements = [ops.Element(self._part(each, told, span)) for each in held]
        self._built.append(ops.Build(made, type(held).__name__, tuple(elements), span=span))  # type: ignore[arg-type]
        return made

    def _part(self, held: Any, told: str, span: Span) -> Operand:
        if holds_modules(held):
            return self._display(held, told, span)
        if isinstance(held, (type(None), bool, int, float, str)):
            return Literal(held)
        made = Value(self._fresh(told))
        if self.is_data(held):
            self._lifted[made.name, "part"] = made
            self.data[made.name] = held, told, span
        else:
            self.code[made.name] = held
            self._built.append(ops.Global(made, made.name, span=span))
        return made

    def _check_displays(self) -> None:
        """What the program changes of a container that it makes for itself would be lost."""
        made = {value.name: told for value, told in self._displays.values()}
        for op in self.program.walk():
            match op:
                case ops.SetItem(object=Value(name=name)) | ops.Delete(object=Value(name=name)):
                    pass
                case ops.Operator(in_place=True, operands=(Value(name=name), *_)):
                    pass
                case ops.Attribute(object=Value(name=name), name=method) if method in _CHANGING:
                    pass
                case _:
                    continue
            if name in made:
                text = f"`{made[name]}` holds modules of the model, and what is changed of it cannot be carried back"
                self.problems.append(Diagnostic(op.span, text, f"change a copy of it: `{made[name]}.copy()`"))

    def _identifier(self, name: str) -> str:
        return name if name.isidentifier() else self._fresh("value")

    def _fresh(self, name: str) -> str:
        number, free = 0, name if name.isidentifier() else "value"
        stem = free
        while free in self._taken:
            number += 1
            free = f"{stem}_{number}"
        self._taken.add(free)
        return free

    def _region(self, region: Region, globals_: Mapping[str, Any], closure: Mapping[str, CellType]) -> Region:
        mapping: dict[Value, Operand] = {}
        made: list[Op] = []
        for op in region.ops:
            op = rewrite(op, region=lambda inner: self._region(inner, globals_, closure))
            if isinstance(op, (ops.Forward, ops.Session)):
                op = replace(op, arguments=tuple(a for a in op.arguments if a.keyword not in ELSEWHERE))
            if isinstance(op, ops.SetGlobal):
                text = f"`{op.name}` is assigned outside of the function, which only this process can do"
                self.problems.append(Diagnostic(op.span, text, "return the value, and assign it after the call"))
            if isinstance(op, ops.Global):
                lifted = self._outside(op, globals_, closure)
                if isinstance(lifted, Value):
                    mapping[op.result] = lifted
                    continue
                op = replace(op, name=lifted, scope="global")
            made.append(op)
        return (
            substitute(Region(region.parameters, tuple(made)), mapping)
            if mapping
            else Region(region.parameters, tuple(made))
        )

    def _outside(self, op: ops.Global, globals_: Mapping[str, Any], closure: Mapping[str, CellType]) -> str | Value:
        """The name by which the code reads a name from outside, or the parameter that has its value."""
        key = op.name, op.scope
        if key in self._lifted:
            return self._lifted[key]
        if key in self._named:
            return self._named[key]
        held = _held(op, globals_, closure)
        if held and key not in self._set and holds_modules(held[0]):
            return self._display(held[0], op.name, op.span)
        if held and key not in self._set and self.is_data(held[0]):
            value = self._lifted[key] = Value(self._fresh(op.name))
            self.data[value.name] = held[0], op.name, op.span
            return value
        name = self._named[key] = op.name if op.name not in self.code else self._fresh(op.name)
        if held:
            self.code[name] = held[0]
        return name


def _spread(program: Program, values: Mapping[str, Any]) -> tuple[Program, Mapping[str, Any]]:
    """A block's trace with each of its arguments as a parameter, in place of a tuple and a dict of them."""
    model, positional, keyword, *reads = program.parameters
    taken = {value.name for value in program.values()}
    made: dict[str, Any] = {}
    arguments: list[ops.Argument] = []
    for name, value in (
        *((None, value) for value in values[positional.value.name]),
        *values[keyword.value.name].items(),
    ):
        free = name or "argument"
        while free in taken | made.keys():
            free += "_"
        made[free] = value
        arguments.append(ops.Argument(Value(free), name))

    def change(op: Op) -> Op:
        if isinstance(op, ops.Forward) and any(a.value == positional.value for a in op.arguments):
            return replace(op, arguments=tuple(arguments))
        return rewrite(op, region=lambda region: Region(region.parameters, tuple(map(change, region.ops))))

    body = Region((), tuple(map(change, program.body.ops)))
    parameters = (model, *(Parameter(Value(name)) for name in made), *reads)
    return replace(program, parameters=parameters, body=body), {**values, **made}


def _held(op: ops.Global, globals_: Mapping[str, Any], closure: Mapping[str, CellType]) -> tuple[Any] | None:
    if op.scope == "global":
        return (globals_[op.name],) if op.name in globals_ else None
    try:
        return (closure[op.name].cell_contents,)
    except (KeyError, ValueError):
        return None
