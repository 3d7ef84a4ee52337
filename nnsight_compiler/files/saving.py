"""Writes an experiment file."""

from __future__ import annotations

import json
import linecache
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, final

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.capture import Capture
from nnsight_compiler.files.document import parse
from nnsight_compiler.files.format import FORMAT, VERSION, write
from nnsight_compiler.files.kinds import HostOp
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.ir.errors import Diagnostic, FileError
from nnsight_compiler.ir.program import Program

if TYPE_CHECKING:
    from nnsight_compiler.experiment import Experiment

MAX_LINE = 2**20
"""Lines of longer files are not kept."""


class LocalOnlyWarning(UserWarning):
    """A file makes host calls, so that only who trusts it runs it, where their code is."""


@final
@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file that was written: how long it is in bytes, what was captured, by name, and the host calls it makes."""

    path: Path
    size: int
    captured: dict[str, str]
    host_ops: tuple[HostOp, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size} bytes"]
        lines += [f"  {name}: {what}" for name, what in self.captured.items()]
        if self.host_ops:
            lines += ["local-only, since it calls what is not in the table of known calls:"]
            lines += [f"  {call}" for call in self.host_ops]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what IPython asks for
        printer.text(str(self))


def save_experiment(experiment: Experiment, path: str | os.PathLike[str]) -> SavedFile:
    """Writes an experiment to a file: its program, and all that it reads from outside of itself.

    Warns with `LocalOnlyWarning` where it makes host calls.

    Raises:
        CompileError: the function cannot be compiled.
        FileError: what it reads has no form in a file, or the file cannot be written.
    """
    document, tensors = experiment_document(experiment)
    # What cannot be read back is not written.
    host_ops = experiment_from(parse(json.dumps(document, allow_nan=False)), tensors).host_ops
    write(path, document, tensors)
    saved = SavedFile(Path(path), Path(path).stat().st_size, _captured(document), host_ops)
    if host_ops:
        listed = "\n".join(f"  {call}" for call in host_ops)
        warnings.warn(
            f"{saved.path} is local-only, since it calls what is not in the table of known calls:\n{listed}",
            LocalOnlyWarning,
            stacklevel=3,
        )
    return saved


def _captured(document: dict[str, Any]) -> dict[str, str]:
    """What each name that the experiment reads from outside stands for, in a word or two."""
    nodes = {**document["globals"], **document["closure"], **document["defaults"]}
    return {name: described(node, document["objects"]) for name, node in nodes.items()}


def described(node: dict[str, Any], objects: list[dict[str, Any]]) -> str:
    ((kind, held),) = node.items()
    if kind != "object":
        return {"namespace": f"the library {held}", "known": str(held), "model": "the model", "package": "save"}.get(
            kind, f"host call {held.replace(':', '.').strip('.')}" if kind == "host" else f"{kind} {held}"
        )
    entry = objects[held]
    match entry["kind"]:
        case "tensor":
            return f"{entry['dtype']}{entry['shape']}"
        case "function":
            return "function, with its program"
        case "module":
            ((_, which),) = entry["class"].items()
            name = which if isinstance(which, str) else objects[which]["name"]
            return f"module {name}"
        case other:
            return f"{other} of {len(entry['items'])}"


def experiment_document(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the tensors of an experiment's file."""
    function, program = experiment._function, experiment.ir
    cache = experiment._held()
    capture = Capture()
    body = capture.experiment(program, cache.globals, cache.closure)
    defaults = _defaults(capture, function, program)
    capture.modules.finish()
    if capture.problems:
        raise FileError(f"{program.name} cannot be put into a file:", once(capture.problems))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "producer": producer(),
        "qualified_name": function.__qualname__,
        "documentation": function.__doc__,
        **body,
        "defaults": defaults,
        "globals": capture.globals,
        "objects": capture.objects,
        "sources": sources(capture.programs),
    }
    return document, capture.tensors.finish()


def _defaults(capture: Capture, function: FunctionType, program: Program) -> dict[str, Any]:
    try:
        return capture.defaults(function, function.__name__)
    except CannotCaptureError as error:
        text = f"`{program.name}`{error.trail}: {error.reason}"
        capture.problems.append(Diagnostic(program.span, text, error.way_out))
        return {}


def once(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    return list(dict.fromkeys(problems))


@cache
def producer() -> str:
    """The version of this package, as documents name it."""
    try:
        return version("nnsight-compiler")
    except PackageNotFoundError:
        return ""


def sources(programs: Iterable[Program]) -> dict[str, dict[str, str]]:
    """The lines that the programs' ops stand on, by file and number: for errors and tracebacks, where the file itself
    is not at hand."""
    lines: dict[str, set[int]] = {}
    for program in programs:
        for span in (program.span, *(op.span for op in program.walk())):
            last = max(span.line, span.end_line)
            if span.line > 0 and last <= MAX_LINE:
                lines.setdefault(span.file, set()).update(range(span.line, last + 1))
    found: dict[str, dict[str, str]] = {}
    for file, numbers in lines.items():
        texts = {str(number): linecache.getline(file, number).rstrip("\n") for number in sorted(numbers)}
        found[file] = {number: text for number, text in texts.items() if text}
    return found


__all__ = ["LocalOnlyWarning", "SavedFile", "experiment_document", "save_experiment"]
