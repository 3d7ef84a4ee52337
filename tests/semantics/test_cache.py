"""What compiles again and what does not: `.cache_info()` against results of plain hooks."""

import linecache
import threading

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, compilation, intervene

torch.set_num_threads(1)
SCALE = 2.0
LAYER = 0
OPTIONS = {"scale": 2.0}


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def make(depth=3, seed=0):
    torch.manual_seed(seed)
    return Net(depth).eval()


def output(net, layer, x):
    seen = {}
    handle = net.layers[layer].register_forward_hook(lambda m, a, out: seen.update(out=out.detach().clone()))
    net(x)
    handle.remove()
    return seen["out"]


@intervene
def read(model, x, layer, scale=1.0):
    with model.trace(x):
        h = model.layers[layer].output * scale
    return h


@pytest.fixture(autouse=True)
def _empty():
    read.cache_clear()


def info(experiment):
    return tuple(experiment.cache_info())


def test_inputs_never_compile_again():
    net = make()
    model = NNsight(net)
    for rows in (1, 2, 5):
        for scale in (1.0, 2.0, 3.5):
            x = torch.randn(rows, 4)
            assert torch.equal(read(model, x, 1, scale), output(net, 1, x) * scale)
    assert info(read) == (8, 1, 1)


def test_a_layer_compiles_once():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    for _ in range(3):
        for layer in range(3):
            assert torch.equal(read(model, x, layer), output(net, layer, x))
    assert info(read) == (6, 3, 3)
    assert torch.equal(read(model, x, -1), output(net, 2, x))
    read(model, x, -1)
    assert info(read) == (7, 4, 4)


def test_equal_layers_of_other_types():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    assert torch.equal(read(model, x, 1), output(net, 1, x))
    assert torch.equal(read(model, x, True), output(net, 1, x))
    assert torch.equal(read(model, x, 0), output(net, 0, x))
    assert torch.equal(read(model, x, False), output(net, 0, x))


def test_each_model_compiles():
    nets = [make(3, seed) for seed in range(3)] + [make(5)]
    models = [NNsight(net) for net in nets]
    x = torch.randn(2, 4)
    for _ in range(2):
        for net, model in zip(nets, models, strict=True):
            assert torch.equal(read(model, x, 1), output(net, 1, x))
            assert torch.equal(read(model, x, -1), output(net, len(net.layers) - 1, x))
    assert info(read) == (8, 8, 8)


def test_a_model_wrapped_twice_is_right_either_way():
    net = make()
    x = torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(read(NNsight(net), x, 1), output(net, 1, x))


def test_new_weights_are_used_without_compiling():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    read(model, x, 1)
    with torch.no_grad():
        net.layers[1].weight.add_(1)
    assert torch.equal(read(model, x, 1), output(net, 1, x))
    net.layers[1] = nn.Linear(4, 4)
    assert torch.equal(read(model, x, 1), output(net, 1, x))
    net.load_state_dict(make(seed=9).state_dict())
    assert torch.equal(read(model, x, 1), output(net, 1, x))
    assert read.cache_info().misses == 1


def test_a_changed_structure_is_noticed():
    @intervene
    def every(model, x):
        states = []
        with model.trace(x):
            for layer in model.layers:
                states.append(layer.output)
        return states

    @intervene
    def last(model, x):
        with model.trace(x):
            h = model.layers[-1].output
        return h

    net = make(2)
    model = NNsight(net)
    x = torch.randn(2, 4)
    assert len(every(model, x)) == 2
    assert torch.equal(last(model, x), output(net, 1, x))
    net.layers.append(nn.Linear(4, 4))
    assert len(every(model, x)) == 3
    assert torch.equal(every(model, x)[2], output(net, 2, x))
    assert torch.equal(last(model, x), output(net, 2, x))


def test_a_changed_global_is_noticed():
    global SCALE, LAYER

    @intervene
    def scaled(model, x):
        with model.trace(x):
            h = model.layers[LAYER].output * SCALE
        return h

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    for layer, scale in ((0, 2.0), (0, 3.0), (1, 3.0), (1, 0.5), (0, 2.0)):
        LAYER, SCALE = layer, scale
        assert torch.equal(scaled(model, x), output(net, layer, x) * scale)
    assert scaled.cache_info().misses == 2
    LAYER, SCALE = 0, 2.0


