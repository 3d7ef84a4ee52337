"""Nothing fails silently: every error says where, why and what to do; the model stays as it was, whatever happens."""

# ruff: noqa: PT012

import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, NNsight, RunError, intervene

torch.set_num_threads(1)


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), x.sum()


class Net(nn.Module):
    """Layers, a shared one, one that is never called, one that is called where the input says so."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.shared = nn.Linear(4, 4)
        self.pair = Pair()
        self.spare = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(1))
        self.times = 2

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        for _ in range(self.times):
            x = self.shared(x)
        x, _ = self.pair(x)
        return self.drop(x)


def make():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 4)


@contextlib.contextmanager
def unchanged(net):
    """The model is the same, bit for bit, before and after, and no hook is left on it."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in net.named_modules()}
    forwards = {name: part.forward for name, part in net.named_modules()}
    grads = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    training = {name: part.training for name, part in net.named_modules()}
    hooks = {name: (list(p._forward_hooks), list(p._forward_pre_hooks)) for name, p in net.named_modules()}
    yield
    after = net.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    for name, part in net.named_modules():
        assert set(vars(part)) == attributes[name], name
        assert part.forward == forwards[name], name
        assert part.training == training[name]
        assert (list(part._forward_hooks), list(part._forward_pre_hooks)) == hooks[name], name
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == grads[name][0]
        assert parameter.grad is grads[name][1]


def line_of(function, text):
    """The number of the first line of this test's own file after `function`'s first that contains a text."""
    code = getattr(function, "__wrapped__", function).__code__
    lines = Path(__file__).read_text().splitlines()
    for number in range(code.co_firstlineno, len(lines)):
        if text in lines[number]:
            return number + 1
    raise AssertionError(text)


def refused(function, *args, at, says, kind=ExperimentError, **kwargs):
    """The error of a call. `at`: a piece of the line it must point to. `says`: pieces of its text."""
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    line = line_of(function, at)
    assert f"test_errors.py:{line}:" in text, text
    for piece in says:
        assert piece in text, (piece, text)
    return text


# --- mistakes that are found before the model runs ---


def test_misspelt_module_gives_the_nearest_names():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.layers[0].weigth.output
        return h

    @intervene
    def wrong_child(model, x):
        with model.trace(x):
            h = model.layer[0].output
        return h

    net = make()
    with unchanged(net):
        text = refused(wrong_child, NNsight(net), X, at="model.layer[0]", says=["no `layer`", "did you mean layers?"])
        assert "^" in text
        refused(wrong, NNsight(net), X, at="weigth", says=["weigth", "weight"])


def test_bad_index():
    @intervene
    def wrong(model, x, layer):
        with model.trace(x):
            h = model.layers[layer].output
        return h

    net = make()
    model = NNsight(net)
    with unchanged(net):
        refused(wrong, model, X, 3, at="model.layers[layer]", says=["3", "0 to 2"])
        refused(wrong, model, X, -4, at="model.layers[layer]", says=["-4"])
        assert torch.equal(wrong(model, X, -1), wrong(model, X, 2))


def test_a_write_that_reaches_nothing():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.layers[0].output
            model.layers[2].output = h * 0
        return h

    net = make()
    with unchanged(net):
        refused(wrong, NNsight(net), X, at="model.layers[2].output =", says=["can reach nothing", "way out"])


def test_an_in_place_write_that_reaches_nothing():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.layers[0].output.save()
            model.layers[2].output[:, 0] = 0
        return h

    net = make()
    with unchanged(net):
        refused(wrong, NNsight(net), X, at="[:, 0] = 0", says=["can reach nothing"])


def test_a_module_that_is_never_called():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.spare.output
        return h

    @intervene
    def of_a_list(model, x):
        with model.trace(x):
            h = model.layers.output
        return h

    net = make()
    with unchanged(net):
        refused(wrong, NNsight(net), X, at="model.spare", says=["`spare` is never called", "way out"])
        refused(of_a_list, NNsight(net), X, at="model.layers.output", says=["`layers` is never called"])


