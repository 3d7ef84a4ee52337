"""The workloads in one library, against hooks written by hand, in one process; writes one JSON document.

`run.py` starts it, with an interpreter that has the library. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from gpt2 import SIZES, Size, fingerprint, make_model
from interleaved import machine, race
from memory import measure
from torch.utils._pytree import tree_leaves
from workloads import WORKLOADS
from workloads.workload import Workload

TOLERANCE = 1e-4
THREADS = 2
FEWEST, MOST = 3, 25
DISTRIBUTIONS = {
    "ours": ("nnsight-compiler",),
    "nnsight": ("nnsight",),
    "pyvene": ("pyvene",),
    "transformer_lens": ("transformer-lens",),
}
"""The libraries, each a module in `programs`, with what it is called where packages are installed."""


def difference(expected: Any, actual: Any) -> float:
    """The largest difference between two results; infinite where they have not the same shape."""
    pairs = tree_leaves(expected), tree_leaves(actual)
    if [value.shape for value in pairs[0]] != [value.shape for value in pairs[1]]:
        return float("inf")
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(*pairs, strict=True))


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, with its seconds."""
    cpu, wall = process_time(), perf_counter()
    result = call()
    return result, {"wall": perf_counter() - wall, "cpu": process_time() - cpu}


class Contest:
    """One library's programs and the hooks, on one model."""

    def __init__(self, library: str, size: Size) -> None:
        module = importlib.import_module(f"programs.{library}")
        self.library, self.size = library, size
        self.model = make_model(size)
        self.wrapped = module.wrap(self.model)
        self.programs = module.PROGRAMS

    def contestants(self, workload: Workload) -> dict[str, Callable[[], Any]]:
        """All that can do a workload, the naive hooks first."""
        inputs = workload.inputs(self.size)
        hooks = {name: partial(program, self.model, *inputs) for name, program in workload.by_hand.items()}
        library = {
            name: partial(program, self.wrapped, *inputs) for name, program in self.programs[workload.name].items()
        }
        return {**hooks, **library}

    def check(self, workload: Workload) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
        """Those whose first call returns what the naive hooks return, and what there is to say of all first calls.

        Raises:
            SystemExit: hooks, or ours, fail or return something else. A peer that does is left out, with the reason.
        """
        right, told = {}, {}
        expected = None
        for name, call in self.contestants(workload).items():
            try:
                result, first = timed(call)
            except Exception as error:
                told[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            else:
                expected = result if expected is None else expected
                apart = difference(expected, result)
                told[name] = {"first": first, "difference": apart}
                if apart < TOLERANCE:
                    right[name] = call
                    continue
                told[name]["failed"] = f"differs by {apart:.2g}"
            print(f"{workload.name}, {name}: {told[name]['failed']}", file=sys.stderr)
            if self.library == "ours" or name in workload.by_hand:
                raise SystemExit(1)
        return right, told

    def run(self, workload: Workload, rounds: int | None, seconds: float) -> dict[str, Any]:
        """Checks, measures memory in a call of its own, then times in rounds."""
        with torch.set_grad_enabled(workload.gradients):
            before = machine()
            right, told = self.check(workload)
            round_time = 0.0
            for name, call in right.items():
                peak, taken = timed(partial(measure, call))
                told[name]["memory"] = asdict(peak)
                round_time += taken["wall"]
            rounds = rounds or max(FEWEST, min(MOST, int(seconds / round_time)))
            samples = race(right, rounds, warm_up=0, collect_every=1)
        for name in right:
            told[name]["wall"] = [value / 1e9 for value in samples.wall[name]]
            told[name]["cpu"] = [value / 1e9 for value in samples.cpu[name]]
        return {"rounds": rounds, "before": before, "after": machine(), "contestants": told}


def versions(library: str) -> dict[str, str]:
    """What was run."""
    return {name: version(name) for name in (*DISTRIBUTIONS[library], "torch", "transformers")}


def compete(
    library: str, size: str, names: Sequence[str], rounds: int | None = None, seconds: float = 60.0
) -> dict[str, Any]:
    """The workloads that a library can say, one after the other."""
    contest = Contest(library, SIZES[size])
    workloads = {}
    for name in names:
        if name in contest.programs:
            print(f"{library}: {name}", file=sys.stderr, flush=True)
            workloads[name] = contest.run(WORKLOADS[name], rounds, seconds)
    return {
        "library": library,
        "size": size,
        "versions": versions(library),
        "threads": torch.get_num_threads(),
        "fingerprint": fingerprint(contest.model, contest.size),
        "workloads": workloads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=DISTRIBUTIONS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="instead of as many as fit the seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long a workload is timed")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    result = compete(given.library, given.size, given.workloads, given.rounds, given.seconds)
    given.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
