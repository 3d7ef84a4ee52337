"""Rounds that fail while what they did to other things still waits behind their last forward."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, final

FAILED: Any = object()
"""What a strand asks for that failed: to go on once all before it have ended, and to be the last."""


@final
class Failure:
    """What a round failed with, if it did. Entered around what precedes the `postponed` ops of the round."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True

    def turn(self) -> Iterator[Any]:
        """Where a round that failed waits for those before it."""
        if self.error is not None:
            yield FAILED

    def unless(self, reached: bool) -> None:
        """Raises it, unless the round had come to what follows."""
        if self.error is None or reached:
            return
        error, self.error = self.error, None
        try:
            raise error
        finally:
            del error  # it holds this frame
