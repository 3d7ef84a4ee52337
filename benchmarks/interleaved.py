"""Timing contestants against each other: one call of each a round, in a new random order every round.

What is compared is the difference *within* a round, so that a machine that gets slower or busier meanwhile hits all
contestants alike. A median of such differences, with its 95 % interval from the order statistics (no assumption on how
they are distributed), is the figure that is reported.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter_ns, process_time_ns


@dataclass(frozen=True)
class Interval:
    """A median, and the interval that holds the true one with 95 % confidence; of fewer than eight, all of them."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Samples:
    """Nanoseconds of every call, one list for each contestant, in the order of the rounds."""

    wall: Mapping[str, Sequence[int]]
    cpu: Mapping[str, Sequence[int]]

    def added(self, name: str, base: str) -> Interval:
        """What a call of `name` takes beyond one of `base`, paired by round, in microseconds of wall time."""
        return median_interval([(a - b) / 1000 for a, b in zip(self.wall[name], self.wall[base], strict=True)])

    def added_cpu(self, name: str, base: str) -> Interval:
        """As `added`, in processor time."""
        return median_interval([(a - b) / 1000 for a, b in zip(self.cpu[name], self.cpu[base], strict=True)])

    def median(self, name: str) -> float:
        """Microseconds of wall time."""
        return statistics.median(self.wall[name]) / 1000


def median_interval(values: Sequence[float]) -> Interval:
    """The median, and the order statistics half a width of 1.96 √n / 2 ranks to either side of it."""
    ordered = sorted(values)
    count = len(ordered)
    reach = 0.98 * math.sqrt(count)
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


def race(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 50, collect_every: int = 500
) -> Samples:
    """Calls every contestant once a round, in shuffled order. The garbage collector runs between rounds, not during."""
    names = list(contestants)
    wall: dict[str, list[int]] = {name: [] for name in names}
    cpu: dict[str, list[int]] = {name: [] for name in names}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for current in range(warm_up + rounds):
            order.shuffle(names)
            for name in names:
                call = contestants[name]
                cpu_start, start = process_time_ns(), perf_counter_ns()
                call()
                end, cpu_end = perf_counter_ns(), process_time_ns()
                if current >= warm_up:
                    wall[name].append(end - start)
                    cpu[name].append(cpu_end - cpu_start)
            if current % collect_every == collect_every - 1:
                gc.collect()
    finally:
        gc.enable()
    return Samples(wall, cpu)


def machine() -> dict[str, object]:
    """What a reader needs to know of the machine: its load now, and how many cores it has."""
    return {"load_average": [round(value, 2) for value in os.getloadavg()], "cores": os.cpu_count()}


def as_dict(interval: Interval) -> dict[str, float]:
    return {key: round(value, 2) for key, value in asdict(interval).items()}
