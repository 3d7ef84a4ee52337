"""Results: files that do not change, so that a download which broke off goes on where it was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.records import JobRecord
from nnsight_compiler.service.refusals import Refusal
from nnsight_compiler.service.waiting import ended, wanted_wait

OCTETS = "application/octet-stream"
PIECE = 1 << 18
"""Bytes that are read at a time; a result that is not longer is read without waking a thread."""

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


async def fetch_result(request: Request) -> Response:
    """GET /v1/jobs/{id}/result: the result, or a range of it."""
    front: FrontEnd = request.app.state.front
    record = await ended(front, request.path_params["id"], request.state.tenant, wanted_wait(request), request)
    if record.status == "expired":
        raise _gone()
    if record.status != "completed":
        raise Refusal(409, f"job_{record.status}", _WHY[record.status], details={"job_error": record.error})
    return await result_response(request, front, record, {})


async def result_response(request: Request, front: FrontEnd, record: JobRecord, headers: Mapping[str, str]) -> Response:
    """The result of a completed job, as the request asks for it."""
    content = await front.call(front.store.result, record.id, request.state.tenant)
    if content is None or record.result is None:
        raise _gone()
    etag = f'"{record.result.sha256}"'
    size = record.result.bytes
    headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private"}
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, size, 200
    wanted = request.headers.get("range") if request.method in ("GET", "HEAD") else None
    if wanted is not None and request.headers.get("if-range", etag) == etag:
        found = parse_range(wanted, size)
        if found is not None:
            start, stop = found
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=OCTETS)
    if isinstance(content, bytes):
        return Response(content[start:stop], status, headers, OCTETS)
    try:
        file = content.open("rb", buffering=0)
    except FileNotFoundError:  # it expired since
        raise _gone() from None
    if stop - start <= PIECE:
        with file:
            return Response(_read(file, start, stop, content), status, headers, OCTETS)
    return StreamingResponse(_pieces(file, start, stop, content), status, headers, OCTETS)


def matches(header: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` names this entity."""
    if header is None:
        return False
    return header.strip() == "*" or etag in (each.strip().removeprefix("W/") for each in header.split(","))


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last, of one range; None where the whole is sent: of several ranges, or of
    what cannot be read, as RFC 9110 (14.2) allows."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= stop:
        text = f"the result has {size} bytes; there is nothing in the range {header.strip()!r}"
        raise Refusal(416, "range_not_satisfiable", text, headers={"Content-Range": f"bytes */{size}"})
    return start, stop


async def _pieces(file: BinaryIO, start: int, stop: int, path: Path) -> AsyncIterator[bytes]:
    with file:
        for begin in range(start, stop, PIECE):
            yield await asyncio.to_thread(_read, file, begin, min(begin + PIECE, stop), path)


def _read(file: BinaryIO, start: int, stop: int, path: Path) -> bytes:
    file.seek(start)
    held = bytearray()
    while len(held) < stop - start:
        piece = file.read(stop - start - len(held))
        if not piece:
            raise OSError(f"{path} is shorter than it was when it was kept")
        held += piece
    return bytes(held)


def _gone() -> Refusal:
    return Refusal(410, "expired", "the result is no longer kept; send the job again")


_WHY = {
    "queued": "the job has not run yet; wait for it with ?wait=SECONDS, or follow its events",
    "running": "the job is still running; wait for it with ?wait=SECONDS, or follow its events",
    "failed": "the job failed, so that it has no result; its error stands in GET /v1/jobs/{id}",
    "cancelled": "the job was cancelled, so that it has no result",
}
