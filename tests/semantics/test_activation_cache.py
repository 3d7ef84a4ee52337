"""`tracer.cache(…)`. The oracle: torch hooks on every module of the plain model."""

import gc
import threading
import weakref

import pytest
import torch
from conftest import Stack, gpt2
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, intervene
from nnsight_compiler.runtime.caches import NotRecordedError


def everything(module, inputs, *writes):
    """What every call of every module returned and got, by path. `writes`: functions applied to outputs, by path."""
    outputs, arguments, handles = {}, {}, []
    changes = dict(writes)
    for path, each in module.named_modules():

        def after(_module, args, kwargs, out, path=path):
            if path in changes:
                out = changes[path](out)
            outputs.setdefault(path, []).append(copied(out))
            arguments.setdefault(path, []).append((copied(args), copied(kwargs)))
            return out

        handles.append(each.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, arguments


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return value


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if hasattr(left, "__dict__"):
        return same(vars(left), vars(right))
    return left == right


def zero_first(out):
    return torch.zeros_like(out)


@pytest.mark.parametrize("first", [True, False])
def test_a_cache_holds_every_module_that_runs_after_what_is_written(model, plain_gpt2, clean, first):
    expected, _ = everything(plain_gpt2, clean, ("transformer.h.1", zero_first))
    if first:
        with model.trace(clean) as tracer:
            cache = tracer.cache()
            model.layers[1].output = 0
    else:
        with model.trace(clean) as tracer:
            model.layers[1].output[:] = 0
            cache = tracer.cache()
    assert set(cache) == set(expected) == set(cache.keys())
    assert len(cache) == len(expected)
    for path, module in cache.items():
        (value,) = expected[path]
        if path in ("", "transformer"):  # these return a `ModelOutput`
            name = "last_hidden_state" if path else "logits"
            assert torch.equal(module.output[name], value[name])
        else:
            assert same(module.output, value), path


def test_names_of_every_kind_mean_one_module(either, clean):
    wrapped, plain, layers = either
    expected = everything(plain, clean)[0][f"{layers}.1.mlp"][0]
    with wrapped.trace(clean) as tracer:
        cache = tracer.cache().save()
    found = [
        cache[f"{layers}.1.mlp"],
        cache["layers.1.mlp"],
        cache.layers[1].mlp,
        cache.model.layers[1].mlp,
        cache["model.layers.1.mlp"],
        next(iter(cache.layers[1:])).mlp,
    ]
    assert all(torch.equal(each.output, expected) for each in found)
    assert len(cache.layers) == 3
    assert torch.equal(cache.lm_head.output, cache["lm_head"].output)


def test_inputs_are_recorded_where_asked_for(model, plain_gpt2, clean):
    _, expected = everything(plain_gpt2, clean)

    @intervene
    def run(model, clean):
        with model.trace(clean) as tracer:
            cache = tracer.cache(include_inputs=True, include_output=False)
        return cache

    cache = run(model, clean)
    for path in ("transformer.h.2.mlp", "transformer.ln_f", "lm_head", "transformer.h.0.attn.c_attn"):
        assert same(cache[path].inputs, expected[path][0])
        assert torch.equal(cache[path].input, expected[path][0][0][0])
    # A cache of keys and values is filled as the model runs: what a layer was given is what it then held.
    (_, held, *_), _ = cache["transformer.h.1"].inputs
    assert held.get_seq_length(0) == clean.shape[1]
    assert held.get_seq_length(1) == 0
    with pytest.raises(
        NotRecordedError, match="does not hold the output of `lm_head`; ask for it with `include_output"
    ):
        cache["lm_head"].output  # noqa: B018


WANTED = "mlp"


def chosen(name, module):
    return name.endswith(WANTED)


def test_modules_are_chosen_by_name_by_module_and_by_function(model, clean):
    @intervene
    def run(model, clean, modules):
        with model.trace(clean) as tracer:
            cache = tracer.cache(modules=modules)
        return cache

    mlps = [f"transformer.h.{number}.mlp" for number in range(4)]
    for modules, expected in (
        ("lm_head", ["lm_head"]),
        ("layers.1", ["transformer.h.1"]),
        (["model.layers.0.mlp", "lm_head"], ["transformer.h.0.mlp", "lm_head"]),
        (model.layers[2], ["transformer.h.2"]),
        (model.layers, [f"transformer.h.{number}" for number in range(4)]),
        ([model.layers[2].mlp, "lm_head", model.layers[0]], ["transformer.h.0", "transformer.h.2.mlp", "lm_head"]),
        (chosen, mlps),
        ("transformer.h.*.mlp", mlps),
        ("layers.*.mlp", mlps),
        (("layers.[12].m*",), mlps[1:3]),
        (lambda name, module: isinstance(module, nn.LayerNorm) and "h." not in name, ["transformer.ln_f"]),
        (lambda name, module: "h" in name.split("."), None),
        (model._module.lm_head, ["lm_head"]),
    ):
        found = list(run(model, clean, modules))
        if expected is None:  # lists of modules do not run
            assert len(found) == 4 * 12
        else:
            assert found == expected, modules


def test_a_filter_in_the_body_sees_the_names_around_it(model, clean):
    suffix = "ln_1"
    numbers = [0, 2]
    with model.trace(clean) as tracer:
        cache = tracer.cache(modules=lambda name, module, end=suffix: name.endswith(end) and int(name[14]) in numbers)
    assert list(cache) == ["transformer.h.0.ln_1", "transformer.h.2.ln_1"]

    @intervene
    def run(model, clean, ending):
        with model.trace(clean) as tracer:
            cache = tracer.cache(modules=lambda name, module: name.endswith(ending))
        return list(cache)

    assert run(model, clean, "ln_f") == ["transformer.ln_f"]
    assert run(model, clean, "wte") == ["transformer.wte"]
    assert run(model, clean, "wte") == ["transformer.wte"]
    assert run.cache_info().misses == 2


def test_dtype_and_detach(plain_gpt2, model, clean):
    expected = everything(plain_gpt2, clean)[0]["transformer.h.1"][0]
    with model.trace(clean) as tracer:
        half = tracer.cache(modules=["transformer.h.1", "transformer.wte"], dtype=torch.bfloat16, include_inputs=True)
    assert torch.equal(half["transformer.h.1"].output, expected.to(torch.bfloat16))
    assert torch.equal(half["transformer.wte"].input, clean)  # only floating point has its dtype changed
    with model.trace(clean, grad=True) as tracer:
        attached, cut = tracer.cache(["lm_head"], detach=False), tracer.cache(["lm_head"])
    assert not cut["lm_head"].output.requires_grad
    attached["lm_head"].output.sum().backward()
    weight = plain_gpt2.transformer.h[0].mlp.c_fc.weight
    assert weight.grad is not None
    plain_gpt2.zero_grad(set_to_none=True)


def test_every_call_of_a_module_is_recorded_and_lists_of_modules_are_left_out(stack, plain_stack, batch):
    expected, arguments = everything(plain_stack, batch)
    with stack.trace(batch) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert set(cache) == set(expected)
    assert [torch.equal(*pair) for pair in zip(cache.shared.output, expected["shared"], strict=True)] == [True, True]
    assert same(cache.shared.inputs, arguments["shared"])
    assert torch.equal(cache.shared.input[1], arguments["shared"][1][0][0])
    assert same(cache.blocks[1].output, expected["blocks.1"][0])
    assert same(cache.mapping.output, expected["mapping"][0])
    assert torch.equal(cache["record"].output.hidden, expected["record"][0].hidden)
    # The model's `ReLU(inplace=True)` changes what the module before it gave: the cache has it as it was.
    assert torch.equal(cache.blocks[0].linear.output, expected["blocks.0.linear"][0])
    assert (cache.blocks[0].linear.output < 0).any()


def test_a_cache_shares_no_memory_with_anything(model, clean):
    with model.trace(clean) as tracer:
        cache = tracer.cache(modules=["layers.0", "layers.1"], include_inputs=True)
        kept = model.layers[0].output.save()
    pointers = {
        kept.data_ptr(), cache["layers.0"].output.data_ptr(), cache["layers.1"].input.data_ptr(),
        cache["layers.0"].input.data_ptr(), cache["layers.1"].output.data_ptr(),
    }  # fmt: skip
    assert len(pointers) == 5
    cache["layers.0"].output.zero_()
    assert kept.any()
    assert cache["layers.1"].input.any()


def test_a_cache_can_be_used_in_a_later_forward(model, plain_gpt2, clean, corrupt):
    source = everything(plain_gpt2, clean)[0]["transformer.h.1"][0]
    expected = everything(plain_gpt2, corrupt, ("transformer.h.1", lambda out: source))[0]["lm_head"][0]

    @intervene
    def patch(model, clean, corrupt):
        with model.trace(clean) as tracer:
            cache = tracer.cache(modules=["layers.1"])
        with model.trace(corrupt):
            model.layers[1].output = cache["layers.1"].output
            logits = model.lm_head.output
        return logits

    assert torch.equal(patch(model, clean, corrupt), expected)


def test_a_cache_that_nothing_uses_costs_nothing(model, clean):
    @intervene
    def run(model, clean):
        with model.trace(clean) as tracer:
            tracer.cache().save()
            logits = model.lm_head.output
        return logits

    text = str(run.lower(model, clean))
    assert "record %" not in text
    assert "= cache" not in text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("tracer.cache(modules=['layers.9'])", "no module has the name `layers.9`"),
        ("tracer.cache(modules='lm_haed')", "GPT2LMHeadModel has no `lm_haed`; did you mean lm_head"),
        ("tracer.cache(modules='lays.*')", "no module has a name like `lays.*`"),
        ("tracer.cache(modules=3)", "a `int` chooses no module of a cache"),
        ("tracer.cache(modules=[])", "no module is chosen for this cache"),
        ("tracer.cache(module='lm_head')", "`tracer.cache` takes no `module`"),
        ("tracer.cache(include_output=False)", "this cache would hold neither outputs nor inputs"),
        ("tracer.cache(modules=lambda name: True)", "the filter raised TypeError for the module ``"),
        ("tracer.cache(modules=OTHER.lm_head)", "`lm_head` belongs to another model than the one that is traced here"),
        ("tracer.cache(modules='transformer.h.0.attn.attn_dropout_')", "`attn_dropout_`"),
        ("print(tracer.cache())", "this cache is used while it is filled"),
        ("tracer.cache()['lm_head'].output.sum()", "this cache is used while it is filled"),
        ("len(tracer.cache())", "this cache is used while it is filled"),
    ],
)
def test_mistakes_are_refused_with_their_line(model, clean, line, reason):
    text = (
        f"@intervene\ndef f(model, clean):\n    with model.trace(clean) as tracer:\n        x = {line}\n    return x\n"
    )
    run = intervene.from_source(text, {"intervene": intervene, "OTHER": OTHER})
    with pytest.raises(CompileError) as caught:
        run(model, clean)
    assert reason in str(caught.value)
    assert {each.span.line for each in caught.value.diagnostics} == {4}


