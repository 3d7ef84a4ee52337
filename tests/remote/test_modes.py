"""Torch's modes where an experiment is called: they hold where it runs, or it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import pack, unpack
from nnsight_compiler.remote.outside import Sent, sent
from nnsight_compiler.remote.results import read_result

ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


@intervene
def makes(net, rows, vector):
    with net.trace(rows):
        hidden = net[0].output
    vector.mul_(2)
    return hidden, torch.zeros(3), torch.ones(2, requires_grad=True) * 2


def test_the_default_dtype_goes_along(net: NNsight) -> None:
    def job() -> Sent:
        values = {"net": net, "rows": ROWS, "vector": ROWS[0].clone()}
        return sent(makes.ir, {"torch": torch}, {}, values, lambda _: "net")

    torch.set_default_dtype(torch.float64)
    try:
        asked = job()
        data = pack(asked.job)
    finally:
        torch.set_default_dtype(torch.float32)
    found = read_result(Executor(net).run(unpack(data)), (*asked.data, *asked.code))
    assert [each.dtype for each in found] == [torch.float32, torch.float64, torch.float64]
    assert torch.get_default_dtype() == torch.float32
    assert job().job.digest != asked.job.digest


def test_no_gradients_where_none_are_recorded(net: NNsight) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            vector = torch.ones(2)
            hidden, _, doubled = makes(net, ROWS, vector, remote="local")
            assert not doubled.requires_grad
            assert vector.tolist() == [2, 2]
            torch.testing.assert_close(hidden, net._wrapped[0](ROWS))
    assert makes(net, ROWS, torch.ones(2), remote="local")[2].requires_grad


def test_autocast_is_refused(net: NNsight) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(
            FileError, match=r"makes cannot be sent: `torch.autocast` holds here, and not where it would"
        ):
            makes(net, ROWS, torch.ones(2), remote="local")
        with torch.autocast("cpu", enabled=False):
            hidden, _, _ = makes(net, ROWS, torch.ones(2), remote="local")
    torch.testing.assert_close(hidden, net._wrapped[0](ROWS).detach())
