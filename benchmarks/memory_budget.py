"""Whether the tensors that are alive at once stay within `memory_budget=`, for the workloads that could use much more.

Prints one JSON document; `run.py` runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import torch
from contest import THREADS, TOLERANCE, difference, timed
from gpt2 import SIZES, make_model
from interleaved import machine
from memory import measure
from programs.ours import PROGRAMS, wrap
from workloads import WORKLOADS

from nnsight_compiler.experiment import Experiment
from nnsight_compiler.options import Options

BUDGETS = {"S1": ("1 GB", "200 MB", "50 MB"), "S5": ("1 GB", "500 MB", "200 MB")}
"""Of S5 each batch is one forward of the researcher's own making, whose activations nothing can split."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    size = SIZES[parser.parse_args().size]
    torch.set_num_threads(THREADS)
    model = make_model(size)
    before, rows = machine(), []
    for name, budgets in BUDGETS.items():
        inputs = WORKLOADS[name].inputs(size)
        experiment = PROGRAMS[name]["ours"]
        assert isinstance(experiment, Experiment)
        with torch.no_grad():
            expected = WORKLOADS[name].best(model, *inputs)
            for budget in (None, *budgets):
                call = partial(experiment.with_options(memory_budget=budget), wrap(model), *inputs)
                if difference(expected, call()) >= TOLERANCE:
                    sys.exit(f"{name} with memory_budget={budget!r} gives something else")
                peak = measure(call)
                _, seconds = timed(call)
                rows.append(
                    {
                        "workload": name,
                        "budget": budget,
                        "bytes": Options.of(memory_budget=budget).memory_budget,
                        "peak": peak.tensors,
                        "returned": peak.returned,
                        "process": peak.process,
                        **seconds,
                    }
                )
    print(json.dumps({"before": before, "after": machine(), "cases": rows}, indent=2))


if __name__ == "__main__":
    main()
