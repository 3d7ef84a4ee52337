"""What happens to a job, as server-sent events: numbered, so that a line which broke is taken up where it was.

    id: 3
    event: printed
    data: {"text": "layer 0\\n"}

While a job waits, its event `queued` is sent again under the same number, with the new place, when the queue has moved.
"""

from __future__ import annotations

import asyncio
import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nnsight_compiler.service.engine import Data
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.refusals import Refusal
from nnsight_compiler.service.tenants import Tenant
from nnsight_compiler.service.waiting import ENDED, disconnected, either

PLACE_SECONDS = 0.5
"""The shortest time between two looks at a job's place in the queue."""


async def follow_events(request: Request) -> Response:
    """GET /v1/jobs/{id}/events: those after `Last-Event-ID`, until `done`. 204 where `done` has been sent before."""
    front: FrontEnd = request.app.state.front
    tenant: Tenant = request.state.tenant
    id = request.path_params["id"]
    given = _last_event_id(request)
    record = await front.job(id, tenant)
    after = min(given, record.events)  # from a number that was never given, the rest would never come
    if record.status in ENDED and after == record.events:
        return Response(status_code=204)  # clients that come again of themselves stop at this
    return EventStream(front, request, id, after)


class EventStream(Response):
    """An answer that goes on until the job has ended, the client has gone or the service stops.

    It holds the events of one look at the queue, and looks again once the client has taken those.
    """

    media_type = "text/event-stream"

    def __init__(self, front: FrontEnd, request: Request, id: str, after: int) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._front, self._request, self._id, self._after = front, request, id, after
        self._waits = False
        self._place: object = None
        self._looked, self._moves = -PLACE_SECONDS, -1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            gone = asyncio.ensure_future(disconnected(self._request))
            try:
                await self._follow(send, gone)
            finally:
                gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, send: Send, gone: asyncio.Future[None]) -> None:
        front, loop = self._front, asyncio.get_running_loop()
        told = loop.time()
        with front.notices.watch(self._id) as news:
            while not gone.done():
                news.clear()
                events = await front.call(front.store.events, self._id, self._after)
                for event in events:
                    await _send(send, frame(event.number, event.name, event.data))
                    told, self._after, self._waits = loop.time(), event.number, event.name == "queued"
                    if self._waits:
                        self._place, self._moves = event.data["place"], -1
                    if event.name == "done":
                        return
                if events:
                    continue
                if front.notices.stopping:
                    return
                if await self._send_place(send):
                    told = loop.time()
                if loop.time() - told >= front.settings.heartbeat:
                    await _send(send, b": alive\n\n")
                    told = loop.time()
                await either(news, gone, self._next_look(told + front.settings.heartbeat) - loop.time())

    def _next_look(self, heartbeat: float) -> float:
        """When to look again without news: for a sign of life, or at a place that may be another now."""
        moved = self._waits and self._moves != self._front.notices.moves
        return min(heartbeat, self._looked + PLACE_SECONDS) if moved else heartbeat

    async def _send_place(self, send: Send) -> bool:
        """Sends the event `queued` again, under its number, where the job still waits and its place is another now."""
        front, now = self._front, asyncio.get_running_loop().time()
        if not self._waits or self._moves == front.notices.moves or now - self._looked < PLACE_SECONDS:
            return False
        self._looked, self._moves = now, front.notices.moves
        place = await front.call(front.store.place, self._id)
        if not place or place == self._place:
            return False
        self._place = place
        await _send(send, frame(self._after, "queued", {"place": place}))
        return True


def frame(number: int, name: str, data: Data) -> bytes:
    """One event as it goes over the line. JSON has no line ends of its own."""
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _last_event_id(request: Request) -> int:
    given = request.headers.get("last-event-id", "0")
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise Refusal(400, "bad_request", "Last-Event-ID is the number of the last event that was received")
    return int(given)
