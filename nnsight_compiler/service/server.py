"""The server around the application: uvicorn, with patience that ends, and a stop that lets streams and jobs end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from nnsight_compiler.service.connections import Patience, patient
from nnsight_compiler.service.front_end import FrontEnd

IDLE_SECONDS = 15
"""For which a connection without a request is kept."""


class Server(uvicorn.Server):
    """Serves an application until it is told to stop, by SIGINT or SIGTERM, or its engine does not start.

    Args:
        on_ready: called once, when jobs are taken.
    """

    def __init__(self, app: Starlette, patience: Patience, on_ready: Callable[[], None]) -> None:
        self._front: FrontEnd = app.state.front
        self._on_ready: Callable[[], None] | None = on_ready
        super().__init__(
            uvicorn.Config(
                app,
                http=patient(patience),
                ws="none",
                loop="auto",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=round(patience.reader_seconds),
            )
        )

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to stop."""
        if self._front.failure is not None:
            return True
        if self._on_ready is not None and self._front.unready() is None:
            self._on_ready()
            self._on_ready = None
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at a signal, and is not ended by it once more afterwards: a stop that was asked for is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends streams and waits first: their connections would be waited for."""
        self._front.close_streams()
        await super().shutdown(sockets)
