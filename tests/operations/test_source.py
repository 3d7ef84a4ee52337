"""Operations inside of a forward: named, read, written; against the same computation written out in torch."""

from __future__ import annotations

import functools
import threading
import traceback

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import CompileError, ExperimentError
from nnsight_compiler.models.source import SourceError, UnknownOperationError
from nnsight_compiler.models.view import OutsideTraceError


def double(x, *, by=2.0):
    y = x * by
    return torch.tanh(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.count = 0

    def forward(self, x, flag=False):
        hidden = torch.relu(self.first(x))
        hidden += 1
        for _ in range(3):
            hidden = double(hidden, by=1.5)
        if flag:
            hidden = torch.sigmoid(hidden)
        a, b = hidden * 2, self.second(hidden)
        return a + b


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 4)


def steps(net, x):
    """The values of `Net.forward`, by hand."""
    relu = torch.relu(net.first(x))
    loops = [relu + 1]
    for _ in range(3):
        loops.append(torch.tanh(loops[-1] * 1.5))
    return relu, loops


def test_names_in_the_order_in_which_they_run(net):
    assert [op._path.partition(":")[2] for op in NNsight(net).source] == [
        "self_first_0", "torch_relu_0", "hidden_0", "hidden_iadd_0", "range_0", "double_0", "hidden_1",
        "torch_sigmoid_0", "hidden_2", "self_second_0", "a_0", "b_0",
    ]  # fmt: skip


def test_printed_source_has_the_names_beside_the_lines(net):
    text = str(NNsight(net).source)
    assert "hidden_iadd_0 ─▶         hidden += 1" in text
    assert "self_first_0 ─┐\ntorch_relu_0 ─┐\nhidden_0 ─▶" in text
    shown = repr(NNsight(net).source.torch_relu_0)
    assert shown.startswith(":torch_relu_0:\n")
    assert "─▶         hidden = torch.relu(self.first(x))" in shown


def test_read(net, x):
    model = NNsight(net)
    relu, loops = steps(net, x)
    with model.trace(x):
        output = model.source.torch_relu_0.output.save()
        before = model.source.torch_relu_0.input.save()
        inputs = model.source.double_0.calls[1].inputs.save()
        assigned = model.source.hidden_0.output.save()
        augmented = model.source.hidden_iadd_0.output.save()
        b = model.source.b_0.output.save()
        of_module = model.source.self_second_0.output.save()
    assert torch.equal(output, relu)
    assert torch.equal(assigned, relu)
    assert torch.equal(before, net.first(x))
    assert torch.equal(inputs[0][0], loops[1])
    assert inputs[1] == {"by": 1.5}
    assert torch.equal(augmented, loops[0])
    assert torch.equal(b, net.second(loops[3]))
    assert torch.equal(of_module, b)


def test_write(net, x):
    model = NNsight(net)
    with model.trace(x):
        model.source.torch_relu_0.output = 0
        out = model.output.save()
    hidden = torch.ones(2, 4)
    for _ in range(3):
        hidden = torch.tanh(hidden * 1.5)
    assert torch.equal(out, hidden * 2 + net.second(hidden))
    with model.trace(x):
        model.source.double_0.calls[2].inputs = ((torch.zeros(2, 4),), {"by": 3.0})
        model.source.a_0.output[:, 0] = 7
        out = model.output.save()
    a = torch.zeros(2, 4)
    a[:, 0] = 7
    assert torch.equal(out, a + net.second(torch.zeros(2, 4)))


def test_augmented_assignment_is_written(net, x):
    model = NNsight(net)
    with model.trace(x):
        model.source.hidden_iadd_0.output = 0
        out = model.output.save()
    assert torch.equal(out, net.second(torch.zeros(2, 4)))


def test_operations_of_a_function_that_is_called(net, x):
    model = NNsight(net)
    _, loops = steps(net, x)
    with model.trace(x):
        y = model.source.double_0.source.y_0.calls[0].output.save()
        model.source.double_0.source.torch_tanh_0.calls[2].output = 0
        out = model.output.save()
    assert torch.equal(y, loops[0] * 1.5)
    assert torch.equal(out, net.second(torch.zeros(2, 4)))


def test_decorated_experiment(net, x):
    @intervene
    def scaled(model, x, factor):
        with model.trace(x):
            model.source.torch_relu_0.output[:] *= factor
            out = model.output
        return out

    model = NNsight(net)
    relu, _ = steps(net, x)
    hidden = relu * 3.0 + 1
    for _ in range(3):
        hidden = torch.tanh(hidden * 1.5)
    assert torch.equal(scaled(model, x, 3.0), hidden * 2 + net.second(hidden))
    text = str(scaled.lower(model, x, 3.0))
    assert "at %model@':torch_relu_0' output" in text
    assert "f32[rows=2, 4]" in text


