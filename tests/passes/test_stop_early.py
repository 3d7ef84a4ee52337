"""Where forwards end: text in, text out; what runs of a model, counted; and the way a program without the pass goes."""

from __future__ import annotations

import json
from textwrap import dedent, indent

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.serial import from_json, to_json
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.remarks import Remark, Remarks
from nnsight_compiler.passes.stop_early import stop_early

MODULES = ("h.0", "h.1", "head")


class Order:
    """A model that runs these modules, one after another."""

    def begins_after(self, path: str, port: str, call: int = 0) -> str | None:
        later = MODULES if not path and port == "input" else () if not path else MODULES[MODULES.index(path) + 1 :]
        return next(iter(later), None)


def made(header: str, body: str, training: bool = False) -> tuple[str, list[Remark]]:
    """The forward's line after the pass on a forward with this body, and the remarks."""
    text = f"experiment f(%model, %x)\n  forward %f0 = {header}\n{indent(dedent(body).strip(), '    ')}\n"
    program = parse_program(text.rstrip() + "\n")
    verify(program)
    remarks = Remarks()
    after = stop_early(program, lambda _: Order(), remarks, lambda _: training)
    verify(after)
    assert parse_program(str(after)) == after
    assert from_json(json.loads(json.dumps(to_json(after)))) == after
    assert str(stop_early(after, lambda _: Order(), Remarks(), lambda _: training)) == str(after)
    line = str(after).splitlines()[1].strip().removeprefix("forward %f0 = ")
    assert str(after).replace(line, header) == str(program)
    return line.removeprefix(header), remarks.made


@pytest.mark.parametrize(
    ("site", "end", "rest"),
    [
        ("h.0 output", "h.0 output", "h.1"),
        ("h.1 input", "h.1 input", "head"),
        ("'' input", "'' input", "h.0"),
        ("h.1 output call 2", "h.1 output call 2", "head"),
    ],
)
def test_a_forward_ends_at_its_last_site(site: str, end: str, rest: str) -> None:
    line, (remark,) = made("trace %model(%x)", f"at %model@{site}\n  %h = read %model@{site}")
    assert line == f" stops after %model@{end}"
    shown = end.removesuffix(" call 2").replace("''", "the model")
    assert (remark.optimisation, remark.fired) == ("stop_early", True)
    assert remark.what == f"ends after {shown}: {rest} and what follows do not run"


def test_where_no_module_is_left_nothing_is_remarked() -> None:
    assert made("trace %model(%x)", "at %model@head output\n  %h = read %model@head output") == (
        " stops after %model@head output",
        [],
    )


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("trace %model(%x)", ""),  # it runs for its own sake
        ("trace %model(%x)", "at %model@'' output\n  %h = read %model@'' output"),
        ("generate %model(%x)", "at %model@h.0 output\n  %h = read %model@h.0 output"),
        ("trace %model()", "invoke %i = %f0(%x)"),
    ],
)
def test_a_forward_runs_to_its_end(header: str, body: str) -> None:
    assert made(header, body) == ("", [])


def test_a_model_in_training_mode_is_remarked_on() -> None:
    _, (remark,) = made("trace %model(%x)", "at %model@h.0 output\n  %h = read %model@h.0 output", training=True)
    assert not remark.fired
    assert remark.what == "the model is in training mode, in which a forward runs to its end: h.1 and what follows run"


@pytest.mark.parametrize(
    "line",
    [
        "forward %f0 = trace %model(%x) stops after %model@h.1 output",
        "forward %f0 = trace %model(%x) stops after %model@h.0 input",
        "forward %f0 = trace %model(%x) stops after %model@h.0 output call 1",
    ],
)
def test_a_line_that_names_another_site_is_no_ir(line: str) -> None:
    text = f"experiment f(%model, %x)\n  {line}\n    at %model@h.0 output\n      %h = read %model@h.0 output\n"
    with pytest.raises(IRError, match="the forward does not stop after its last site"):
        parse_program(text)


def test_a_generation_that_stops_is_not_well_formed() -> None:
    body = "    at %model@h.0 output\n      %h = read %model@h.0 output\n"
    text = f"experiment f(%model, %x)\n  forward %f0 = generate %model(%x) stops after %model@h.0 output\n{body}"
    with pytest.raises(IRError, match="a forward stops after a site, and a generation does not"):
        verify(parse_program(text))


# --- what runs ---


@intervene
def first(model, x):
    with model.trace(x):
        hidden = model[0].output
    return hidden


class Counted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("without", [(), "stop_early"])
def test_what_follows_the_last_site_does_not_run(without: object, training: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Counted(), Counted(), Counted()).train(training)
    model, x = NNsight(plain), torch.randn(2, 4)
    run = first.with_options(without=without)
    with torch.no_grad():
        expected = plain[0](x)
    plain[0].count = 0
    for _ in range(3):
        assert torch.equal(run(model, x), expected)
    stops = without == () and not training
    assert [each.count for each in plain] == ([3, 1, 1] if stops else [3, 3, 3])  # the first of new shapes is whole
    assert ("stops after %model@0 output" in str(run.lower(model, x))) == (without == ())
    assert ("ends after it" in str(run.explain(model, x))) == (without == ())
