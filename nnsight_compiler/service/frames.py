"""Messages between the front end and its processes: frames of JSON, bytes and file descriptors over a socket pair.

    bytes of the header (4) | bytes of the body (4) | file descriptors (2) | header, a JSON object | body

All three have bounds, and whoever receives checks them: a process that runs jobs is not trusted. No pickle.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

from nnsight_compiler.service.engine import Content, Data

HEADER_BYTES = 2**20
BODY_BYTES = 2**28
DESCRIPTORS = 250
"""In one frame; Linux passes 253."""

_PREFIX = struct.Struct(">IIH")
_CHUNK = 2**18


class FrameError(Exception):
    """Bytes that are no frame, or a frame beyond the bounds."""


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """One message. The descriptors belong to whoever has it."""

    header: Data
    body: bytes = b""
    descriptors: tuple[int, ...] = ()

    def text(self, name: str) -> str:
        """A text of the header."""
        value = self.header.get(name)
        if not isinstance(value, str):
            raise FrameError(f"a frame whose {name!r} is no text")
        return value

    def data(self, name: str) -> Data:
        """An object of the header."""
        value = self.header.get(name)
        if not isinstance(value, dict):
            raise FrameError(f"a frame whose {name!r} is no object")
        return value

    def close(self) -> None:
        """Closes what it brought."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def encode(header: Data, body: bytes = b"", descriptors: Sequence[int] = ()) -> bytes:
    """A frame's bytes.

    Raises:
        FrameError: it is beyond the bounds.
    """
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES or len(body) > BODY_BYTES or len(descriptors) > DESCRIPTORS:
        raise FrameError(
            f"a frame of {len(text)} + {len(body)} bytes and {len(descriptors)} descriptors; it may have "
            f"{HEADER_BYTES} + {BODY_BYTES} and {DESCRIPTORS}"
        )
    return _PREFIX.pack(len(text), len(body), len(descriptors)) + text + body


def opened(content: Content) -> int:
    """A descriptor by which some content can be read, and which goes with a frame. It is the caller's, to be closed.

    Raises:
        OSError: the file is gone, or there is no more room.
    """
    if isinstance(content, Path):
        return os.open(content, os.O_RDONLY | os.O_CLOEXEC)
    descriptor = os.memfd_create("content", os.MFD_CLOEXEC)
    with ExitStack() as failed:
        failed.callback(os.close, descriptor)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        failed.pop_all()
    return descriptor


@final
class Decoder:
    """Makes frames from bytes and descriptors as they come."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Takes what was received."""
        self._bytes += data
        self._descriptors += descriptors

    def next(self) -> Frame | None:
        """The next frame, if it is whole.

        Raises:
            FrameError: what came is none.
        """
        if len(self._bytes) < _PREFIX.size:
            return None
        header, body, count = _PREFIX.unpack_from(self._bytes)
        if header > HEADER_BYTES or body > BODY_BYTES or count > DESCRIPTORS:
            raise FrameError(f"a frame that says it has {header} + {body} bytes and {count} descriptors")
        start, end = _PREFIX.size + header, _PREFIX.size + header + body
        if len(self._bytes) < end:
            return None
        try:
            known = json.loads(self._bytes[_PREFIX.size : start])
        except (ValueError, RecursionError) as error:
            raise FrameError("a frame whose header is no JSON") from error
        if not isinstance(known, dict) or count > len(self._descriptors):
            raise FrameError("a frame whose header is no object, or whose descriptors did not come")
        content = bytes(self._bytes[start:end])
        del self._bytes[:end]
        return Frame(known, content, tuple(self._descriptors.popleft() for _ in range(count)))

    def close(self) -> None:
        """Closes the descriptors that no frame was made of."""
        while self._descriptors:
            os.close(self._descriptors.popleft())


@final
class Channel:
    """A process's end: it waits."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self._decoder = Decoder()

    def receive(self, wait: bool = True) -> Frame | None:
        """The next frame. `None` where none has come and it is not to wait for one.

        Raises:
            EOFError: the other end is closed.
            FrameError: what came is no frame.
        """
        while (frame := self._decoder.next()) is None:
            try:
                data, descriptors = _received(self.end)
            except BlockingIOError:
                if not wait:
                    return None
                select.select([self.end], [], [])
                continue
            except ConnectionError:  # it was closed with messages of ours unread
                raise EOFError from None
            self._decoder.feed(data, descriptors)
            if not data:
                raise EOFError
        return frame

    def send(self, header: Data, body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Sends a frame, and waits until it is on its way.

        Raises:
            EOFError: the other end is closed.
        """
        rest = memoryview(encode(header, body, descriptors))
        while rest:
            try:
                sent = socket.send_fds(self.end, [rest[:_CHUNK]], list(descriptors))
            except BlockingIOError:
                select.select([], [self.end], [])
                continue
            except ConnectionError:
                raise EOFError from None
            rest, descriptors = rest[sent:], ()


@final
class Line:
    """The front end's end, in its event loop."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._decoder = Decoder()
        self._sending = asyncio.Lock()

    async def receive(self) -> Frame:
        """The next frame. One task at a time may wait for it.

        Raises:
            EOFError: the process closed its end, which it does at the latest when it dies.
            FrameError: what came is no frame.
        """
        while (frame := self._decoder.next()) is None:
            try:
                data, descriptors = _received(self._end)
            except BlockingIOError:
                await _when(asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader, self._end)
                continue
            except OSError:  # it died with frames of ours unread
                data, descriptors = b"", []
            self._decoder.feed(data, descriptors)
            if not data:
                raise EOFError
        return frame

    async def send(self, header: Data, body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Sends a frame.

        Raises:
            EOFError: the process closed its end.
        """
        rest = memoryview(encode(header, body, descriptors))
        loop = asyncio.get_running_loop()
        async with self._sending:
            while rest:
                try:
                    sent = socket.send_fds(self._end, [rest[:_CHUNK]], list(descriptors))
                except BlockingIOError:
                    await _when(loop.add_writer, loop.remove_writer, self._end)
                    continue
                except OSError:
                    raise EOFError from None
                rest, descriptors = rest[sent:], ()

    def close(self) -> None:
        """Closes this end: the process sees it."""
        self._decoder.close()
        self._end.close()


def _received(end: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(end, _CHUNK, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    return data, descriptors


async def _when(add: Callable[..., object], remove: Callable[..., object], end: socket.socket) -> None:
    """Waits until an end can be read, or written."""
    ready = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add(end, wake)
    try:
        await ready
    finally:
        remove(end)
