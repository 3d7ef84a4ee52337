"""The lines that errors, warnings and tracebacks of a job show: those that came with it.

A job says itself of which file its lines are. Looked up on the disk, they would be any file's of the service; kept
from one job to the next, another tenant's.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from nnsight_compiler.files.loading import sources_of
from nnsight_compiler.ir.lines import elsewhere
from nnsight_compiler.remote.job import Job


@final
class Lines:
    """The lines of the jobs that a process has before it."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    @contextmanager
    def of(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Has the lines of these jobs shown, inside and by `shown`, and no others.

        Raises:
            FileError: what a job says of its lines is damaged.
        """
        self._held = {}
        with self.shown():
            for job in jobs:
                linecache.cache.update(sources_of(job.code.get("sources", {})))
            yield

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Has the lines shown that the last `of` has."""
        own: Any = linecache  # the names that its functions go by
        before = own.cache, own.updatecache
        own.cache, own.updatecache = self._held, _nothing
        token = elsewhere.set(True)
        try:
            yield
        finally:
            elsewhere.reset(token)
            own.cache, own.updatecache = before


def _nothing(filename: str, module_globals: object = None) -> list[str]:
    """What a file says that did not come with a job."""
    return []
