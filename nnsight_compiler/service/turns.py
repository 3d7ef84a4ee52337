"""Whose job is checked next: one of each tenant's at a time, so that nobody waits for all that another has sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import final


@final
class Turns:
    """A line for each tenant. The engine checks one job after another, in the order in which they come to it."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """Inside, no other job of this tenant is."""
        line, waiting = self._lines.get(tenant, (asyncio.Lock(), 0))
        self._lines[tenant] = line, waiting + 1
        try:
            async with line:
                yield
        finally:
            line, waiting = self._lines.pop(tenant)
            if waiting > 1:
                self._lines[tenant] = line, waiting - 1
