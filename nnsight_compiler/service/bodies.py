"""A request's body, received piece by piece, into a file where it is large: never more of it than is allowed, and never
too slowly."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request

from nnsight_compiler.service.engine import Content
from nnsight_compiler.service.records import NoSpaceError
from nnsight_compiler.service.refusals import Refusal, not_ready
from nnsight_compiler.service.settings import Settings

PIECE = 1 << 20
"""Bytes that are gathered before they are written: a body that is not longer needs no file."""

IN_MEMORY, CROWDED = 64 << 20, 1 << 16
"""Bytes of all bodies together that are held in memory; once there are more, each is written by this smaller piece."""


@dataclass(frozen=True, slots=True)
class Body:
    """A body that has arrived whole: its bytes, or its file, which goes when the request ends; its length, its
    sha256 in hex."""

    content: Content
    bytes: int
    sha256: str


class Arrivals:
    """The bodies that are on their way."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._patiences: set[asyncio.Timeout] = set()
        self._stopping = False
        self._held: dict[Path, int] = {}

    def stop(self) -> None:
        """Waits for none of them any more."""
        self._stopping = True
        for patience in self._patiences:
            patience.reschedule(0)

    @asynccontextmanager
    async def received(self, request: Request, limit: int) -> AsyncIterator[Body]:
        """The body of a request, in a file under `settings.incoming` where it is large, for the time of the `with`.

        A declared length over the limit is refused before anything is read; a body without one, as soon as it is over.
        """
        _check_headers(request, limit)
        path = self._settings.incoming / uuid4().hex
        try:
            yield await self._receive(request, path, limit)
        finally:
            self._held.pop(path, None)
            path.unlink(missing_ok=True)

    async def _receive(self, request: Request, path: Path, limit: int) -> Body:
        settings, began = self._settings, asyncio.get_running_loop().time()
        digest = hashlib.sha256()
        total = 0
        pending = bytearray()
        content: Content = path
        try:
            with ExitStack() as opened:
                file: int | None = None
                async with self._patience(began + settings.body_patience) as patience:
                    async for piece in request.stream():
                        total += len(piece)
                        if total > limit:
                            raise _too_large(limit)
                        patience.reschedule(began + settings.body_patience + total / settings.body_rate)
                        pending += piece
                        self._held[path] = len(pending)
                        if len(pending) > self._piece():
                            if file is None:
                                file = opened.enter_context(path.open("wb", buffering=0)).fileno()
                            await asyncio.to_thread(_write, file, bytes(pending), digest)
                            pending.clear()
                            self._held[path] = 0
                if file is None:
                    content = bytes(pending)
                    digest.update(content)
                else:
                    _write(file, bytes(pending), digest)
        except TimeoutError:
            raise self._too_late(total) from None
        except ClientDisconnect:
            raise Refusal(400, "incomplete", "the connection was closed before the body was complete") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoSpaceError(f"the disk has no room for a body of {total} bytes or more") from error
            raise
        return Body(content, total, digest.hexdigest())

    def _piece(self) -> int:
        return CROWDED if sum(self._held.values()) > IN_MEMORY else PIECE

    @asynccontextmanager
    async def _patience(self, deadline: float) -> AsyncIterator[asyncio.Timeout]:
        async with asyncio.timeout_at(0 if self._stopping else deadline) as patience:
            self._patiences.add(patience)
            try:
                yield patience
            finally:
                self._patiences.discard(patience)

    def _too_late(self, total: int) -> Refusal:
        if self._stopping:
            return not_ready("the service is about to stop")
        rate = self._settings.body_rate
        text = f"the body did not arrive in time: {total} bytes, slower than {rate} bytes a second"
        return Refusal(408, "too_slow", text)


def _check_headers(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length")
    if declared is None:
        if "transfer-encoding" not in request.headers:
            raise Refusal(411, "length_required", "the body has no length: send Content-Length, or the body in chunks")
    elif not declared.isascii() or not declared.isdigit():
        raise Refusal(400, "bad_request", "Content-Length is not a number")
    elif len(declared) > 18 or int(declared) > limit:
        raise _too_large(limit)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "unsupported_encoding", "the body is compressed: send it as it is, without Content-Encoding")


def _write(file: int, data: bytes, digest: hashlib._Hash) -> None:
    digest.update(data)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _too_large(limit: int) -> Refusal:
    text = f"the body is larger than the {limit} bytes that are allowed: send large tensors once, with PUT /v1/blobs"
    return Refusal(413, "too_large", text)
