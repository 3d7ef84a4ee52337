"""Planted mistakes: each is found at its line, without weights, in one experiment and in a file that holds them all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import OPTConfig

from nnsight_compiler import LanguageModel, NNsight, intervene
from nnsight_compiler.cli.checking import check_file
from nnsight_compiler.cli.target import Target

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent.parent

HEADER = """\
import torch
from nnsight_compiler import intervene

PROMPT = "The Eiffel Tower is in the city of"  # eight tokens; the model is 128 wide and has three layers


def scaled(hidden, by):
    return hidden * by
"""


@dataclass(frozen=True)
class Mistake:
    """An experiment with one mistake: the body of its function, in which `<>` is the line that is wrong or right."""

    name: str
    body: str
    wrong: str
    right: str
    reason: str
    way_out: str

    def source(self, line: str) -> str:
        body = self.body.replace("<>", f"{line}  # here").strip("\n")
        return f"@intervene\ndef {self.name}(model):\n{body}\n"


IN_TRACE = """
    with model.trace(PROMPT):
        <>
        out = model.lm_head.output
    return out, value
"""
"""A body whose one line computes `value` in a trace."""

WRITES = """
    with model.trace(PROMPT):
        hidden = model.layers[0].output
        <>
        out = model.lm_head.output
    return out, hidden
"""
"""A body whose one line changes something in a trace."""

MISTAKES = [
    Mistake(
        "misspelt_module", IN_TRACE,
        "value = model.layrs[1].output", "value = model.layers[1].output",
        "has no `layrs`", "did you mean layers?",
    ),
    Mistake(
        "misspelt_inside_a_layer", IN_TRACE,
        "value = model.layers[1].mlpp.output", "value = model.layers[1].mlp.output",
        "has no `mlpp`", "did you mean mlp?",
    ),
    Mistake(
        "layer_out_of_range", IN_TRACE,
        "value = model.layers[3].output", "value = model.layers[2].output",
        "holds 3 modules: no index 3", "0 to 2",
    ),
    Mistake(
        "negative_layer_out_of_range", IN_TRACE,
        "value = model.layers[-4].output", "value = model.layers[-3].output",
        "no index -4", "0 to 2",
    ),
    Mistake(
        "no_such_part", IN_TRACE,
        "value = model.layers[0].mlp.attn.output", "value = model.layers[0].attn.output",
        "nothing here stands for `attn`", "it has: c_fc",
    ),
    Mistake(
        "never_called", IN_TRACE,
        "value = model.layers.output", "value = model.layers[0].output",
        "`transformer.h` is never called in this forward", "address a module that runs",
    ),
    Mistake(
        "no_such_call", IN_TRACE,
        "value = model.lm_head.calls[9].output", "value = model.lm_head.calls[0].output",
        "there is no call 9", "calls count from 0 to 0",
    ),
    Mistake(
        "calls_without_a_number", IN_TRACE,
        "value = model.lm_head.calls.output", "value = model.lm_head.calls[0].output",
        "needs the number of the call", ".calls[0].output",
    ),
    Mistake(
        "back_in_time", WRITES,
        "model.layers[1].output = model.layers[2].output", "model.layers[2].output = model.layers[1].output",
        "which the same forward computes only later", "a forward of its own",
    ),
    Mistake(
        "unnoticed_write", """
    with model.trace(PROMPT):
        value = model.layers[0].output
        <>
    return value
""",
        "model.layers[2].output = 0", "model.layers[0].input = 0",
        "this write can reach nothing", "read or save something that it changes",
    ),
    Mistake(
        "written_weight", WRITES,
        "model.lm_head.weight[0] = 0", "model.lm_head.weight.clone()[0] = 0",
        "a weight of the model", "work on a copy",
    ),
    Mistake(
        "outside_of_the_trace", """
    <>
    with model.trace(PROMPT):
        value = model.layers[0].output
    return early, value
""",
        "early = model.layers[0].output", "early = len(model.layers)",
        "exist only while the model runs", "with model.trace(…)",
    ),
    Mistake(
        "nested_trace", """
    with model.trace(PROMPT):
        value = model.layers[0].output
        <>
            other = model.layers[1].output
    return value, other
""",
        "with model.trace(PROMPT):", "with torch.no_grad():",
        "a forward cannot run inside the body of another", "close the first `with`",
    ),
    Mistake(
        "traced_submodule", """
    <>
        value = model.layers[0].output
    return value
""",
        "with model.layers[0].trace(PROMPT):", "with model.trace(PROMPT):",
        "only a whole model can be traced", "trace the model itself",
    ),
    Mistake(
        "unknown_keyword", """
    <>
        value = model.layers[0].output
    return value
""",
        "with model.trace(PROMPT, attention_maks=None):", "with model.trace(PROMPT, attention_mask=None):",
        "takes no `attention_maks`", "did you mean `attention_mask`?",
    ),
    Mistake(
        "argument_of_generate", """
    <>
        value = model.layers[0].output
    return value
