"""The one thread that the queue and the keys are called from: both wait for a disk, and neither may be shared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """Calls functions in a thread, one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "store")

    async def call(self, function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
        """What the function returns. It runs to its end even if nobody waits for it any more."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **keywords))

    def run(self, function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
        """The same outside of an event loop."""
        return self._executor.submit(function, *args, **keywords).result()

    def close(self) -> None:
        """Waits for the calls that were asked for, and ends the thread."""
        self._executor.shutdown()
