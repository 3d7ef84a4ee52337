"""D1: across sites the forward's order rules, whatever the order in which an experiment is written."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing import assert_close

from nnsight_compiler import CompileError, intervene


def test_reads_written_out_of_order(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            last = model.layers[3].output
            middle = model.layers[1].output
            logits = model.lm_head.output
            first = model.layers[0].input
        return first, middle, last, logits

    first, middle, last, logits = experiment(model, clean)
    assert_close(first, grab(plain_gpt2, clean, "transformer.h.0", "input"))
    assert_close(middle, grab(plain_gpt2, clean, "transformer.h.1"))
    assert_close(last, grab(plain_gpt2, clean, "transformer.h.3"))
    assert_close(logits, grab(plain_gpt2, clean, "lm_head"))


def test_a_write_after_a_later_site_was_read_still_changes_it(either, clean, grab) -> None:
    model, plain, path = either

    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            logits = model.lm_head.output
            model.layers[1].output[:, -1] = 0
            early = model.layers[0].output
        return early, logits

    def zero(out):
        (out if isinstance(out, torch.Tensor) else out[0])[:, -1] = 0

    early, logits = experiment(model, clean)
    assert_close(early, grab(plain, clean, f"{path}.0"))
    assert_close(logits, grab(plain, clean, "lm_head", "output", (f"{path}.1", "output", zero)))
    assert not torch.allclose(logits, grab(plain, clean, "lm_head"))


def test_a_later_layer_s_value_used_in_code_written_first(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            late = model.layers[3].output
            early = model.layers[0].output
            difference = late - early
            squared = early * early
        return difference.norm(), squared

    late, early = (grab(plain_gpt2, clean, f"transformer.h.{index}") for index in (3, 0))
    norm, squared = experiment(model, clean)
    assert_close(norm, (late - early).norm())
    assert_close(squared, early * early)


def test_an_early_value_is_written_to_a_later_layer(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            logits = model.lm_head.output
            model.layers[2].output[:] = model.layers[0].output * 2
        return logits

    early = grab(plain_gpt2, clean, "transformer.h.0")
    expected = grab(plain_gpt2, clean, "lm_head", "output", ("transformer.h.2", "output", lambda out: early * 2))
    assert_close(experiment(model, clean), expected)


def test_causality_error_names_both_lines_and_the_cycle(model, clean) -> None:
    def experiment(model, prompt):
        with model.trace(prompt):
            late = model.layers[3].output
            scaled = late * 2
            model.layers[1].output[:] = scaled
            return model.lm_head.output

    first = inspect.getsourcelines(experiment)[1]
    with pytest.raises(CompileError) as caught:
        intervene(experiment)(model, clean)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.file == __file__
    assert diagnostic.span.line == first + 4
    assert [span.line for span, _ in diagnostic.related] == [first + 2]
    text = str(caught.value)
    assert "transformer.h.1" in text
    assert "transformer.h.3" in text
    assert f"line {first + 4} needs line {first + 3} needs line {first + 2}" in text
    assert f"the model needs line {first + 4} before that" in text
    assert "model.layers[1].output[:] = scaled" in text
    assert "late = model.layers[3].output" in text
    assert "way out" in text


def test_causality_error_for_a_replacement_and_a_condition(model, clean) -> None:
    def replacement(model, prompt):
        with model.trace(prompt):
            model.layers[0].output = model.layers[2].output
            return model.lm_head.output

    def condition(model, prompt):
        with model.trace(prompt):
            if model.layers[2].output.norm() > 0:
                model.layers[0].output[:] = 0
            return model.lm_head.output

    def within_a_module(model, prompt):
        with model.trace(prompt):
            model.layers[1].mlp.input[:] = model.layers[1].output
            return model.lm_head.output

    for function in (replacement, condition, within_a_module):
        with pytest.raises(CompileError, match=r"which the same forward computes only later"):
            intervene(function)(model, clean)


def test_input_of_a_layer_written_then_output_of_the_layer_before_read(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            model.layers[3].input[:] = 0
            before = model.layers[2].output
            after = model.layers[3].output
        return before, after

    def zero(x):
        x[:] = 0

    before, after = experiment(model, clean)
    assert_close(before, grab(plain_gpt2, clean, "transformer.h.2"))
    assert_close(after, grab(plain_gpt2, clean, "transformer.h.3", "output", ("transformer.h.3", "input", zero)))


def test_two_forwards_in_one_function(model, plain_gpt2, clean, corrupt, grab) -> None:
    @intervene
    def patch(model, clean, corrupt, layer, position):
        with model.trace(clean):
            source = model.layers[layer].output[:, position]
        with model.trace(corrupt):
            model.layers[layer].output[:, position] = source
            logits = model.lm_head.output[:, -1]
        return logits.softmax(-1)

    for layer in range(4):
        for position in (-1, 1):
            source = grab(plain_gpt2, clean, f"transformer.h.{layer}")[:, position]

            def write(out, source=source, position=position):
                out[:, position] = source

            expected = grab(plain_gpt2, corrupt, "lm_head", "output", (f"transformer.h.{layer}", "output", write))
            assert_close(patch(model, clean, corrupt, layer, position), expected[:, -1].softmax(-1))


def test_three_forwards_each_needing_the_one_before(model, plain_gpt2, clean, corrupt, grab) -> None:
    @intervene
    def experiment(model, clean, corrupt):
        with model.trace(clean):
            a = model.layers[0].output
            scale = model.layers[3].output.norm()
        b = a / scale
        with model.trace(corrupt):
            model.layers[1].output += b
            c = model.layers[2].output
            model.layers[3].output = c - b
            middle = model.lm_head.output
        with model.trace(clean):
            model.layers[2].output[:] = c
            end = model.lm_head.output
        return middle, end, b

    a, norm = grab(plain_gpt2, clean, "transformer.h.0"), grab(plain_gpt2, clean, "transformer.h.3").norm()
    b = a / norm
    add = ("transformer.h.1", "output", lambda out: out + b)
    c = grab(plain_gpt2, corrupt, "transformer.h.2", "output", add)
    middle = grab(plain_gpt2, corrupt, "lm_head", "output", add, ("transformer.h.3", "output", lambda out: c - b))
    end = grab(plain_gpt2, clean, "lm_head", "output", ("transformer.h.2", "output", lambda out: c))
    found = experiment(model, clean, corrupt)
    for value, expected in zip(found, (middle, end, b), strict=True):
        assert_close(value, expected)


def test_a_value_of_one_forward_decides_in_the_next(model, plain_gpt2, clean, corrupt, grab) -> None:
    @intervene
    def experiment(model, clean, corrupt, bound):
        with model.trace(clean):
            norm = model.layers[1].output.norm()
        with model.trace(corrupt):
            if norm > bound:
                model.layers[1].output[:] = 0
                model.layers[2].mlp.output = 1.0
            else:
                model.layers[3].output *= 2
            logits = model.lm_head.output
        return logits

    norm = grab(plain_gpt2, clean, "transformer.h.1").norm().item()
    ones = ("transformer.h.2.mlp", "output", torch.ones_like)
    zeros = ("transformer.h.1", "output", torch.zeros_like)
    twice = ("transformer.h.3", "output", lambda out: out * 2)
    high = grab(plain_gpt2, corrupt, "lm_head", "output", zeros, ones)
    low = grab(plain_gpt2, corrupt, "lm_head", "output", twice)
    assert_close(experiment(model, clean, corrupt, norm - 1), high)
    assert_close(experiment(model, clean, corrupt, norm + 1), low)


@pytest.mark.parametrize("above", [True, False])
def test_conditions_on_live_values_touching_several_layers(model, plain_gpt2, clean, grab, above) -> None:
    @intervene
    def experiment(model, prompt, bound):
        with model.trace(prompt):
            kept = None
            if model.layers[0].output.norm() > bound:
                model.layers[1].output[:, 0] = 0
                kept = model.layers[2].output
                model.layers[3].output = kept * 2
            else:
                model.layers[2].output[:] = model.layers[1].output
            logits = model.lm_head.output
        return logits, kept

    norm = grab(plain_gpt2, clean, "transformer.h.0").norm().item()
    logits, kept = experiment(model, clean, norm - 1 if above else norm + 1)
    if above:

        def zero(out):
            out[:, 0] = 0

        first = ("transformer.h.1", "output", zero)
        middle = grab(plain_gpt2, clean, "transformer.h.2", "output", first)
        assert_close(kept, middle)
        expected = grab(
            plain_gpt2, clean, "lm_head", "output", first, ("transformer.h.3", "output", lambda out: middle * 2)
        )
    else:
        assert kept is None
        one = grab(plain_gpt2, clean, "transformer.h.1")
        expected = grab(plain_gpt2, clean, "lm_head", "output", ("transformer.h.2", "output", lambda out: one))
    assert_close(logits, expected)


def test_nested_conditions_elif_and_a_variable_that_both_branches_assign(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt, low, high):
        with model.trace(prompt):
            size = model.layers[0].output.norm()
            if size < low:
                factor = model.layers[1].output.mean()
            elif size < high:
                factor = 2.0
                if model.layers[1].output.norm() > 0:
                    model.layers[2].output += 1
            else:
                factor = size
            model.layers[3].output *= factor
            logits = model.lm_head.output
        return logits

    size = grab(plain_gpt2, clean, "transformer.h.0").norm().item()
    mean = grab(plain_gpt2, clean, "transformer.h.1").mean()
    plus = ("transformer.h.2", "output", lambda out: out + 1)
    for bounds, factor, hooks in (((2, 3), mean, ()), ((0.5, 3), 2.0, (plus,)), ((0.1, 0.5), size, ())):
        expected = grab(
            plain_gpt2, clean, "lm_head", "output", *hooks,
            ("transformer.h.3", "output", lambda out, factor=factor: out * factor),
        )  # fmt: skip
        assert_close(experiment(model, clean, size * bounds[0], size * bounds[1]), expected, atol=1e-4, rtol=1e-4)


def test_effects_are_printed_in_the_order_of_the_source(model, plain_gpt2, clean, grab, capsys) -> None:
    @intervene
    def experiment(model, prompt):
        print("start")
        with model.trace(prompt):
            print("late", model.layers[3].output.shape[-1])
            print("plain")
            print("early", model.layers[0].output.shape[1])
            model.layers[1].output[:] = 0
            print("middle", model.layers[1].output.abs().sum().item())
        print("end")

    experiment(model, clean)
    assert capsys.readouterr().out == "start\nlate 32\nplain\nearly 6\nmiddle 0.0\nend\n"


def test_a_forward_ends_after_its_last_site(model, plain_gpt2, clean, counts) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            return model.layers[1].output

    experiment(model, clean)
    seen = counts(plain_gpt2)
    experiment(model, clean)
    assert seen["transformer.h.1"] == 1
    assert "transformer.h.2" not in seen
    assert "lm_head" not in seen


def test_a_forward_that_nothing_needs_is_not_run(model, plain_gpt2, clean, corrupt, counts) -> None:
    @intervene
    def experiment(model, clean, corrupt):
        with model.trace(clean):
            model.layers[1].output.save()
        with model.trace(corrupt):
            kept = model.layers[0].output
        return kept

    experiment(model, clean, corrupt)
    seen = counts(plain_gpt2)
    experiment(model, clean, corrupt)
    assert seen["transformer.wte"] == 1


def test_a_module_called_in_the_body_is_no_call_of_the_forward(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def lens(model, prompt):
        found = []
        with model.trace(prompt):
            model.ln_final.output[:] = 0
            for layer in model.layers:
                found.append(model.lm_head(model.ln_final(layer.output))[:, -1])
            logits = model.lm_head.output
        return found, logits

    found, logits = lens(model, clean)
    with torch.no_grad():
        for index, value in enumerate(found):
            hidden = grab(plain_gpt2, clean, f"transformer.h.{index}")
            assert_close(value, plain_gpt2.lm_head(plain_gpt2.transformer.ln_f(hidden))[:, -1])
    assert_close(logits, torch.zeros_like(logits))


def test_weights_are_values(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def attribution(model, prompt, token):
        with model.trace(prompt):
            direction = model.lm_head.weight[token]
            return [layer.output[0, -1] @ direction for layer in model.layers]

    for token in (3, 99):
        for index, value in enumerate(attribution(model, clean, token)):
            hidden = grab(plain_gpt2, clean, f"transformer.h.{index}")
            assert_close(value.detach(), (hidden[0, -1] @ plain_gpt2.lm_head.weight[token]).detach())


def test_the_subject_s_embedding_moves_the_fact(tiny) -> None:
    @intervene
    def patch(model, clean, corrupt):
        with model.trace(clean):
            source = model.embed.output[:, 1]
        with model.trace(corrupt):
            model.embed.output[:, 1] = source
            patched = model.lm_head.output[0, -1]
        with model.trace(corrupt):
            plain = model.lm_head.output[0, -1]
        return plain.argmax(), patched.argmax()

    tokenizer = tiny.tokenizer
    clean, corrupt = "The Colosseum is in the city of", "The Atomium is in the city of"
    first, second = (tokenizer(text).input_ids for text in (clean, corrupt))
    assert len(first) == len(second)
    differing = [index for index, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    plain, patched = patch(tiny, clean, corrupt)
    assert tokenizer.decode(plain) == " Brussels"
    assert differing == [1]
    assert tokenizer.decode(patched) == " Rome"


def test_a_module_that_runs_twice_needs_a_call_index(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def first(model, x):
        with model.trace(x):
            kept = model.shared.calls[0].output
            model.shared.calls[1].output[:] = kept
            result = model.output
        return kept, result

    @intervene
    def without(model, x):
        with model.trace(x):
            return model.shared.output

    seen: list[torch.Tensor] = []

    def note(out):
        seen.append(out.clone())
        return seen[0].clone() if len(seen) == 2 else None

    kept, result = first(stack, batch)
    expected = hooked(plain_stack, batch, ("shared", "output", note))
    assert_close(kept, seen[0])
    assert_close(result, expected)
    with pytest.raises(CompileError, match="called 2 times"):
        without(stack, batch)


def test_one_module_under_two_paths_is_one_site(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def experiment(model, x):
        with model.trace(x):
            model.tied.output[:] = 0
            first = model.first.output
            result = model.output
        return first, result

    first, result = experiment(stack, batch)
    assert_close(first, torch.zeros_like(first))
    assert_close(result, plain_stack.head.bias.detach().expand_as(result))