""",
        "with model.trace(PROMPT, max_new_tokens=3):", "with model.trace(PROMPT, use_cache=False):",
        "takes no max_new_tokens", "arguments of `generate`",
    ),
    Mistake(
        "trace_without_with", """
    <>
        value = model.layers[0].output
    return value
""".replace("<>\n        value", "<>\n    with model.trace(PROMPT):\n        value"),
        "model.trace(PROMPT)", "len(model.layers)",
        "without `with` runs nothing", "with model.trace(…):",
    ),
    Mistake(
        "replaced_module", WRITES,
        "model.layers[0] = model.layers[1]", "model.layers[1].output = hidden",
        "a module cannot be replaced in an experiment", "set it outside",
    ),
    Mistake(
        "assigned_attribute", WRITES,
        "model.layers[1].outputs = hidden", "model.layers[1].output = hidden",
        "`outputs` of `transformer.h.1` cannot be assigned", "only `.output`, `.input` and `.inputs`",
    ),
    Mistake(
        "return_under_a_condition", """
    with model.trace(PROMPT):
        value = model.layers[0].output
        if value.norm() > 1:
            <>
        out = model.lm_head.output
    return out, value
""",
        "return value", "value = value * 2",
        "whether this `return` happens depends on a value of the forward", "assign the result in both branches",
    ),
    Mistake(
        "saved_module", IN_TRACE,
        "value = model.layers[0].save()", "value = model.layers[0].output.save()",
        "only values can be saved, not modules", "save its `.output`",
    ),
    Mistake(
        "chosen_by_its_own_forward", """
    with model.trace(PROMPT):
        layer = int(model.layers[0].output.argmax()) % 3
        <>
    return value
""",
        "value = model.layers[layer].output", "value = model.layers[1].output * layer",
        "which module this is must be known before the model runs", "compute it before the `with`",
    ),
    Mistake(
        "no_such_function", IN_TRACE,
        "value = torch.sofmax(model.layers[0].output, -1)", "value = torch.softmax(model.layers[0].output, -1)",
        "the module `torch` has no `sofmax`", "`softmax`",
    ),
    Mistake(
        "undefined_name", IN_TRACE,
        "value = model.layers[0].output * strenght", "value = model.layers[0].output * len(PROMPT)",
        "the name `strenght` is not defined", "define or import it",
    ),
    Mistake(
        "helper_without_an_argument", IN_TRACE,
        "value = scaled(model.layers[0].output)", "value = scaled(model.layers[0].output, 2)",
        "`scaled` cannot be called like this: missing a required argument: 'by'", "(hidden, by)",
    ),
    Mistake(
        "lambda_without_an_argument", """
    double = lambda hidden, by: hidden * by
    with model.trace(PROMPT):
        <>
    return value
""",
        "value = double(model.layers[0].output)", "value = double(model.layers[0].output, 2)",
        "missing a required argument: 'by'", "(hidden, by)",
    ),
    Mistake(
        "position_out_of_range", IN_TRACE,
        "value = model.layers[0].output[:, 8]", "value = model.layers[0].output[:, 7]",
        "index 8 is out of range: this dimension (tokens) has 8 entries", "use an index from -8 to 7",
    ),
    Mistake(
        "token_out_of_range", IN_TRACE,
        "value = model.lm_head.output[0, -1, 1007]", "value = model.lm_head.output[0, -1, 1006]",
        "index 1007 is out of range", "use an index from -1007 to 1006",
    ),
    Mistake(
        "wrong_width", WRITES,
        "model.layers[1].output[:, -1] = torch.zeros(127)", "model.layers[1].output[:, -1] = torch.zeros(128)",
        "a value of shape [127] is assigned to a part of shape [1, 128]", "make the shapes equal",
    ),
    Mistake(
        "wrong_shape", WRITES,
        "model.layers[1].output = torch.zeros(1, 9, 128)", "model.layers[1].output = torch.zeros(1, 8, 128)",
        "a tensor of shape [1, 9, 128] is assigned where the module gives [1, 8, 128]", "make the shapes equal",
    ),
    Mistake(
        "mismatched_product", IN_TRACE,
        "value = model.layers[0].output @ model.lm_head.weight",
        "value = model.layers[0].output @ model.lm_head.weight.T",
        "shapes cannot be multiplied (8x128 and 1007x128)", "the shapes here are",
    ),
    Mistake(
        "mismatched_sum", """
    with model.trace(PROMPT):
        hidden = model.layers[0].output
    <>
    return value