def test_a_changed_container_in_a_global_is_noticed():
    @intervene
    def scaled(model, x):
        with model.trace(x):
            h = model.layers[0].output * OPTIONS["scale"]
        return h

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    for scale in (2.0, 5.0):
        OPTIONS["scale"] = scale
        assert torch.equal(scaled(model, x), output(net, 0, x) * scale)


def test_a_changed_closure_is_noticed():
    layer, scale = 0, 1.0

    @intervene
    def scaled(model, x):
        with model.trace(x):
            h = model.layers[layer].output * scale
        return h

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    for layer, scale in ((0, 2.0), (0, 3.0), (2, 3.0), (2, 0.5)):
        assert torch.equal(scaled(model, x), output(net, layer, x) * scale)
    assert scaled.cache_info().misses == 2


def helper(h):
    return h * 2


def test_a_changed_helper_is_noticed(monkeypatch):
    @intervene
    def helped(model, x):
        with model.trace(x):
            h = helper(model.layers[0].output)
        return h

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    assert torch.equal(helped(model, x), output(net, 0, x) * 2)
    monkeypatch.setitem(globals(), "helper", lambda h: h * 5)
    assert torch.equal(helped(model, x), output(net, 0, x) * 5)


def test_a_model_in_a_global_or_closure():
    nets = [make(seed=1), make(seed=2)]
    x = torch.randn(2, 4)

    def experiment(model):
        @intervene
        def run(x):
            with model.trace(x):
                h = model.layers[0].output
            return h

        return run

    for net in nets:
        assert torch.equal(experiment(NNsight(net))(x), output(net, 0, x))
    held = NNsight(nets[0])

    @intervene
    def run(x):
        with held.trace(x):
            h = held.layers[0].output
        return h

    assert torch.equal(run(x), output(nets[0], 0, x))
    held = NNsight(nets[1])
    assert torch.equal(run(x), output(nets[1], 0, x))


def test_a_condition_on_an_argument():
    @intervene
    def maybe(model, x, ablate):
        with model.trace(x):
            if ablate:
                model.layers[0].output = 0
            result = model.output
        return result

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    handle = net.layers[0].register_forward_hook(lambda m, a, out: out * 0)
    ablated = net(x)
    handle.remove()
    for ablate in (True, False, 1, 0, "yes", "", [1], [], None):
        want = ablated if ablate else net(x)
        assert torch.equal(maybe(model, x, ablate), want), ablate


def test_a_list_of_layers_as_an_argument():
    @intervene
    def several(model, x, layers):
        states = []
        with model.trace(x):
            for layer in layers:
                states.append(model.layers[layer].output)
        return states

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    chosen = [0, 2]
    for layers in ([0], [0, 2], (1, 2), range(3), [], chosen):
        found = several(model, x, layers)
        assert len(found) == len(layers)
        for layer, h in zip(layers, found, strict=True):
            assert torch.equal(h, output(net, layer, x))
    chosen.append(1)
    assert len(several(model, x, chosen)) == 3
    chosen[0] = 2
    assert torch.equal(several(model, x, chosen)[0], output(net, 2, x))


def test_a_dict_and_an_object_as_arguments():
    class Config:
        layer = 1

    @intervene
    def run(model, x, options, config):
        with model.trace(x):
            a = model.layers[options["layer"]].output
            b = model.layers[config.layer].output
        return a, b

    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    config = Config()
    for first, second in ((0, 1), (2, 1), (2, 0)):
        config.layer = second
        a, b = run(model, x, {"layer": first}, config)
        assert torch.equal(a, output(net, first, x))
        assert torch.equal(b, output(net, second, x))


def test_train_and_eval_are_both_right():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    model = NNsight(net)
    x = torch.randn(2, 4)

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model[1].output
        return h

    assert torch.equal(run(model, x), net[0](x).detach())
    net.train()
    torch.manual_seed(3)
    found = run(model, x)
    torch.manual_seed(3)
    assert torch.equal(found, net[1](net[0](x)).detach())


def test_clear_forgets():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    read(model, x, 1)
    read.cache_clear()
    assert info(read) == (0, 0, 0)
    read(model, x, 1)
    assert info(read) == (0, 1, 1)


def test_compile_and_lower_run_no_forward():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    ran = []
    net.layers[0].register_forward_hook(lambda m, a, out: ran.append(1))
    lowered = read.lower(model, x, layer=1)
    compiled = lowered.compile()
    assert read.compile(model, x, layer=1) is compiled
    assert not ran
    assert torch.equal(read(model, x, layer=1), output(net, 1, x))
    assert read.cache_info().misses == 1