OTHER = LanguageModel(gpt2(1))


def test_a_named_module_must_run(clean):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    net, x = NNsight(Spare()), torch.ones(1, 4)

    @intervene
    def run(net, x, modules):
        with net.trace(x) as tracer:
            cache = tracer.cache(modules=modules)
        return list(cache)

    assert run(net, x, None) == ["used", ""]
    assert run(net, x, lambda name, module: True) == ["used", ""]
    assert run(net, x, "*se*") == ["used"]
    with pytest.raises(CompileError, match="`spare` is never called in this forward"):
        run(net, x, "spare")


def test_what_a_cache_does_not_hold_is_an_error_with_near_names(model, clean):
    with model.trace(clean) as tracer:
        cache = tracer.cache(modules=["transformer.h.1", "lm_head"])
    assert "lm_head" in cache
    assert "transformer.h.0" not in cache
    with pytest.raises(
        KeyError, match=r"`transformer.h.2` was not recorded in this cache; did you mean transformer.h.1"
    ):
        cache["transformer.h.2"]
    with pytest.raises(
        KeyError, match=r"no module of the model is called `nothing`; it holds transformer.h.1, lm_head"
    ):
        cache["nothing"]
    with pytest.raises(AttributeError, match=r"`transformer.h.0` was not recorded in this cache"):
        cache.layers[0].output  # noqa: B018
    with pytest.raises(AttributeError, match="does not hold the inputs of `lm_head`; ask for it with `include_inputs"):
        cache.lm_head.input  # noqa: B018
    with pytest.raises(AttributeError, match="GPT2LMHeadModel has no `nothing`"):
        cache.nothing  # noqa: B018
    assert repr(cache) == "<cache of 2 modules: transformer.h.1, lm_head>"
    assert repr(cache["lm_head"]) == "<lm_head: output float32[1, 6, 101]>"


