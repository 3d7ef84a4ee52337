"""Writes an experiment file."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType
from typing import TYPE_CHECKING, Any

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.capture import Capture
from nnsight_compiler.files.format import FORMAT, VERSION, write
from nnsight_compiler.ir.errors import Diagnostic, FileError
from nnsight_compiler.ir.program import Program

if TYPE_CHECKING:
    from nnsight_compiler.experiment import Experiment

MAX_LINE = 2**20
"""Lines of longer files are not kept."""


def save_experiment(experiment: Experiment, path: str | os.PathLike[str]) -> None:
    """Writes an experiment to a file: its program, and all that it reads from outside of itself.

    Raises:
        CompileError: the function cannot be compiled.
        FileError: what it reads has no form in a file, or the file cannot be written.
    """
    document, tensors = experiment_document(experiment)
    write(path, document, tensors)


def experiment_document(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the tensors of an experiment's file."""
    function, program = experiment._function, experiment.ir
    cache = experiment._held()
    capture = Capture()
    body = capture.experiment(program, cache.globals, cache.closure)
    defaults = _defaults(capture, function, program)
    capture.modules.finish()
    if capture.problems:
        raise FileError(f"{program.name} cannot be put into a file:", _once(capture.problems))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "producer": _producer(),
        "qualified_name": function.__qualname__,
        "documentation": function.__doc__,
        **body,
        "defaults": defaults,
        "globals": capture.globals,
        "objects": capture.objects,
        "sources": _sources(capture.programs),
    }
    return document, capture.tensors.finish()


def _defaults(capture: Capture, function: FunctionType, program: Program) -> dict[str, Any]:
    try:
        return capture.defaults(function, function.__name__)
    except CannotCaptureError as error:
        capture.problems.append(Diagnostic(program.span, f"`{program.name}`{error.trail}: {error.reason}", error.way_out))
        return {}


def _once(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    return list(dict.fromkeys(problems))


def _producer() -> str:
    try:
        return version("nnsight-compiler")
    except PackageNotFoundError:
        return ""


def _sources(programs: Iterable[Program]) -> dict[str, dict[str, str]]:
    """The lines that the programs' ops stand on, by file and number: for errors and tracebacks, where the file itself
    is not at hand."""
    lines: dict[str, set[int]] = {}
    for program in programs:
        for span in (program.span, *(op.span for op in program.walk())):
            last = max(span.line, span.end_line)
            if 0 < span.line and last <= MAX_LINE:
                lines.setdefault(span.file, set()).update(range(span.line, last + 1))
    found: dict[str, dict[str, str]] = {}
    for file, numbers in lines.items():
        texts = {str(number): linecache.getline(file, number).rstrip("\n") for number in sorted(numbers)}
        found[file] = {number: text for number, text in texts.items() if text}
    return found


__all__ = ["experiment_document", "save_experiment"]
