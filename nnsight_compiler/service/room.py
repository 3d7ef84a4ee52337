"""Whether one more job fits: into the queue, into its tenant's part of it, onto the disk."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import final

from nnsight_compiler.service.database import Database
from nnsight_compiler.service.records import NoSpaceError, QueueFullError
from nnsight_compiler.service.tenants import Tenant

MAX_QUEUED = 4096
"""Jobs of all tenants that wait at once."""

RESERVE = 64 * 2**20
"""Bytes of the disk that no job and no upload takes, so that jobs which were acknowledged can end."""

QUEUED = "SELECT count(*) FROM jobs WHERE state = 'queued'"
WAITING = "SELECT total(payload_bytes) FROM jobs WHERE state = 'queued' AND tenant = ?"


@final
class Room:
    """The bounds of the queue, and how fast it goes."""

    def __init__(self, database: Database, folder: Path, max_queued: int, clock: Callable[[], float]) -> None:
        self._database = database
        self._folder = folder
        self._max_queued = max_queued
        self._clock = clock
        self._begun: deque[float] = deque(maxlen=64)

    def begun(self, jobs: int) -> None:
        """Counts jobs that were begun now."""
        self._begun.extend([self._clock()] * jobs)

    def check_queue(self, tenant: Tenant) -> None:
        """Raises QueueFullError where another job of this tenant may not wait."""
        queued = int(self._database.number(QUEUED))
        if not queued:
            self._begun.clear()  # until now nothing waited, however long that was
        if queued >= self._max_queued:
            raise QueueFullError(f"{queued} jobs wait, as many as may; try again later", self._retry_after(queued))
        own = int(self._database.number(f"{QUEUED} AND tenant = ?", tenant.name))
        if own >= tenant.limits.max_queued:
            raise QueueFullError(
                f"{own} jobs of {tenant.name} wait, as many as may; try again when some have run",
                self._retry_after(own),
            )

    def check_bytes(self, tenant: Tenant, size: int) -> None:
        """Raises QueueFullError where the jobs of this tenant that wait would be more bytes than it may store; a single
        one always may."""
        most, waiting = tenant.limits.stored_bytes, self._database.number(WAITING, tenant.name)
        if waiting and waiting + size > most:
            own = int(self._database.number(f"{QUEUED} AND tenant = ?", tenant.name))
            raise QueueFullError(
                f"with this job, those of {tenant.name} that wait would be more than the {most} bytes that it may "
                "store; try again when some have run",
                self._retry_after(own),
            )

    def check_disk(self) -> None:
        """Raises NoSpaceError where what is left of the disk is kept for jobs that are there already."""
        if shutil.disk_usage(self._folder).free < RESERVE:
            raise NoSpaceError(f"fewer than {RESERVE} bytes are free at {self._folder}; make room on that disk")

    def _retry_after(self, waiting: int) -> int:
        """When a tenth of those that wait will have been begun, as fast as it went since some do: 1 to 300 seconds."""
        if len(self._begun) < 2:
            return 5
        seconds_each = (self._clock() - self._begun[0]) / len(self._begun)
        return min(300, max(1, math.ceil(waiting / 10 * seconds_each)))
