"""Files of edits: the programs, and what they captured, in one safetensors file (see `docs/edits.md`).

The container, the table of objects, and the rules of what a file may say and call are those of experiment files. In a
file, what an edit captured is a global of the file, which its program reads first; in memory it is a parameter.
"""

from __future__ import annotations

import builtins
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from nnsight_compiler.compilation import lower_program
from nnsight_compiler.edits import Edit, check, running
from nnsight_compiler.files.capture import Capture
from nnsight_compiler.files.checking import check_program, program_from_json
from nnsight_compiler.files.document import array, fields, mapping, parse, refuse, string
from nnsight_compiler.files.format import VERSION, read, write
from nnsight_compiler.files.kinds import HostOp
from nnsight_compiler.files.loading import keep_sources, versioned
from nnsight_compiler.files.namespace import Namespace
from nnsight_compiler.files.restore import Restore
from nnsight_compiler.files.saving import LocalOnlyWarning, described, once, producer, sources
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import to_json
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import used

if TYPE_CHECKING:
    from nnsight_compiler.models import NNsight

FORMAT = "nnsight-compiler-edits"
_FIELDS = ("format", "version", "producer", "model", "edits", "globals", "objects", "sources")


@final
@dataclass(frozen=True, slots=True)
class SavedEdits:
    """A file that was written: how long it is in bytes, the edits in it, what they captured, and their host calls."""

    path: Path
    size: int
    edits: tuple[str, ...]
    captured: dict[str, str]
    host_ops: tuple[HostOp, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size} bytes"]
        lines += [f"  edit {number}: {edit}" for number, edit in enumerate(self.edits)]
        lines += [f"  {name}: {what}" for name, what in self.captured.items()]
        if self.host_ops:
            lines += ["local-only, since it calls what is not in the table of known calls:"]
            lines += [f"  {call}" for call in self.host_ops]
        return "\n".join(lines)


def export_edits(model: NNsight, path: str | os.PathLike[str]) -> SavedEdits:
    """Writes the edits of a model to a file.

    Raises:
        FileError: the model has none, what they captured has no form in a file, or the file cannot be written.
    """
    if not model._edits:
        raise FileError("this model has no edits to export\n  way out: make one: `with model.edit() as edited:`")
    capture = Capture(edits_of=model._base)
    document, tensors = edits_document(model, capture)
    host_ops = edits_from(parse(json.dumps(document, allow_nan=False)), tensors)[1].host_ops  # it can be read back
    write(path, document, tensors)
    captured = {name: described(node, capture.objects) for name, node in capture.globals.items()}
    titles = tuple(f"{edit.program.span.file}:{edit.program.span.line}" for edit in model._edits)
    saved = SavedEdits(Path(path), Path(path).stat().st_size, titles, captured, host_ops)
    if host_ops:
        listed = "\n".join(f"  {call}" for call in host_ops)
        warnings.warn(
            f"{saved.path} is local-only, since it calls what is not in the table of known calls:\n{listed}",
            LocalOnlyWarning,
            stacklevel=3,
        )
    return saved


