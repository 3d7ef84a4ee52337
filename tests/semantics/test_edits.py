"""Edited models. The oracle: the same forward with torch hooks written by hand, on the plain module."""

import gc
import threading
import weakref

import pytest
import torch
from conftest import gpt2
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, LanguageModel, NNsight, intervene

H = "transformer.h"


def zeros(out):
    return torch.zeros_like(out)


def plus(vector):
    return lambda out: out + vector


@pytest.fixture
def vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(5))


def logits(model, inputs):
    with model.trace(inputs):
        found = model.lm_head.output.save()
    return found


def test_an_edit_runs_first_in_every_forward_of_the_view_alone(model, plain_gpt2, hooked, clean, vector):
    plain = hooked(plain_gpt2, clean).logits
    with model.edit() as edited:
        edited.layers[1].output[:] += vector
        model.layers[2].mlp.output = 0
    expected = hooked(plain_gpt2, clean, (f"{H}.1", "output", plus(vector)), (f"{H}.2.mlp", "output", zeros)).logits
    assert torch.equal(logits(edited, clean), expected)
    assert torch.equal(logits(model, clean), plain)
    assert not torch.equal(expected, plain)
    assert edited._module is model._module
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in plain_gpt2.modules())


def test_nothing_runs_at_the_with(model, counts, plain_gpt2):
    seen = counts(plain_gpt2)
    with model.edit() as edited:
        raise AssertionError("this is part of the edit, and never runs here")
        edited.layers[0].output[:] = 0
    assert not seen
    assert len(edited.edits) == 1


def test_the_experiment_sees_values_after_the_edits_and_writes_after_them(model, plain_gpt2, grab, hooked, clean):
    with model.edit() as edited:
        edited.layers[1].output[:] = 1

    @intervene
    def run(model, inputs):
        with model.trace(inputs):
            before = model.layers[1].output.clone()
            model.layers[1].output[:] *= 3
            after = model.lm_head.output
        return before, after

    before, after = run(edited, clean)
    assert torch.equal(before, torch.ones(1, 6, 32))
    assert torch.equal(
        after, hooked(plain_gpt2, clean, (f"{H}.1", "output", lambda out: torch.full_like(out, 3))).logits
    )
    plain, _ = run(model, clean)
    assert torch.equal(plain, grab(plain_gpt2, clean, f"{H}.1"))
    assert run.cache_info().misses == 2
    run(edited, clean)
    assert run.cache_info().misses == 2


def test_edits_compose_in_their_order(model, plain_gpt2, hooked, clean, vector):
    with model.edit() as first:
        first.layers[0].output[:] += vector
    with first.edit() as second:
        second.layers[0].output[:] *= 2
    expected = hooked(plain_gpt2, clean, (f"{H}.0", "output", lambda out: (out + vector) * 2)).logits
    assert torch.equal(logits(second, clean), expected)
    assert torch.equal(logits(first, clean), hooked(plain_gpt2, clean, (f"{H}.0", "output", plus(vector))).logits)
    assert [len(each.edits) for each in (model, first, second)] == [0, 1, 2]
    assert second.edits[0] is first.edits[0]


def test_what_an_edit_takes_is_what_it_was_when_it_was_made(model, plain_gpt2, hooked, clean, vector):
    layer, strength, kept = 1, 2.0, vector.clone()
    with model.edit() as edited:
        edited.layers[layer].output[:] += strength * vector
    layer, strength, vector = 3, 5.0, None
    expected = hooked(plain_gpt2, clean, (f"{H}.1", "output", plus(2.0 * kept))).logits
    assert torch.allclose(logits(edited, clean), expected, atol=1e-6)
    assert set(edited.edits[0].values) == {"layer", "strength", "vector"}


