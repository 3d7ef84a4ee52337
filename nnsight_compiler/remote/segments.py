"""Segments: parts of a program that run where the model is, each a job of its own.

    layer = pick(scores)                             client
    with model.trace(prompt):                        segment(model, prompt, layer)
        h = model.layers[layer].output
    p = h[0, -1].softmax(-1)                             return (p,)

What a segment takes is known for sure only when it is called: a module of the model is then sent as its path, and a
variable that has no value is none of the segment's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CellType
from typing import Any, final

from nnsight_compiler.experiment import Experiment
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Operand, Value
from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.runtime.functions import generate_function
from nnsight_compiler.runtime.support import UNBOUND as NO_VALUE


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a program as an experiment of its own, whose first parameter is the model.

    globals, closure: what its names stand for, as those of the program that it is a part of.
    """

    program: Program
    globals: dict[str, Any]
    closure: Mapping[str, CellType]

    def experiment(self) -> Experiment:
        """The experiment that runs it here."""
        names = sorted(
            {
                op.name
                for op in self.program.walk()
                if isinstance(op, (ops.Global, ops.SetGlobal)) and op.scope == "free"
            }
        )
        free = (ops.Global(Value(f"free.{name}"), name, "free", span=self.program.span) for name in names)
        body = Region((), (*free, ops.Return(NONE, span=self.program.span)))
        shell = replace(self.program, body=body, kind="function")
        return Experiment(generate_function(shell, self.globals, self.closure), self.program)


Run = Callable[[Segment, tuple[Any, ...]], Any]
"""Runs a segment where the model is: on the model and on data, one value for each of its parameters. What it returns is
what the segment's program returns; objects that this changed are changed in place."""


@final
@dataclass(slots=True)
class Outlined:
    """A segment before it is known what it is called with.

    program: takes the model, then the values in `takes`, named as in the source.
    gives: what it gives back, named as in the source.
    spans: of its ops, in the order of the source.
    model: the model that its names mention, if they do.
    """

    program: Program
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    spans: tuple[Span, ...]
    globals: dict[str, Any]
    closure: Mapping[str, CellType]
    model: Any = None
    _variants: dict[tuple[str, ...], Segment] = field(default_factory=dict)

    def called(self, run: Run, *values: Any) -> Any:
        """Runs it on these values."""
        roots = {id(value._root): value._root for value in values if is_handle(value)}
        if self.model is not None:
            roots.setdefault(id(self.model), self.model)
        if len(roots) != 1:
            which = "more than one model" if roots else "no model that can be told"
            raise FileError(f"{self.program.span}: this part of {self.program.name} runs on {which}")
        (model,) = roots.values()
        kinds = tuple(map(_sent_as, values))
        sent = [value._path if kind == "module" else value for value, kind in zip(values, kinds, strict=True)
                if kind in ("module", "value")]  # fmt: skip
        return run(self.segment(kinds), (model, *sent))

    def segment(self, kinds: Sequence[str]) -> Segment:
        """The segment for values that are sent in these ways."""
        key = tuple(kinds)
        if key not in self._variants:
            self._variants[key] = Segment(_variant(self.program, key), self.globals, self.closure)
        return self._variants[key]


def _sent_as(value: Any) -> str:
    if value is NO_VALUE:
        return "unbound"
    if is_handle(value):
        return "module" if value._path else "model"
    return "value"


def _variant(program: Program, kinds: tuple[str, ...]) -> Program:
    """The program that takes paths where it took modules, and that knows which variables have no value."""
    model, *others = program.parameters
    kept, known, ahead = [model], dict[Value, Operand](), list[Op]()
    taken = {value.name for value in program.values()}
    for parameter, kind in zip(others, kinds, strict=True):
        value = parameter.value
        match kind:
            case "unbound":
                known[value] = UNBOUND
            case "model":
                known[value] = model.value
            case "module":
                path = Value(_unlike(f"path_of_{value.name}", taken))
                ahead.append(ops.Item(value, model.value, path, span=program.span))
                kept.append(Parameter(path))
            case _:
                kept.append(parameter)
    body = substitute(program.body, known)
    return replace(program, parameters=tuple(kept), body=Region((), (*ahead, *body.ops)))


def _unlike(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def of_model(program: Program, models: Callable[[ops.Global], Any]) -> tuple[Program, Any]:
    """The program of an outline with the model as its first parameter, and the model that its names mention.

    models: the module of a model that a name stands for, or `None`.
    """
    taken = {value.name for value in program.values()}
    taken |= {op.name for op in program.walk() if isinstance(op, (ops.Global, ops.SetGlobal))}
    model = Value(_unlike("model", taken))
    naming = _Naming(model, models)
    body = substitute(naming.region(program.body), naming.known)
    parameters = (Parameter(model), *program.parameters)
    return replace(program, kind="experiment", parameters=parameters, body=body), naming.root


class _Naming:
    """Replaces names that stand for modules of the model by the way to them from the model."""

    def __init__(self, model: Value, models: Callable[[ops.Global], Any]) -> None:
        self.model = model
        self.models = models
        self.root: Any = None
        self.known: dict[Value, Operand] = {}

    def region(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            if not isinstance(op, ops.Global) or (held := self.models(op)) is None:
                made.append(rewrite(op, region=self.region))
                continue
            if self.root is not None and self.root is not held._root:
                raise FileError(f"{op.span}: `{op.name}` is a second model, and a job runs on one")
            self.root = held._root
            if held._path:
                made.append(ops.Item(op.result, self.model, Literal(held._path), span=op.span))
            else:
                self.known[op.result] = self.model
        return Region(region.parameters, tuple(made))
