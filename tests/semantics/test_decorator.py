"""`@intervene` on every kind of function, and what an experiment shows of itself."""

import functools
import inspect

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, Experiment, NNsight, intervene

torch.set_num_threads(1)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
X = torch.randn(2, 4)
model = NNsight(NET)
with torch.no_grad():
    HIDDEN = NET[0](X)
    RESULT = NET(X)


@intervene
def top(model, x, scale=1.0):
    """Says what it does."""
    with model.trace(x):
        h = model[0].output * scale
    return h


class Probe:
    factor = 3

    def __init__(self, scale):
        self.scale = scale

    @intervene
    def method(self, x):
        with model.trace(x):
            h = model[0].output * self.scale
        return h

    @intervene
    def writes(self, x):
        with model.trace(x):
            self.hidden = model[0].output
        return self.hidden

    @staticmethod
    @intervene
    def static(x):
        with model.trace(x):
            h = model[0].output
        return h

    @intervene
    @staticmethod
    def static_inside(x):
        with model.trace(x):
            h = model[0].output
        return h

    @classmethod
    @intervene
    def of_class(cls, x):
        with model.trace(x):
            h = model[0].output * cls.factor
        return h

    @intervene
    @classmethod
    def of_class_inside(cls, x):
        with model.trace(x):
            h = model[0].output * cls.factor
        return h

    @property
    @intervene
    def hidden_now(self):
        with model.trace(X):
            h = model[0].output * self.__scale_of()
        return h

    def __scale_of(self):
        return self.scale


class Child(Probe):
    factor = 5

    @intervene
    def method(self, x):
        base = super(Child, self).method(x)  # noqa: UP008
        with model.trace(x):
            h = model[0].output * 10
        return base + h


def test_function():
    assert torch.equal(top(model, X), HIDDEN)
    assert torch.equal(top(model, X, 2.0), HIDDEN * 2)
    assert torch.equal(top(model, x=X, scale=3.0), HIDDEN * 3)


def test_methods():
    probe = Probe(2)
    assert torch.equal(probe.method(X), HIDDEN * 2)
    assert torch.equal(Probe(7).method(X), HIDDEN * 7)
    assert torch.equal(Probe.method(probe, X), HIDDEN * 2)
    bound = probe.method
    assert torch.equal(bound(x=X), HIDDEN * 2)
    assert torch.equal(probe.writes(X), HIDDEN)
    assert torch.equal(probe.hidden, HIDDEN)


def test_static_and_class_methods():
    probe = Child(2)
    assert torch.equal(Probe.static(X), HIDDEN)
    assert torch.equal(probe.static(X), HIDDEN)
    assert torch.equal(probe.static_inside(X), HIDDEN)
    assert torch.equal(Probe.static_inside(X), HIDDEN)
    assert torch.equal(Probe.of_class(X), HIDDEN * 3)
    assert torch.equal(Child.of_class(X), HIDDEN * 5)
    assert torch.equal(probe.of_class(X), HIDDEN * 5)
    assert torch.equal(Probe.of_class_inside(X), HIDDEN * 3)
    assert torch.equal(Child.of_class_inside(X), HIDDEN * 5)


def test_property_and_private_names():
    assert torch.equal(Probe(4).hidden_now, HIDDEN * 4)


def test_super_in_a_method():
    assert torch.equal(Child(2).method(X), HIDDEN * 2 + HIDDEN * 10)


def test_super_without_arguments_is_refused_with_a_way_out():
    class Other(Probe):
        @intervene
        def method(self, x):
            return super().method(x)

    with pytest.raises(
        CompileError, match=r"test_decorator\.py:\d+:\d+: super\(\)[\s\S]*way out: .*super\(Class, self\)"
    ):
        Other(2).method(X)


def test_nested_functions_and_closures():
    def outer(scale):
        @intervene
        def inner(x):
            with model.trace(x):
                h = model[0].output * scale
            return h

        return inner

    assert torch.equal(outer(2)(X), HIDDEN * 2)
    assert torch.equal(outer(3)(X), HIDDEN * 3)


def test_lambda():
    def traced(x):
        with model.trace(x):
            h = model[0].output.save()
        return h

    run = intervene(lambda x, scale: traced(x) * scale)
    assert torch.equal(run(X, 2), HIDDEN * 2)


