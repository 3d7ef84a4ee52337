"""The programs that the benchmarks time give the same on a tiny model, and what they measure is measured rightly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8")


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The modules of the benchmarks, which are scripts beside each other and no package."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    try:
        import contest
        import gpt2
        import memory
        import tables
        import workloads

        yield SimpleNamespace(contest=contest, gpt2=gpt2, memory=memory, tables=tables, workloads=workloads.WORKLOADS)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def ours(modules):
    return modules.contest.Contest("ours", modules.gpt2.SIZES["tiny"])


@pytest.mark.parametrize("name", NAMES)
def test_all_programs_of_a_workload_give_the_same(modules, ours, name: str) -> None:
    workload = modules.workloads[name]
    with torch.set_grad_enabled(workload.gradients):
        right, told = ours.check(workload)
        result = torch.utils._pytree.tree_leaves(right["naive hooks"]())[0]
    assert set(right) == set(told) == {*workload.by_hand, "ours"}
    assert result.float().std() > 1e-2  # so that a patch that is left out would be noticed


def test_the_workloads_are_these(modules) -> None:
    assert tuple(modules.workloads) == NAMES


def test_a_wrong_program_of_ours_stops_the_benchmark(modules, ours, monkeypatch, capsys) -> None:
    monkeypatch.setitem(ours.programs["S3"], "ours", lambda model, prompt: torch.zeros(3, 53))
    with torch.no_grad(), pytest.raises(SystemExit):
        ours.check(modules.workloads["S3"])
    assert "S3, ours: differs by" in capsys.readouterr().err


def test_a_peer_that_is_wrong_or_fails_is_left_out_with_the_reason(modules, ours, monkeypatch) -> None:
    monkeypatch.setattr(ours, "library", "a peer")
    monkeypatch.setitem(ours.programs, "S3", {"wrong": lambda model, prompt: torch.zeros(3, 53), "failing": _fail})
    with torch.no_grad():
        right, told = ours.check(modules.workloads["S3"])
    assert set(right) == {"naive hooks", "best hooks"}
    assert told["wrong"]["failed"].startswith("differs by")
    assert told["failing"]["failed"] == "ValueError: no"


def _fail(model: object, prompt: object) -> None:
    raise ValueError("no")


def test_a_contest_times_each_program_in_each_round(modules, ours) -> None:
    measured = ours.run(modules.workloads["S3"], rounds=2, seconds=0)
    assert measured["rounds"] == 2
    for told in measured["contestants"].values():
        assert len(told["wall"]) == len(told["cpu"]) == 2
        assert min(told["wall"]) > 0
        assert told["memory"]["tensors"] >= told["memory"]["returned"] == 3 * 53 * 4


def test_live_tensors_are_counted_until_they_are_freed(modules) -> None:
    given = torch.zeros(1000)

    def call() -> torch.Tensor:
        first = given + 1  # 4,000 bytes
        second = first + 1  # 8,000
        del first
        third = second[:10] + second.view(10, 100).sum(0)[:10]  # 4,000; then 400 of the sum, and 40
        second += 1
        return third

    peak = modules.memory.measure(call)
    assert (peak.tensors, peak.returned) == (8000, 40)


def test_what_is_out_of_its_bound_is_told(modules) -> None:
    def result(seconds: dict[str, float]) -> dict[str, object]:
        told = {name: {"wall": [value] * 3, "cpu": [value] * 3} for name, value in seconds.items()}
        return {"workloads": {"S3": {"contestants": told}}}

    good = result({"naive hooks": 1.0, "best hooks": 0.2, "ours": 0.21})
    assert modules.tables.faults("S3", {"ours": good}) == []
    bad = result({"naive hooks": 1.0, "best hooks": 0.5, "ours": 0.6})
    assert modules.tables.faults("S3", {"ours": bad}) == [
        "S3: the best hooks take 0.5 of the naive ones, and may take 0.26",
        "S3: ours takes 1.2 × the best hooks (wall), bound 1.1",
        "S3: ours takes 1.2 × the best hooks (cpu), bound 1.1",
    ]


def test_a_peer_that_cannot_say_a_workload_is_no_fault(modules, ours) -> None:
    workload = modules.workloads["S6"]
    with torch.set_grad_enabled(workload.gradients):
        measured = ours.run(workload, rounds=3, seconds=0)
    silent = {"library": "pyvene", "versions": {}, "threads": 1, "workloads": {}}
    results = {"ours": {**silent, "library": "ours", "workloads": {"S6": measured}}, "pyvene": silent}
    told = modules.tables.faults("S6", results)
    assert all(fault.startswith("S6: ours takes") for fault in told)
    table = modules.tables.workloads({"S6": results})
    assert "| ours | best hooks |" in table
    assert "| pyvene |" not in table