def test_an_edit_in_place_and_taking_it_off(clean, hooked, vector):
    plain = gpt2(2)
    model = LanguageModel(plain)

    @intervene
    def run(inputs):
        with model.trace(inputs):
            found = model.lm_head.output
        return found

    unedited = run(clean)
    view = model
    with model.edit(inplace=True):
        model.layers[0].output[:] += vector
    with model.edit(inplace=True) as same:
        same.layers[1].output = 0
    assert same is view is model
    expected = hooked(plain, clean, (f"{H}.0", "output", plus(vector)), (f"{H}.1", "output", zeros)).logits
    assert torch.equal(run(clean), expected)
    assert len(model.edits) == 2
    with model.edit() as more:
        more.lm_head.output[:] = 7
    model.clear_edits()
    assert model.edits == ()
    assert torch.equal(run(clean), unedited)
    assert len(more.edits) == 3
    assert (logits(more, clean) == 7).all()


def test_the_two_names_of_nnsight_0_8(model, clean):
    with model.edit() as (tracer, edited):
        edited.lm_head.output[:] = 4
    assert (logits(edited, clean) == 4).all()
    assert type(tracer).__name__ == "EditContext"


def test_a_plain_call_of_an_edited_model_applies_the_edits(model, plain_gpt2, hooked, clean, vector):
    with model.edit() as edited:
        edited.layers[1].output[:] += vector
    expected = hooked(plain_gpt2, clean, (f"{H}.1", "output", plus(vector))).logits
    with torch.no_grad():
        assert torch.equal(edited(clean).logits, expected)
        assert torch.equal(model(clean).logits, plain_gpt2(clean).logits)
    found = edited(clean).logits
    assert torch.equal(found.detach(), expected)
    found.sum().backward()
    assert plain_gpt2.transformer.wte.weight.grad is not None
    plain_gpt2.zero_grad(set_to_none=True)


def test_an_edited_model_is_usable_wherever_a_model_is(tiny):
    prompt = "The Eiffel Tower is in the city of"
    with tiny.edit() as edited:
        edited.lm_head.output[:, -1] = 0
    assert edited.tokenizer is tiny.tokenizer
    assert edited.device == tiny.device
    assert len(edited.layers) == 3
    assert type(edited) is LanguageModel
    assert edited.lm_head.weight is tiny.lm_head.weight
    assert repr(edited).startswith(repr(tiny))
    assert repr(edited).endswith(f"edit 0: {__file__}:{edited.edits[0].program.span.line}")
    assert not logits(edited, prompt)[:, -1].any()


def test_weights_are_loaded_once_for_a_model_and_its_views():
    tiny = LanguageModel("tiny")
    with tiny.edit() as edited:
        edited.layers[0].output[:] = 0
    assert tiny.lm_head._module.weight.is_meta
    logits(edited, "one prompt")
    assert not tiny.lm_head._module.weight.is_meta
    assert tiny._module is edited._module


def test_edits_in_experiments_are_made_of_its_values(model, plain_gpt2, grab, hooked, clean, corrupt):
    @intervene
    def run(model, clean, corrupt, layer, strength):
        with model.trace(clean):
            source = model.layers[layer].output[:, -1]
        with model.edit() as edited:
            edited.layers[layer].output[:, -1] = source * strength
        with edited.edit() as twice:
            twice.layers[3].output[:] += 1
        with twice.trace(corrupt):
            both = twice.lm_head.output
        with edited.trace(corrupt):
            one = model.lm_head.output
        with model.trace(corrupt):
            none = model.lm_head.output
        return both, one, none

    source = grab(plain_gpt2, clean, f"{H}.1")[:, -1]

    def patched(out):
        out = out.clone()
        out[:, -1] = source * 2.0
        return out

    both, one, none = run(model, clean, corrupt, 1, 2.0)
    hook = (f"{H}.1", "output", patched)
    assert torch.equal(none, hooked(plain_gpt2, corrupt).logits)
    assert torch.equal(one, hooked(plain_gpt2, corrupt, hook).logits)
    assert torch.equal(both, hooked(plain_gpt2, corrupt, hook, (f"{H}.3", "output", plus(1.0))).logits)
    run(model, clean, corrupt, 1, 3.0)
    assert run.cache_info().misses == 1