def test_other_decorators_around_it():
    calls = []

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls.append(args)
            return function(*args, **kwargs)

        return wrapper

    @counted
    @counted
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model[0].output
        return h

    assert torch.equal(run(model, X), HIDDEN)
    assert len(calls) == 2

    @functools.lru_cache
    @intervene
    def cached(scale):
        with model.trace(X):
            h = model[0].output * scale
        return h

    assert torch.equal(cached(2), HIDDEN * 2)
    assert cached(2) is cached(2)


def test_decorators_inside_are_refused():
    def plus(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args) + 1

        return wrapper

    def run(model, x):
        with model.trace(x):
            h = model[0].output
        return h

    for decorator in (torch.no_grad(), plus, functools.lru_cache):
        with pytest.raises(TypeError, match="closest to the `def`"):
            intervene(decorator(run))


def test_the_wrapped_function_looks_like_itself():
    assert isinstance(top, Experiment)
    assert top.__name__ == "top"
    assert top.__doc__ == "Says what it does."
    assert top.__module__ == __name__
    assert top.__qualname__ == "top"
    assert list(inspect.signature(top).parameters) == ["model", "x", "scale"]
    assert "top(model, x, scale=1.0)" in repr(top)


def test_intervene_twice_is_once():
    assert torch.equal(intervene(top)(model, X), HIDDEN)


@pytest.mark.parametrize("thing", [3, "text", len, print, Probe, Probe(1), None])
def test_things_that_are_no_functions(thing):
    with pytest.raises(TypeError, match="@intervene"):
        intervene(thing)


def test_generators_are_refused_with_a_way_out():
    @intervene
    def each(model, x):
        for factor in (1, 2):
            with model.trace(x):
                h = model[0].output * factor
            yield h

    with pytest.raises(CompileError, match=r"test_decorator\.py:\d+:\d+: a generator function[\s\S]*way out"):
        each(model, X)


def test_coroutines_are_refused():
    async def coroutine(model, x):
        with model.trace(x):
            h = model[0].output
        return h

    with pytest.raises(TypeError, match=r"async def"):
        intervene(coroutine)


def test_every_kind_of_parameter():
    @intervene
    def run(model, x, /, a, *rest, b, c=3, **others):
        with model.trace(x):
            h = model[0].output * a
        return h, rest, b, c, others

    h, rest, b, c, others = run(model, X, 2, 10, 11, b=4, d=5)
    assert torch.equal(h, HIDDEN * 2)
    assert (rest, b, c, others) == ((10, 11), 4, 3, {"d": 5})


def test_defaults_are_evaluated_once():
    made = []

    def default():
        made.append(1)
        return made

    @intervene
    def run(model, x, held=default()):  # noqa: B008
        held.append(2)
        with model.trace(x):
            h = model[0].output
        return h, held

    assert run(model, X)[1] == [1, 2]
    assert run(model, X)[1] == [1, 2, 2]
    assert run(model, X)[1] is made


def test_ir_needs_no_model():
    @intervene
    def patch(model, clean, corrupt, layer, position):
        with model.trace(clean):
            source = model.layers[layer].output[:, position]
        with model.trace(corrupt):
            model.layers[layer].output[:, position] = source
            logits = model.lm_head.output[:, -1]
        return logits.softmax(-1)

    text = str(patch.ir)
    assert text.count("forward ") == 2
    for name in ("%model", "%clean", "%corrupt", "%layer", "%position"):
        assert name in text
    assert "test_decorator.py" in text
    assert patch.ir is patch.ir


def test_lower_and_source():
    lowered = top.lower(model, X, scale=2.0)
    text = str(lowered)
    assert "Sequential" in text
    assert "at %model@0 output" in text
    names = [name for name, _ in lowered.stages]
    assert names[0] == "specialise"
    assert "place" in names
    source = lowered.compile().source
    compile(source, "<generated>", "exec")
    assert "def " in source
    assert "scale" in source


def test_recursion_and_experiments_that_call_experiments():
    @intervene
    def down(x, depth):
        if depth == 0:
            return x
        with model.trace(x):
            h = model[0].output
        return down(h, depth - 1)

    want = X
    with torch.no_grad():
        for _ in range(3):
            want = NET[0](want)
    assert torch.equal(down(X, 3), want)


def test_no_trace_at_all():
    @intervene
    def plain(a, b):
        return a + b, model[0].weight.sum()

    total, weight = plain(1, 2)
    assert total == 3
    assert torch.equal(weight, NET[0].weight.sum())
