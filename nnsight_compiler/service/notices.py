"""Who waits for news of which job: news is told in the process, so that nobody has to ask the disk again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Notices:
    """Wakes those who watch a job. What has changed they look up themselves."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self.stopping = False
        self.moves = 0

    @contextmanager
    def watch(self, id: str, *, over: bool = False) -> Iterator[asyncio.Event]:
        """An event that is set at each news of the job. Clear it before looking, so that no news is missed.

        Args:
            over: whether it is set only when the job may be over.
        """
        news = asyncio.Event()
        held = self._waiting if over else self._watchers
        watchers = held.setdefault(id, set())
        watchers.add(news)
        try:
            yield news
        finally:
            watchers.discard(news)
            if not watchers and held.get(id) is watchers:
                del held[id]

    def tell(self, id: str, *, over: bool = False) -> None:
        """Something about the job has changed; or it may be over."""
        for news in (*self._watchers.get(id, ()), *(self._waiting.get(id, ()) if over else ())):
            news.set()

    def queue_moved(self) -> None:
        """Places in the queue have changed."""
        self.moves += 1
        self._tell_all(self._watchers)

    def stop(self) -> None:
        """The service ends: whoever waits gives up."""
        self.stopping = True
        self._tell_all(self._watchers)
        self._tell_all(self._waiting)

    @staticmethod
    def _tell_all(held: dict[str, set[asyncio.Event]]) -> None:
        for watchers in held.values():
            for news in watchers:
                news.set()