def test_an_edit_in_a_helper_and_in_a_loop(model, plain_gpt2, hooked, clean):
    def without(model, layer):
        with model.edit() as edited:
            edited.layers[layer].output[:] = 0
        return edited

    @intervene
    def run(model, clean):
        found = []
        for layer in range(4):
            edited = without(model, layer)
            with edited.trace(clean):
                found.append(edited.lm_head.output)
        return found

    for layer, found in enumerate(run(model, clean)):
        assert torch.equal(found, hooked(plain_gpt2, clean, (f"{H}.{layer}", "output", zeros)).logits)


def test_an_edit_may_read_condition_and_call_modules_of_the_users(model, plain_gpt2, hooked, clean):
    torch.manual_seed(0)
    probe = nn.Linear(32, 32)

    with model.edit() as edited:
        hidden = edited.layers[1].output
        if hidden.norm() > 0.1:
            for _ in range(2):
                hidden = probe(hidden)
            edited.layers[1].output = hidden
    expected = hooked(plain_gpt2, clean, (f"{H}.1", "output", lambda out: probe(probe(out))), grad=True).logits
    found = logits(edited, clean)
    assert torch.equal(found.detach(), expected.detach())
    found.sum().backward()
    assert probe.weight.grad.any()


def test_an_edit_that_nothing_reads_after_it_is_no_mistake(model, plain_gpt2, grab, clean):
    with model.edit() as edited:
        edited.layers[3].output[:] = 0
    with edited.trace(clean):
        early = edited.layers[1].output.save()
    assert torch.equal(early, grab(plain_gpt2, clean, f"{H}.1"))


def test_a_mutable_value_is_taken_by_reference_and_guarded(model, plain_gpt2, hooked, clean):
    layers = [0]
    with model.edit() as edited:
        for layer in layers:
            edited.layers[layer].output[:] = 0

    @intervene
    def run(model, inputs):
        with model.trace(inputs):
            found = model.lm_head.output
        return found

    assert torch.equal(run(edited, clean), hooked(plain_gpt2, clean, (f"{H}.0", "output", zeros)).logits)
    layers[0] = 2
    assert torch.equal(run(edited, clean), hooked(plain_gpt2, clean, (f"{H}.2", "output", zeros)).logits)


def edited_at(model, body):
    """Runs a `with model.edit()` whose body is a line, in a file of its own lines."""
    text = f"@intervene\ndef f(model, x):\n    with model.edit() as edited:\n        {body}\n"
    text += "    with edited.trace(x):\n        out = edited.lm_head.output\n    return out\n"
    return intervene.from_source(text, {"intervene": intervene})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = edited.layers[0].output.save()", "an edit only changes the model: nobody can be given what it saves"),
        (
            "return edited.layers[0].output",
            "an edit returns nothing: its body runs in each forward of the edited model",
        ),
        ("edited.layrs[0].output = 0", "has no `layrs`"),
        ("edited.layers[9].output = 0", "no index 9"),
        ("edited.layers[0].output = 0\n        with model.trace(x): y = 1", "cannot run inside the body of another"),
    ],
)
def test_mistakes_in_an_edit_are_refused_at_their_line(model, clean, body, reason):
    with pytest.raises(CompileError) as caught:
        edited_at(model, body)(model, clean)
    assert reason in str(caught.value)
    assert caught.value.diagnostics[0].span.line in (4, 5)
    assert f":{caught.value.diagnostics[0].span.line}:" in str(caught.value)


def test_mistakes_in_an_undecorated_edit_are_found_when_it_is_made(model):
    with pytest.raises(CompileError, match="has no `layrs`") as caught, model.edit() as edited:
        edited.layrs[0].output = 0
    assert caught.value.diagnostics[0].span.file == __file__
    with pytest.raises(CompileError, match="nobody can be given what it saves"), model.edit() as edited:
        edited.layers[0].output.save()
    with pytest.raises(CompileError, match="`not_yet` has no value when the edit is made"), model.edit() as edited:
        edited.layers[0].output[:] += not_yet  # noqa: F821
    with pytest.raises(CompileError, match="which the same forward computes only later"), model.edit() as edited:
        edited.layers[0].output = edited.layers[2].output
    assert model.edits == ()


