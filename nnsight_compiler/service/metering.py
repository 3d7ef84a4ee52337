"""Around every request: counts it, and closes a connection on which a body is left that nobody read."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnsight_compiler.service.metrics import Metrics


class Metering:
    """Tells `Metrics` of each request, by the route that answered it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: dict[object, str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = received = sent = 0
        unread = any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )

        async def counted_receive() -> Message:
            nonlocal received, unread
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                unread = bool(message.get("more_body", False))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:  # the rest of the body would be taken for the next request, or read for nothing
                    headers = [each for each in message.get("headers", []) if each[0].lower() != b"connection"]
                    message = {**message, "headers": [*headers, (b"connection", b"close")]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            status = 500  # it is answered further out
            raise
        finally:
            route = self._routes.get(scope.get("endpoint"), "unknown")
            self._metrics.request(route, scope["method"], status, time.perf_counter() - began, received, sent)
