"""Ending a job while it runs: the front end sends the reason, then a signal, whose handler raises within the job.

A handler runs in the main thread between two bytecodes, so that an operation of torch ends first. It raises only while
a job is in progress, never while a message is half sent, and once. What was interrupted is left half done; the worker
ends after it, where another can be forked.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

from nnsight_compiler.service.engine import Data
from nnsight_compiler.service.frames import Channel, FrameError

SIGNAL = signal.SIGUSR1


class Interrupted(BaseException):
    """A job is to end now: which, and why (`cancelled`, `time_limit`)."""

    def __init__(self, job: str, reason: str) -> None:
        self.job, self.reason = job, reason
        super().__init__(reason)


@final
class Interrupts:
    """What a worker was told to end. `progress` are the jobs that have begun and not ended."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open = False
        self._signalled = False
        self.progress: set[str] = set()
        signal.signal(SIGNAL, self._handle)

    @contextmanager
    def jobs(self) -> Iterator[None]:
        """While jobs may be interrupted."""
        try:
            self.look()
            yield
        finally:
            self.close()

    def close(self) -> None:
        """From here on nothing is raised."""
        self._open = False
        self.progress.clear()

    def send(self, header: Data, body: bytes = b"") -> None:
        """Sends a message whole, and is interrupted after it."""
        was, self._open = self._open, False
        self._channel.send(header, body)
        self._open = was
        if was and self._signalled:
            self.look()

    def look(self) -> None:
        """Reads what has come.

        Raises:
            Interrupted: a job that is in progress is to end.
        """
        while True:
            self._open = self._signalled = False
            while (frame := self._channel.receive(wait=False)) is not None:
                if frame.header.get("do") != "cancel":
                    raise FrameError("while jobs run, they can be cancelled and nothing else")
                if frame.text("id") in self.progress:
                    self.close()
                    raise Interrupted(frame.text("id"), frame.text("why"))
            self._open = True
            if not self._signalled:  # what is signalled from here on raises by itself
                return

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if self._open:
            self.look()
