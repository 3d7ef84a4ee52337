"""D2: the order of the source rules within a value: in-place code, views, replacement, items of structures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from nnsight_compiler import CompileError, RunError, intervene

LAYER = "transformer.h.1"


def check(experiment: Any, model: Any, plain: Any, prompt: Any, grab: Any, change: Any, port: str = "output") -> None:
    """The experiment gives the logits that a hand-written hook gives."""
    expected = grab(plain, prompt, "lm_head", "output", (LAYER, port, change))
    assert_close(experiment(model, prompt), expected)
    assert not torch.allclose(expected, grab(plain, prompt, "lm_head"))


def test_item_assignment(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            x = model.layers[1].output
            x[:, -1] = 3.0
            return model.lm_head.output

    def change(x):
        x[:, -1] = 3.0

    check(experiment, model, plain_gpt2, clean, grab, change)


def test_augmented_assignment_of_a_name(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            x = model.layers[1].output
            x += 2.5
            return model.lm_head.output

    check(experiment, model, plain_gpt2, clean, grab, lambda x: x + 2.5)


def test_augmented_assignment_of_a_site_and_of_an_item(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            model.layers[1].output *= 2
            model.layers[1].output[:, 1:3] -= 1
            model.layers[1].output[0, -1, :4] /= 2
            return model.lm_head.output

    def change(x):
        x *= 2
        x[:, 1:3] -= 1
        x[0, -1, :4] /= 2

    check(experiment, model, plain_gpt2, clean, grab, change)


def test_methods_that_write(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            h.mul_(2).add_(1)
            h[:, 0].zero_()
            h.select(1, 2).fill_(4)
            torch.relu_(h[:, 3])
            return model.lm_head.output

    def change(h):
        h.mul_(2).add_(1)
        h[:, 0].zero_()
        h.select(1, 2).fill_(4)
        torch.relu_(h[:, 3])

    check(experiment, model, plain_gpt2, clean, grab, change)


def test_views_of_views(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            heads = model.layers[1].output.view(1, -1, 4, 8)
            one = heads[:, :, 2].transpose(0, 1)[1:]
            one[0] = 0
            half = one.unbind(1)[0][..., :4]
            half.copy_(half * -1)
            model.layers[1].output.permute(2, 1, 0).squeeze(-1)[0] = 7
            return model.lm_head.output

    def change(h):
        one = h.view(1, -1, 4, 8)[:, :, 2].transpose(0, 1)[1:]
        one[0] = 0
        half = one.unbind(1)[0][..., :4]
        half.copy_(half * -1)
        h[0, :, 0] = 7

    check(experiment, model, plain_gpt2, clean, grab, change)


def test_input_in_place_and_replaced(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def in_place(model, prompt):
        with model.trace(prompt):
            model.layers[1].input[:, 2] = 0
            return model.lm_head.output

    @intervene
    def replaced(model, prompt):
        with model.trace(prompt):
            model.layers[1].input = model.layers[1].input * 2
            return model.lm_head.output

    @intervene
    def scalar(model, prompt):
        with model.trace(prompt):
            model.layers[1].input = 0.5
            return model.lm_head.output

    @intervene
    def through_inputs(model, prompt):
        with model.trace(prompt):
            model.layers[1].inputs[0][0][:, 2] = 0
            return model.lm_head.output

    @intervene
    def all_inputs(model, prompt):
        with model.trace(prompt):
            args, kwargs = model.layers[1].inputs
            model.layers[1].inputs = (args[0] * 2, *args[1:]), kwargs
            return model.lm_head.output

    def zero(x):
        x = x.clone()
        x[:, 2] = 0
        return x

    check(in_place, model, plain_gpt2, clean, grab, zero, "input")
    check(through_inputs, model, plain_gpt2, clean, grab, zero, "input")
    check(replaced, model, plain_gpt2, clean, grab, lambda x: x * 2, "input")
    check(all_inputs, model, plain_gpt2, clean, grab, lambda x: x * 2, "input")
    check(scalar, model, plain_gpt2, clean, grab, lambda x: torch.full_like(x, 0.5), "input")


def test_replacement_by_a_tensor_a_scalar_and_what_it_reads_of_itself(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt, value):
        with model.trace(prompt):
            model.layers[1].output = value
            return model.lm_head.output

    @intervene
    def itself(model, prompt):
        with model.trace(prompt):
            model.layers[1].output = model.layers[1].output.flip(1) + model.layers[1].input
            return model.lm_head.output

    @intervene
    def twice(model, prompt):
        with model.trace(prompt):
            model.layers[1].output = 1
            model.layers[1].output = model.layers[1].output + 2
            model.layers[1].output[:, 0] = model.layers[1].output[:, 1] * 2
            return model.lm_head.output

    given = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(9))
    for value, change in (
        (0, torch.zeros_like),
        (2.5, lambda x: torch.full_like(x, 2.5)),
        (True, torch.ones_like),
        (torch.tensor(3.0), lambda x: torch.full_like(x, 3.0)),
        (given, lambda x: given),
        (given.double(), lambda x: given),
    ):
        expected = grab(plain_gpt2, clean, "lm_head", "output", (LAYER, "output", change))
        assert_close(experiment(model, clean, value), expected)
    before = grab(plain_gpt2, clean, LAYER, "input")
    check(itself, model, plain_gpt2, clean, grab, lambda x: x.flip(1) + before)

    def change(x):
        x = torch.full_like(x, 3.0)
        x[:, 0] = 6
        return x

    check(twice, model, plain_gpt2, clean, grab, change)


def test_a_tensor_from_outside_that_is_assigned_is_not_changed_by_the_model(model, clean) -> None:
    @intervene
    def experiment(model, prompt, value):
        with model.trace(prompt):
            model.layers[1].output = value
            model.layers[2].input[:] = 0
            return model.lm_head.output

    given = torch.ones(1, 6, 32)
    first = experiment(model, clean, given)
    assert torch.equal(given, torch.ones(1, 6, 32))
    assert_close(experiment(model, clean, given), first)


def test_what_is_assigned_before_an_inplace_activation_stays_as_it_was(stack, batch) -> None:
    @intervene
    def experiment(model, x, value):
        with model.trace(x):
            mine = value * 1
            model.blocks[0].linear.output = mine
            model.blocks[1].linear.output = value
            into = model.blocks[1].input
            model.blocks[2].linear.output = into
            return mine, into, model.blocks[1].input, model.output

    given = -torch.ones(2, 4, 8)
    mine, into, again, _ = experiment(stack, batch, given)
    assert torch.equal(given, -torch.ones(2, 4, 8))
    assert torch.equal(mine, given)
    assert torch.equal(into, again)


def test_a_wrong_shape_is_refused_by_line(model, clean) -> None:
    @intervene
    def experiment(model, prompt, value):
        with model.trace(prompt):
            model.layers[1].output = value
            return model.lm_head.output

    with pytest.raises(CompileError, match=r"test_aliasing.py:\d+.*shape"):
        experiment(model, clean, torch.zeros(1, 5, 32))
    experiment(model, clean, torch.zeros(1, 6, 32))
    with pytest.raises(
        RunError, match=r"test_aliasing.py:\d+.*shape"
    ):  # the program is compiled: it is the run's to say
        experiment(model, clean, torch.zeros(1, 5, 32))


def test_a_name_before_and_after_a_write_is_one_value(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            first = h * 1
            view = h[:, 0]
            h[:, 0] = 5
            second = h * 1
            third = view * 1
            h = h * 2
            fourth = model.layers[1].output * 1
            h[:] = 0
            fifth = model.layers[1].output * 1
        return first, second, third, fourth, fifth

    first, second, third, fourth, fifth = experiment(model, clean)
    plain = grab(plain_gpt2, clean, LAYER)
    changed = plain.clone()
    changed[:, 0] = 5
    assert_close(first, plain)
    assert_close(second, changed)
    assert_close(third, changed[:, 0])
    assert_close(fourth, changed)
    assert_close(fifth, changed)


def test_a_sum_of_two_sites_is_the_program_s_own(model, clean, grab, plain_gpt2) -> None:
    """`+` may also join lists, which would still hold the model's values."""

    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            twice = h + h
            twice[:, 0] = 5
            mixed = h + model.layers[2].output
            mixed[:, 1] = model.layers[3].output[:, 1]
        return twice, mixed

    h, two, three = (grab(plain_gpt2, clean, f"transformer.h.{index}") for index in (1, 2, 3))
    twice, mixed = h + h, h + two
    twice[:, 0] = 5
    mixed[:, 1] = three[:, 1]
    for value, wanted in zip(experiment(model, clean), (twice, mixed), strict=True):
        assert_close(value, wanted)


