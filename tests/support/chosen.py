"""How much the tests go through: by default as much as takes minutes, and more where the environment asks for it.

    NNSIGHT_COMPILER_PROGRAMS=5000      that many random programs for each test that draws them, other ones each time
    NNSIGHT_COMPILER_ARCHITECTURES=all  all architectures, not only the few that differ most
    NNSIGHT_COMPILER_PARITY=all         each program that is compared with nnsight in both forms, not in one of the two
    NNSIGHT_COMPILER_KILLS=50           that many processes of the service are killed by each test that kills them

as in `NNSIGHT_COMPILER_PROGRAMS=5000 python -m pytest tests/passes/test_eliminate_random_programs.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

PROGRAMS = os.environ.get("NNSIGHT_COMPILER_PROGRAMS")
ALL = os.environ.get("NNSIGHT_COMPILER_ARCHITECTURES") == "all"
KILLS = os.environ.get("NNSIGHT_COMPILER_KILLS")
BOTH_FORMS = os.environ.get("NNSIGHT_COMPILER_PARITY") == "all"


def some(names: Iterable[str], *few: str) -> list[str]:
    """The names that are tested: all where that is asked for, else these few of them."""
    known = list(names)
    missing = set(few) - set(known)
    assert not missing, f"no such architectures: {sorted(missing)}"
    return known if ALL else list(few)
