"""Forwards that stand one after the other, as rows of one: what hooks give for each by itself, in fewer runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnsight_compiler import LanguageModel, NNsight, intervene


def runs(experiment: Any) -> list[int]:
    """How many forwards of the program each run of a model was, in the last call."""
    return [each.forwards for each in experiment.last_run.forwards]


def why(experiment: Any, *given: Any) -> list[str]:
    """Why forwards were not merged."""
    made = experiment.compile(*given).remarks
    return [each.what for each in made if each.optimisation == "merge_forwards" and not each.fired]


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- what is merged ---


@intervene
def compare(model, clean, corrupt):
    with model.trace(clean):
        low = model.transformer.h[0].output[0, -1].save()
        one = model.lm_head.output[0, -1].save()
    with model.trace(corrupt):
        high = model.transformer.h[3].output[0, -1].save()
        other = model.lm_head.output[0, -1].save()
    return low, high, one - other


def test_two_prompts_share_a_forward(model, plain_gpt2, clean, corrupt, grab):
    low, high, difference = compare(model, clean, corrupt)
    assert runs(compare) == [2]
    close(low, grab(plain_gpt2, clean, "transformer.h.0")[0, -1])
    close(high, grab(plain_gpt2, corrupt, "transformer.h.3")[0, -1])
    close(difference, (plain_gpt2(clean).logits - plain_gpt2(corrupt).logits)[0, -1].detach())


@intervene
def early(model, clean, corrupt):
    with model.trace(clean):
        low = model.transformer.h[0].output.save()
    with model.trace(corrupt):
        high = model.transformer.h[2].output.save()
    return low, high


def test_the_shared_forward_ends_where_the_last_of_them_would(model, plain_gpt2, clean, corrupt, grab):
    early(model, clean, corrupt)  # the first run on new shapes goes to its end
    low, high = early(model, clean, corrupt)
    assert [(each.forwards, each.ended) for each in early.last_run.forwards] == [(2, ("transformer.h.2", "output", 0))]
    close(low, grab(plain_gpt2, clean, "transformer.h.0"))
    close(high, grab(plain_gpt2, corrupt, "transformer.h.2"))


@intervene
def changed(model, clean, corrupt, vector):
    with model.trace(clean):
        model.transformer.h[1].output[:, -1] += vector
        one = model.lm_head.output.save()
    with model.trace(corrupt):
        model.transformer.h[2].output = model.transformer.h[2].output * 0.5
        before = model.transformer.h[3].input.save()
        other = model.lm_head.output.save()
    return one, before, other


def test_each_changes_its_own_rows(model, plain_gpt2, clean, corrupt, hooked, grab):
    vector = torch.randn(32)

    def add(output: Any) -> Tensor:
        output = (output if isinstance(output, Tensor) else output[0]).clone()
        output[:, -1] += vector
        return output

    halve = ("transformer.h.2", "output", lambda output: output * 0.5)
    one, before, other = changed(model, clean, corrupt, vector)
    assert runs(changed) == [2]
    close(one, hooked(plain_gpt2, clean, ("transformer.h.1", "output", add)).logits)
    close(before, grab(plain_gpt2, corrupt, "transformer.h.3", "input", halve))
    close(other, hooked(plain_gpt2, corrupt, halve).logits)


@intervene
def two_patches(model, sources, targets):
    with model.trace(sources[0]):
        first = model.transformer.h[1].output[:, 2].save()
    with model.trace(targets[0]):
        model.transformer.h[1].output[:, 2] = first
        one = model.lm_head.output[0, -1].save()
    with model.trace(sources[1]):
        second = model.transformer.h[1].output[:, 2].save()
    with model.trace(targets[1]):
        model.transformer.h[1].output[:, 2] = second
        other = model.lm_head.output[0, -1].save()
    return one, other


def test_a_forward_that_needs_another_runs_with_those_that_come_as_late(
    model, plain_gpt2, clean, corrupt, hooked, grab
):
    sources, targets = (clean, corrupt), (clean.flip(1), corrupt.flip(1))
    found = two_patches(model, sources, targets)
    assert runs(two_patches) == [2, 2]
    for source, target, ours in zip(sources, targets, found, strict=True):
        held = grab(plain_gpt2, source, "transformer.h.1")[:, 2]

        def patch(output: Tensor, held: Tensor = held) -> Tensor:
            output = output.clone()
            output[:, 2] = held
            return output

        close(ours, hooked(plain_gpt2, target, ("transformer.h.1", "output", patch)).logits[0, -1])


@intervene
def attribute(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[1].output
        score = model.lm_head.output[0, -1, 3]
        with score.backward():
            first = one.grad.save()
    with model.trace(corrupt):
        other = model.transformer.h[1].output
        score = model.lm_head.output[0, -1, 7] * 2
        with score.backward():
            second = other.grad.save()
    return first, second


def gradient(plain: nn.Module, prompt: Tensor, hooked: Callable[..., Any], token: int) -> Tensor:
    held: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[0]

    logits = hooked(plain, prompt, ("transformer.h.1", "output", keep), grad=True).logits
    (found,) = torch.autograd.grad(logits[0, -1, token], held)
    return found


def test_backward_passes_of_two_forwards_are_one(model, plain_gpt2, clean, corrupt, hooked):
    first, second = attribute(model, clean, corrupt)
    assert runs(attribute) == [2]
    close(first, gradient(plain_gpt2, clean, hooked, 3))
    close(second, 2 * gradient(plain_gpt2, corrupt, hooked, 7))


@intervene
def attribute_by_function(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[1].output
        (first,) = torch.autograd.grad(model.lm_head.output[0, -1, 3], [one])
        first = first.save()
    with model.trace(corrupt):
        other = model.transformer.h[1].output
        (second,) = torch.autograd.grad(model.lm_head.output[0, -1, 7], [other])
        second = second.save()
    return first, second


def test_gradients_of_two_lines_are_taken_at_once(model, plain_gpt2, clean, corrupt, hooked):
    first, second = attribute_by_function(model, clean, corrupt)
    assert runs(attribute_by_function) == [2]
    close(first, gradient(plain_gpt2, clean, hooked, 3))
    close(second, gradient(plain_gpt2, corrupt, hooked, 7))


@intervene
def of_two_kinds(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[1].output
        score = model.lm_head.output[0, -1, 3]
        with score.backward():
            first = one.grad.save()
    with model.trace(corrupt):
        other = model.transformer.h[1].output
        (second,) = torch.autograd.grad(model.lm_head.output[0, -1, 7], [other])
        second = second.save()
    return first, second


def test_what_one_backward_pass_frees_another_does_not_need(model, plain_gpt2, clean, corrupt, hooked):
    first, second = of_two_kinds(model, clean, corrupt)
    assert runs(of_two_kinds) == [1, 1]
    close(first, gradient(plain_gpt2, clean, hooked, 3))
    close(second, gradient(plain_gpt2, corrupt, hooked, 7))


@intervene
def shared_leaf(model, prompt, vector, strengths):
    found = []
    for strength in strengths:
        with model.trace(prompt):
            model.transformer.h[1].output[:, -1] += strength * vector
            score = model.lm_head.output[0, -1, 3]
        (each,) = torch.autograd.grad(score, [vector])
        found.append(each)
    return found


def test_rounds_that_take_the_gradient_of_one_tensor_each_have_their_own(model, plain_gpt2, clean, hooked):
    vector = torch.randn(32, requires_grad=True)
    strengths = (1.0, 3.0, -2.0)
    for strength, ours in zip(strengths, shared_leaf(model, clean, vector, strengths), strict=True):

        def add(output: Tensor, strength: float = strength) -> Tensor:
            output = output.clone()
            output[:, -1] += strength * vector
            return output

        logits = hooked(plain_gpt2, clean, ("transformer.h.1", "output", add), grad=True).logits
        (wanted,) = torch.autograd.grad(logits[0, -1, 3], [vector])
        close(ours, wanted)


@intervene
def uneven(model, clean, corrupt):
    with model.trace(clean):
        one = model.transformer.h[1].output
        (first,) = torch.autograd.grad(model.lm_head.output[0, -1, 3], [one])
        first = first.save()
    with model.trace(corrupt):
        second = model.transformer.h[1].output.save()
    return first, second


def test_a_forward_that_records_nothing_does_not_share_one_that_does(model, plain_gpt2, clean, corrupt, hooked, grab):
    first, second = uneven(model, clean, corrupt)
    assert runs(uneven) == [1, 1]
    assert not second.requires_grad
    close(first, gradient(plain_gpt2, clean, hooked, 3))
    close(second, grab(plain_gpt2, corrupt, "transformer.h.1"))


@intervene
def continued(model, clean, corrupt, vector):
    with model.generate(clean, max_new_tokens=5, do_sample=False) as tracer:
        model.transformer.h[1].output[:, -1] += vector
        steered = tracer.result.save()
    with model.generate(corrupt, max_new_tokens=5, do_sample=False) as tracer:
        plain = tracer.result.save()
    return steered, plain


def test_two_generations_share_their_steps(clean, corrupt):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=41, n_positions=32, bos_token_id=0, eos_token_id=40)
    network = GPT2LMHeadModel(config).eval()
    network.generation_config.pad_token_id = 0
    given = (clean % 40, corrupt % 40, torch.randn(16) * 5)
    experiment = continued
    model = LanguageModel(network)
    steered, plain = experiment(model, *given)
    assert [(each.forwards, each.steps) for each in experiment.last_run.forwards] == [(2, 5)]
    assert torch.equal(plain, network.generate(given[1], max_new_tokens=5, do_sample=False))

    def steer(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] += given[2]
        return output

    handle = network.transformer.h[1].register_forward_hook(steer)
    wanted = network.generate(given[0], max_new_tokens=5, do_sample=False)
    handle.remove()
    assert torch.equal(steered, wanted)


def test_lengths_decide_at_the_run_and_padding_is_asked_for(model, plain_gpt2, clean):
    short = clean[:, :5]
    found = compare(model, clean, short)
    assert runs(compare) == [1, 1]
    padded = compare.with_options(padding=True)
    close(padded(model, clean, short), found)
    assert runs(padded) == [2]
    close(found[2], (plain_gpt2(clean).logits[0, -1] - plain_gpt2(short).logits[0, -1]).detach())


def test_inputs_that_keep_the_device_busy_run_one_by_one(monkeypatch, model, clean, corrupt):
    from nnsight_compiler.runtime import batching

    @intervene
    def pair(model, clean, corrupt):
        with model.trace(clean):
            one = model.lm_head.output[0, -1].save()
        with model.trace(corrupt):
            other = model.lm_head.output[0, -1].save()
        return one, other

    wanted = pair(model, clean, corrupt)
    assert runs(pair) == [2]
    monkeypatch.setitem(batching.ENOUGH, "cpu", 11)  # the two have twelve tokens
    close(pair(model, clean, corrupt), wanted)
    assert runs(pair) == [1, 1]


def test_a_budget_for_one_keeps_them_apart_and_says_so(model, clean, corrupt):
    small = compare.with_options(memory_budget=1000)
    close(small(model, clean, corrupt), compare(model, clean, corrupt))
    assert runs(small) == [1, 1]
    assert any("more than memory_budget=1,000" in each.what for each in small.last_run.remarks)


def test_the_switch_of_loops_is_theirs(model, clean, corrupt):
    apart = compare.with_options(without="merge_forwards")
    close(apart(model, clean, corrupt), compare(model, clean, corrupt))
    assert runs(apart) == [1, 1]


def test_a_session_is_straight_code(model, plain_gpt2, clean, corrupt, grab):
    with model.session():
        with model.trace(clean):
            one = model.transformer.h[1].output.save()
        with model.trace(corrupt):
            other = model.transformer.h[1].output.save()
    close(one, grab(plain_gpt2, clean, "transformer.h.1"))
    close(other, grab(plain_gpt2, corrupt, "transformer.h.1"))


def test_straight_code_in_a_loop_and_under_a_condition(model, plain_gpt2, clean, corrupt, grab):
    seen: list[int] = []

    @intervene
    def rounds(model, clean, corrupt, often, note):
        found = []
        for number in range(often):
            note(number)  # which keeps rounds apart
            with model.trace(clean):
                one = model.transformer.h[1].output[:, number].save()
            with model.trace(corrupt):
                other = model.transformer.h[2].output[:, number].save()
            found.append((one, other))
        if len(found) > 1:
            with model.trace(clean):
                last = model.transformer.h[0].output.save()
            with model.trace(corrupt):
                model.transformer.h[0].output[:, 1] = 0
                changed = model.transformer.h[0].output.save()
            found.append((last, changed))
        return found

    found = rounds(model, clean, corrupt, 2, seen.append)
    assert runs(rounds) == [2, 2, 2]
    assert seen == [0, 1]
    for number, (one, other) in enumerate(found[:2]):
        close(one, grab(plain_gpt2, clean, "transformer.h.1")[:, number])
        close(other, grab(plain_gpt2, corrupt, "transformer.h.2")[:, number])
    wanted = grab(plain_gpt2, corrupt, "transformer.h.0")
    wanted[:, 1] = 0
    close(found[2], (grab(plain_gpt2, clean, "transformer.h.0"), wanted))


def test_forwards_on_one_input_share_what_they_compute_alike(model, plain_gpt2, clean, hooked):
    @intervene
    def heads(model, clean):
        with model.trace(clean):
            model.transformer.h[2].output[:, 1] = 0
            one = model.lm_head.output[0, -1].save()
        with model.trace(clean):
            model.transformer.h[2].output[:, 2] = 0
            other = model.lm_head.output[0, -1].save()
        return one, other

    for position, ours in enumerate(heads(model, clean), 1):

        def patch(output: Tensor, position: int = position) -> Tensor:
            output = output.clone()
            output[:, position] = 0
            return output

        close(ours, hooked(plain_gpt2, clean, ("transformer.h.2", "output", patch)).logits[0, -1])
    assert [(each.forwards, bool(each.shared)) for each in heads.last_run.forwards] == [(2, True)]


# --- order and failures ---


@intervene
def told(model, clean, corrupt, log, index):
    with model.trace(clean):
        one = model.transformer.h[1].output[0, -1].save()
    log.append(1)
    print("first", log)
    with model.trace(corrupt):
        other = model.transformer.h[1].output[0, index].save()
    log.append(2)
    print("second", log)
    return one, other


def test_what_is_shown_and_collected_keeps_its_order(model, clean, corrupt, capsys, plain_gpt2, grab):
    log: list[int] = []
    one, other = told(model, clean, corrupt, log, 2)
    assert capsys.readouterr().out == "first [1]\nsecond [1, 2]\n"
    assert log == [1, 2]
    close(one, grab(plain_gpt2, clean, "transformer.h.1")[0, -1])
    close(other, grab(plain_gpt2, corrupt, "transformer.h.1")[0, 2])


@intervene
def failing(model, clean, corrupt, log, numbers):
    with model.trace(clean):
        one = model.transformer.h[1].output[0, -1].save()
    log.append(numbers[0])
    print("first", log)
    with model.trace(corrupt):
        other = model.transformer.h[1].output[0, -1].save()
    log.append(1 / numbers[1])
    print("second", log)
    with model.trace(clean):
        model.transformer.h[0].output[:, 0] = 0
        third = model.transformer.h[1].output[0, -1].save()
    log.append(1 / numbers[2])
    return one, other, third


@pytest.mark.parametrize(
    ("numbers", "error", "shown"),
    [
        ([], IndexError, ""),
        ([7], IndexError, "first [7]\n"),
        ([7, 0, 0], ZeroDivisionError, "first [7]\n"),
        ([7, 1, 0], ZeroDivisionError, "first [7]\nsecond [7, 1.0]\n"),
    ],
)
def test_the_first_failure_is_raised_and_what_came_before_it_was_shown(
    model, clean, corrupt, capsys, numbers, error, shown
):
    log: list[float] = []
    with pytest.raises(error):
        failing(model, clean, corrupt, log, numbers)
    assert capsys.readouterr().out == shown
    assert log == [7, 1.0][: shown.count("\n")]


@intervene
def announced(model, clean, corrupt, numbers):
    with model.trace(clean):
        one = model.transformer.h[1].output[0, -1].save()
    part = float(one.sum()) / numbers[0]
    ids = corrupt + numbers[1]
    print("between")
    with model.trace(ids):
        other = model.transformer.h[1].output[0, -1].save()
    return part, other


@pytest.mark.parametrize("numbers", [[0, 1], [0], [1, 1], [1]])
def test_what_stands_before_the_second_is_shown_where_the_first_was_well(
    model, clean, corrupt, capsys, numbers, plain_gpt2, grab
):
    if numbers == [1, 1]:
        part, other = announced(model, clean, corrupt, numbers)
        assert runs(announced) == [2]
        close(part, float(grab(plain_gpt2, clean, "transformer.h.1")[0, -1].sum()))
        close(other, grab(plain_gpt2, corrupt + 1, "transformer.h.1")[0, -1])
    else:
        with pytest.raises(IndexError if numbers[0] else ZeroDivisionError):
            announced(model, clean, corrupt, numbers)
    assert capsys.readouterr().out == ("between\n" if numbers == [1, 1] else "")


# --- what stays apart ---


def apart(source: str, name: str = "program", **scope: Any) -> Any:
    return intervene.from_source(source, {"torch": torch, **scope})


HEAD = (
    "def program(model, clean, corrupt):\n"
    "    with model.trace(clean):\n        a = model.transformer.h[1].output.save()\n"
)
READ = "    with model.trace(corrupt):\n        b = model.transformer.h[1].output.save()\n    return a, b\n"


@pytest.mark.parametrize(
    ("between", "after", "reason"),
    [
        ("    torch.manual_seed(0)\n", READ, "a call sets how torch computes|a call draws random numbers|not known"),
        ("    noise = torch.randn(3)\n", READ + "", "a call draws random numbers"),
        ("    unknown(a)\n", READ, "a call is not known, and may change or see anything"),
        ("    corrupt[0, 0] = 3\n", READ, "what stands between them must come after the first"),
        (
            "",
            "    try:\n        with model.trace(corrupt):\n            b = model.transformer.h[1].output.save()\n"
            "    except ValueError:\n        b = 0\n    return a, b\n",
            None,
        ),
        (
            "",
            "    with model.trace(corrupt) as tracer:\n        b = model.transformer.h[1].output.save()\n"
            "        tracer.stop()\n    return a, b\n",
            "a module is skipped, or the forward stopped",
        ),
        (
            "",
            "    with model.trace(corrupt):\n        model.transformer.h[0].mlp.skip(torch.zeros(1, 6, 32))\n"
            "        b = model.transformer.h[1].output.save()\n    return a, b\n",
            "a module is skipped, or the forward stopped",
        ),
        (
            "",
            "    with model.trace(corrupt) as tracer:\n        b = tracer.cache(modules=[model.transformer.h[1]])\n"
            "    return a, b\n",
            "a cache of activations has the values of all rows",
        ),
        (
            "",
            "    with model.trace() as tracer:\n        with tracer.invoke(corrupt):\n"
            "            b = model.transformer.h[1].output.save()\n    return a, b\n",
            "the forward has invokes of its own",
        ),
        (
            "",
            "    with model.trace(corrupt):\n        model.transformer.h[0].output[:] = a\n"
            "        b = model.transformer.h[1].output.save()\n    return a, b\n",
            None,
        ),
    ],
)
def test_forwards_that_run_one_by_one(model, clean, corrupt, between, after, reason):
    seen: list[Tensor] = []
    experiment = apart(HEAD + between + after, unknown=seen.append)
    given = (model, clean.clone(), corrupt.clone())
    experiment(*given)
    assert runs(experiment) == [1, 1]
    reasons = why(experiment, *given)
    if reason is None:
        assert not any("runs apart" in each for each in reasons)
    else:
        assert any(re.search(reason, each) for each in reasons), reasons


def test_two_models_do_not_share_a_forward(model, plain_gpt2, clean, corrupt):
    @intervene
    def both(one, other, clean, corrupt):
        with one.trace(clean):
            a = one.transformer.h[1].output.save()
        with other.trace(corrupt):
            b = other.transformer.h[1].output.save()
        return a, b

    other = LanguageModel(plain_gpt2)
    both(model, other, clean, corrupt)
    assert runs(both) == [1, 1]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) + torch.rand(4)


class Mixed(nn.Module):
    """Takes the mean of its rows off, as batch norm in training does."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.last(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("kind", [Noisy, Mixed])
def test_models_that_draw_or_mix_rows_run_one_by_one(kind, grab):
    torch.manual_seed(1)
    network = kind().eval()
    model = NNsight(network)

    @intervene
    def pair(model, x, y):
        with model.trace(x):
            a = model.last.output.save()
        with model.trace(y):
            b = model.last.output.save()
        return a, b

    x, y = torch.randn(2, 4), torch.randn(2, 4)
    found = pair(model, x, y)
    assert runs(pair) == [1, 1]
    close(found, (grab(network, x, "last"), grab(network, y, "last")))


def test_a_model_that_others_watch_sees_each_forward_whole(model, plain_gpt2, clean, corrupt):
    seen: list[int] = []
    handle = plain_gpt2.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape[0]), with_kwargs=True
    )
    try:
        compare(model, clean, corrupt)
    finally:
        handle.remove()
    assert seen == [1, 1]
