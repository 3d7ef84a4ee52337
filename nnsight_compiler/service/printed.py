"""What jobs print: it goes to the client as events, whole lines where there are lines, and not without end."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import final

PRINTED_BYTES = 2**20
PRINTED_EVENTS = 10_000
PIECE = 2**14
"""Characters in one event."""


class Allowance:
    """How much one job may still print, on both streams together."""

    def __init__(self, bytes: int = PRINTED_BYTES, events: int = PRINTED_EVENTS) -> None:
        self.bytes, self.events = bytes, events

    def cut(self, text: str) -> str:
        """As much of the text as is allowed. What ends there says so."""
        if self.events <= 0 or self.bytes <= 0:
            return ""
        size = len(text.encode(errors="replace"))
        if size <= self.bytes and self.events > 1:
            self.bytes -= size
            self.events -= 1
            return text
        kept = text.encode(errors="replace")[: self.bytes].decode(errors="ignore")
        self.bytes = self.events = 0
        return f"{kept}\n… this job has printed as much as a job may; the rest is not shown\n"


@final
class Printed(io.TextIOBase):
    """A stream that hands its text on, at the end of a line or when it is flushed."""

    def __init__(self, send: Callable[[str], None], allowance: Allowance) -> None:
        self._send, self._allowance = send, allowance
        self._held = ""

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a variable there
        return "utf-8"

    def write(self, text: str) -> int:
        self._held += text
        whole, newline, rest = self._held.rpartition("\n")
        if newline:
            self._held = rest
            self._hand_on(whole + newline)
        elif len(self._held) > PRINTED_BYTES:
            self.flush()
        return len(text)

    def flush(self) -> None:
        held, self._held = self._held, ""
        if held:
            self._hand_on(held)

    def _hand_on(self, text: str) -> None:
        text = self._allowance.cut(text)
        for start in range(0, len(text), PIECE):
            self._send(text[start : start + PIECE])