def test_a_replaced_value_and_the_value_read_before(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            old = model.layers[1].output
            model.layers[1].output = torch.zeros_like(old)
            new = model.layers[1].output
            new[:, 0] = 1
            old_kept = old + 0
        return old, new, old_kept

    old, new, kept = experiment(model, clean)
    plain = grab(plain_gpt2, clean, LAYER)
    assert_close(old, plain)
    assert_close(kept, plain)
    expected = torch.zeros_like(plain)
    expected[:, 0] = 1
    assert_close(new, expected)


def test_in_place_on_what_was_assigned_reaches_the_site(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            mine = torch.zeros(1, 6, 32)
            model.layers[1].output = mine
            mine[:, 2] = 1
            site = model.layers[1].output * 1
            return site, model.lm_head.output

    site, logits = experiment(model, clean)
    mine = torch.zeros(1, 6, 32)
    mine[:, 2] = 1
    assert_close(site, mine)
    assert_close(logits, grab(plain_gpt2, clean, "lm_head", "output", (LAYER, "output", lambda x: mine)))


def test_a_value_used_at_a_later_site_is_the_value_at_that_line(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[0].output
            model.layers[1].output = h
            h[:, 0] = 9
            model.layers[2].output = h
            h[:, 1] = 8
            result = model.lm_head.output
            return h, result, model.layers[1].output, model.layers[2].output

    h, result, one, two = experiment(model, clean)
    plain = grab(plain_gpt2, clean, "transformer.h.0")
    first, second, third = plain.clone(), plain.clone(), plain.clone()
    second[:, 0] = third[:, 0] = 9
    third[:, 1] = 8
    assert_close(h, third)
    assert_close(one, first)
    assert_close(two, second)
    expected = grab(plain_gpt2, clean, "lm_head", "output", ("transformer.h.2", "output", lambda x: second))
    assert_close(result, expected)


def test_a_write_that_makes_room_for_a_name_of_two_sites(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt, first):
        with model.trace(prompt):
            if first:
                h = model.layers[0].output
            else:
                h = model.layers[2].output
            h[:, 0] = 0
            return model.lm_head.output

    def zero(x):
        x[:, 0] = 0

    for first, path in ((True, "transformer.h.0"), (False, "transformer.h.2")):
        assert_close(
            experiment(model, clean, first), grab(plain_gpt2, clean, "lm_head", "output", (path, "output", zero))
        )


def test_tuple_outputs(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def in_place(model, x):
        with model.trace(x):
            model.blocks[1].output[0][:, -1] = 0
            return model.output

    @intervene
    def item(model, x):
        with model.trace(x):
            hidden = model.blocks[1].output[0]
            model.blocks[1].output[0] = hidden * 2
            kept = model.blocks[1].output[0]
            whole = model.blocks[1].output
            return kept, whole, model.output

    @intervene
    def whole(model, x):
        with model.trace(x):
            hidden, mean = model.blocks[1].output
            model.blocks[1].output = (hidden + 1, mean)
            return model.output

    @intervene
    def scalar(model, x):
        with model.trace(x):
            model.blocks[1].output = 0
            return model.output

    def zero(out):
        out[0][:, -1] = 0

    def hooks(change):
        return ("blocks.1", "output", change)

    assert_close(in_place(stack, batch), hooked(plain_stack, batch, hooks(zero)))
    kept, both, result = item(stack, batch)
    assert_close(result, hooked(plain_stack, batch, hooks(lambda out: (out[0] * 2, out[1]))))
    assert isinstance(both, tuple)
    assert_close(both[0], kept)
    assert_close(whole(stack, batch), hooked(plain_stack, batch, hooks(lambda out: (out[0] + 1, out[1]))))
    with pytest.raises(CompileError, match="a tuple of 2"):
        scalar(stack, batch)


def test_row_zero_of_a_tensor_and_item_zero_of_a_tuple(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def experiment(model, x):
        with model.trace(x):
            row = model.shared.calls[0].output[0]
            before = row.save()
            model.shared.calls[0].output[0] = 0
            return before, row, model.output

    held = []

    def first(out):
        if not held:
            held.append(out[0].clone())
            out[0] = 0

    before, row, result = experiment(stack, batch)
    expected = hooked(plain_stack, batch, ("shared", "output", first))
    assert_close(before, held[0])
    assert_close(row, torch.zeros_like(row))  # what leaves unsaved has the value after the last access to it
    assert_close(result, expected)


def test_dict_and_dataclass_outputs(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def mapping(model, x):
        with model.trace(x):
            hidden = model.mapping.output["hidden"]
            model.mapping.output["hidden"] = hidden * 2
            model.mapping.output["norm"][:, 0] = 3
            return model.mapping.output, model.output

    @intervene
    def record(model, x):
        with model.trace(x):
            model.record.output.hidden[:, 0] = 0
            norm = model.record.output.norm
            norm += 1
            return model.record.output, model.output

    def change(out):
        out["norm"][:, 0] = 3
        return {"hidden": out["hidden"] * 2, "norm": out["norm"]}

    def change_record(out):
        out.hidden[:, 0] = 0
        out.norm += 1

    kept, result = mapping(stack, batch)
    assert set(kept) == {"hidden", "norm"}
    assert_close(result, hooked(plain_stack, batch, ("mapping", "output", change)))
    held, result = record(stack, batch)
    assert_close(result, hooked(plain_stack, batch, ("record", "output", change_record)))
    assert_close(held.hidden[:, 0], torch.zeros_like(held.hidden[:, 0]))


def test_attribute_of_a_dataclass_output_assigned(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def experiment(model, x):
        with model.trace(x):
            model.record.output.norm = model.record.output.norm * 0
            return model.output

    def change(out):
        out.norm = out.norm * 0

    assert_close(experiment(stack, batch), hooked(plain_stack, batch, ("record", "output", change)))


def test_fields_of_a_model_output(model, plain_gpt2, clean, hooked) -> None:
    @intervene
    def read(model, prompt):
        with model.trace(prompt):
            out = model.output
            return out.logits, out["logits"], out[0]

    @intervene
    def write(model, prompt):
        with model.trace(prompt):
            model.output["logits"] = model.output.logits * 2
            model.output.logits[:, 0] = 1
            return model.output, model.output.logits

    expected = hooked(plain_gpt2, clean).logits
    for value in read(model, clean):
        assert_close(value, expected)
    whole, logits = write(model, clean)
    doubled = expected * 2
    doubled[:, 0] = 1
    assert_close(logits, doubled)
    assert_close(whole.logits, doubled)
    assert type(whole).__name__ == "CausalLMOutputWithCrossAttentions"


def test_an_inplace_activation_of_the_model(stack, plain_stack, batch, hooked) -> None:
    @intervene
    def experiment(model, x):
        with model.trace(x):
            before = model.blocks[0].linear.output
            kept = before + 0
            after = model.blocks[0].act.output
            return before, kept, after

    held = {}
    hooked(
        plain_stack,
        batch,
        ("blocks.0.linear", "output", lambda out: held.update(before=out.clone()) or None),
        ("blocks.0.act", "output", lambda out: held.update(after=out.clone()) or None),
    )
    before, kept, after = experiment(stack, batch)
    assert_close(before, held["before"])
    assert_close(kept, held["before"])
    assert_close(after, held["after"])
    assert (before < 0).any()


def test_a_weight_is_not_written(model, plain_gpt2, clean) -> None:
    """A write to a weight would outlive the run, frozen parameters or not."""

    @intervene
    def item(model, prompt):
        with model.trace(prompt):
            model.lm_head.weight[3] = 0
            return model.lm_head.output

    @intervene
    def method(model, prompt):
        with model.trace(prompt):
            row = model.lm_head.weight[3]
            row.mul_(0)
            return model.lm_head.output

    before = plain_gpt2.lm_head.weight.detach().clone()
    plain_gpt2.requires_grad_(False)
    try:
        for experiment in (item, method):
            with pytest.raises(CompileError, match=r"this writes to `lm_head.weight`, a weight"):
                experiment(model, clean)
        assert torch.equal(plain_gpt2.lm_head.weight, before)
    finally:
        plain_gpt2.requires_grad_(True)


def test_the_input_of_the_trace_is_not_changed(stack, plain_stack, batch, hooked) -> None:
    """What the user hands to the model is the model's own value at its first site: an in-place write"
    " there is theirs."""

    @intervene
    def experiment(model, x):
        with model.trace(x):
            model.blocks[0].output[0][:] = 0
            return model.output

    held = batch.clone()
    experiment(stack, batch)
    assert torch.equal(batch, held)


def test_a_layer_whose_output_is_its_input_s_storage(batch) -> None:
    class Identity(torch.nn.Module):
        def forward(self, x):
            return x

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.through, self.last = torch.nn.Linear(8, 8), Identity(), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.through(self.first(x)))

    from nnsight_compiler import NNsight

    @intervene
    def experiment(model, x):
        with model.trace(x):
            model.through.output[:] = 0
            first = model.first.output
            into = model.last.input
            return first, into

    plain = Two()
    first, into = experiment(NNsight(plain), batch)
    assert_close(first, plain.first(batch).detach())
    assert_close(into, torch.zeros_like(into))


def test_writes_to_two_layers_in_one_rolled_or_unrolled_loop(model, plain_gpt2, clean, grab) -> None:
    @intervene
    def experiment(model, prompt, layers):
        with model.trace(prompt):
            for index in layers:
                model.layers[index].output[:, -1] = index
            return model.lm_head.output

    def write(value):
        def change(x):
            x[:, -1] = value

        return change

    expected = grab(
        plain_gpt2, clean, "lm_head", "output", *((f"transformer.h.{n}", "output", write(n)) for n in (0, 2))
    )
    assert_close(experiment(model, clean, (2, 0)), expected)


def test_host_code_that_keeps_and_changes_what_it_is_given(model, plain_gpt2, clean, grab) -> None:
    def halve(tensor):
        tensor.div_(2)
        return tensor

    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            h = model.layers[1].output
            same = halve(h)
            same[:, 0] = 1
            return model.lm_head.output

    def change(x):
        x.div_(2)
        x[:, 0] = 1

    check(experiment, model, plain_gpt2, clean, grab, change)


def test_refused_write_to_either_of_two_sites(model, clean) -> None:
    @intervene
    def experiment(model, prompt):
        with model.trace(prompt):
            if model.layers[0].output.sum() > 0:
                h = model.layers[1].output
            else:
                h = model.layers[2].output
            h[:, 0] = 0
            return model.lm_head.output

    with pytest.raises(CompileError, match=r"transformer.h.1` or of `transformer.h.2"):
        experiment(model, clean)
