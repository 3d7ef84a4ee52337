"""What goes wrong between a client and a service: each with its reason and a way out.

What a service says is shown as text, without control characters, and never longer than a few lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, final

from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.span import Span
from nnsight_compiler.remote.errors import MOST_CHANGED, Record, RemoteError

_LONGEST = 2000
"""Characters of a service's text that are shown."""
_LONGEST_MESSAGE = 100_000
"""The same, of what a job raised: the mistakes of a program, each with its line."""
_MOST = 200
"""How many lines of a traceback are shown."""


class ServiceError(RemoteError):
    """A service that cannot be asked, or that does not do what it is asked for. `code` is its own word for the reason,
    where it gave one."""

    code = ""


@final
class NoServiceError(ServiceError):
    """It is not known which service is meant."""


@final
class KeyRefusedError(ServiceError):
    """The service wants an API key, or another one."""


@final
class UnreachableError(ServiceError):
    """The line to the service is broken, and stays so."""


@final
class BusyError(ServiceError):
    """The service has no room for a job, or is not ready, for longer than a client waits."""


@final
class AnswerError(ServiceError):
    """The service answers with something that is no answer of this protocol."""


class JobRefusedError(ServiceError):
    """The service does not take this job. Where a line of the experiment is the reason, it is a `Diagnostic`."""

    def __init__(self, reason: str, diagnostics: tuple[Diagnostic, ...] = ()) -> None:
        self.diagnostics = diagnostics
        Exception.__init__(self, "\n".join([reason, *map(str, diagnostics)]))


@final
class JobNotCompiledError(JobRefusedError, CompileError):
    """The service does not take this job, which does not compile: as it would not where it is called."""


@final
class JobCancelledError(ServiceError):
    """A job that was cancelled before it ended."""


@final
class NotThereError(ServiceError):
    """The service has no such job, result or model, or has it no longer."""


def shown(text: object, longest: int = _LONGEST) -> str:
    """A text from outside as it may be printed: of bounded length, and without what moves a terminal's cursor."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:longest])
    return plain if len(str(text)) <= longest else f"{plain} …"


def refusal(status: int, body: object, url: str, key: str | None, asked: str) -> ServiceError:
    """The error that an answer with this status stands for. `asked` is what was asked for: `job 3f2a`, `model gpt2`."""
    said = _said(body)
    error = _refusal(status, said, url, key, asked)
    error.code = shown(said.get("code") or "", 100)
    return error


def _refusal(status: int, said: Mapping[str, Any], url: str, key: str | None, asked: str) -> ServiceError:
    message = shown(said.get("message") or f"HTTP status {status}")
    match status:
        case 401 if key is None:
            return KeyRefusedError(
                f"{url} wants an API key, and none is known here\n"
                f"  way out: run `nnsightc login {url}`, or set NNSIGHT_API_KEY"
            )
        case 401:
            return KeyRefusedError(
                f"{url} does not accept the API key: {message}\n"
                f"  way out: run `nnsightc login {url}` with one that is valid, or set NNSIGHT_API_KEY"
            )
        case 403:
            return KeyRefusedError(
                f"{url} does not allow this with your API key: {message}\n"
                "  way out: ask whoever runs the service, or log in with another key"
            )
        case 404:
            return NotThereError(f"{url} does not know {asked}: {message}")
        case 409:
            return ServiceError(f"{url} cannot do this with {asked} as it is now: {message}")
        case 410:
            return NotThereError(
                f"{url} has the result of {asked} no longer: {message}\n"
                "  way out: run the experiment again; results are kept for a limited time"
            )
        case 413:
            way_out = "send or return less: narrow to the rows, positions and layers that you use, or use shorter data"
            return _refused(f"{url} does not take {asked}, which is too large", said, message, way_out)
        case 422:
            return _refused(f"{url} refuses {asked}", said, message)
        case 400:
            return ServiceError(
                f"{url} cannot read {asked}: {message}\n"
                "  way out: it may be of another version than this package; update the older of the two"
            )
        case 429 | 503:
            return BusyError(f"{url} does nothing about {asked} now: {message}\n  way out: try again later")
        case _ if 300 <= status < 400:
            return ServiceError(
                f"{url} sends requests on to another address, where an API key would not be safe (HTTP {status})\n"
                "  way out: name the address that it leads to"
            )
        case _:
            return ServiceError(f"{url} failed over {asked} (HTTP {status}): {message}\n  way out: try again later")


def failure(record: object) -> Record:
    """What a service recorded of an error, as `raise_from` reads it: each field of the type that it must have."""
    data = record if isinstance(record, dict) else {}
    arguments, frames, changes = data.get("arguments"), data.get("where"), data.get("changes")
    return {
        "kind": shown(data.get("kind") or "an error", 200),
        "module": shown(data.get("module") or "", 200),
        "message": shown(data.get("message") or "no reason given", _LONGEST_MESSAGE),
        "arguments": [shown(each) if isinstance(each, str) else each for each in arguments]
        if isinstance(arguments, list) and all(isinstance(each, (str, int, float)) for each in arguments)
        else None,
        "notes": [shown(each) for each in _list(data.get("notes"))],
        "where": [
            {name: shown(frame.get(name, ""), 400) for name in ("file", "line", "text")}
            for frame in _list(frames)
            if isinstance(frame, dict)
        ],
        "changes": changes if isinstance(changes, str) and len(changes) <= 2 * MOST_CHANGED else None,
    }


def _list(data: object) -> list[object]:
    """At most so many items of an array; none where there is none."""
    return data[:_MOST] if isinstance(data, list) else []


def _said(body: object) -> Mapping[str, Any]:
    """The `error` of an answer's JSON; nothing where there is none."""
    found = body.get("error") if isinstance(body, dict) else None
    return found if isinstance(found, dict) else {}


def _refused(reason: str, said: Mapping[str, Any], message: str, way_out: str = "") -> JobRefusedError:
    """A refusal that points to the line which the service names."""
    kind = JobNotCompiledError if said.get("code") == CompileError.__name__ else JobRefusedError
    span = _span(said.get("where"))
    op = said.get("op")
    if op:
        message = f"{message} (in `{shown(op, 300)}`)"
    if span is not None and str(span) not in message:  # a compile error names its lines itself
        return kind(reason, (Diagnostic(span, message, way_out),))
    text = f"{reason}:\n{message}" if "\n" in message else f"{reason}: {message}"
    return kind(f"{text}\n  way out: {way_out}" if way_out else text)


_PLACE = re.compile(r"(?P<file>.{1,1000}):(?P<line>[0-9]{1,9}):(?P<column>[0-9]{1,9})")


def _span(where: object) -> Span | None:
    """The place that `demo.py:12:8` names."""
    found = _PLACE.fullmatch(where) if isinstance(where, str) else None
    if found is None:
        return None
    line, column = int(found["line"]), max(int(found["column"]) - 1, 0)
    return Span(shown(found["file"]), line, column, line, column + 1)
