"""Lists, tuples and dicts that a program makes: what stands in them under constants is the model's own value, in
whatever way it came there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from nnsight_compiler import CompileError, intervene

LAYERS = ("transformer.h.0", "transformer.h.1")


def zero(hidden: torch.Tensor) -> None:
    hidden[:] = 0


def values_of(plain: Any, prompt: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the layers, with the gradients of a logit, from plain torch."""
    found: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        found.append(value)

    handles = [plain.get_submodule(name).register_forward_hook(keep) for name in LAYERS]
    try:
        plain(prompt).logits[0, -1, 3].backward()
    finally:
        for handle in handles:
            handle.remove()
        plain.zero_grad()
    return found


@intervene
def by_key(model, prompt):
    held = {}
    with model.trace(prompt):
        held["h"] = model.layers[1].output
        held["h"][:] = 0
        logits = model.lm_head.output
    return logits, held["h"]


@intervene
def by_a_key_that_is_computed(model, prompt):
    held = {"layer 1": 3}
    with model.trace(prompt):
        for number, layer in enumerate(model.layers[:2]):
            held[f"layer {number}"] = layer.output
        held[f"layer {1}"][:] = 0
        logits = model.lm_head.output
    return logits, held["layer 1"]


@intervene
def after_it_was_put_there(model, prompt):
    held = {}
    with model.trace(prompt):
        hidden = model.layers[1].output
        held[True] = 1
        held[1] = hidden
        hidden[:] = 0
        same = held[1]
        logits = model.lm_head.output
    return logits, same


@intervene
def in_a_list_that_grew(model, prompt):
    held = []
    with model.trace(prompt):
        held += [model.layers[0].output]
        other = held
        other += (model.layers[1].output,)
        held[1][:] = 0
        logits = model.lm_head.output
    return logits, held[-1]


@intervene
def in_a_sum_of_lists(model, prompt):
    with model.trace(prompt):
        held = [model.layers[0].output]
        both = held + [model.layers[1].output]  # noqa: RUF005
        both[1][:] = 0
        logits = model.lm_head.output
    return logits, (*held, both[1])[1]


@intervene
def in_a_tuple_that_grew(model, prompt):
    held = ()
    with model.trace(prompt):
        for layer in model.layers[:2]:
            held += (layer.output,)
        held[1][:] = 0
        logits = model.lm_head.output
    return logits, held[1]


@intervene
def under_a_key_that_stands_twice(model, prompt):
    with model.trace(prompt):
        held = {"h": model.layers[0].output, "h": model.layers[1].output}  # noqa: F601
        held["h"][:] = 0
        logits = model.lm_head.output
    return logits, held["h"]


WRITES = [
    by_key, by_a_key_that_is_computed, after_it_was_put_there, in_a_list_that_grew, in_a_sum_of_lists,
    in_a_tuple_that_grew, under_a_key_that_stands_twice,
]  # fmt: skip


@pytest.mark.parametrize("experiment", WRITES, ids=lambda each: each._function.__name__)
def test_what_is_written_reaches_the_model(experiment: Any, model, plain_gpt2, clean, grab) -> None:
    expected = grab(plain_gpt2, clean, "lm_head", "output", (LAYERS[1], "output", zero))
    for each in (experiment, experiment.with_options(without="all")):
        logits, held = each(model, clean)
        assert_close(logits, expected)
        assert not held.any()


@intervene
def of_a_dict(model, prompt):
    held = {}
    with model.trace(prompt):
        for number, layer in enumerate(model.layers[:2]):
            held[f"resid {number}"] = layer.output
        with model.lm_head.output[0, -1, 3].backward():
            found = {name: value.grad for name, value in held.items()}
    return list(found.values())


@intervene
def of_a_list(model, prompt):
    held = []
    with model.trace(prompt):
        for layer in model.layers[:2]:
            held += [layer.output]
        with model.lm_head.output[0, -1, 3].backward():
            found = [value.grad for value in held]
    return found


def gradients(values):
    return [value.grad for value in values]


