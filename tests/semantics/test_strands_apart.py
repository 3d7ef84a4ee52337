"""What rows of one forward have in common with the rest of a program: gradients of tensors that are in several losses,
weights, objects that the model is given, hooks of the user. The oracle is plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nnsight_compiler import LanguageModel, RunError, intervene


def runs(experiment: Any) -> list[int]:
    """How many forwards of the program each run of a model was, in the last call."""
    return [each.forwards for each in experiment.last_run.forwards]


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(32, generator=generator).requires_grad_() for _ in range(2)]


@pytest.fixture
def stream(plain_gpt2, hooked) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What the first layer gives, as a leaf, and the logit that is differentiated."""

    def run(prompt: Tensor) -> tuple[Tensor, Tensor]:
        held: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            held.append(output.detach().requires_grad_())
            return held[0]

        logits = hooked(plain_gpt2, prompt, ("transformer.h.0", "output", keep), grad=True).logits
        return held[0], logits[0, -1, 3]

    return run


# --- gradients ---


@intervene
def in_a_loop(model, prompts, vectors):
    found = []
    for number, prompt in enumerate(prompts):
        with model.trace(prompt):
            hidden = model.transformer.h[0].output
            loss = model.lm_head.output[0, -1, 3] + (number + 1) * (vectors[0] * vectors[1]).sum()
            one, other = torch.autograd.grad(loss, [vectors[number], hidden])
        found.append((one, other))
    return found


@intervene
def one_by_one(model, prompts, vectors):
    with model.trace(prompts[0]):
        hidden = model.transformer.h[0].output
        loss = model.lm_head.output[0, -1, 3] + (vectors[0] * vectors[1]).sum()
        first = torch.autograd.grad(loss, [vectors[0], hidden])
    with model.trace(prompts[1]):
        hidden = model.transformer.h[0].output
        loss = model.lm_head.output[0, -1, 3] + 2 * (vectors[0] * vectors[1]).sum()
        second = torch.autograd.grad(loss, [vectors[1], hidden])
    return [first, second]


@pytest.mark.parametrize("experiment", [in_a_loop, one_by_one], ids=["loop", "straight"])
def test_a_tensor_that_is_in_several_losses_has_the_gradient_of_the_one_that_is_asked(
    model, clean, corrupt, vectors, stream, experiment
):
    found = experiment(model, [clean, corrupt], vectors)
    for number, (prompt, ours) in enumerate(zip((clean, corrupt), found, strict=True)):
        hidden, logit = stream(prompt)
        loss = logit + (number + 1) * (vectors[0] * vectors[1]).sum()
        close(list(ours), list(torch.autograd.grad(loss, [vectors[number], hidden])))


@intervene
def accumulates_in_a_loop(model, prompts, vector):
    for prompt in prompts:
        with model.trace(prompt):
            model.transformer.h[0].output[:, -1] += vector
            loss = model.lm_head.output[0, -1, 3]
            with loss.backward():
                pass


@intervene
def accumulates_one_by_one(model, prompts, vector):
    with model.trace(prompts[0]):
        model.transformer.h[0].output[:, -1] += vector
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            pass
    with model.trace(prompts[1]):
        model.transformer.h[0].output[:, -1] += vector
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            pass


@pytest.mark.parametrize("experiment", [accumulates_in_a_loop, accumulates_one_by_one], ids=["loop", "straight"])
def test_hooks_of_a_tensor_see_what_each_pass_gives_it(model, clean, corrupt, vectors, experiment):
    def given(experiment: Any) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
        vector, seen, after = vectors[0].detach().clone().requires_grad_(), [], []

        def capped(gradient: Tensor) -> Tensor:
            seen.append(gradient)
            return gradient.clamp(-1e-3, 1e-3)

        vector.register_hook(capped)
        vector.register_post_accumulate_grad_hook(
            lambda tensor: after.append(None if tensor.grad is None else tensor.grad.clone())
        )
        experiment(model, [clean, corrupt], vector)
        return seen, after, vector.grad

    found, wanted = given(experiment), given(experiment.with_options(without="all"))
    assert len(wanted[0]) == len(wanted[1]) == 2
    close(found, wanted)


