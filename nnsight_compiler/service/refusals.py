"""What the service answers where it does not do as asked: a status, and JSON that says why.

{"error": {"code": "queue_full", "message": "…", "where": null | "demo.py:12:8", "op": null | "…"}}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nnsight_compiler.service.engine import RefusedError

log = logging.getLogger(__name__)

PHRASES = {
    404: ("not_found", "there is nothing under this path"),
    405: ("method_not_allowed", "this path does not know the method"),
}


class Refusal(Exception):  # noqa: N818 - it is an answer, to whoever made the mistake
    """A request that is answered with an error; raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        where: str | None = None,
        op: str | None = None,
        details: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.record: dict[str, object] = {"code": code, "message": message, "where": where, "op": op, **(details or {})}
        self.headers = dict(headers or {})
        super().__init__(message)

    def response(self) -> Response:
        """The answer."""
        return JSONResponse({"error": self.record}, self.status, self.headers)


def no_such_job() -> Refusal:
    """The same for a job that never was and for one of another tenant."""
    return Refusal(
        404, "no_such_job", "there is no such job; check its id, and that the key is the one it was sent with"
    )


def not_ready(reason: str, retry_after: float = 1.0) -> Refusal:
    """The service cannot take a job now, but will."""
    return Refusal(503, "not_ready", reason, headers=retry(retry_after))


def retry(seconds: float) -> dict[str, str]:
    """The header that says when to come again: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


async def answer_refusal(request: Request, error: Exception) -> Response:
    """Answers a `Refusal`."""
    assert isinstance(error, Refusal)
    return error.response()


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers what the router refuses: an unknown path, an unknown method."""
    assert isinstance(error, HTTPException)
    code, message = PHRASES.get(error.status_code, ("refused", str(error.detail)))
    return Refusal(error.status_code, code, message, headers=error.headers).response()


async def answer_no_space(request: Request, error: Exception) -> Response:
    """Answers where the disk is full: nothing was kept, and nothing is acknowledged."""
    return Refusal(503, "no_space", "the service's disk is full; nothing was kept", headers=retry(10)).response()


async def answer_store_failure(request: Request, error: Exception) -> Response:
    """Answers where the disk fails, or the queue on it is damaged: nothing is told that may be lost."""
    log.error("the queue failed at %s %s: %s", request.method, request.url.path, error)
    text = "the service's disk fails, and what was asked for may not be kept; its log says how"
    return Refusal(503, "store_failed", text, headers=retry(10)).response()


async def answer_unforeseen(request: Request, error: Exception) -> Response:
    """Answers where the service itself failed. What happened is in its log, not in the answer."""
    return Refusal(500, "internal", "the service failed at this request; its log says how").response()


def refusal_of(refused: RefusedError) -> Refusal:
    """The answer to a job that was not admitted: its record's fields, `where` and `op` as the protocol spells them."""
    record = refused.record
    where, op = record.get("where"), record.get("op")
    return Refusal(
        refused.status,
        str(record.get("kind", "refused")),
        str(record.get("message", "")),
        where=_place(where),
        op=op if isinstance(op, str) else None,
        details={"error": record},
    )


def _place(where: object) -> str | None:
    """`demo.py:12:8` of the last place that a record names."""
    if isinstance(where, str):
        return where
    if isinstance(where, Sequence) and where and isinstance(where[-1], Mapping):
        last = where[-1]
        return ":".join(str(last[part]) for part in ("file", "line", "column") if last.get(part) is not None)
    return None
