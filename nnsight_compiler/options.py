"""What of the optimiser a user can choose: which optimisations run, and how much memory they may use."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import final

OPTIMISATIONS = (
    "eliminate_dead_saves",
    "hoist_forwards",
    "unite_forwards",
    "eliminate_common_subexpressions",
    "narrow",
    "fuse_calls",
    "stop_early",
    "merge_forwards",
    "share_prefixes",
)
"""What can be switched off, each by the name of its pass."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How programs are optimised.

    without: the optimisations that are left out.
    memory_budget: the bytes of tensors that forwards which share a batch may keep alive at once; `None`: a quarter of
        what is free on the model's device when they run.
    padding: whether prompts that differ in length may be padded to share a forward.
    """

    without: frozenset[str] = frozenset()
    memory_budget: int | None = None
    padding: bool = False

    def does(self, optimisation: str) -> bool:
        """Whether an optimisation is to run."""
        return optimisation not in self.without

    @staticmethod
    def of(
        without: Collection[str] | str = (), memory_budget: int | str | None = None, padding: bool = False
    ) -> Options:
        """The options as users write them: a `memory_budget` may be text such as `"2 GiB"`, and `without="all"` leaves
        every optimisation out.

        Raises:
            ValueError: an optimisation or an amount that there is not.
        """
        names = OPTIMISATIONS if without == "all" else (without,) if isinstance(without, str) else tuple(without)
        for name in names:
            if name not in OPTIMISATIONS:
                near = get_close_matches(name, OPTIMISATIONS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OPTIMISATIONS)}"
                raise ValueError(f"there is no optimisation {name!r}; {hint}")
        return Options(frozenset(names), _bytes(memory_budget), padding)


DEFAULT = Options()


def _bytes(amount: int | str | None) -> int | None:
    if amount is None or (isinstance(amount, int) and amount > 0):
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower()) if isinstance(amount, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"memory_budget={amount!r} is no amount of memory; write bytes, or text such as '2 GiB'")
    return int(float(match[1]) * _UNITS[match[2]])