def test_edit_without_with_is_refused(model):
    with pytest.raises(ExperimentError, match=r"`.edit\(…\)` without `with` edits nothing"):
        model.edit()
    with pytest.raises(TypeError, match=r"`edit` takes no argument but `inplace` \(in_place\)"):
        model.edit(in_place=True)


def test_an_experiment_does_not_edit_in_place(model, clean):
    text = "@intervene\ndef f(model, x):\n    with model.edit(inplace=True):\n        model.output = 0\n    return 1\n"
    with pytest.raises(CompileError, match="an experiment leaves the model as it was, so it cannot edit it in place"):
        intervene.from_source(text, {"intervene": intervene})(model, clean)


def test_a_module_of_an_edited_view_is_no_module_of_the_plain_model(model, clean):
    with model.edit() as edited:
        edited.layers[0].output[:] = 0

    @intervene
    def run(model, edited, inputs):
        with model.trace(inputs):
            found = edited.lm_head.output
        return found

    with pytest.raises(CompileError, match="this module belongs to an edited model, and this `with` runs the model"):
        run(model, edited, clean)
    with edited.trace(clean):  # the other way round, the names of the model mean the one that runs
        found = model.layers[0].output.save()
    assert not found.any()


def test_an_edited_model_made_in_an_experiment_stays_in_it(model, clean):
    @intervene
    def run(model):
        with model.edit() as edited:
            edited.layers[0].output[:] = 0
        return edited

    with pytest.raises(CompileError, match="cannot be handed on as a value"):
        run(model)


def test_a_cache_of_an_edited_model_holds_what_the_edits_made(model, clean):
    with model.edit() as edited:
        edited.layers[1].output[:] = 3
    with edited.trace(clean) as tracer:
        cache = tracer.cache(modules=["layers.1"])
    assert (cache["layers.1"].output == 3).all()


def test_four_threads_with_four_views(plain_gpt2, model, hooked, clean):
    views, expected, found = [], [], [None] * 4
    for number in range(4):
        with model.edit() as view:
            view.layers[number].output[:] *= 0.5
        views.append(view)
        expected.append(hooked(plain_gpt2, clean, (f"{H}.{number}", "output", lambda out: out * 0.5)).logits)

    @intervene
    def run(model, inputs):
        with model.trace(inputs):
            out = model.lm_head.output
        return out

    def work(number):
        with torch.inference_mode():
            for _ in range(5):
                found[number] = run(views[number], clean)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_views_that_are_gone_leave_nothing_behind():
    net = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    x = torch.ones(1, 4)

    @intervene
    def run(net, x):
        with net.trace(x):
            out = net.output
        return out

    def once(number):
        vector = torch.full((4,), float(number))
        with net.edit() as edited:
            edited[1].output[:] += vector
        return weakref.ref(edited), weakref.ref(vector), run(edited, x)

    with torch.no_grad():
        plain = net(x)
    for number in range(50):
        view, vector, out = once(number)
        assert torch.equal(out, plain + number)
    gc.collect()
    assert view() is None
    assert vector() is None
    assert run.cache_info().size == 1  # a new vector compiles nothing
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in net._module.modules())


def test_a_number_that_an_edit_relies_on_is_guarded(model, plain_gpt2, hooked, clean):
    @intervene
    def run(model, inputs):
        with model.trace(inputs):
            out = model.lm_head.output
        return out

    for layer in (0, 2, 0):
        with model.edit() as edited:
            edited.layers[layer].output[:] = 0
        assert torch.equal(run(edited, clean), hooked(plain_gpt2, clean, (f"{H}.{layer}", "output", zeros)).logits)
    assert run.cache_info().misses == 2