""",
        "value = hidden + torch.zeros(3)", "value = hidden + torch.zeros(128)",
        "(128) must match the size of tensor b (3)", "the shapes here are [1, 8, 128], [3]",
    ),
    Mistake(
        "mismatched_cat", IN_TRACE,
        "value = torch.cat([model.layers[0].output, model.layers[1].output[0]])",
        "value = torch.cat([model.layers[0].output, model.layers[1].output])",
        "must have same number of dimensions", "the shapes here are",
    ),
    Mistake(
        "one_value_for_a_tuple", WRITES,
        "model.layers[1].attn.output = 0", "model.layers[1].attn.output[0] = 0",
        "the module gives a tuple of 2, which one value cannot replace", "assign one of its items (`[0]`, `[1]`)",
    ),
    Mistake(
        "tuple_of_wrong_length", WRITES,
        "model.layers[1].attn.output = (hidden, None, None)", "model.layers[1].attn.output = (hidden, None)",
        "the module gives a tuple of 2, but 3 values are assigned", "",
    ),
    Mistake(
        "too_many_names", IN_TRACE,
        "value, weights, more = model.layers[0].attn.output", "value, weights = model.layers[0].attn.output",
        "2 values are unpacked into 3 names", "",
    ),
    Mistake(
        "no_such_method", IN_TRACE,
        "value = model.layers[0].output.sofmax(-1)", "value = model.layers[0].output.softmax(-1)",
        "a tensor has no `sofmax`", "did you mean `softmax`",
    ),
    Mistake(
        "wrong_part_of_a_module", IN_TRACE,
        "value = model.lm_head(model.layers[0].output[..., :5])",
        "value = model.lm_head(model.layers[0].output[..., :])",
        "cannot be multiplied (8x5 and 128x1007)", "the shapes here are",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def lazy():
    model = LanguageModel("tiny")
    yield model
    assert not model._loaded


def place(text: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# here"))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: each.name)
def test_each_is_found_at_its_line(mistake, lazy, tmp_path):
    file = tmp_path / f"{mistake.name}.py"
    file.write_text(f"{HEADER}\n\n{mistake.source(mistake.wrong)}")
    report = check_file(Target(file, None), lazy, {}).report
    assert len(report.diagnostics) == 1, str(report)
    (found,) = report.diagnostics
    assert (found.span.file, found.span.line) == (str(file), place(file.read_text()))
    assert mistake.reason in found.reason
    assert mistake.way_out in str(found)
    assert "^" in str(found)


def test_the_right_variants_have_none(lazy, tmp_path):
    file = tmp_path / "right.py"
    file.write_text("\n\n".join([HEADER, *(each.source(each.right) for each in MISTAKES)]))
    checked = check_file(Target(file, None), lazy, {})
    assert checked.experiments == len(MISTAKES) >= 20
    assert checked.report.ok, str(checked)
    assert checked.report.unchecked == (), str(checked)


def test_all_are_found_by_one_command_in_a_fresh_process(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("\n\n".join([HEADER, *(each.source(each.wrong) for each in MISTAKES)]))
    lines = file.read_text().splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line.endswith("# here")]
    command = [sys.executable, "-c", "from nnsight_compiler.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "check", str(file), "--model", "tiny", "--json"], capture_output=True, text=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"user CPU time {after.ru_utime - before.ru_utime:.2f} s")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert [each["line"] for each in found["mistakes"]] == expected
    for mistake, each in zip(MISTAKES, found["mistakes"], strict=True):
        assert mistake.reason in each["reason"]
    assert found["not_checked"] == []


# --- on other models ---


class Net(nn.Module):
    """A module that runs twice, and one that returns a pair."""

    def __init__(self):
        super().__init__()
        self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.twice(self.twice(x)))


def only(report, line):
    assert len(report.diagnostics) == 1, str(report)
    assert report.diagnostics[0].span.line == line, str(report)
    return str(report.diagnostics[0])


def here(experiment):
    code = experiment.__wrapped__.__code__
    lines = Path(__file__).read_text().splitlines()
    return next(n for n in range(code.co_firstlineno, len(lines)) if lines[n - 1].endswith("# here"))


def test_a_part_that_an_architecture_does_without():
    @intervene
    def lens(model, prompt):
        with model.trace(prompt):
            value = model.layers[0].mlp.output  # here
        return value

    config = OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    text = only(lens.check(config, [[1, 2, 3]]), here(lens))
    assert "this architecture has no module for `mlp`" in text
    assert "`fc1` (up) and `fc2` (down)" in text


def test_a_module_that_runs_several_times():
    @intervene
    def read(model, x):
        with model.trace(x):
            value = model.twice.output  # here
        return value

    text = only(read.check(NNsight(Net()), torch.zeros(1, 4)), here(read))
    assert "`twice` is called 2 times in one forward" in text
    assert "`.calls[0].output` to `.calls[1].output`" in text


def test_a_module_of_another_model():
    @intervene
    def mixed(model, other, x):
        with model.trace(x):
            value = other.last.output  # here
        return value

    text = only(mixed.check(NNsight(Net()), NNsight(Net()), torch.zeros(1, 4)), here(mixed))
    assert "this module belongs to another model" in text
    assert "trace that model in a `with` of its own" in text


def test_an_unknown_keyword_of_any_module():
    @intervene
    def read(model, x):
        with model.trace(x, y=x):  # here
            value = model.last.output
        return value

    text = only(read.check(NNsight(Net()), torch.zeros(1, 4)), here(read))
    assert "the forward of Net takes no `y`" in text
