"""Runs are values: threads, nested experiments, modules called in a body, training, gradients. Oracle: torch hooks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        for layer in self.layers:
            x = self.drop(x + layer(x).tanh())
        return x


def make(drop=0.0):
    torch.manual_seed(0)
    return Net(drop)


def by_hand(net, x, write=None, read=None):
    """One forward with hooks: `write` is (layer, function), `read` a layer; gives what was read, and the result."""
    seen, handles = {}, []
    if write is not None:
        layer, function = write
        handles.append(net.layers[layer].register_forward_hook(lambda m, a, out: function(out)))
    if read is not None:
        hook = lambda m, a, out: seen.update(found=out.detach().clone())  # noqa: E731
        handles.append(net.layers[read].register_forward_hook(hook))
    with torch.no_grad():
        result = net(x)
    for handle in handles:
        handle.remove()
    return seen.get("found"), result


@intervene
def scaled(model, x, layer, scale):
    with model.trace(x):
        model.layers[layer].output = model.layers[layer].output * scale
        last = model.layers[3].output
        result = model.output
    return last, result


def test_four_threads_and_the_plain_model():
    net = make().eval()
    model = NNsight(net)
    inputs = [torch.randn(3, 4) for _ in range(4)]
    plain = by_hand(net, inputs[0])[1]
    want = [by_hand(net, inputs[n], (n % 3, lambda out, n=n: out * (n + 2.0)), 3) for n in range(4)]
    stop, wrong = threading.Event(), []

    def watch():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(net(inputs[0]), plain):
                    wrong.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = threading.Barrier(4)

    def work(n):
        start.wait()
        return [scaled(model, inputs[n], n % 3, n + 2.0) for _ in range(40)]

    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(4)))
    finally:
        stop.set()
        watcher.join()
    assert not wrong
    for each, (last, result) in zip(found, want, strict=True):
        for got in each:
            assert torch.equal(got[0], last)
            assert torch.equal(got[1], result)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_four_threads_compile_once_for_each_layer():
    @intervene
    def read(model, x, layer):
        with model.trace(x):
            h = model.layers[layer].output
        return h

    net = make().eval()
    model = NNsight(net)
    x = torch.randn(1, 4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: read(model, x, n % 2), range(16)))
    for n, h in enumerate(found):
        assert torch.equal(h, by_hand(net, x, read=n % 2)[0])
    assert read.cache_info().misses == 2
    assert read.cache_info().size == 2


def test_blocks_in_threads():
    net = make().eval()
    model = NNsight(net)

    def work(n):
        x = torch.full((1, 4), float(n))
        for _ in range(20):
            with model.trace(x):
                model.layers[1].output = model.layers[1].output + n
                result = model.output.save()
        return result

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for n, result in enumerate(found):
        assert torch.equal(result, by_hand(net, torch.full((1, 4), float(n)), (1, lambda out, n=n: out + n))[1])


def test_a_plain_call_in_the_body_sees_the_plain_model():
    net = make().eval()
    model = NNsight(net)
    x = torch.randn(2, 4)

    def plainly(h):
        return net(x)

    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[1].output = model.layers[1].output * 0
            h = model.layers[1].output
            plain = plainly(h)
            result = model.output
        return plain, result

    plain, result = run(model, x)
    assert torch.equal(plain, net(x))
    assert torch.equal(result, by_hand(net, x, (1, lambda out: out * 0))[1])


def test_a_nested_experiment_on_the_same_model():
    net = make().eval()
    model = NNsight(net)
    x = torch.randn(2, 4)

    @intervene
    def inner(h):
        with model.trace(h):
            model.layers[2].output = model.layers[2].output * 3
            result = model.output
        return result

    def call_inner(h):
        return inner(h)

    @intervene
    def outer(x):
        with model.trace(x):
            model.layers[1].output = model.layers[1].output * 2
            h = model.layers[1].output
            nested = call_inner(h)
            result = model.output
        return h, nested, result

    h, nested, result = outer(x)
    seen, want = by_hand(net, x, (1, lambda out: out * 2), 1)
    assert torch.equal(h, seen)
    assert torch.equal(result, want)
    assert torch.equal(nested, by_hand(net, seen, (2, lambda out: out * 3))[1])


def test_a_nested_undecorated_block_is_refused_with_both_lines():
    net = make().eval()
    model = NNsight(net)
    x = torch.randn(2, 4)

    def nested(h):
        with model.trace(h):
            result = model.output.save()
        return result

    with pytest.raises(CompileError, match="cannot run inside the body of another") as caught, model.trace(x):
        inside = nested(model.layers[1].output).save()  # noqa: F841
    assert str(caught.value).count("test_threads.py:") == 2
    assert "way out" in str(caught.value)


def test_a_module_called_in_the_body_is_not_a_call_of_the_forward():
    net = make().eval()
    model = NNsight(net)
    x = torch.randn(2, 4)

    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[2].output = model.layers[2].output * 0
            h = model.layers[1].output
            lens = model.layers[2](h)
            result = model.output
        return h, lens, result

    h, lens, result = run(model, x)
    assert torch.equal(h, by_hand(net, x, read=1)[0])
    with torch.no_grad():
        assert torch.equal(lens, net.layers[2](h))
    assert torch.equal(result, by_hand(net, x, (2, lambda out: out * 0))[1])


# --- training mode ---


def test_training_mode_uses_as_many_random_numbers_as_the_plain_model():
    net = make(0.5).train()
    model = NNsight(net)
    x = torch.randn(2, 4)

    @intervene
    def read(model, x):
        with model.trace(x):
            h = model.layers[0].output
        return h

    read(model, x)  # compiled
    for again in range(2):
        torch.manual_seed(again)
        with torch.no_grad():
            net(x)
        want = torch.rand(3)
        torch.manual_seed(again)
        read(model, x)
        assert torch.equal(torch.rand(3), want)
    assert net.training


def test_compiling_draws_no_random_numbers():
    net = make(0.5).train()
    x = torch.randn(2, 4)
    torch.manual_seed(5)
    with torch.no_grad():
        want_result = net(x)
    want = torch.rand(3)
    torch.manual_seed(5)

    @intervene
    def read(model, x):
        with model.trace(x):
            result = model.output
        return result

    found = read(NNsight(net), x)
    assert torch.equal(found, want_result)
    assert torch.equal(torch.rand(3), want)


def test_batch_norm_statistics_move_as_in_the_plain_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    twin = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(5, 4)

    @intervene
    def read(model, x):
        with model.trace(x):
            h = model[0].output
        return h

    read(NNsight(net), x)
    twin(x)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


# --- gradients ---


def test_values_leave_detached_by_default():
    net = make()
    found = NNsight(net)

    @intervene
    def read(model, x):
        with model.trace(x):
            h = model.layers[1].output
            result = model.output
        return h, result

    assert torch.is_grad_enabled()
    for value in read(found, torch.randn(2, 4)):
        assert not value.requires_grad
        assert value.grad_fn is None
    assert torch.is_grad_enabled()


def test_values_that_are_written_over_and_kept_are_detached():
    net = make()
    x = torch.randn(2, 4)
    with NNsight(net).trace(x):
        pass
    model = NNsight(net)
    states = []
    with model.trace(x):
        states.append(model.layers[0].output)
        weight = model.layers[0].weight.sum().save()
        result = model.output.save()
    assert not result.requires_grad
    assert not states[0].requires_grad
    assert weight is not None


@pytest.mark.parametrize("where", ["argument", "closure", "keyword"])
def test_a_steering_vector_that_requires_grad_learns(where):
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    vector = torch.zeros(4, requires_grad=True)
    if where == "closure":

        @intervene
        def steer(x):
            with model.trace(x):
                model.layers[1].output = model.layers[1].output + vector
                result = model.output
            return result

        result = steer(x)
    else:

        @intervene
        def steer(x, vector):
            with model.trace(x):
                model.layers[1].output = model.layers[1].output + vector
                result = model.output
            return result

        result = steer(x, vector) if where == "argument" else steer(x, vector=vector)
    loss = result.square().sum()
    (found,) = torch.autograd.grad(loss, [vector])

    other = torch.zeros(4, requires_grad=True)
    handle = net.layers[1].register_forward_hook(lambda m, a, out: out + other)
    (want,) = torch.autograd.grad(net(x).square().sum(), [other])
    handle.remove()
    assert torch.equal(found, want)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_training_loop_on_a_steering_vector():
    net = make().eval()
    model = NNsight(net)
    x, target = torch.randn(2, 4), torch.randn(2, 4)

    @intervene
    def steer(model, x, vector):
        with model.trace(x):
            model.layers[1].output += vector
            result = model.output
        return result

    def by_hooks(vector):
        handle = net.layers[1].register_forward_hook(lambda m, a, out: out + vector)
        result = net(x)
        handle.remove()
        return result

    ends = []
    for forward in (lambda v: steer(model, x, v), by_hooks):
        vector = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([vector], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (forward(vector) - target).square().sum().backward()
            optimizer.step()
        ends.append(vector.detach())
    assert torch.allclose(ends[0], ends[1])
    assert ends[0].abs().sum() > 0


def test_no_grad_in_the_body_covers_the_body_only():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    vector = torch.zeros(4, requires_grad=True)

    @intervene
    def run(model, x, vector):
        with model.trace(x):
            model.layers[1].output = model.layers[1].output + vector
            with torch.no_grad():
                inside = model.layers[2].output * 2
            result = model.output
        return inside, result

    inside, result = run(model, x, vector)
    assert not inside.requires_grad
    assert result.requires_grad
    assert torch.is_grad_enabled()


def test_no_grad_around_a_call():
    model = NNsight(make())
    vector = torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        _, result = scaled(model, torch.randn(2, 4), 1, vector)
    assert not result.requires_grad


def test_input_that_requires_grad():
    net = make()
    x = torch.randn(2, 4, requires_grad=True)

    @intervene
    def run(model, x):
        with model.trace(x):
            result = model.output
        return result

    (found,) = torch.autograd.grad(run(NNsight(net), x).sum(), [x])
    (want,) = torch.autograd.grad(net(x).sum(), [x])
    assert torch.equal(found, want)
