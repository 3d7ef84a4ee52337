"""Waiting for the disk: whoever tells a client what was queued, kept or ended waits until it cannot be lost any more.

Many wait for one sync at once: one that began before a commit says nothing of it, and the next one serves all.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import final

from nnsight_compiler.service.records import StoreError
from nnsight_compiler.service.store import Store


@final
class Syncs:
    """Has the queue synced, in a thread of its own, when somebody waits for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._synced = -1
        self._running: asyncio.Future[None] | None = None
        self.failure: StoreError | None = None
        """Why nothing can be told any more: the disk failed."""
        self._executor = ThreadPoolExecutor(1, "sync")

    async def settled(self) -> None:
        """Returns when what was committed before is on the disk; at once where nothing was since the last sync.

        Raises:
            StoreError: the disk fails.
        """
        wanted = self._store.committed
        while self._synced < wanted:
            if self._running is None:
                self._running = asyncio.ensure_future(self._sync())
            await asyncio.shield(self._running)

    async def _sync(self) -> None:
        reaches = self._store.committed
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._store.sync)
            self._synced = reaches
        except StoreError as error:
            self.failure = self.failure or error
            raise
        finally:
            self._running = None

    def close(self) -> None:
        """Ends the thread."""
        self._executor.shutdown()
