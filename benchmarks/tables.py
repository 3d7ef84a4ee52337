"""The results as Markdown, and what of them is out of its bound."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from interleaved import Interval, median_interval
from workloads import WORKLOADS

NAIVE, BEST = "naive hooks", "best hooks"

Result = Mapping[str, Any]
"""What a benchmark printed."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(result: Result) -> str:
    """The machine before and after."""
    before, after = (", ".join(map(str, result[when]["load_average"])) for when in ("before", "after"))
    return f"load average before: {before}; after: {after}; {result['before']['cores']} cores"


def within(value: bool) -> str:
    return "yes" if value else "**no**"


def interval(value: Mapping[str, float]) -> str:
    return f"{value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.1f}"


def ratio(contestants: Result, name: str, base: str, clock: str) -> Interval:
    """How many times as long as one of `base` a call of `name` takes, paired by round."""
    pairs = zip(contestants[name][clock], contestants[base][clock], strict=True)
    return median_interval([a / b for a, b in pairs])


def spread(value: Interval) -> str:
    return f"{value.median:.3g} [{value.low:.3g}, {value.high:.3g}]"


def faults(name: str, libraries: Mapping[str, Result]) -> list[str]:
    """What is out of its bound in a workload: ours, and hooks that are not as good as they should be."""
    workload, found = WORKLOADS[name], []
    for library, result in libraries.items():
        if name not in result["workloads"]:
            continue  # it cannot say this workload
        contestants = result["workloads"][name]["contestants"]
        taken = ratio(contestants, BEST, NAIVE, "cpu").median
        if library == "ours":
            if workload.share is not None and taken > workload.share:
                found.append(
                    f"{name}: the best hooks take {taken:.3g} of the naive ones, and may take {workload.share}"
                )
            for clock in ("wall", "cpu"):
                measured = ratio(contestants, "ours", BEST, clock).median
                if measured > workload.bound:
                    found.append(
                        f"{name}: ours takes {measured:.3g} × the best hooks ({clock}), bound {workload.bound}"
                    )
        found += [f"{name}: {who}: {what['failed']}" for who, what in contestants.items() if "failed" in what]
    return found


def workloads(results: Mapping[str, Mapping[str, Result]]) -> str:
    """All workloads: one table of what matters, then one for each."""
    header = [
        "workload",
        "ours / best hooks, wall",
        "CPU",
        "bound",
        "within",
        "best / naive hooks, CPU",
        "allowed",
        "naive hooks / ours, CPU",
        "nnsight / ours, CPU",
        "expert nnsight / ours, CPU",
    ]
    parts = [
        "# Naive programs against hooks written by hand",
        "Ratios of times in one process, by round: the median, and its 95 % interval. `benchmarks/README.md` says how"
        " to read them.",
        table(header, [_summary(name, libraries) for name, libraries in results.items() if "ours" in libraries]),
    ]
    for name, libraries in results.items():
        parts += _workload(name, libraries)
    return "\n\n".join(parts) + "\n"


def _summary(name: str, libraries: Mapping[str, Result]) -> list[str]:
    workload = WORKLOADS[name]
    contestants = libraries["ours"]["workloads"][name]["contestants"]
    ours = {clock: ratio(contestants, "ours", BEST, clock) for clock in ("wall", "cpu")}
    share = ratio(contestants, BEST, NAIVE, "cpu")
    return [
        f"{name} {workload.title}",
        spread(ours["wall"]),
        spread(ours["cpu"]),
        f"{workload.bound}",
        within(all(value.median <= workload.bound for value in ours.values())),
        spread(share),
        "–" if workload.share is None else f"{workload.share}" + ("" if share.median <= workload.share else " **no**"),
        spread(ratio(contestants, NAIVE, "ours", "cpu")),
        _times_ours(name, libraries, "nnsight"),
        _times_ours(name, libraries, "nnsight, expert"),
    ]


def _times_ours(name: str, libraries: Mapping[str, Result], peer: str) -> str:
    """How many times what ours takes a peer takes, each measured by the best hooks in its own process."""
    for result in libraries.values():
        contestants = result["workloads"].get(name, {}).get("contestants", {})
        if "cpu" in contestants.get(peer, {}):
            ours = libraries["ours"]["workloads"][name]["contestants"]
            return f"{ratio(contestants, peer, BEST, 'cpu').median / ratio(ours, 'ours', BEST, 'cpu').median:.3g}"
    return "–"


