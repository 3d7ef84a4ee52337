"""`experiment.check`: what is found without weights and without running anything, and what is said of the rest."""

import random

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from nnsight_compiler import CompileError, LanguageModel, NNsight, intervene

torch.set_num_threads(1)
TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def lazy():
    """The small model, of which only the configuration has been read. No check may load the rest."""
    model = LanguageModel("tiny")
    yield model
    assert not model._loaded
    assert all(parameter.is_meta for parameter in model._module.parameters())


@intervene
def patch(model, clean, corrupt, layer, position=-1):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


@intervene
def several(model, prompt, layer):
    with model.trace(prompt):
        a = model.layrs[0].output
        b = model.layers[7].output
        c = model.layers[layer].mlp.output
        model.layers[0].output = model.layers[1].output
    with model.trace(prompt):
        model.layers[0].output = 0
        d = model.layers[2].mlpp.output
    return a, b, c, d


def line_of(experiment, text):
    code = experiment.__wrapped__.__code__
    with open(__file__) as file:
        lines = file.read().splitlines()
    return next(n for n in range(code.co_firstlineno, len(lines) + 1) if text in lines[n - 1])


def test_a_correct_experiment_has_a_clean_report(lazy):
    report = patch.check(lazy, TEXT, TEXT, 1)
    assert report
    assert report.ok
    assert (report.diagnostics, report.unchecked, report.warnings) == ((), (), ())
    assert str(report) == "no mistakes found"
    report.raise_mistakes()


def test_all_mistakes_at_once_at_their_lines(lazy):
    report = several.check(lazy, TEXT, 1)
    assert not report
    marks = ["layrs", "layers[7]", "model.layers[0].output = model.layers[1]", "mlpp"]
    assert [each.span.line for each in report.diagnostics] == [line_of(several, mark) for mark in marks]
    assert all(each.span.file == __file__ for each in report.diagnostics)
    assert "did you mean layers?" in report.diagnostics[0].reason
    assert "no index 7 (0 to 2)" in report.diagnostics[1].reason
    assert "computes only later" in report.diagnostics[2].reason
    assert "did you mean mlp?" in report.diagnostics[3].reason
    assert report.unchecked == ()
    text = str(report)
    assert text.endswith("\n4 mistakes")
    assert text.count("way out: ") == 4
    assert "            a = model.layrs[0].output\n                ^^^^^^^^^^^\n" in text
    with pytest.raises(CompileError) as raised:
        report.raise_mistakes()
    assert raised.value.diagnostics == report.diagnostics


def test_what_needs_an_argument_that_was_not_given_is_named(lazy):
    report = several.check(lazy)
    assert len(report.diagnostics) == 4
    (place,) = report.unchecked
    assert place.span.line == line_of(several, "layers[layer]")
    assert place.reason == "which module this is depends on `layer`, which was not given"
    assert "4 mistakes, 1 place not checked" in str(report)
    assert f"not checked: {__file__}:{place.span.line}:" in str(report)


def test_defaults_count_as_given(lazy):
    @intervene
    def lens(model, prompt=TEXT, layer=5):
        with model.trace(prompt):
            h = model.layers[layer].output
        return h

    assert "no index 5" in lens.check(lazy).diagnostics[0].reason
    assert lens.check(lazy, layer=2).ok


def test_what_is_made_from_a_missing_argument_is_followed(lazy):
    @intervene
    def spread(model, prompt, layers, offset):
        kept = []
        with model.trace(prompt):
            for layer in layers:
                kept.append(model.layers[layer].output)
            last = model.layers[offset + 1].mlpp.output
            first = model.layers[0].mlpp.output
        return kept, last, first

    report = spread.check(lazy, TEXT)
    (mistake,) = report.diagnostics
    assert mistake.span.line == line_of(spread, "first = ")
    places = [(each.span.line, each.reason) for each in report.unchecked]
    assert places == [
        (line_of(spread, "for layer in"), "what this loop goes over depends on `layers`, which was not given"),
        (line_of(spread, "last ="), "which module this is depends on `offset`, which was not given"),
    ]


def test_a_missing_argument_hides_no_write_behind_it(lazy):
    """A write is noticed by a read of which it is not known where it is."""

    @intervene
    def late(model, prompt, layer):
        with model.trace(prompt):
            model.layers[1].output = 0
            h = model.layers[layer].output
        return h

    report = late.check(lazy, TEXT)
    assert report.ok
    assert len(report.unchecked) == 1
    assert "can reach nothing" in late.check(lazy, TEXT, 0).diagnostics[0].reason
    assert late.check(lazy, TEXT, 2).ok


