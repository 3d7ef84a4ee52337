"""Requests that wait for a job to end: they sleep until they are told, and give up in time."""

from __future__ import annotations

import asyncio
import math
import time

from starlette.requests import Request

from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.records import JobRecord
from nnsight_compiler.service.refusals import Refusal
from nnsight_compiler.service.tenants import Tenant

ENDED = ("completed", "failed", "cancelled", "expired")
"""The states from which a job moves no more; but a completed one expires with its result."""


def wanted_wait(request: Request) -> float:
    """The seconds of `?wait=`; 0 where it is not given."""
    given = request.query_params.getlist("wait")
    if not given:
        return 0.0
    try:
        seconds = float(given[0]) if len(given) == 1 else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise Refusal(400, "bad_request", "'wait' is a number of seconds, 0 or more, given once")
    return seconds


async def ended(front: FrontEnd, id: str, tenant: Tenant, seconds: float, request: Request) -> JobRecord:
    """The job, once it has ended; or as it is once so many seconds have passed, or nobody waits for the answer."""
    if seconds <= 0:
        return await front.job(id, tenant)
    deadline = time.monotonic() + min(seconds, front.settings.max_wait)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        with front.notices.watch(id, over=True) as news:
            while True:
                news.clear()
                record = await front.job(id, tenant)
                left = deadline - time.monotonic()
                if record.status in ENDED or left <= 0 or front.notices.stopping or gone.done():
                    return record
                await either(news, gone, left)
    finally:
        gone.cancel()


async def either(news: asyncio.Event, gone: asyncio.Future[None], seconds: float) -> None:
    """Returns at news, when the client has gone, or after so many seconds."""
    told = asyncio.ensure_future(news.wait())
    try:
        await asyncio.wait((told, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()


async def disconnected(request: Request) -> None:
    """Returns when the client has gone away; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