@intervene
def in_a_helper(model, prompt):
    with model.trace(prompt):
        held = [layer.output for layer in model.layers[:2]]
        with model.lm_head.output[0, -1, 3].backward():
            found = gradients(held)
    return found


@intervene
def in_a_closure(model, prompt):
    def one(value):
        return value.grad

    with model.trace(prompt):
        held = [layer.output for layer in model.layers[:2]]
        with model.lm_head.output[0, -1, 3].backward():
            found = [one(value) for value in held]
    return found


@pytest.mark.parametrize("experiment", [of_a_dict, of_a_list, in_a_helper, in_a_closure])
def test_gradients_of_what_is_held(experiment: Any, model, plain_gpt2, clean) -> None:
    expected = [value.grad for value in values_of(plain_gpt2, clean)]
    assert_close(experiment(model, clean), expected)
    assert_close(experiment.with_options(without="all")(model, clean), expected)


def doubled(value):
    value.grad = value.grad * 2


@intervene
def written_in_a_helper(model, prompt):
    with model.trace(prompt):
        early, late = model.layers[0].output, model.layers[1].output
        with model.lm_head.output[0, -1, 3].backward():
            doubled(late)
            found = early.grad
    return found


def test_a_gradient_that_a_helper_writes(model, plain_gpt2, clean) -> None:
    early, _ = values_of(plain_gpt2, clean)
    assert_close(written_in_a_helper(model, clean), early.grad * 2)


def lazily(value):
    while True:
        yield value.grad


@intervene
def of_a_generator(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[0].output
        with model.lm_head.output[0, -1, 3].backward():
            other = model.layers[1].output.grad
            found = next(lazily(hidden))
    return found, other


def test_a_function_that_takes_gradients_and_cannot_be_inlined_is_refused(model, clean) -> None:
    with pytest.raises(CompileError):
        of_a_generator(model, clean)


@intervene
def handed_to_map(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[0].output
        with model.lm_head.output[0, -1, 3].backward():
            found = list(map(lambda value: value.grad, [hidden]))
    return found


def test_a_function_that_takes_gradients_is_called_by_name(model, clean) -> None:
    with pytest.raises(CompileError, match="this touches the model and cannot be handed on as a value") as caught:
        handed_to_map(model, clean)
    assert caught.value.diagnostics[0].way_out == "call it by name here"


@intervene
def under_a_key_of_the_caller(model, prompt, name):
    with model.trace(prompt):
        held = {name: model.layers[0].output.sum(), "z": model.layers[1].output.sum()}
        held[name] = held[name] + 1
        found = held["z"]
    return found, len(held)


def test_a_key_of_the_caller_is_not_taken_for_a_constant(model, clean) -> None:
    other, _ = under_a_key_of_the_caller(model, clean, "a")
    found, many = under_a_key_of_the_caller(model, clean, "z")
    assert many == 1
    assert_close(found, other + 1)


@intervene
def on_a_condition(model, prompt):
    held = {"side": None}
    with model.trace(prompt):
        total = model.layers[0].output.sum()
        if total > 0:
            held["side"] = "above"
        else:
            held["side"] = "below"
        held["total"] = total
    return held["side"], held


def test_what_only_the_run_puts_there_is_found_there(model, clean) -> None:
    side, held = on_a_condition(model, clean)
    assert side == held["side"] == ("above" if held["total"] > 0 else "below")


@intervene
def removed(model, prompt):
    held = {}
    with model.trace(prompt):
        held["a"] = model.layers[0].output.sum()
        held["b"] = model.layers[1].output.sum()
        del held["a"]
        there = "a" in held
    return there, len(held), list(held)


def test_what_was_deleted_is_gone(model, clean) -> None:
    assert removed(model, clean) == (False, 1, ["b"])


@intervene
def texts(model, prompt):
    with model.trace(prompt):
        total = model.layers[0].output.sum()
        found = [f"{number}|{number:>3}|{'x'!r}|{number!s:>2}|{True}|{{}}" for number in range(2)]
    return found, total


def test_texts_that_are_computed_while_compiling(model, clean) -> None:
    assert texts(model, clean)[0] == [f"{number}|{number:>3}|'x'|{number!s:>2}|True|{{}}" for number in range(2)]