def test_the_model_is_left_as_it_was(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            h = model.source.torch_relu_0.output
            infinite = 1 / int((h * 0).sum())
            model.source.torch_relu_0.output = infinite
            model.output.save()

    with pytest.raises(ZeroDivisionError):
        run()
    assert "forward" not in vars(net)
    assert torch.equal(net(x), Net.forward(net, x))
    own = functools.partial(Net.forward, net)
    net.forward = own
    with pytest.raises(SourceError, match=r"cannot be seen: it is a `functools.partial`"):
        print(model.source)
    assert net.forward is own


def test_other_threads_see_the_plain_model(net, x):
    model = NNsight(net)
    plain = net(x)
    seen = []

    def look(value):
        thread = threading.Thread(target=lambda: seen.append(net(x)))
        thread.start()
        thread.join()
        seen.append(net(x))

    with model.trace(x):
        model.source.torch_relu_0.output = 0
        look(model.source.double_0.calls[0].output)
        changed = model.output.save()
    assert not torch.equal(changed, plain)
    assert all(torch.equal(each, plain) for each in seen)
    assert len(seen) == 2


def test_four_threads_at_once(net, x):
    @intervene
    def filled(model, x, value):
        with model.trace(x):
            model.source.torch_relu_0.output = value
            out = model.output
        return out

    model = NNsight(net)
    expected = {}
    for value in range(4):
        hidden = torch.full((2, 4), float(value)) + 1
        for _ in range(3):
            hidden = torch.tanh(hidden * 1.5)
        expected[value] = hidden * 2 + net.second(hidden)
    wrong = []

    def run(value):
        for _ in range(25):
            if not torch.equal(filled(model, x, float(value)), expected[value]):
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(net)


# --- what forwards are made of ---


class Base(nn.Module):
    def forward(self, x):
        return torch.relu(x)


def noted(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        self.calls_seen += 1
        return function(self, *args, **kwargs)

    return wrapper


SHIFT = 1.0


class Odd(Base):
    """Decorated, with keyword arguments, `super()`, a private name, closures, comprehensions, lambdas, a generator."""

    def __init__(self):
        super().__init__()
        self.__scale = 2.0
        self.calls_seen = 0

    @noted
    def forward(self, x, *, times: int = 2, **rest):
        total = 0.0

        def add(value):
            nonlocal total
            total = total + torch.tanh(value)
            return total

        base = super().forward(x) * self.__scale
        for part in [torch.sigmoid(base * n) for n in range(1, times + 1)]:
            add(part)
        pick = (lambda value: torch.neg(value))(base)
        summed = sum(torch.abs(pick) for _ in range(2))
        return (
            total
            + summed
            + SHIFT * rest.get("more", 0)
        )  # fmt: skip


def odd(x, times, more, flip=torch.neg):
    base = torch.relu(x) * 2.0
    total = sum(torch.tanh(torch.sigmoid(base * n)) for n in range(1, times + 1))
    return total + 2 * torch.abs(flip(base)) + SHIFT * more


def test_what_python_allows_in_a_forward(x):
    net = Odd()
    model = NNsight(net)
    with model.trace(x, times=3, more=2):
        base = model.source.base_0.output.save()
        first = model.source.torch_sigmoid_0.calls[0].output.save()
        tanh = model.source.torch_tanh_0.calls[-1].output.save()
        absolute = model.source.torch_abs_0.calls[1].output.save()
        relu = model.source.forward_0.source.torch_relu_0.output.save()
        out = model.output.save()
    assert torch.allclose(out, odd(x, 3, 2))
    assert torch.equal(base, torch.relu(x) * 2.0)
    assert torch.equal(relu, torch.relu(x))
    assert torch.equal(first, torch.sigmoid(base))
    assert torch.equal(tanh, torch.tanh(torch.sigmoid(base * 3)))
    assert torch.equal(absolute, base.abs())
    assert net.calls_seen == 1
    with model.trace(x, times=1):
        model.source.torch_neg_0.output = 0
        out = model.output.save()
    assert torch.allclose(out, odd(x, 1, 0, flip=torch.zeros_like))


def test_globals_are_those_of_the_model(x, monkeypatch):
    model = NNsight(Odd())
    monkeypatch.setitem(globals(), "SHIFT", 10.0)
    with model.trace(x, times=1, more=1):
        model.source.torch_neg_0.output = 0
        out = model.output.save()
    assert torch.allclose(out, odd(x, 1, 1, flip=torch.zeros_like))


class Failing(nn.Module):
    def forward(self, x):
        y = torch.relu(x)

        return y.reshape(3, 1000)


def test_tracebacks_name_the_line_of_the_model(x):
    model = NNsight(Failing())

    def run():
        with model.trace(x):
            model.source.torch_relu_0.output = 0
            model.output.save()

    with pytest.raises(RuntimeError) as caught:
        run()
    frames = traceback.extract_tb(caught.value.__traceback__)
    mine = [frame for frame in frames if frame.name == "forward"]
    assert mine[-1].filename == __file__
    assert mine[-1].line == "return y.reshape(3, 1000)"


# --- mistakes ---


def mistake(run) -> str:
    with pytest.raises(CompileError) as caught:
        run()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.file == __file__
    return f"{diagnostic.reason} / {diagnostic.way_out}"


def test_unknown_operation(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            model.source.torch_rely_0.output.save()

    assert mistake(run) == (
        "there is no operation `torch_rely_0` in the forward of Net; did you mean torch_relu_0, torch_sigmoid_0?"
        " / `print(….source)` shows the operations of a module"
    )
    with pytest.raises(UnknownOperationError, match="did you mean double_0"):
        model.source.double_1  # noqa: B018
    with pytest.raises(UnknownOperationError, match=r"has `\.output`.*and no `\.weight`"):
        model.source.double_0.weight  # noqa: B018


def test_unknown_operation_of_a_function(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            model.source.double_0.source.torch_tan_0.calls[0].output.save()

    assert mistake(run) == (
        "there is no operation `torch_tan_0` in what `:double_0` calls / did you mean `torch_tanh_0`?"
    )


def test_operation_that_is_never_run(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            model.source.torch_sigmoid_0.output.save()

    assert mistake(run) == (
        "`:torch_sigmoid_0` is never run in this forward"
        " / its lines are not reached on these inputs; address an operation that runs"
    )
    with model.trace(x, flag=True):
        out = model.source.torch_sigmoid_0.output.save()
    assert torch.equal(out, torch.sigmoid(steps(net, x)[1][3]))


def test_operation_that_runs_several_times(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            model.source.double_0.output.save()

    assert mistake(run).startswith("`:double_0` is called 3 times in one forward / say which call is meant: `.calls[0]")


def test_functions_without_python_source(net, x):
    model = NNsight(net)

    def run():
        with model.trace(x):
            model.source.torch_relu_0.source.anything_0.output.save()

    assert mistake(run).startswith("`relu` is not written in Python, so there are no operations to see in it")

    def module():
        with model.trace(x):
            model.source.self_first_0.source.F_linear_0.output.save()

    assert mistake(module) == "`:self_first_0` calls a module / use the `.source` of that module"
    made = {}
    exec("from torch import nn\nclass Made(nn.Module):\n    def forward(self, x):\n        return x + 1\n", made)
    with pytest.raises(
        SourceError, match=r"the operations of Made cannot be seen: the source of `Made\.forward` is not"
    ):
        print(NNsight(made["Made"]()).source)


def test_outside_of_a_trace(net):
    source = NNsight(net).source
    for name in ("output", "input", "inputs", "calls", "skip"):
        with pytest.raises(OutsideTraceError, match=r"inside `with model\.trace"):
            getattr(source.torch_relu_0, name)
    with pytest.raises(OutsideTraceError, match=r"inside `with model\.trace"):
        source.torch_relu_0.output = 0
    with pytest.raises(SourceError, match="which function `:double_0` calls is known only when it runs"):
        list(source.double_0.source)
    assert "torch_relu_0" in dir(source)
    assert len(source) == 12


def test_an_invoke_has_its_own_rows_of_an_operation(net, x):
    wrapped, other = NNsight(net), torch.randn(3, 4)
    with wrapped.trace() as tracer:
        with tracer.invoke(x):
            wrapped.source.torch_relu_0.output[:, 0] = 7
            changed = wrapped.output.save()
        with tracer.invoke(other):
            relu = wrapped.source.torch_relu_0.output.save()
            plain = wrapped.output.save()
    assert torch.equal(relu, net.first(other).relu())
    assert torch.allclose(plain, net(other))
    hidden = net.first(x).relu().index_fill(1, torch.tensor(0), 7.0) + 1
    for _ in range(3):
        hidden = double(hidden, by=1.5)
    assert torch.allclose(changed, hidden * 2 + net.second(hidden))


class Mixing(nn.Module):
    def forward(self, x):
        return torch.neg(x) + torch.cumsum(x, 0)


def test_invokes_share_no_operation_in_which_rows_mix():
    mixing = NNsight(Mixing())

    @intervene
    def run(net, x, name):
        with net.trace() as tracer:
            with tracer.invoke(x):
                first = getattr(net.source, name).output
            with tracer.invoke(x):
                second = getattr(net.source, name).output
        return first, second

    assert torch.equal(run(mixing, torch.ones(2, 4), "torch_neg_0")[1], -torch.ones(2, 4))
    with pytest.raises(ExperimentError, match=r"torch_cumsum_0` output cannot be shared by invokes"):
        run(mixing, torch.ones(2, 4), "torch_cumsum_0")