def test_a_module_called_twice_needs_an_index():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.shared.output
        return h

    @intervene
    def written(model, x):
        with model.trace(x):
            model.shared.output = 0
            h = model.output
        return h

    net = make()
    with unchanged(net):
        refused(wrong, NNsight(net), X, at="model.shared", says=["called 2 times", ".calls[0].output"])
        refused(written, NNsight(net), X, at="model.shared", says=["called 2 times", ".calls[0].output"])


def test_an_access_outside_of_a_trace():
    @intervene
    def wrong(model, x):
        h = model.layers[0].output
        with model.trace(x):
            y = model.output
        return h, y

    net = make()
    with unchanged(net):
        refused(wrong, NNsight(net), X, at="h = model.layers[0].output", says=["while the model runs", "trace"])


def test_a_cycle_names_both_lines():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            late = model.layers[2].output
            model.layers[0].output = late
            result = model.output
        return result

    net = make()
    with unchanged(net):
        text = refused(wrong, NNsight(net), X, at="model.layers[0].output = late", says=[], kind=CompileError)
        assert f":{line_of(wrong, 'late = model')}:" in text


def test_another_model_in_the_trace():
    @intervene
    def wrong(model, other, x):
        with model.trace(x):
            h = other.layers[0].output
        return h

    refused(wrong, NNsight(make()), NNsight(make()), X, at="other.layers", says=["another model"])


def test_every_mistake_of_a_trace_at_once():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            a = model.spare.output
            b = model.shared.output
        return a, b

    text = refused(wrong, NNsight(make()), X, at="model.spare", says=["`spare`", "`shared`"], kind=CompileError)
    assert f"test_errors.py:{line_of(wrong, 'model.shared')}:" in text


# --- mistakes that only a run can find ---


def test_a_wrong_shape_is_refused():
    @intervene
    def wrong(model, x, new):
        with model.trace(x):
            model.layers[1].output = new
            result = model.output
        return result

    net = make()
    model = NNsight(net)
    with unchanged(net):
        refused(wrong, model, X, torch.zeros(3, 4), at="model.layers[1].output = new", says=["[3, 4]", "[2, 4]"])
        refused(wrong, model, X, torch.zeros(4), at="model.layers[1].output = new", says=["[4]", "[2, 4]"])
        refused(wrong, model, X, "text", at="model.layers[1].output = new", says=["str", "[2, 4]"])
        refused(wrong, model, X, None, at="model.layers[1].output = new", says=["[2, 4]"])
        refused(wrong, model, X, (X, X), at="model.layers[1].output = new", says=["tuple", "[2, 4]"])


def test_one_value_for_a_tuple_is_refused():
    @intervene
    def wrong(model, x, new):
        with model.trace(x):
            model.pair.output = new
            result = model.output
        return result

    net = make()
    model = NNsight(net)
    with unchanged(net):
        for new in (0, 0.5, torch.zeros(2, 4)):
            refused(wrong, model, X, new, at="model.pair.output = new", says=["tuple of 2", "way out"])
        refused(wrong, model, X, (X, X, X), at="model.pair.output = new", says=["2", "3"])


def test_a_tuple_for_a_tuple_and_one_item():
    @intervene
    def whole(model, x, new):
        with model.trace(x):
            model.pair.output = (new, new.sum())
            result = model.output
        return result

    @intervene
    def item(model, x, new):
        with model.trace(x):
            model.pair.output[0] = new
            result = model.output
        return result

    model = NNsight(make())
    new = torch.randn(2, 4)
    assert torch.equal(whole(model, X, new), new)
    assert torch.equal(item(model, X, new), new)


def test_index_out_of_range_in_the_body_shows_the_users_line():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.layers[1].output
            picked = h[:, [99]]  # what is in the list is not looked at before the run
        return picked

    net = make()
    with unchanged(net), pytest.raises(IndexError) as caught:
        wrong(NNsight(net), X)
    frames = traceback.extract_tb(caught.value.__traceback__)
    last = frames[-1]
    assert last.filename == __file__
    assert last.line.startswith("picked = h[:, [99]]")
    assert last.lineno == line_of(wrong, "h[:, [99]]")
    assert last.name.rpartition(".")[2] == "wrong"
    generated = [frame for frame in frames if frame.filename == __file__]
    assert all(frame.line for frame in generated)