def test_a_cache_under_a_live_condition_is_refused(model, clean):
    @intervene
    def run(model, clean):
        cache = None
        with model.trace(clean) as tracer:
            if model.layers[0].output.norm() > 1:
                cache = tracer.cache()
        return cache

    with pytest.raises(CompileError, match="whether, or how often, this cache is made depends on what only a run can"):
        run(model, clean)


def test_a_thousand_caches_leave_nothing_behind():
    plain = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    net, x = NNsight(plain), torch.ones(2, 4)

    @intervene
    def run(net, x):
        with net.trace(x) as tracer:
            cache = tracer.cache()
        return cache

    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    gone = weakref.ref(run(net, x))
    before = tensors()
    for _ in range(1000):
        run(net, x)
    assert tensors() <= before
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_and_threads(mode):
    torch.manual_seed(0)
    plain = Stack().to(torch.bfloat16).eval()
    net = NNsight(plain)
    inputs = [torch.randn(2, 3, 8, dtype=torch.bfloat16) for _ in range(4)]
    expected = [everything(plain, x)[0]["first"][0] for x in inputs]
    found = [None] * 4

    @intervene
    def run(net, x):
        with net.trace(x) as tracer:
            cache = tracer.cache(modules=lambda name, module: name == "first")
        return cache.first.output

    def work(number):
        with mode():
            for _ in range(5):
                found[number] = run(net, inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_write_at_the_site_that_is_recorded_is_noticed() -> None:
    net, x = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), torch.ones(1, 4)
    with net.trace() as tracer:
        with tracer.invoke(x):
            first = tracer.cache(modules=["0"]).save()
        with tracer.invoke(2 * x):
            second = tracer.cache(modules=["0"]).save()
            net[0].output[:] += 1
    assert torch.allclose(first["0"].output, net._module[0](x))
    assert torch.allclose(second["0"].output, net._module[0](2 * x) + 1)