def test_what_only_a_run_can_give_stays_a_mistake_inside_its_own_forward(lazy):
    @intervene
    def chosen(model, prompt):
        with model.trace(prompt):
            layer = int(model.layers[0].output.argmax()) % 3
            h = model.layers[layer].output
        return h

    (mistake,) = chosen.check(lazy, TEXT).diagnostics
    assert mistake.span.line == line_of(chosen, "h = model")
    assert "only a run can give it" in mistake.reason


def test_what_only_a_run_can_give_before_a_trace_is_not_checked_and_the_rest_is(lazy):
    @intervene
    def drawn(model, prompt):
        layer = random.choice([0, 1, 2])
        with model.trace(prompt):
            first = model.layers[layer].output
            second = model.layers[5].output
            base = model.layers[0].output
        number = int(base.argmax()) % 3
        with model.trace(prompt):
            model.layers[0].output = 0
            third = model.layers[number].output
        return first, second, third

    report = drawn.check(lazy, TEXT)
    (mistake,) = report.diagnostics
    assert mistake.span.line == line_of(drawn, "second =")
    assert [(each.span.line, each.reason) for each in report.unchecked] == [
        (
            line_of(drawn, f"{mark} ="),
            f"which module this is depends on line {line}, known only when the experiment runs",
        )
        for mark, line in (
            ("first", line_of(drawn, "layer = random")),
            ("third", line_of(drawn, "number =")),
        )
    ]


def test_loops_of_which_only_a_run_tells_how_often_they_go_round(lazy):
    @intervene
    def until(model, prompt, limit):
        layer = 0
        while limit > layer:
            with model.trace(prompt):
                model.layers[0].output = 0
                h = model.layers[layer].output
                g = model.layers[0].mlpp.output
            layer += 1
        return h, g

    report = until.check(lazy, TEXT)
    (mistake,) = report.diagnostics
    assert mistake.span.line == line_of(until, "g =")
    assert [each.span.line for each in report.unchecked] == [line_of(until, "h =")]


def test_a_loop_over_modules_that_may_end_early(lazy):
    @intervene
    def search(model, prompt):
        for layer in model.layers:
            with model.trace(prompt):
                layer.input = 0
                h = layer.output
                g = model.layers[3].output
            if h.norm() > 1:
                break
        return h, g

    report = search.check(lazy, TEXT)
    (mistake,) = report.diagnostics
    assert mistake.span.line == line_of(search, "g =")


def test_a_configuration_or_a_name_stands_for_a_model():
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    for model in (config, "tiny"):
        assert patch.check(model, TEXT, TEXT, 2).ok
        assert "no index 3 (0 to 2)" in patch.check(model, TEXT, TEXT, 3).diagnostics[0].reason


def test_a_large_configuration_costs_no_memory():
    config = GPT2Config(n_layer=48, n_embd=12288, n_head=96)  # 87 billion weights
    assert patch.check(config, TEXT, TEXT, 47).ok
    assert "0 to 47" in patch.check(config, TEXT, TEXT, 48).diagnostics[0].reason


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.b(self.a(x)))


@intervene
def of_net(model, x):
    with model.trace(x):
        h = model.a.output
        s = model.spare.output
        t = model.b.output
    return h, s, t


def test_any_module_on_the_meta_device():
    with torch.device("meta"):
        net = Net()
    report = of_net.check(NNsight(net), torch.zeros(1, 4))
    assert [
        piece for each in report.diagnostics for piece in ("never called", "called 2 times") if piece in each.reason
    ] == ["never called", "called 2 times"]


def test_without_an_input_the_order_of_any_module_is_not_known():
    report = of_net.check(NNsight(Net()))
    assert report.ok
    (place,) = report.unchecked
    assert place.span.line == line_of(of_net, "with model.trace")
    assert "depends on the input" in place.reason


def test_an_input_that_the_model_refuses():
    report = of_net.check(NNsight(Net()), torch.zeros(1, 5))
    assert not report.ok
    assert report.diagnostics[0].span.line == line_of(of_net, "with model.trace")
    assert "the model cannot run on this input" in report.diagnostics[0].reason


def test_a_plain_module_is_refused_as_in_a_call():
    report = of_net.check(Net(), torch.zeros(1, 4))
    assert "NNsight(module)" in report.diagnostics[0].way_out


def test_a_value_made_for_nothing_is_warned_of(lazy):
    @intervene
    def forgotten(model, prompt):
        with model.trace(prompt):
            h = model.layers[0].output
            h = h * 0
            out = model.output
        return out

    report = forgotten.check(lazy, TEXT)
    assert report.ok
    assert report.warnings[0].span.line == line_of(forgotten, "h * 0")
    assert "1 warning" in str(report)


def test_unexpected_arguments_are_type_errors(lazy):
    with pytest.raises(TypeError, match="unexpected keyword argument 'layr'"):
        patch.check(lazy, layr=1)
