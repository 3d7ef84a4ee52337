"""Which architectures the tests that go through all of them take.

By default a few that differ most, so that the whole suite takes minutes. `NNSIGHT_COMPILER_ARCHITECTURES=all` in the
environment takes all of them:

    NNSIGHT_COMPILER_ARCHITECTURES=all python -m pytest tests/runtime/test_attention_architectures.py
"""

from __future__ import annotations

import os
from collections.abc import Iterable

ALL = os.environ.get("NNSIGHT_COMPILER_ARCHITECTURES") == "all"


def some(names: Iterable[str], *few: str) -> list[str]:
    """The names that are tested: all where that is asked for, else these few of them."""
    known = list(names)
    missing = set(few) - set(known)
    assert not missing, f"no such architectures: {sorted(missing)}"
    return known if ALL else list(few)