def test_the_same_in_a_block():
    net = make()
    model = NNsight(net)
    with unchanged(net), pytest.raises(IndexError) as caught, model.trace(X):
        h = model.layers[1].output
        picked = h[:, [99]].save()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].filename == __file__
    assert frames[-1].line == "picked = h[:, [99]].save()"
    assert "picked" not in locals()


def test_an_error_in_a_helper_shows_the_helpers_line():
    def helper(h):
        return h[:, [99]]

    @intervene
    def wrong(model, x):
        with model.trace(x):
            picked = helper(model.layers[1].output)
        return picked

    net = make()
    with unchanged(net), pytest.raises(IndexError) as caught:
        wrong(NNsight(net), X)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == __file__]
    assert "return h[:, [99]]" in lines


def test_an_error_before_and_after_the_trace():
    @intervene
    def before(model, x):
        y = x[[99]]
        with model.trace(x):
            h = model.layers[0].output
        return h, y

    @intervene
    def after(model, x):
        with model.trace(x):
            h = model.layers[0].output
        return h[[99]]

    for wrong, text in ((before, "y = x[[99]]"), (after, "return h[[99]]")):
        net = make()
        with unchanged(net), pytest.raises(IndexError) as caught:
            wrong(NNsight(net), X)
        assert traceback.extract_tb(caught.value.__traceback__)[-1].line == text


def test_the_models_own_error():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output.save()
            result = model.output
        return h, result

    net = make()
    model = NNsight(net)
    with unchanged(net):
        with pytest.raises(RuntimeError, match="shape"):
            run(model, torch.zeros(2, 5))
        run(model, X)
        with pytest.raises(RuntimeError, match="shape"):
            run(model, torch.zeros(2, 5))
        with pytest.raises(TypeError):
            run(model, None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError, MemoryError])
def test_any_exception_leaves_no_hook(kind):
    def interrupt(h):
        raise kind("now")

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            interrupt(h)
            result = model.output
        return result

    net = make()
    with unchanged(net), pytest.raises(kind, match="now"):
        run(NNsight(net), X)
    assert torch.equal(net(X), net(X))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_exception_inside_the_model_leaves_no_hook(kind):
    class Bomb(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.armed = nn.Linear(4, 4), False

        def forward(self, x):
            x = self.first(x)
            if self.armed:
                raise kind("bomb")
            return x

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.first.output.save()
            result = model.output
        return h, result

    net = Bomb()
    model = NNsight(net)
    run(model, X)
    net.armed = True
    with unchanged(net), pytest.raises(kind, match="bomb"):
        run(model, X)


def test_a_module_removed_after_compilation():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[2].output.save()
            result = model.output
        return h, result

    net = make()
    model = NNsight(net)
    run(model, X)
    del net.layers[2]
    with unchanged(net):
        refused(run, model, X, at="model.layers[2]", says=["layers", "2"])


def test_a_module_that_stops_running_after_compilation():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), True

        def forward(self, x):
            return self.b(self.a(x)) if self.use else self.a(x)

    @intervene
    def run(model, x):
        with model.trace(x):
            model.b.output = 0
            result = model.output
        return result

    net = Sometimes()
    model = NNsight(net)
    assert torch.equal(run(model, X), torch.zeros(2, 4))
    net.use = False
    with unchanged(net):
        refused(run, model, X, at="model.b.output", says=["`b`", "did not run", "way out"], kind=RunError)


def test_a_site_that_fires_twice_after_compilation():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.times = nn.Linear(4, 4), 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.a(x)
            return x

    @intervene
    def run(model, x):
        with model.trace(x):
            model.a.output = model.a.output * 2
            result = model.output
        return result

    @intervene
    def read(model, x):
        with model.trace(x):
            h = model.a.output
        return h

    net = Again()
    model = NNsight(net)
    assert torch.allclose(run(model, X), net(X) * 2)
    read(model, X)
    net.times = 2
    with unchanged(net):
        refused(run, model, X, at="model.a.output = ", says=["`a`", "2 times", ".calls[0]"], kind=RunError)
        refused(read, model, X, at="h = model.a.output", says=["`a`"], kind=RunError)


