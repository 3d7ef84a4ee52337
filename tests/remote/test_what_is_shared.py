"""What a job is given and gives back, against plain Python and torch: what is shared, what is changed, and by what."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict, defaultdict, deque

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BatchEncoding

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import pack, unpack, unpacked
from nnsight_compiler.remote.outside import sent

ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))


def first(net: NNsight) -> torch.Tensor:
    """The output of the first module, by itself."""
    out = net._wrapped[0](ROWS).detach()
    assert isinstance(out, torch.Tensor)
    return out


# --- changes that torch does not count ---


@intervene
def by_data(net, rows, vector):
    with net.trace(rows):
        hidden = net[0].output
    vector.data.mul_(3)
    return hidden


@intervene
def by_an_array(net, rows, vector):
    with net.trace(rows):
        hidden = net[0].output
    array = vector.numpy()
    array[0] = 4
    return hidden


@intervene
def by_a_function(net, rows, mean, variance):
    with net.trace(rows):
        hidden = functional.batch_norm(net[0].output, mean, variance, training=True)
    return hidden


def test_changes_that_torch_does_not_count(net: NNsight) -> None:
    vector = torch.ones(2)
    by_data(net, ROWS, vector, remote="local")
    assert vector.tolist() == [3, 3]
    by_an_array(net, ROWS, vector, remote="local")
    assert vector.tolist() == [4, 3]
    mean, variance = torch.zeros(4), torch.ones(4)
    by_a_function(net, ROWS, mean, variance, remote="local")
    own = [torch.zeros(4), torch.ones(4)]
    functional.batch_norm(first(net), *own, training=True)
    torch.testing.assert_close([mean, variance], own)


@intervene
def through(net, rows, module):
    with net.trace(rows):
        net[0].output = module(net[0].output)
        out = net.output
    return out


def test_statistics_of_a_module(net: NNsight) -> None:
    module = nn.BatchNorm1d(4)
    wanted = copy.deepcopy(module)
    for _ in range(2):
        through(net, ROWS, module, remote="local")
        wanted(first(net))
    torch.testing.assert_close(dict(module.named_buffers()), dict(wanted.named_buffers()))
    assert int(module.num_batches_tracked) == 2


@intervene
def scales_weights(net, rows, module):
    with net.trace(rows):
        hidden = module(net[0].output)
    module.weight.data.mul_(2)
    return hidden


def test_weights_that_are_changed_by_data(net: NNsight) -> None:
    module = nn.Linear(4, 4)
    weight = module.weight.detach().clone()
    for factor in (2, 4):
        scales_weights(net, ROWS, module, remote="local")
        assert torch.equal(module.weight, weight * factor)


@intervene
def zeros_and_nans(net, rows, items, named):
    with net.trace(rows):
        hidden = net[0].output
    items[0] = -0.0
    named["a"] = complex(0.0, -0.0)
    items.append(float("nan"))
    return hidden


def test_a_zero_that_becomes_negative(net: NNsight) -> None:
    items, named = [0.0], {"a": 0j}
    zeros_and_nans(net, ROWS, items, named, remote="local")
    assert math.copysign(1, items[0]) == -1
    assert math.isnan(items[1])
    assert math.copysign(1, named["a"].imag) == -1


# --- what is shared ---


@intervene
def parts(net, rows, vector, pair):
    with net.trace(rows):
        hidden = net[0].output
    pair.append(vector[2:])
    vector.add_(1)
    return vector[:2], vector.view(2, 2).T, hidden[0], hidden


def test_a_part_of_what_was_given_is_a_part_of_it(net: NNsight) -> None:
    whole = torch.arange(6.0)
    vector, pair = whole[1:5], []
    low, square, row, hidden = parts(net, ROWS, vector, pair, remote="local")
    assert whole.tolist() == [0, 2, 3, 4, 5, 5]
    whole.mul_(10)
    assert low.tolist() == [20, 30]
    assert square.tolist() == [[20, 40], [30, 50]]
    assert pair[0].tolist() == [40, 50]
    hidden.zero_()
    assert row.tolist() == [0, 0, 0, 0]


def test_a_part_of_what_is_laid_out_otherwise_is_a_copy(net: NNsight) -> None:
    vector = torch.arange(40.0)[::10]
    low, square, _, _ = parts(net, ROWS, vector, [], remote="local")
    assert vector.tolist() == [1, 11, 21, 31]
    assert low.tolist() == [1, 11]
    assert square.tolist() == [[1, 21], [11, 31]]


@intervene
def weights_of(net, rows, module):
    with net.trace(rows):
        hidden = module(net[0].output)
    return module.weight, module.weight.detach()[0], hidden


def test_a_part_of_a_weight(net: NNsight) -> None:
    module = nn.Linear(4, 4)
    weight, row, _ = weights_of(net, ROWS, module, remote="local")
    assert weight is module.weight
    with torch.no_grad():
        module.weight.fill_(2)
    assert row.tolist() == [2, 2, 2, 2]


@intervene
def doubles(net, rows, one, many):
    with net.trace(rows):
        hidden = net[0].output
    one.mul_(2)
    return hidden


def test_a_tensor_and_its_expansion(net: NNsight) -> None:
    one = torch.tensor([[1.0], [2.0]])
    many = one.expand(2, 3)
    doubles(net, ROWS, one, many, remote="local")
    assert many.tolist() == [[2, 2, 2], [4, 4, 4]]


# --- gradients ---


@intervene
def accumulates(net, rows, vector, gradient, module):
    with net.trace(rows):
        net[0].output = module(net[0].output) + vector
        net.output.sum().backward()
    return vector.grad, gradient


def test_gradients_are_added_to_those_that_were_there(net: NNsight) -> None:
    module, vector = nn.Linear(4, 4), torch.zeros(4, requires_grad=True)
    wanted, own = copy.deepcopy(module), torch.zeros(4, requires_grad=True)
    for weight in (module.weight, wanted.weight, vector, own):
        weight.grad = torch.ones_like(weight)
    gradient, weights = vector.grad, module.weight.grad
    for _ in range(2):
        found, given = accumulates(net, ROWS, vector, gradient, module, remote="local")
        assert found is given is vector.grad is gradient
        assert module.weight.grad is weights
        net._wrapped[2](torch.tanh(wanted(first(net)) + own)).sum().backward()
    torch.testing.assert_close(vector.grad, own.grad)
    torch.testing.assert_close(module.weight.grad, wanted.weight.grad)
    torch.testing.assert_close(module.bias.grad, wanted.bias.grad)
    net._wrapped.zero_grad()


@intervene
def begins_anew(net, rows, vector):
    with net.trace(rows):
        net[0].output += vector
        vector.grad = None
        net.output.sum().backward()
    return None


def test_a_new_gradient_is_another_tensor(net: NNsight) -> None:
    vector = torch.zeros(4, requires_grad=True)
    before = vector.grad = torch.ones(4)
    begins_anew(net, ROWS, vector, remote="local")
    assert vector.grad is not before
    assert before.tolist() == [1, 1, 1, 1]


# --- containers ---


@intervene
def fills(net, rows, ordered, counts, found, last, array):
    with net.trace(rows):
        hidden = net[0].output
        ordered["hidden"] = hidden.shape[0]
        found["a"].append(1)
        last.append(2)
        array[1] = 5
    return hidden, ordered, counts


def test_containers_and_arrays_are_changed_here(net: NNsight) -> None:
    ordered, counts, found = OrderedDict(a=1), Counter("aab"), defaultdict(list, a=[0])
    last, array = deque([0, 1], 2), numpy.ones(3, dtype=numpy.float32)
    _, same, unchanged = fills(net, ROWS, ordered, counts, found, last, array, remote="local")
    assert same is ordered
    assert unchanged is counts
    assert counts == Counter("aab")
    assert list(ordered.items()) == [("a", 1), ("hidden", 8)]
    assert found == {"a": [0, 1]}
    assert list(last) == [1, 2]
    assert array.tolist() == [1, 5, 1]


@intervene
def adds(net, rows, encoding):
    with net.trace(rows):
        hidden = net[0].output
        encoding["more"] = hidden.mean()
    return hidden


def test_what_is_changed_and_cannot_be_carried_back(net: NNsight) -> None:
    with pytest.raises(FileError, match="a BatchEncoding that was given was changed in place, which cannot be carried"):
        adds(net, ROWS, BatchEncoding({"ids": [1]}), remote="local")


@intervene
def conjugates(net, rows, vector):
    with net.trace(rows):
        hidden = net[0].output
    return hidden, vector.conj(), vector.conj().imag


def test_a_conjugate_comes_back(net: NNsight) -> None:
    vector = torch.tensor([1 + 2j, 3 - 1j])
    _, found, imaginary = conjugates(net, ROWS, vector, remote="local")
    assert found.tolist() == [1 - 2j, 3 + 1j]
    assert imaginary.tolist() == [-2, 1]


@intervene
def looks(net, rows, vector, items, module, array):
    with net.trace(rows):
        hidden = module(net[0].output) + vector + items[0] + array[0]
    return hidden


def test_what_is_not_changed_is_not_sent_back(net: NNsight) -> None:
    vector, array = torch.zeros(4, requires_grad=True), numpy.ones(2, dtype=numpy.float32)
    vector.grad = torch.ones(4)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    values = {"net": net, "rows": ROWS, "vector": vector, "items": [1.5], "module": module, "array": array}
    job = unpack(pack(sent(looks.ir, {}, {}, values, lambda _: "net").job))
    executor = Executor(net)
    for _ in range(2):
        document, _ = unpacked(executor.run(job))
        assert document["changed"] == []  # type: ignore[index]  # it is a dict
    assert list(executor._loaded) == [job.digest]
