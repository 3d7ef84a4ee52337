"""The lines of source files: as `linecache` has them, or, while it has somebody else's, as they are on the disk."""

from __future__ import annotations

import linecache
import os
import tokenize
from collections.abc import Mapping
from contextvars import ContextVar

elsewhere: ContextVar[bool] = ContextVar("elsewhere", default=False)
"""Whether `linecache` has lines that came from elsewhere, by the names of their files there: for errors alone."""


def lines_of(file: str, namespace: Mapping[str, object] | None = None) -> list[str]:
    """The lines of the file that code here was compiled from; none where it has none."""
    if elsewhere.get() and os.path.isfile(file):
        with tokenize.open(file) as stream:
            return stream.readlines()
    linecache.checkcache(file)
    return linecache.getlines(file, None if namespace is None else dict(namespace))
