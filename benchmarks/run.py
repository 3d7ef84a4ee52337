"""Runs the benchmarks, each in a process of its own, and writes JSON and Markdown into `benchmarks/results/`.

python benchmarks/run.py                                     all of them
python benchmarks/run.py --only S1 S3 --rounds 3             some, in so many rounds
python benchmarks/run.py --only S1 --libraries ours nnsight  against some of the peers
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables
from contest import DISTRIBUTIONS
from gpt2 import SIZES
from workloads import WORKLOADS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LIBRARIES = tuple(DISTRIBUTIONS)
PARTS = (*WORKLOADS, "memory_budget", "own_time", "call_cost", "compile_time")


def interpreter(library: str) -> Path:
    """What runs a library: ours is installed here, each peer in an environment of its own."""
    return Path(sys.executable) if library == "ours" else HERE / f".venv-{library}" / "bin" / "python"


def start(command: Sequence[object]) -> str:
    """What a script prints. Threads that wait do not spin, so that processor time is work."""
    surroundings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=surroundings, check=False
    )
    if finished.returncode != 0:
        sys.exit(f"{command[1]} failed")
    return finished.stdout


def script(name: str, *options: str, library: str = "ours") -> dict[str, Any]:
    """The JSON that a benchmark prints."""
    print(f"running {name}", flush=True)
    return dict(json.loads(start([interpreter(library), HERE / f"{name}.py", *options])))


def contest(workload: str, library: str, options: argparse.Namespace) -> dict[str, Any]:
    """One workload in one library, against hooks."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        limits = ["--seconds", options.seconds] + (["--rounds", options.rounds] if options.rounds else [])
        start(
            [
                *(interpreter(library), HERE / "contest.py", library, output),
                *("--size", options.size, "--workloads", workload, *limits),
            ]
        )
        return dict(json.loads(output.read_text()))


def write(name: str, data: object, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(f"\n{text}", flush=True)


def run_workloads(names: Sequence[str], libraries: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Runs workloads and writes them beside those that were run before; what is out of its bound."""
    table = "workloads" if options.size == "small" else f"workloads_{options.size}"
    file = RESULTS / f"{table}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        results[name] = {library: contest(name, library, options) for library in libraries}
        prints = [result["fingerprint"] for result in results[name].values()]
        if any(abs(a - b) > 1e-2 for other in prints for a, b in zip(prints[0], other, strict=True)):
            sys.exit(f"{name}: the libraries did not run the same model")
    results = {name: results[name] for name in sorted(results)}
    write(table, results, tables.workloads(results))
    return [fault for name in names if options.size == "small" for fault in tables.faults(name, results[name])]


def run_memory_budget(options: argparse.Namespace) -> list[str]:
    result = script("memory_budget", "--size", options.size)
    write("memory_budget", result, tables.memory_budget(result))
    return [f"memory_budget: {case['workload']} with {case['budget']}" for case in tables.over_budget(result)]


def run_own_time(options: argparse.Namespace) -> list[str]:
    result = script("own_time")
    write("own_time", result, tables.own_time(result))
    return [f"own_time: {case['case']}" for case in result["cases"] if case["within_bound"] is False]


def run_call_cost(options: argparse.Namespace) -> list[str]:
    ours = script("call_cost")
    peer = script("peer_nnsight", library="nnsight") if "nnsight" in options.libraries else None
    write("call_cost", {"ours": ours, "nnsight": peer}, tables.call_cost(ours, peer))
    return [f"call_cost: {case['stack']}, {case['case']}" for case in ours["cases"] if not case["within_bound"]]


def run_compile_time(options: argparse.Namespace) -> list[str]:
    result = script("compile_time")
    write("compile_time", result, tables.compile_time(result))
    return [f"compile_time: S1, {row['positions']} positions" for row in result["sweeps"] if not row["within_bound"]]


OTHERS: Mapping[str, Callable[[argparse.Namespace], list[str]]] = {
    "memory_budget": run_memory_budget,
    "own_time": run_own_time,
    "call_cost": run_call_cost,
    "compile_time": run_compile_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; otherwise all")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="otherwise all")
    parser.add_argument("--without-peers", action="store_true", help="ours and hooks alone")
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny shows that all of it works")
    parser.add_argument("--rounds", type=int, help="of each workload, instead of as many as fit the seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long each workload and library is timed")
    options = parser.parse_args()
    if options.without_peers:
        options.libraries = ("ours",)
    for library in options.libraries:
        if not interpreter(library).is_file():
            print(
                f"{library} is not installed in {interpreter(library).parent.parent}: it is left out", file=sys.stderr
            )
    options.libraries = [
        library for library in LIBRARIES if library in options.libraries and interpreter(library).is_file()
    ]
    faults = []
    if names := [name for name in WORKLOADS if name in options.only]:
        faults += run_workloads(names, options.libraries, options)
    for name, part in OTHERS.items():
        if name in options.only:
            faults += part(options)
    if faults:
        sys.exit("out of bounds:\n" + "\n".join(f"  {fault}" for fault in faults))


if __name__ == "__main__":
    main()
