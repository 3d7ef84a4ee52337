"""Jobs that run together give what each gives alone, or are left to run alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.remote.execute import Executor, Given
from nnsight_compiler.remote.job import pack, unpack
from nnsight_compiler.remote.outside import sent
from nnsight_compiler.remote.results import read_result

ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


def together(net: NNsight, experiment: Any, values: Sequence[dict[str, Any]]) -> list[Any] | None:
    asked = [sent(experiment.ir, globals(), {}, {"net": net, **each}, lambda _: "net") for each in values]
    found = Executor(net).run_together([unpack(pack(each.job)) for each in asked])
    if found is None:
        return None
    return [read_result(data, (*each.data, *each.code), net) for data, each in zip(found, asked, strict=True)]


@intervene
def steers(net, rows, vector):
    with net.trace(rows):
        net[0].output += vector
        out = net.output
    vector.mul_(2)
    return out, vector[:2]


def test_each_has_its_own_rows_and_vector(net: NNsight) -> None:
    vectors = [torch.full((4,), value) for value in (1.0, float("nan"), -2.0)]
    plain, given = net._wrapped, [vector.clone() for vector in vectors]
    found = together(net, steers, [{"rows": ROWS[:n], "vector": v} for n, v in zip((2, 3, 2), given, strict=True)])
    assert found is not None
    for (out, part), rows, vector, own in zip(found, (2, 3, 2), vectors, given, strict=True):
        with torch.no_grad():
            wanted = plain[2](torch.tanh(plain[0](ROWS[:rows]) + vector))
        torch.testing.assert_close(out, wanted, equal_nan=True)
        torch.testing.assert_close(own, vector * 2, equal_nan=True)
        assert part.data_ptr() == own.data_ptr()


SEEN: list[int] = []


def counted(hidden):
    SEEN.append(1)
    return hidden * len(SEEN)


@intervene
def counts(net, rows):
    with net.trace(rows):
        hidden = counted(net[0].output)
    return hidden


@intervene
def learns(net, rows, module):
    with net.trace(rows):
        net[0].output = module(net[0].output)
        net.output.sum().backward()
    return module.weight.grad


def test_what_changes_its_code_or_brings_gradients_for_it_runs_alone(net: NNsight) -> None:
    assert together(net, counts, [{"rows": ROWS}, {"rows": -ROWS}]) is None
    assert SEEN == []
    module = nn.Linear(4, 4)
    assert together(net, learns, [{"rows": ROWS, "module": module}, {"rows": -ROWS, "module": module}]) is None
    module.weight.grad = torch.ones(4, 4)
    assert together(net, learns, [{"rows": ROWS, "module": module}, {"rows": -ROWS, "module": module}]) is None
    job = sent(learns.ir, {}, {}, {"net": net, "rows": ROWS, "module": module}, lambda _: "net").job
    executor = Executor(net)
    given = Given(job, executor.load(job, job.digest))
    assert executor.group(job, given, given.loaded.cache.get(given.values)) == ""
    executor.run(unpack(pack(job)))
    module.weight.grad = None
    plain = sent(learns.ir, {}, {}, {"net": net, "rows": ROWS, "module": module}, lambda _: "net")
    assert plain.job.digest == job.digest
    gradient = read_result(executor.run(unpack(pack(plain.job))), (*plain.data, *plain.code), net)
    out = net._wrapped[2](torch.tanh(module(net._wrapped[0](ROWS).detach())))
    torch.testing.assert_close(gradient, torch.autograd.grad(out.sum(), module.weight)[0])
