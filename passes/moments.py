"""When something happens in a generation: at which steps, and when within a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import regions
from nnsight_compiler.ir.values import Literal

Moment = tuple[float, int]
"""A step of a generation, infinite for what comes after it, and a time within the step. A trace is step 0."""


def first_step(steps: ops.Steps) -> int:
    """The first of these steps."""
    assert isinstance(steps.start, Literal)
    assert isinstance(steps.start.value, int)
    return steps.start.value


def last_step(steps: ops.Steps) -> float:
    """The last of these steps; infinite where they are open-ended."""
    assert isinstance(steps.stop, Literal)
    return steps.stop.value - 1 if isinstance(steps.stop.value, int) else math.inf


def with_steps(region: Region, around: ops.Steps | None = None) -> Iterator[tuple[Op, ops.Steps | None]]:
    """Every op in a region, and the steps at which it happens where it does not happen once."""
    for op in region.ops:
        yield op, around
        inner = op if isinstance(op, ops.Steps) else around
        for part in regions(op):
            yield from with_steps(part, inner)
