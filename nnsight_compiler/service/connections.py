"""Connections that are patient for a while only: with slow requests, with idle clients, with readers that do not read.

uvicorn bounds none of these: a client that sends half a header, or that never takes its answer, keeps its place for
good. What is closed here has no request that is being answered, or a client that has taken nothing of its answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

NO_HTTP = ("400 Bad Request", "bad_request", "this is no HTTP request")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how much of what."""

    header_seconds: float = 10.0
    """From the first byte that is awaited of a request to the end of its header."""

    reader_seconds: float = 15.0
    """For a client to take what waits for it."""

    header_bytes: int = 32 * 1024
    """Of names and values of a request's header, its address counted."""

    connections: int = 1024
    """At a time."""


class Timer:
    """Calls a function once, after so many seconds, unless it is stopped or started anew before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        """Whether it has been started since it was stopped."""
        return self._handle is not None

    def start(self, seconds: float, function: Callable[[], object]) -> None:
        """Begins to wait, from now."""
        self.stop()
        self._handle = self._loop.call_later(seconds, function)

    def stop(self) -> None:
        """Waits no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class PatientProtocol(HttpToolsProtocol):
    """One connection. `patience` is set on a subclass of this, since uvicorn takes a class."""

    patience = Patience()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._reading, self._writing = Timer(self.loop), Timer(self.loop)
        self._header_bytes = 0
        self._wrong = NO_HTTP
        self._notice_vanished_clients()
        if len(self.connections) > self.patience.connections:
            self._refuse(("503 Service Unavailable", "too_many_connections", "too many connections; try again later"))
        else:
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reading.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_header()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading.stop()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, uvicorn answers in plain text; here it is JSON as all else."""
        self._refuse(self._wrong)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.start(self.patience.reader_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._writing.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _await_header(self) -> None:
        if not self._reading.runs:
            self._reading.start(self.patience.header_seconds, self._give_up_header)

    def _give_up_header(self) -> None:
        self._refuse(("408 Request Timeout", "too_slow", "the request's header did not arrive in time"))

    def _count(self, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > self.patience.header_bytes:
            text = f"the request's header is longer than {self.patience.header_bytes} bytes"
            self._wrong = ("431 Request Header Fields Too Large", "header_too_large", text)
            raise ValueError(text)  # the parser stops at it

    def _refuse(self, wrong: tuple[str, str, str]) -> None:
        """Answers what comes before a request that the application could answer, and closes."""
        status, code, message = wrong
        body = json.dumps({"error": {"code": code, "message": message, "where": None, "op": None}})
        self.transport.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Retry-After: 1\r\nConnection: close\r\n\r\n{body}".encode()
        )
        self._close()

    def _close(self) -> None:
        """Closes; what a client does not take of what was sent is given up in time."""
        if not self.transport.is_closing():
            self.transport.close()
            self._writing.start(self.patience.reader_seconds, self.transport.abort)

    def _notice_vanished_clients(self) -> None:
        """Lets the system close a connection whose other end no longer confirms anything."""
        found: Any = self.transport.get_extra_info("socket")
        if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
            return
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds = max(1, round(self.patience.reader_seconds))
        for name, value in (
            ("TCP_KEEPIDLE", seconds),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", seconds * 1000),
        ):
            if hasattr(socket, name):  # Linux knows all of them
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def patient(patience: Patience) -> type[PatientProtocol]:
    """The protocol class with this patience."""
    return type("PatientProtocol", (PatientProtocol,), {"patience": patience})