def edits_document(model: NNsight, capture: Capture) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of a model's edits, captured by an empty `capture` of them.

    Raises:
        FileError: what they captured has no form in a file.
    """
    programs = [_captured_as_globals(edit, capture) for edit in model._edits]
    capture.modules.finish()
    if capture.problems:
        raise FileError("these edits cannot be put into a file:", once(capture.problems))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "producer": producer(),
        "model": model._class_name,
        "edits": [to_json(program) for program in programs],
        "globals": capture.globals,
        "objects": capture.objects,
        "sources": sources(capture.programs),
    }
    return document, capture.tensors.finish()


def import_edits(model: NNsight, path: str | os.PathLike[str], allow_host_calls: bool = False) -> tuple[Edit, ...]:
    """The edits in a file, for a model.

    Args:
        allow_host_calls: import and call the functions outside of the table of known calls that the file names. Only
            for files whose author you trust: such a function may do anything.

    Raises:
        FileError: the file is damaged, of another version, or holds or calls what no file may.
        CompileError: the edits do not fit this model; each mistake with its line.
    """
    container = read(path)
    try:
        edits = edits_for(model, parse(container.text), container.tensors, allow_host_calls)
    except FileError as error:
        raise FileError(f"{os.fspath(path)} cannot be imported: {error}") from None
    check(model._with_edits((*model._edits, *edits)))
    return edits


def edits_for(
    model: NNsight, document: object, tensors: Mapping[str, torch.Tensor], allow_host_calls: bool = False
) -> tuple[Edit, ...]:
    """The edits of a document, for a model. Raises as `import_edits` does."""
    programs, namespace = edits_from(document, tensors, model, allow_host_calls)
    namespace.link()
    made = []
    for program in programs:
        source = running(program)
        namespace.programs[0] = source
        lower_program(source, {source.parameters[0].value.name: model}, namespace, {})  # refuses what is not admitted
        made.append(_captured_as_values(program, namespace))
    return tuple(made)


def edits_from(
    document: object, tensors: Mapping[str, torch.Tensor], model: Any = None, allow_host_calls: bool = False
) -> tuple[list[Program], Namespace]:
    """The programs of a document, and the names that they read."""
    data = fields(versioned(document, FORMAT), _FIELDS, "")
    for name in ("producer", "model"):
        string(data[name], name)
    namespace = Namespace(model, allow_host_calls)
    restore = Restore(data["objects"], tensors, namespace)
    for name, node in mapping(data["globals"], "globals").items():
        if not name.isidentifier():
            refuse("globals", f"{name!r:.80} is no name")
        restore.bind(name, node, f"globals.{name}")
    programs = []
    for number, held in enumerate(array(data["edits"], "edits")):
        where = f"edits[{number}]"
        program = program_from_json(held, where)
        check_program(program, where, edit=True)
        programs.append(program)
    if not programs:
        refuse("edits", "there is none")
    restore.finish()
    namespace.programs[:0] = programs
    namespace.check()
    keep_sources(data["sources"])
    return programs, namespace


def is_edits(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file says that it holds edits."""
    data = parse(read(path).text)
    return isinstance(data, dict) and data.get("format") == FORMAT


def _captured_as_globals(edit: Edit, capture: Capture) -> Program:
    """The program of an edit as a file holds it."""
    program = edit.program
    tracer, model, *captured = program.parameters
    places = _places(program)
    reads: list[Op] = []
    capture.programs.append(program)
    for parameter in captured:
        value = parameter.value
        span = places.get(value.name, program.span)
        name = capture.captured(value.name, edit.values[value.name], span)
        reads.append(ops.Global(value, name, span=span))
    body = Region((), (*reads, *program.body.ops))
    return replace(program, parameters=(tracer, model), body=body)


def _captured_as_values(program: Program, namespace: Namespace) -> Edit:
    """The edit that the program of a file stands for."""
    count = len(_leading(program))
    reads = [op for op in program.body.ops[:count] if isinstance(op, ops.Global)]
    values = {op.result.name: namespace.get(op.name, getattr(builtins, op.name, None)) for op in reads}
    parameters = (*program.parameters, *(Parameter(op.result) for op in reads))
    return Edit(replace(program, parameters=parameters, body=Region((), program.body.ops[count:])), values)


def _leading(program: Program) -> list[Op]:
    """The ops at the start of a program that read names."""
    found: list[Op] = []
    for op in program.body.ops:
        if not isinstance(op, ops.Global):
            break
        found.append(op)
    return found


def _places(program: Program) -> dict[str, Span]:
    """Where each value is used first."""
    return {value.name: op.span for op in reversed(list(program.walk())) for value in used(op)}


def programs_of(path: str | os.PathLike[str]) -> Iterator[Program]:
    """The programs in a file of edits, as they stand in it."""
    container = read(path)
    yield from edits_from(parse(container.text), container.tensors)[0]
