"""How many examples the tests on random programs draw."""

from __future__ import annotations

from chosen import PROGRAMS
from hypothesis import HealthCheck, settings


def examples(number: int) -> settings:
    """The settings of a test that draws `number` examples, the same ones each time, where no other number is asked
    for."""
    return settings(
        max_examples=int(PROGRAMS or number), deadline=None, derandomize=PROGRAMS is None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