def test_a_failed_compilation_is_not_kept():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    for _ in range(2):
        with pytest.raises(Exception, match="0 to 2"):
            read(model, x, 7)
    assert read.cache_info().size == 0
    assert torch.equal(read(model, x, 1), output(net, 1, x))


def test_arguments_with_strange_equality():
    class Never:
        def __eq__(self, other):
            raise RuntimeError("never compared")

        __hash__ = None

    @intervene
    def run(model, x, extra):
        with model.trace(x):
            h = model.layers[0].output
        return h, extra

    net = make()
    x = torch.randn(2, 4)
    extra = Never()
    h, back = run(NNsight(net), x, extra)
    assert torch.equal(h, output(net, 0, x))
    assert back is extra


def test_a_layer_given_as_a_tensor_or_numpy_number():
    numpy = pytest.importorskip("numpy")
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    assert torch.equal(read(model, x, numpy.int64(2)), output(net, 2, x))
    assert torch.equal(read(model, x, numpy.int64(1)), output(net, 1, x))


def test_models_are_not_kept_alive_by_the_cache():
    import gc
    import weakref

    net = make()
    ghost = weakref.ref(net)
    read(NNsight(net), torch.randn(2, 4), 1)
    del net
    gc.collect()
    assert ghost() is None


def test_clearing_while_others_call():
    net = make()
    model = NNsight(net)
    x = torch.randn(2, 4)
    want = output(net, 1, x)
    wrong = []

    def work():
        for _ in range(30):
            if not torch.equal(read(model, x, 1), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        read.cache_clear()
    for thread in threads:
        thread.join()
    assert not wrong


# --- functions that are changed in place, as IPython's autoreload does ---


def changing(module, factor=2.0, *, shift=0.0):
    return module.output * factor + shift


class Changing:
    def part(self, module):
        return module.output * 3


class Other:
    def part(self, module):
        return module.output * 7


held = Changing()


@intervene
def uses_function(model, x):
    with model.trace(x):
        out = changing(model.first)
    return out


@intervene
def uses_method(model, x):
    with model.trace(x):
        out = held.part(model.first)
    return out


def test_new_code_and_new_defaults_of_an_inlined_function_are_used(stack, plain_stack, batch, monkeypatch, grab):
    value = grab(plain_stack, batch, "first")

    def doubled(module, factor=2.0, *, shift=0.0):
        return module.output * factor * 2 + shift

    assert torch.equal(uses_function(stack, batch), value * 2)
    monkeypatch.setattr(changing, "__code__", doubled.__code__)
    assert torch.equal(uses_function(stack, batch), value * 4)
    monkeypatch.setattr(changing, "__defaults__", (5.0,))
    assert torch.equal(uses_function(stack, batch), value * 5 * 2)
    monkeypatch.setattr(changing, "__kwdefaults__", {"shift": 1.0})
    assert torch.equal(uses_function(stack, batch), value * 5 * 2 + 1)
    monkeypatch.undo()
    assert torch.equal(uses_function(stack, batch), value * 2)


def test_an_inlined_method_is_that_of_the_objects_class_now(stack, plain_stack, batch, monkeypatch, grab):
    value = grab(plain_stack, batch, "first")
    assert torch.equal(uses_method(stack, batch), value * 3)
    monkeypatch.setitem(globals(), "held", Other())
    assert torch.equal(uses_method(stack, batch), value * 7)
    monkeypatch.setattr(Other.part, "__code__", Changing.part.__code__)
    assert torch.equal(uses_method(stack, batch), value * 3)
    monkeypatch.undo()
    assert torch.equal(uses_method(stack, batch), value * 3)


def test_helpers_that_were_lowered_are_forgotten_where_there_are_many(stack, plain_stack, batch, monkeypatch, grab):
    monkeypatch.setattr(compilation, "_MOST_HELPERS", 3)
    value = grab(plain_stack, batch, "first")
    for number in range(6):
        scope = {}
        source = f"def helper(module):\n    return module.output * {number}\n"
        file = f"<helper {number}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), scope)
        monkeypatch.setitem(globals(), "many", scope["helper"])
        assert torch.equal(uses_many(stack, batch), value * number)
    assert len(compilation._helpers) <= 3


def many(module):
    return module.output


@intervene
def uses_many(model, x):
    with model.trace(x):
        out = many(model.first)
    return out
