"""What is decided about a program while it is specialised, so that the interpretation can start again knowing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nnsight_compiler.ir.ops import Op
from nnsight_compiler.passes.changes import Changes
from nnsight_compiler.passes.outline import Outline


@dataclass(slots=True)
class Decisions:
    """What an interpretation does with ops of the source program, told by their identity.

    unroll, fold: the loops that are unrolled and the conditions that are folded. A condition on known values is folded
        in either set.
    roll: the loops that are kept although their variable names modules, since only a run tells how often they go round.
    stages: the ops at which a stage begins, and what it needs to know.
    whole: the ops at which none can begin.
    changes: what the rounds of a kept loop change, where facts that a round relies on may be meant.
    ahead: the forwards whose body begins with code that the model has no part in: that code, and the rest.
    outlines: what was cut off at these ops; kept, so that its ops are the same ones in every interpretation.
    """

    unroll: set[int] = field(default_factory=set)
    fold: set[int] = field(default_factory=set)
    roll: set[int] = field(default_factory=set)
    stages: dict[int, str] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    changes: dict[int, Changes] = field(default_factory=dict)
    ahead: dict[int, tuple[Op, ...]] = field(default_factory=dict)
    outlines: dict[int, Outline] = field(default_factory=dict)

    def add(self, other: Decisions) -> None:
        """Takes these decisions too. One of them is new, or the interpretation would start again for ever."""
        known = self._count()
        self.unroll |= other.unroll
        self.fold |= other.fold
        self.roll |= other.roll
        self.stages.update(other.stages)
        self.whole |= other.whole
        self.changes.update(other.changes)
        self.ahead.update(other.ahead)
        assert self._count() > known or other.changes, "the interpretation starts again with a new decision"

    def _count(self) -> int:
        return sum(map(len, (self.unroll, self.fold, self.roll, self.stages, self.whole, self.ahead)))


class Undecided(Exception):  # noqa: N818  # control flow, not an error
    """The interpretation needs these decisions besides those that it has."""

    def __init__(self, **decisions: Any) -> None:
        self.decisions = Decisions(**decisions)
