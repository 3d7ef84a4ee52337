"""How many examples the tests on random programs draw.

By default few, and the same ones each time, so that the whole suite takes minutes. `NNSIGHT_COMPILER_PROGRAMS=5000` in
the environment draws that many for each such test, other ones each time:

    NNSIGHT_COMPILER_PROGRAMS=5000 python -m pytest tests/passes/test_eliminate_random_programs.py
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

ASKED = os.environ.get("NNSIGHT_COMPILER_PROGRAMS")


def examples(number: int) -> settings:
    """The settings of a test that draws `number` examples, where no other number is asked for."""
    return settings(
        max_examples=int(ASKED or number), deadline=None, derandomize=ASKED is None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