@intervene
def crossed(model, clean, corrupt):
    losses = []
    with model.trace(clean):
        one = model.transformer.h[0].output
        first = model.lm_head.output[0, -1, 3]
    losses.append(first)
    with model.trace(corrupt):
        other = model.transformer.h[0].output
        second = model.lm_head.output[0, -1, 3]
    losses.append(second)
    (of_both,) = torch.autograd.grad(sum(losses), [other])
    (of_first,) = torch.autograd.grad(first, [one])
    return of_both, of_first


def test_forwards_stay_apart_where_a_loss_reaches_one_through_a_list(model, clean, corrupt, stream):
    of_both, of_first = crossed(model, clean, corrupt)
    assert runs(crossed) == [1, 1]
    for ours, prompt in ((of_both, corrupt), (of_first, clean)):
        hidden, logit = stream(prompt)
        close(ours, torch.autograd.grad(logit, hidden)[0])


@intervene
def weights_in_a_loop(model, prompts):
    found = []
    for prompt in prompts:
        with model.trace(prompt):
            loss = model.lm_head.output[0, -1, 3]
            with loss.backward():
                found.append(model.transformer.h[1].mlp.c_fc.weight.grad.clone())
    return found


@intervene
def weights_one_by_one(model, prompts):
    with model.trace(prompts[0]):
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            first = model.transformer.h[1].mlp.c_fc.weight.grad.save()
    with model.trace(prompts[1]):
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            second = model.transformer.h[1].mlp.c_fc.weight.grad.save()
    return [first, second]


@pytest.mark.parametrize("experiment", [weights_in_a_loop, weights_one_by_one], ids=["loop", "straight"])
def test_gradients_of_weights_keep_forwards_apart(model, plain_gpt2, clean, corrupt, experiment):
    prompts = [clean, corrupt]
    found = experiment(model, prompts)
    assert runs(experiment) == [1, 1]
    weight = plain_gpt2.transformer.h[1].mlp.c_fc.weight
    for prompt, ours in zip(prompts, found, strict=True):
        close(ours, torch.autograd.grad(plain_gpt2(prompt).logits[0, -1, 3], weight)[0])
    assert any(
        "the gradient of a weight is asked for, which all rows share" in each.what
        for each in experiment.compile(model, prompts).remarks
    )


# --- what sees a forward ---


