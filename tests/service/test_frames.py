"""Frames: what is sent comes whole, however it comes in pieces; what is no frame, or too large, is refused."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnsight_compiler.service.engine import Data
from nnsight_compiler.service.frames import BODY_BYTES, DESCRIPTORS, HEADER_BYTES, Channel, Decoder, FrameError, Line
from nnsight_compiler.service.frames import encode as encoded


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_frames_come_whole_from_bytes_that_come_one_by_one() -> None:
    sent: list[tuple[Data, bytes]] = [({"a": "ü"}, b""), ({}, b"\x00\xff" * 10), ({"b": [1, None]}, b"x")]
    decoder, found = Decoder(), []
    for byte in b"".join(encoded(header, body) for header, body in sent):
        decoder.feed(bytes([byte]), ())
        while (frame := decoder.next()) is not None:
            found.append((frame.header, frame.body))
    assert found == sent


def prefix(header: int, body: int = 0, descriptors: int = 0) -> bytes:
    return struct.pack(">IIH", header, body, descriptors)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (prefix(HEADER_BYTES + 1), f"a frame that says it has {HEADER_BYTES + 1} + 0 bytes and 0 descriptors"),
        (prefix(2, BODY_BYTES + 1), f"a frame that says it has 2 + {BODY_BYTES + 1} bytes and 0 descriptors"),
        (prefix(2, 0, DESCRIPTORS + 1), f"a frame that says it has 2 + 0 bytes and {DESCRIPTORS + 1} descriptors"),
        (prefix(1) + b"{", "a frame whose header is no JSON"),
        (prefix(2) + b"\xff\xff", "a frame whose header is no JSON"),
        (prefix(200_000) + b"[" * 200_000, "a frame whose header is no JSON"),
        (prefix(2) + b"[]", "a frame whose header is no object, or whose descriptors did not come"),
        (prefix(2, 0, 1) + b"{}", "a frame whose header is no object, or whose descriptors did not come"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, reason: str) -> None:
    decoder = Decoder()
    decoder.feed(data, ())
    with pytest.raises(FrameError) as caught:
        decoder.next()
    assert str(caught.value) == reason


def test_a_frame_beyond_the_bounds_is_not_sent() -> None:
    with pytest.raises(FrameError, match=f"it may have {HEADER_BYTES} \\+ {BODY_BYTES} and {DESCRIPTORS}"):
        encoded({"a": "x" * HEADER_BYTES})


def test_fields_are_of_their_kinds() -> None:
    decoder = Decoder()
    decoder.feed(encoded({"text": "a", "data": {}}), ())
    frame = decoder.next()
    assert frame is not None
    assert (frame.text("text"), frame.data("data")) == ("a", {})
    with pytest.raises(FrameError, match="a frame whose 'data' is no text"):
        frame.text("data")
    with pytest.raises(FrameError, match="a frame whose 'other' is no object"):
        frame.data("other")


def test_open_files_come_with_their_frame(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    left, right = map(Channel, ends)
    with (tmp_path / "file").open() as file:
        left.send({"number": 1})
        left.send({"number": 2}, descriptors=[file.fileno(), file.fileno()])
        left.send({"number": 3}, descriptors=[file.fileno()])
    for number, count in ((1, 0), (2, 2), (3, 1)):
        frame = right.receive()
        assert frame is not None
        assert (frame.header, len(frame.descriptors)) == ({"number": number}, count)
        assert [os.pread(descriptor, 100, 0) for descriptor in frame.descriptors] == [b"content"] * count
        frame.close()
    assert right.receive(wait=False) is None


def test_the_end_of_the_other_is_seen(ends: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(ends[0])
    ends[1].close()
    with pytest.raises(EOFError):
        channel.receive()


def test_lines_send_and_receive_more_than_a_socket_holds(ends: tuple[socket.socket, socket.socket]) -> None:
    body = os.urandom(3_000_000)

    async def both() -> bytes:
        left, right = map(Line, ends)
        sending = asyncio.create_task(left.send({"a": 1}, body))
        frame = await right.receive()
        await sending
        left.close()
        with pytest.raises(EOFError):
            await right.receive()
        right.close()
        with pytest.raises(EOFError):
            await left.send({})
        return frame.body

    assert asyncio.run(both()) == body
