"""Server-sent events, read strictly: bounded lines, bounded events, numbers that only grow.

id: 3                              Event(3, "printed", {"text": "layer 0\\n"})
event: printed              ──▶
data: {"text": "layer 0\\n"}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.remote.answers import parsed
from nnsight_compiler.remote.refusals import AnswerError

MAX_EVENT = 4 * 2**20
"""Bytes of one event."""


@final
@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a service says about a job: `queued`, `running`, `printed`, `token`, `progress` or `done`."""

    id: int
    name: str
    data: dict[str, Any]


def read_events(pieces: Iterable[bytes], url: str) -> Iterator[Event | None]:
    """The events in a stream of bytes; `None` for each sign of life that is none. An event that is cut off at the end
    of the stream is left out.

    Raises:
        AnswerError: what comes is no stream of events.
    """
    number, name, data = None, "", b""
    for line in _lines(pieces, url):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                if number is None:
                    raise AnswerError(f"{url} sends an event without a number")
                yield Event(number, name, parsed(data, url))
            number, name, data = None, "", b""
        elif not field:  # a comment: the service is alive
            yield None
        elif field == b"id":
            if not value.isdigit() or len(value) > 18:
                raise AnswerError(f"{url} numbers an event {value[:40]!r}")
            number = int(value)
        elif field == b"event":
            name = value[:40].decode("ascii", "replace")
        elif field == b"data":
            data += (b"\n" if data else b"") + value
            if len(data) > MAX_EVENT:
                raise AnswerError(f"{url} sends an event of more than {MAX_EVENT} bytes")
        elif field != b"retry":
            raise AnswerError(f"{url} sends {line[:40]!r}, which is no line of an event stream")


def _lines(pieces: Iterable[bytes], url: str) -> Iterator[bytes]:
    """Whole lines, without what ends them."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for end in whole:
            yield b"".join((*held, end)).removesuffix(b"\r")
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > MAX_EVENT:
            raise AnswerError(f"{url} sends a line of more than {MAX_EVENT} bytes")
