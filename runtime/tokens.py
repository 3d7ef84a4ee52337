"""What stands for a function of a caller's who is elsewhere, and is given the tokens of a generation as they come.

on_token=show          the caller's side keeps `show`, and sends `Listener(0)` in its place
Listener(0)(ids)       is told to whoever runs the experiment, who sends the ids on: number 0, [464, 290]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch

from nnsight_compiler.ir.errors import RunError

Heard = Callable[[int, list[int]], object]
"""Takes the number of a listener, and the id of each row's token."""


@final
@dataclass(frozen=True, slots=True)
class Listener:
    """Stands for the function of this number."""

    number: int

    def __call__(self, ids: torch.Tensor) -> None:
        """Tells of the tokens of one step.

        Raises:
            RunError: these are no tokens, or nobody listens.
        """
        if _HEARING.heard is None:
            raise RunError(
                "the tokens of this generation are for a function of whoever sent it here, and nobody listens\n"
                "  way out: leave `on_token=` out"
            )
        if not isinstance(ids, torch.Tensor) or ids.dim() != 1 or ids.dtype != torch.int64:
            raise RunError("a function that is called with tokens takes the id of one for each row")
        _HEARING.heard(self.number, ids.tolist())


class _Hearing(threading.local):
    """Who listens in this thread."""

    heard: Heard | None = None


_HEARING = _Hearing()


@contextmanager
def hearing(heard: Heard) -> Iterator[None]:
    """Has tokens told here, in this thread."""
    before, _HEARING.heard = _HEARING.heard, heard
    try:
        yield
    finally:
        _HEARING.heard = before