@intervene
def told(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[1].output.save()
    print("between")
    with model.trace(corrupt):
        other = model.transformer.h[1].output.save()
    print("after")
    return one, other


@intervene
def told_in_rounds(model, clean, corrupt):
    found = []
    for prompt in (clean, corrupt):
        with model.trace(prompt):
            found.append(model.transformer.h[1].output)
        print("after")
    return found


@pytest.mark.parametrize(
    ("experiment", "wanted"),
    [(told, ["hook", "between", "hook", "after"]), (told_in_rounds, ["hook", "after", "hook", "after"])],
    ids=["straight", "loop"],
)
def test_hooks_of_the_user_run_between_what_stands_before_and_after_their_forward(
    model, plain_gpt2, clean, corrupt, capsys, experiment, wanted
):
    def show(_module: nn.Module, _args: Any, _output: Any) -> None:
        print("hook")

    experiment(model, clean, corrupt)  # which looks at the model, and at copies of it
    capsys.readouterr()
    handle = plain_gpt2.transformer.h[0].register_forward_hook(show)
    try:
        experiment(model, clean, corrupt)
    finally:
        handle.remove()
    assert capsys.readouterr().out.split() == wanted


@intervene
def cached(model, clean, corrupt, cache):
    with model.trace(clean, past_key_values=cache, use_cache=True):
        one = model.lm_head.output[0, -1].save()
    between = cache.layers[0].keys.shape[-2]
    with model.trace(corrupt, past_key_values=cache, use_cache=True):
        other = model.lm_head.output[0, -1].save()
    return one, between, other


def test_a_cache_that_forwards_are_given_is_filled_by_them_alone(plain_gpt2, clean, corrupt):
    model, cache, ours = LanguageModel(plain_gpt2), DynamicCache(), DynamicCache()
    outputs = [plain_gpt2(each, past_key_values=cache, use_cache=True) for each in (clean, corrupt)]
    one, between, other = cached(model, clean, corrupt, ours)
    close([one, other], [each.logits[0, -1].detach() for each in outputs])
    assert (between, ours.get_seq_length()) == (clean.shape[1], clean.shape[1] + corrupt.shape[1])


@intervene
def collected(model, clean, corrupt):
    with model.trace(clean, output_hidden_states=True):
        one = model.output.hidden_states[1].save()
    with model.trace(corrupt, output_hidden_states=True):
        other = model.output.hidden_states[2].save()
    return one, other


@intervene
def pair(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[0].output.save()
    with model.trace(corrupt):
        other = model.transformer.h[1].output.save()
    return one, other


def test_a_model_that_was_asked_for_hidden_states_runs_rows_together_after_that(
    model, plain_gpt2, clean, corrupt, grab
):
    wanted = grab(plain_gpt2, clean, "transformer.h.0"), grab(plain_gpt2, corrupt, "transformer.h.1")
    close(collected(model, clean, corrupt), wanted)  # it leaves hooks of its own on the model
    close(pair(model, clean, corrupt), wanted)
    assert runs(pair) == [2]
    close(collected(model, clean, corrupt), wanted)


@intervene
def shown_inside(model, clean, corrupt, indices):
    with model.trace(clean):
        print("one", tuple(model.transformer.h[0].output.shape))
        one = model.transformer.h[1].output[0, indices[0]].save()
    with model.trace(corrupt):
        print("two", tuple(model.transformer.h[0].output.shape))
        other = model.transformer.h[1].output[0, indices[1]].save()
    return one, other


@pytest.mark.parametrize("indices", [(1, 2), (77, 2), (1, 78), (77, 78)])
def test_what_a_trace_shows_before_a_line_of_it_fails_is_shown(model, clean, corrupt, capsys, indices):
    given = model, clean, corrupt, torch.tensor(indices)
    shown = ["one (1, 6, 32)\n", "two (1, 6, 32)\n"]
    if max(indices) < 6:
        shown_inside(*given)
    else:
        with pytest.raises(IndexError, match=str(next(each for each in indices if each > 5))):
            shown_inside(*given)
    assert capsys.readouterr().out == "".join(shown if indices[0] < 6 else shown[:1])


# --- passes that fail ---


@intervene
def passes(model, clean, corrupt, vector, detached):
    with model.trace(clean):
        one = model.transformer.h[0].output
        loss = model.lm_head.output[0, -1, 3] + (vector * vector).sum()
        with loss.backward():
            first = one.grad.save()
    print("first")
    with model.trace(corrupt):
        other = model.transformer.h[0].output
        loss = model.lm_head.output[0, -1, 3]
        loss = loss.detach() if detached else loss
        with loss.backward():
            second = other.grad.save()
    return first, second


@pytest.mark.parametrize("detached", [False, True])
def test_what_stands_before_a_backward_pass_that_fails_is_done(
    model, clean, corrupt, vectors, stream, capsys, detached
):
    given = model, clean, corrupt, vectors[0], detached
    if detached:
        with pytest.raises(RunError, match="does not depend on this value, so it has no gradient"):
            passes(*given)
    else:
        for ours, prompt in zip(passes(*given), (clean, corrupt), strict=True):
            hidden, logit = stream(prompt)
            close(ours, torch.autograd.grad(logit, hidden)[0])
        assert runs(passes) == [2]
    assert capsys.readouterr().out == "first\n"
    close(vectors[0].grad, 2 * vectors[0].detach())


@intervene
def of_later(model, clean, corrupt):
    with model.trace(clean):
        early, late = model.transformer.h[0].output, model.transformer.h[2].output
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            one, two = late.grad.save(), early.grad.save()
    print("first")
    with model.trace(corrupt):
        early, late = model.transformer.h[0].output, model.transformer.h[2].output
        loss = model.transformer.h[1].output[0, -1, 3]
        with loss.backward():
            three, four = late.grad.save(), early.grad.save()
    return one, two, three, four


@intervene
def of_later_by_function(model, clean, corrupt):
    with model.trace(clean):
        early, late = model.transformer.h[0].output, model.transformer.h[2].output
        first = torch.autograd.grad(model.lm_head.output[0, -1, 3], [early, late])
    print("first")
    with model.trace(corrupt):
        early, late = model.transformer.h[0].output, model.transformer.h[2].output
        second = torch.autograd.grad(model.transformer.h[1].output[0, -1, 3], [early, late])
    return first, second


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [(of_later, "does not depend on this value"), (of_later_by_function, "not have been used")],
)
def test_a_loss_that_does_not_reach_a_value_is_told_though_that_of_another_row_does(
    model, clean, corrupt, capsys, experiment, reason
):
    with pytest.raises(RunError, match=reason):
        experiment(model, clean, corrupt)
    assert capsys.readouterr().out == "first\n"
