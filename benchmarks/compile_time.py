"""How long compiling takes, in a warm process: by the length of an experiment, and of the sweep S1 by its positions.

Prints one JSON document; `run.py` runs it.

Each length is compiled from a new source file every time, so that nothing can be remembered from the time before.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from types import ModuleType

import libcst
import torch
from gpt2 import SIZES, make_model, tokens
from interleaved import machine
from programs.ours import sweep_positions, wrap
from stack import make_stack

from nnsight_compiler import NNsight, intervene

LENGTHS = (10, 20, 40, 80, 160, 320)
REPEATS = 15
POSITIONS, SWEEPS = (15, 60), 5
BOUND = 300.0
"""Milliseconds that compiling S1 may take, however many positions there are."""

STATEMENTS = (
    "h{n} = model.layers[{layer}].output",
    "h{n} = h{n} * 2 + x",
    "total = total + h{n}.sum()",
    "model.layers[{layer}].output[:, 0] = h{n}.mean()",
)


def source_of(lines: int) -> str:
    """An experiment of this many lines: reads, tensor code and writes on four layers in turn."""
    head = ["def experiment(model, x):", "    total = 0", "    with model.trace(x):"]
    body = ["        " + STATEMENTS[n % 4].format(n=n // 4, layer=(n // 4) % 4) for n in range(lines - len(head) - 2)]
    return "\n".join([*head, *body, "        total = total + model.output.sum()", "    return total", ""])


def load(source: str, folder: Path, number: int) -> ModuleType:
    """Writes the source to a file of its own and imports it."""
    file = folder / f"experiment_{number}.py"
    file.write_text(source)
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """The result, and milliseconds of wall and of processor time."""
    cpu, start = process_time(), perf_counter()
    result = work()
    return result, (perf_counter() - start) * 1000, (process_time() - cpu) * 1000


def measure(lines: int, folder: Path) -> dict[str, object]:
    model, x = make_stack()
    wrapped = NNsight(model)
    source = source_of(lines)
    columns: dict[str, list[float]] = {
        "libcst": [],
        "lower": [],
        "compile": [],
        "total": [],
        "cpu": [],
    }
    for repeat in range(REPEATS + 2):
        function = load(source, folder, 10_000 * lines + repeat).experiment
        _, parse, _ = timed(lambda: libcst.parse_module(source))
        experiment = intervene(function)
        _, lower, lower_cpu = timed(lambda: experiment.ir)  # noqa: B023
        _, compiling, compiling_cpu = timed(lambda: experiment.compile(wrapped, x))  # noqa: B023  # passes, then code
        if repeat >= 2:
            columns["libcst"].append(parse)
            columns["lower"].append(lower)
            columns["compile"].append(compiling)
            columns["total"].append(lower + compiling)
            columns["cpu"].append(lower_cpu + compiling_cpu)
    medians = {f"{name}_ms": round(statistics.median(values), 2) for name, values in columns.items()}
    return {"lines": lines, **medians, "total_max_ms": round(max(columns["total"]), 2)}


def measure_sweep(positions: int) -> dict[str, object]:
    """From source to hooks, of S1 on GPT-2 small: a new experiment, for a new model and once more for the same."""
    totals, cpu, again = [], [], []
    for _ in range(SWEEPS + 1):
        size = SIZES["small"]
        model = wrap(make_model(size))
        experiment = intervene(sweep_positions.__wrapped__)
        clean, corrupt = tokens(size, 1, positions, 0), tokens(size, 1, positions, 1)
        _, wall, of_cpu = timed(lambda: experiment.compile(model, clean, corrupt, 1, 2))  # noqa: B023
        totals.append(wall)
        cpu.append(of_cpu)
        experiment = intervene(sweep_positions.__wrapped__)
        again.append(timed(lambda: experiment.compile(model, clean, corrupt, 1, 2))[1])  # noqa: B023
    median = statistics.median(totals[1:])
    return {
        "positions": positions,
        "first_ms": round(totals[0], 2),
        "total_ms": round(median, 2),
        "total_max_ms": round(max(totals[1:]), 2),
        "cpu_ms": round(statistics.median(cpu[1:]), 2),
        "again_ms": round(statistics.median(again[1:]), 2),
        "within_bound": median <= BOUND,
    }


def main() -> None:
    torch.set_num_threads(1)
    before = machine()
    sweeps = [measure_sweep(positions) for positions in POSITIONS]
    with tempfile.TemporaryDirectory() as folder:
        measure(10, Path(folder))
        rows = [measure(lines, Path(folder)) for lines in LENGTHS]
    print(
        json.dumps(
            {
                "repeats": REPEATS,
                "before": before,
                "after": machine(),
                "lengths": rows,
                "bound_ms": BOUND,
                "sweeps": sweeps,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