def _workload(name: str, libraries: Mapping[str, Result]) -> list[str]:
    header = [
        "process",
        "program",
        "× best hooks, wall",
        "× best hooks, CPU",
        "× naive hooks, CPU",
        "seconds, wall",
        "first call",
        "live tensors, MB",
        "process grows, MB",
    ]
    rows, notes = [], []
    for library, result in libraries.items():
        if name not in result["workloads"]:
            continue
        measured = result["workloads"][name]
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        notes.append(
            f"- {library}: {versions}; {measured['rounds']} rounds, {result['threads']} threads; {load(measured)}."
        )
        for program, told in measured["contestants"].items():
            if "failed" in told:
                rows.append([library, program, told["failed"], *["–"] * (len(header) - 3)])
                continue
            rows.append(
                [
                    library,
                    program,
                    *(spread(ratio(measured["contestants"], program, BEST, clock)) for clock in ("wall", "cpu")),
                    spread(ratio(measured["contestants"], program, NAIVE, "cpu")),
                    f"{statistics.median(told['wall']):.3g}",
                    f"{told['first']['wall']:.3g}",
                    megabytes(told["memory"]["tensors"]),
                    megabytes(told["memory"]["process"]),
                ]
            )
    return [f"## {name}: {WORKLOADS[name].title}", table(header, rows), "\n".join(notes)]


def over_budget(result: Result) -> list[Result]:
    """The cases whose live tensors, but for what is returned, are more than was allowed."""
    return [case for case in result["cases"] if case["budget"] and case["peak"] - case["returned"] > case["bytes"]]


def memory_budget(result: Result) -> str:
    over = over_budget(result)
    rows = [
        [
            case["workload"],
            case["budget"] or "none given",
            megabytes(case["peak"] - case["returned"]),
            megabytes(case["returned"]),
            megabytes(case["process"]),
            "–" if case["budget"] is None else within(case not in over),
            f"{case['wall']:.3g}",
        ]
        for case in result["cases"]
    ]
    header = ["workload", "budget", "live tensors, MB", "returned, MB", "process grows, MB", "within", "seconds, wall"]
    return "\n\n".join(["# Memory under `memory_budget=`", f"{load(result)}.".capitalize(), table(header, rows)]) + "\n"


def own_time(result: Result) -> str:
    rows = [
        [
            case["case"],
            str(case["forwards"]),
            f"{case['bare_us']:.1f}",
            interval(case["beyond_one_forward_us"]),
            interval(case["beyond_one_forward_cpu_us"]),
            "–" if case["within_bound"] is None else within(case["within_bound"]),
        ]
        for case in result["cases"]
    ]
    header = ["call", "forwards written", "one bare forward", "beyond it, wall", "beyond it, CPU", "within"]
    return "\n\n".join(
        [
            "# Our own time in a cached call",
            f"Microseconds, on a model whose modules return at once; bound: {result['bound_us']:.0f}; {load(result)}.",
            table(header, rows) + "\n",
        ]
    )


def call_cost(ours: Result, peer: Result | None) -> str:
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
            within(case["within_bound"]),
        ]
        for case in ours["cases"]
    ]
    header = ["stack", "case", "bare forward", "hooks add", "ours adds", "ours − hooks", "bound", "within"]
    parts = [
        "# Cost of a call beyond the bare forward",
        "Microseconds of wall time, medians of paired differences with their 95 % intervals"
        f" ({ours['cases'][0]['rounds']} rounds); one thread; {load(ours)}; torch {ours['torch']}.",
        table(header, rows),
        "## nnsight, in a process of its own",
    ]
    if peer is None:
        parts.append("Left out: nnsight is not installed, or was not asked for.")
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
        parts.append(f"nnsight {peer['nnsight']}, torch {peer['torch']}; {load(peer)}.")
        parts.append(table(["case", "bare forward", "hooks add", "nnsight adds"], peer_rows))
    return "\n\n".join(parts) + "\n"


def compile_time(result: Result) -> str:
    keys = ["libcst_ms", "lower_ms", "compile_ms", "total_ms", "total_max_ms", "cpu_ms"]
    rows = [[str(row["lines"]), *(f"{row[key]:.2f}" for key in keys)] for row in result["lengths"]]
    header = ["lines", "libcst alone", "lower", "passes and code", "total", "slowest total", "CPU"]
    keys = ["total_ms", "total_max_ms", "cpu_ms", "again_ms", "first_ms"]
    sweeps = [
        [str(row["positions"]), *(f"{row[key]:.2f}" for key in keys), within(row["within_bound"])]
        for row in result["sweeps"]
    ]
    sweep_header = [
        "positions",
        "total",
        "slowest total",
        "CPU",
        "once more, same model",
        "the first in the process",
        "within",
    ]
    return "\n\n".join(
        [
            "# Compile time in a warm process",
            f"Milliseconds, medians of {result['repeats']} compilations, each of a new file; {load(result)}.",
            table(header, rows),
            f"The sweep S1 on GPT-2 small, each time for a new model; the bound is {result['bound_ms']:.0f}.",
            table(sweep_header, sweeps) + "\n",
        ]
    )