def test_users_hooks_fire_before_ours_and_stay():
    net = make()
    log = []

    def theirs(module, args, out):
        log.append("theirs")
        return out + 1

    def theirs_before(module, args):
        log.append("theirs before")
        return (args[0] * 2,)

    handles = [net.layers[1].register_forward_hook(theirs), net.layers[1].register_forward_pre_hook(theirs_before)]
    seen = {}
    last = [
        net.layers[1].register_forward_hook(lambda m, a, out: seen.update(out=out.clone())),
        net.layers[1].register_forward_pre_hook(lambda m, a: seen.update(into=a[0].clone())),
    ]
    net(X)
    for handle in last:
        handle.remove()
    log.clear()

    @intervene
    def run(model, x):
        with model.trace(x):
            into = model.layers[1].input
            out = model.layers[1].output
            result = model.output
        return into, out, result

    with unchanged(net):
        into, out, result = run(NNsight(net), X)
    assert torch.equal(into, seen["into"])
    assert torch.equal(out, seen["out"])
    assert log == ["theirs before", "theirs"]
    assert torch.equal(result, net(X))
    assert len(net.layers[1]._forward_hooks) == 1
    for handle in handles:
        handle.remove()


def test_a_users_hook_that_raises():
    net = make()

    def theirs(module, args, out):
        if armed:
            raise ValueError("theirs")

    net.layers[1].register_forward_hook(theirs)
    armed = False

    @intervene
    def run(model, x):
        with model.trace(x):
            out = model.layers[0].output.save()
            result = model.output
        return out, result

    model = NNsight(net)
    run(model, X)
    armed = True
    with unchanged(net), pytest.raises(ValueError, match="theirs"):
        run(model, X)


def test_error_in_a_nested_experiment_leaves_both_clean():
    net = make()
    model = NNsight(net)

    @intervene
    def inner(x):
        with model.trace(x):
            h = model.layers[0].output[:, [99]]
        return h

    def call_inner(h):
        return inner(h)

    @intervene
    def outer(x):
        with model.trace(x):
            h = model.layers[1].output
            again = call_inner(h)
            result = model.output
        return again, result

    with unchanged(net), pytest.raises(IndexError):
        outer(X)


# --- wrong arguments ---


def test_wrong_arguments_are_type_errors_as_in_python():
    def plain(model, x, *, layer, scale=1.0):
        with model.trace(x):
            h = model.layers[layer].output * scale
        return h

    run = intervene(plain)
    model = NNsight(make())
    for args, kwargs in (
        ((), {}),
        ((model,), {}),
        ((model, X), {}),
        ((model, X, 1), {}),
        ((model, X), {"layer": 1, "wrong": 2}),
        ((model, X), {"layer": 1, "x": 2}),
    ):
        with pytest.raises(TypeError) as ours:
            run(*args, **kwargs)
        with pytest.raises(TypeError) as pythons:
            plain(*args, **kwargs)
        assert str(ours.value) == str(pythons.value)
    assert torch.equal(run(model, X, layer=1, scale=2), run(model, X, layer=1) * 2)


def test_a_plain_torch_module_instead_of_a_wrapped_one():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
        return h

    refused(run, make(), X, at="with model.trace(x)", says=["NNsight("])


def test_error_messages_begin_with_the_place():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.spare.output
        return h

    text = refused(wrong, NNsight(make()), X, at="model.spare", says=[])
    first, source, carets, *rest = text.splitlines()
    column = source.index("model.spare") - 4
    assert first.startswith(f"{__file__}:{line_of(wrong, 'model.spare')}:{column + 1}: ")
    assert source.strip() == "h = model.spare.output"
    assert carets.index("^") == source.index("model.spare")
    assert carets.count("^") == len("model.spare.output")
    assert rest[0].startswith("  way out: ")


def test_errors_raised_again_on_the_second_call():
    @intervene
    def wrong(model, x):
        with model.trace(x):
            h = model.spare.output
        return h

    model = NNsight(make())
    first = refused(wrong, model, X, at="model.spare", says=[])
    assert refused(wrong, model, X, at="model.spare", says=[]) == first
