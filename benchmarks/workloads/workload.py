"""What a workload is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2 import Size

Program = Callable[..., Any]
"""Takes a model and the workload's inputs; returns tensors, or lists of them."""


@dataclass(frozen=True)
class Workload:
    """An experiment, and how it is done with torch alone.

    inputs: what every program is given after the model.
    naive: the loop that everyone writes first, with hooks.
    best: the strongest hooks written by hand; what ours is measured against.
    further: other plans, by name, which need to know more than hooks can (that the model is causal, say).
    bound: ours is to take at most this many times what the best hooks take.
    share: hooks count as the best only if they take at most this share of what naive ones take.
    """

    name: str
    title: str
    inputs: Callable[[Size], tuple[Any, ...]]
    naive: Program
    best: Program
    bound: float
    share: float | None = None
    further: Mapping[str, Program] | None = None
    gradients: bool = False

    @property
    def by_hand(self) -> dict[str, Program]:
        """The programs that need torch alone, by name; the naive one is first and says what is right."""
        return {"naive hooks": self.naive, "best hooks": self.best, **(self.further or {})}
