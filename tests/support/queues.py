"""Queues for tests that need not outlive the power: the same calls, without waiting for the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnsight_compiler.service import durable


@contextmanager
def unsynced() -> Iterator[None]:
    """Within, nothing is synced. What a process wrote is still there when that process is killed."""
    sync = durable.sync
    durable.sync = lambda descriptor: None
    try:
        yield
    finally:
        durable.sync = sync
