"""Runs the benchmarks, each in a process of its own, and writes JSON and Markdown into `benchmarks/results/`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(interpreter: str, script: str) -> dict[str, Any]:
    """The JSON that a benchmark prints."""
    print(f"running {script}", flush=True)
    finished = subprocess.run([interpreter, str(HERE / script)], stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{script} failed")
    return dict(json.loads(finished.stdout))


def interval(value: Mapping[str, float]) -> str:
    return f"{value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(result: Mapping[str, Any]) -> str:
    before, after = (", ".join(map(str, result[when]["load_average"])) for when in ("before", "after"))
    return f"Load average before: {before}; after: {after}; {result['before']['cores']} cores; one thread."


def call_cost(ours: Mapping[str, Any], peer: Mapping[str, Any] | None) -> str:
    """The call-cost table. A peer has its own process, so its column is what it adds to the bare forward there."""
    rows = [
        [
            case["stack"],
            case["case"],
            f"{case['bare_us']:.1f}",
            interval(case["hooks_added_us"]),
            interval(case["ours_added_us"]),
            interval(case["ours_minus_hooks_us"]),
            f"{case['bound_us']:.1f}",
            "yes" if case["within_bound"] else "**no**",
        ]
        for case in ours["cases"]
    ]
    header = ["stack", "case", "bare forward", "hooks add", "ours adds", "ours − hooks", "bound", "within"]
    parts = [
        "# Cost of a call beyond the bare forward",
        "Microseconds of wall time, medians of paired differences with their 95 % intervals"
        f" ({ours['cases'][0]['rounds']} rounds). {load(ours)} torch {ours['torch']}.",
        table(header, rows),
        "## nnsight, in a process of its own",
    ]
    if peer is None:
        parts.append("Left out: nnsight could not be installed here.")
    else:
        peer_rows = [
            [
                case["case"],
                f"{case['bare_us']:.1f}",
                interval(case["hooks_added_us"]),
                interval(case["nnsight_added_us"]),
            ]
            for case in peer["cases"]
        ]
        parts.append(f"nnsight {peer['nnsight']}, torch {peer['torch']}. {load(peer)}")
        parts.append(table(["case", "bare forward", "hooks add", "nnsight adds"], peer_rows))
    return "\n\n".join(parts) + "\n"


def compile_time(result: Mapping[str, Any]) -> str:
    """The compile-time table."""
    keys = ["libcst_ms", "lower_ms", "compile_ms", "total_ms", "total_max_ms", "cpu_ms"]
    rows = [[str(row["lines"]), *(f"{row[key]:.2f}" for key in keys)] for row in result["lengths"]]
    header = [
        "lines",
        "libcst alone",
        "lower",
        "passes and code",
        "total",
        "slowest total",
        "CPU",
    ]
    return "\n\n".join(
        [
            "# Compile time in a warm process",
            f"Milliseconds, medians of {result['repeats']} compilations, each of a new file. {load(result)}",
            table(header, rows) + "\n",
        ]
    )


def write(name: str, data: object, text: str) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default="", help="an interpreter that has nnsight; left out where it does not exist")
    peer_python = parser.parse_args().peer
    ours = run(sys.executable, "call_cost.py")
    peer = run(peer_python, "peer_nnsight.py") if Path(peer_python).is_file() else None
    write("call_cost", {"ours": ours, "nnsight": peer}, call_cost(ours, peer))
    compiling = run(sys.executable, "compile_time.py")
    write("compile_time", compiling, compile_time(compiling))


if __name__ == "__main__":
    main()
