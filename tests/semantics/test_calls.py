"""Modules that run several times, shared modules, and calls of modules in the body. The oracle: torch hooks."""

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, RunError, intervene

torch.set_num_threads(1)


class Loop(nn.Module):
    """Runs `step` three times, then `act` inside and outside of a part, then `head`."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.part = nn.Sequential(nn.Linear(4, 4), self.act)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(3):
            x = self.act(self.step(x))
        return self.head(self.part(x))


torch.manual_seed(0)
NET = Loop().eval()
X = torch.randn(3, 4)
model = NNsight(NET)


def calls(net, path, x, writes=None):
    """What each call of a module got and returned, with the outputs of some calls replaced; and the result."""
    seen = []

    def hook(module, args, out):
        number = len(seen)
        if writes and number in writes:
            out = writes[number](out)
        seen.append((args[0].detach().clone(), out.detach().clone()))
        return out

    handle = net.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        result = net(x)
    handle.remove()
    return seen, result


@pytest.mark.parametrize("call", [0, 1, 2, -1, -3])
def test_one_call(call):
    @intervene
    def read(model, x, call):
        with model.trace(x):
            before = model.step.calls[call].input
            after = model.step.calls[call].output
        return before, after

    seen, _ = calls(NET, "step", X)
    before, after = read(model, X, call)
    assert torch.equal(before, seen[call][0])
    assert torch.equal(after, seen[call][1])


@pytest.mark.parametrize("call", [0, 1, 2, -1])
def test_a_write_at_one_call(call):
    @intervene
    def write(model, x, call):
        with model.trace(x):
            model.step.calls[call].output = model.step.calls[call].output * 2
            result = model.output
        return result

    _, result = calls(NET, "step", X, {call % 3: lambda out: out * 2})
    assert torch.equal(write(model, X, call), result)


def test_in_place_at_each_call():
    @intervene
    def write(model, x):
        with model.trace(x):
            for call in range(3):
                model.step.calls[call].output[:, call] = 7.0
            result = model.output
        return result

    def at(column):
        def write(out):
            out = out.clone()
            out[:, column] = 7.0
            return out

        return write

    _, result = calls(NET, "step", X, {n: at(n) for n in range(3)})
    assert torch.equal(write(model, X), result)


def test_an_input_written_at_one_call():
    @intervene
    def write(model, x):
        with model.trace(x):
            model.step.calls[1].input = 0
            after = model.step.calls[1].output
            result = model.output
        return after, result

    count = 0

    def hook(module, args):
        nonlocal count
        count += 1
        return (args[0] * 0,) if count == 2 else None

    handle = NET.step.register_forward_pre_hook(hook)
    seen, result = calls(NET, "step", X)
    handle.remove()
    after, found = write(model, X)
    assert torch.equal(found, result)
    assert torch.equal(after, seen[1][1])


def test_from_one_call_to_another():
    @intervene
    def move(model, x):
        with model.trace(x):
            early = model.step.calls[0].output
            model.step.calls[2].output = early
            result = model.output
        return result

    seen, _ = calls(NET, "step", X)
    _, want = calls(NET, "step", X, {2: lambda out: seen[0][1]})
    assert torch.equal(move(model, X), want)


def test_backwards_in_time_is_a_cycle():
    @intervene
    def move(model, x):
        with model.trace(x):
            late = model.step.calls[2].output
            model.step.calls[0].output = late
            result = model.output
        return result

    with pytest.raises(CompileError):
        move(model, X)


@pytest.mark.parametrize("call", [3, -4])
def test_no_such_call(call):
    @intervene
    def read(model, x, call):
        with model.trace(x):
            h = model.step.calls[call].output
        return h

    with pytest.raises(CompileError, match=rf"called 3 times in one forward; there is no call {call}") as caught:
        read(model, X, call)
    assert "0 to 2" in str(caught.value)


def test_without_an_index():
    @intervene
    def read(model, x):
        with model.trace(x):
            h = model.step.output
        return h

    with pytest.raises(CompileError, match=r"`step` is called 3 times in one forward") as caught:
        read(model, X)
    assert ".calls[0].output" in str(caught.value)
    assert ".calls[2].output" in str(caught.value)


def test_an_index_for_a_module_that_runs_once():
    @intervene
    def read(model, x):
        with model.trace(x):
            a = model.head.calls[0].input
            b = model.head.calls[-1].input
            c = model.head.input
        return a, b, c

    seen, _ = calls(NET, "head", X)
    for found in read(model, X):
        assert torch.equal(found, seen[0][0])


def test_one_module_under_two_paths():
    @intervene
    def read(model, x):
        with model.trace(x):
            first = model.act.calls[0].output
            last = model.act.calls[3].output
            other = model.part[1].calls[3].output
        return first, last, other

    seen, _ = calls(NET, "act", X)
    assert len(seen) == 4
    first, last, other = read(model, X)
    assert torch.equal(first, seen[0][1])
    assert torch.equal(last, seen[3][1])
    assert torch.equal(other, seen[3][1])


def test_a_write_under_one_path_is_read_under_the_other():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.c = nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.b(x))

    net = Twice().eval()

    @intervene
    def run(model, x):
        with model.trace(x):
            model.b.output[:, 0] = 5
            h = model.a.output
            result = model.output
        return h, result

    def write(out):
        out = out.clone()
        out[:, 0] = 5
        return out

    seen, want = calls(net, "a", X, {0: write})
    h, result = run(NNsight(net), X)
    assert torch.equal(h, seen[0][1])
    assert torch.equal(result, want)


def test_nested_calls_of_one_module_inside_itself():
    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            x = self.inner(x)
            return self(x, depth - 1) if depth else x

    net = Nest().eval()

    @intervene
    def read(model, x):
        with model.trace(x):
            first = model.inner.calls[0].output
            last = model.inner.calls[2].output
        return first, last

    seen, _ = calls(net, "inner", X)
    first, last = read(NNsight(net), X)
    assert torch.equal(first, seen[0][1])
    assert torch.equal(last, seen[2][1])

    @intervene
    def outputs(model, x):
        with model.trace(x):
            whole = model.calls[0].output
        return whole

    assert torch.equal(outputs(NNsight(net), X), net(X))


def test_outputs_of_a_module_that_contains_itself():
    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            y = self.inner(x)
            return y + self(y, depth - 1) if depth else y

    class Box(nn.Module):
        def __init__(self):
            super().__init__()
            self.nest = Nest()

        def forward(self, x):
            return self.nest(x)

    net = Box().eval()
    starts, ends = [], {}
    stack = []

    def before(module, args):
        stack.append(len(starts))
        starts.append(args[0].detach().clone())

    def after(module, args, out):
        ends[stack.pop()] = out.detach().clone()

    handles = [net.nest.register_forward_pre_hook(before), net.nest.register_forward_hook(after)]
    net(X)
    for handle in handles:
        handle.remove()

    @intervene
    def read(model, x):
        with model.trace(x):
            a = model.nest.calls[0].input
            b = model.nest.calls[0].output
            c = model.nest.calls[2].input
            d = model.nest.calls[2].output
        return a, b, c, d

    a, b, c, d = read(NNsight(net), X)
    assert torch.equal(a, starts[0])
    assert torch.equal(c, starts[2])
    assert torch.equal(b, ends[0])
    assert torch.equal(d, ends[2])


def test_a_call_in_the_body_has_no_index():
    @intervene
    def read(model, x):
        with model.trace(x):
            h = model.step.calls[0].output
            mine = model.step(h)
            again = model.step(mine)
            model.step.calls[1].output = model.step.calls[1].output * 0
            late = model.step.calls[2].output
            result = model.output
        return mine, again, late, result

    seen, _ = calls(NET, "step", X)
    after, want = calls(NET, "step", X, {1: lambda out: out * 0})
    mine, again, late, result = read(model, X)
    with torch.no_grad():
        assert torch.equal(mine, NET.step(seen[0][1]))
        assert torch.equal(again, NET.step(NET.step(seen[0][1])))
    assert torch.equal(late, after[2][1])
    assert torch.equal(result, want)


def test_all_calls_one_by_one_in_a_block():
    states = []
    with model.trace(X):
        for call in range(3):
            states.append(model.step.calls[call].output)
    seen, _ = calls(NET, "step", X)
    assert [torch.equal(a, b[1]) for a, b in zip(states, seen, strict=True)] == [True] * 3


def test_a_module_called_more_often_on_other_inputs():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x, times=1):
            for _ in range(times):
                x = self.step(x)
            return x

    net = Long().eval()
    wrapped = NNsight(net)

    @intervene
    def read(model, x, times, call):
        with model.trace(x, times=times):
            h = model.step.calls[call].output
            result = model.output
        return h, result

    for times in (1, 2, 4):
        for call in range(-times, times):
            h, result = read(wrapped, X, times, call)
            want = X
            outs = []
            with torch.no_grad():
                for _ in range(times):
                    want = net.step(want)
                    outs.append(want)
            assert torch.equal(h, outs[call]), (times, call)
            assert torch.equal(result, want)


def test_a_block_with_a_switch_of_the_model_that_changes():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, first=True, scale=1.0):
            return (self.b(self.a(x)) if first else self.a(self.b(x))) * scale

    net = Switch().eval()
    wrapped = NNsight(net)
    for first in (True, False, True):
        with wrapped.trace(X, first=first, scale=2.0):
            early = (wrapped.a.output if first else wrapped.b.output) * 0
            if first:
                wrapped.b.output += early
            else:
                wrapped.a.output += early
            result = wrapped.output.save()
        with torch.no_grad():
            assert torch.equal(result, net(X, first, 2.0))


def test_the_last_call_where_the_input_says_how_many_there_are():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            h = x[0]
            for row in x:
                h = self.cell(h + row)
            return h

    net = Recurrent().eval()

    @intervene
    def last(model, x):
        with model.trace(x):
            h = model.cell.calls[-1].output
        return h

    wrapped = NNsight(net)
    for rows in (3, 1):
        last.cache_clear()
        assert torch.equal(last(NNsight(net), X[:rows]), net(X[:rows]))
    assert torch.equal(last(wrapped, X[:2]), net(X[:2]))
    x = torch.randn(5, 4)
    with pytest.raises(RunError, match=r"test_calls\.py:\d+:\d+: .*ran 5 times in this forward, but 2 times"):
        last(wrapped, x)


class Unrolled(nn.Module):
    """Runs `cell` as often as there are columns."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(x.shape[1]):
            x = self.cell(x).tanh()
        return x


def test_calls_are_counted_on_what_an_invoke_brings():
    net, x = NNsight(Unrolled()), torch.ones(1, 3)
    with net.trace() as tracer, tracer.invoke(x):
        count = len(net.cell.calls)
        last = [call.output for call in net.cell.calls][-1].save()
        out = net.output.save()
    assert count == 3
    assert torch.equal(out, last.tanh())


def test_calls_are_not_counted_where_no_input_is_known():
    @intervene
    def run(net, x):
        with net.trace(x.clone()):
            count = len(net.cell.calls)
        return count

    with pytest.raises(CompileError, match="how often a module is called is seen by running the model once"):
        run(NNsight(Unrolled()), torch.ones(1, 3))
