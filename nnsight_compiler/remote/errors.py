"""Errors on their way from where a job ran to who asked for it, with what the job had changed before."""

from __future__ import annotations

import base64
import binascii
import builtins
import linecache
import traceback
from typing import Any, NoReturn

import torch

from nnsight_compiler.figures import in_bytes
from nnsight_compiler.ir import errors
from nnsight_compiler.ir.errors import CompileError, ExperimentError, FileError
from nnsight_compiler.tracebacks import trimmed

Record = dict[str, Any]
MOST_CHANGED = 2**18
"""The bytes of what a job has changed before an error that go along with it."""
_CHANGES = "_nnsight_compiler_changes"
"""The attribute of an error that holds the file of these changes."""


class RemoteError(ExperimentError):
    """What a job raised at a service, of a class that is not known here; or a service that does not answer as it
    should."""


_OURS = {
    name: held for name, held in vars(errors).items() if isinstance(held, type) and issubclass(held, ExperimentError)
}
_BUILTIN = {
    name: held for name, held in vars(builtins).items()
    if isinstance(held, type) and issubclass(held, Exception) and not issubclass(held, (UnicodeError, SyntaxError))
}  # fmt: skip


def leave(error: BaseException, changes: bytes) -> None:
    """Notes with an error what had been changed before it: a file as of a result."""
    if len(changes) > MOST_CHANGED:
        error.add_note(
            f"what it had changed before is not carried back: {in_bytes(len(changes))}, and an error takes at most"
            f" {in_bytes(MOST_CHANGED)}"
        )
    else:
        setattr(error, _CHANGES, changes)


def left(error: BaseException) -> bytes | None:
    """What had been changed before an error, where it is known."""
    held: bytes | None = getattr(error, _CHANGES, None)
    return held


def error_record(error: BaseException) -> Record:
    """What is told of an error: its class, its text, the lines that it came through, and what had been changed."""
    changes = left(error)
    frames = traceback.extract_tb(trimmed(error))
    arguments = error.args if all(isinstance(each, (str, int, float, bool)) for each in error.args) else None
    return {
        "kind": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error),
        "arguments": None if arguments is None else list(arguments),
        "notes": list(getattr(error, "__notes__", ())),
        "where": [{"file": each.filename, "line": each.lineno, "text": each.line or ""} for each in frames],
        "changes": None if changes is None else base64.b64encode(changes).decode(),
    }


def raise_from(record: Record) -> NoReturn:
    """Raises the error of a record: of the same class where that is one of Python's, torch's or ours."""
    kind, module, message = str(record.get("kind")), str(record.get("module")), str(record.get("message"))
    error: Exception
    if module == "builtins" and kind in _BUILTIN:
        error = _made(_BUILTIN[kind], record.get("arguments"), message)
    elif kind in _OURS and module.startswith("nnsight_compiler."):
        found = _OURS[kind]
        error = found.__new__(found)
        Exception.__init__(error, message)
        if isinstance(error, (CompileError, FileError)):
            error.diagnostics = ()
    elif (module, kind) == ("torch", "OutOfMemoryError"):
        error = torch.OutOfMemoryError(message)
    else:
        error = RemoteError(f"{kind}: {message}")
    for note in record.get("notes") or ():
        error.add_note(str(note))
    for frame in record.get("where") or ():
        file, line = str(frame.get("file")), frame.get("line")
        text = linecache.getline(file, line).strip() if isinstance(line, int) else ""  # it was written here
        error.add_note(f"at the service, {file}:{line}: {text or frame.get('text')}")
    changes = record.get("changes")
    if isinstance(changes, str):
        try:
            leave(error, base64.b64decode(changes, validate=True))
        except binascii.Error:
            error.add_note("what it had changed before came back damaged")
    raise error


def _made(kind: type[Exception], arguments: Any, message: str) -> Exception:
    if isinstance(arguments, list):
        try:
            return kind(*arguments)
        except TypeError:
            pass
    return kind(message)


__all__ = ["MOST_CHANGED", "RemoteError", "error_record", "leave", "left", "raise_from"]
