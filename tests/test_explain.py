"""What `explain` says: stages, forwards, host ops, each with its line; before a run and after."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, estimates, intervene
from nnsight_compiler.explain import explain as explanation_of
from nnsight_compiler.explanation import Explanation
from nnsight_compiler.ir.span import Span
from nnsight_compiler.options import OPTIMISATIONS
from nnsight_compiler.passes.remarks import Remark
from nnsight_compiler.runtime.axes import AxisError

HERE = Path(__file__)
PROMPT = "The Eiffel Tower is in the city of"
LAYERS = [0, 1, 2]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


@pytest.fixture(autouse=True)
def working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)


def lines_of(explanation: Explanation) -> list[str]:
    """The text without what optimisations say, and without times."""
    text = re.sub(r"^optimisations\n(  .*(\n|$))*", "", str(explanation), flags=re.MULTILINE)
    return re.sub(r"[\d.]+ m?s\b", "# ms", text).splitlines()


def plan_lines(explanation: Explanation) -> list[str]:
    """These, without what forwards cost and did cost."""
    return [line for line in lines_of(explanation) if not line.strip().startswith(("estimate  ", "last run"))]


def line_of(text: str) -> int:
    """The line of this file that begins with a text."""
    lines = HERE.read_text().splitlines()
    [found] = [number for number, line in enumerate(lines, start=1) if line.strip().startswith(text)]
    return found


@intervene
def lens(model: Any, prompt: Any) -> Any:
    with model.trace(prompt):  # lens
        return torch.stack([model.lm_head(model.ln_final(layer.output[0, -1])) for layer in model.layers])


@intervene
def drawn(model: Any, prompt: Any) -> Any:
    layer = random.choice(LAYERS)
    with model.trace(prompt):  # drawn
        hidden = model.layers[layer].output[0, -1]
    return layer, hidden


@intervene
def host(model: Any, prompt: Any, function: Callable[..., Any], rounds: int) -> Any:
    with model.trace(prompt):  # host
        model.layers[0].mlp.output.mul_(0.5)
        function(model.layers[1].output)
        out = model.output
    for each in range(rounds):
        if function(each):
            function(each + 1)
    return out


def test_calls_that_repeat_are_one_line(tiny: LanguageModel) -> None:
    forward, calls = line_of("with model.trace(prompt):  # lens"), line_of("return torch.stack(")
    assert "of these" not in str(lens.explain(tiny, PROMPT)), "calls on several values are one"
    assert plan_lines(lens.with_options(without={"fuse_calls"}).explain(tiny, PROMPT)) == [
        "experiment lens",
        "stage 1, given len(transformer.h)=3",
        f"  test_explain.py:{forward}  forward of GPT2LMHeadModel         reads transformer.h.0…2 output; ends after"
        " transformer.h.2 output",
        f"  test_explain.py:{calls}  module call `transformer.ln_f(…)`  a torch module, run whole and as it is; 3 of"
        " these",
        f"  test_explain.py:{calls}  module call `lm_head(…)`           a torch module, run whole and as it is; 3 of"
        " these",
    ]


def test_a_stage_before_and_after_runs(tiny: LanguageModel) -> None:
    drawn.cache_clear()
    begins = f"test_explain.py:{line_of('with model.trace(prompt):  # drawn')}"
    stage = f"stage 2 begins at {begins}, where it must be known which module this is"
    first = ["experiment drawn", "stage 1", "  no forward and no host op"]
    assert plan_lines(drawn.explain(tiny, PROMPT)) == [
        *first,
        stage,
        f"  {begins}  forward  specialised when the run reaches it",
    ]
    random.seed(1)
    layers = [int(drawn(tiny, PROMPT)[0])]
    only = f"  {begins}  forward of GPT2LMHeadModel  reads transformer.h.{layers[0]} output; ends after it"
    assert plan_lines(drawn.explain(tiny, PROMPT)) == [*first, f"{stage}, given layer={layers[0]}", only]
    while len(layers) < 3:
        layer, _ = drawn(tiny, PROMPT)
        layers += [layer] * (layer not in layers)
    expected = [*first, f"{stage}; specialised 3 times so far"]
    for layer in layers:
        reads = f"reads transformer.h.{layer} output; ends after it"
        expected += [f"  given layer={layer}", f"    {begins}  forward of GPT2LMHeadModel  {reads}"]
    assert plan_lines(drawn.explain(tiny, PROMPT)) == expected


def test_host_ops_say_where_they_run(tiny: LanguageModel) -> None:
    forward, loop, condition = map(line_of, ("with model.trace(prompt):  # host", "for each in", "if function(each)"))
    inside, then = line_of("function(model.layers[1]"), line_of("function(each + 1)")
    host_op = "host op `function(…)`     "
    known = "not in the table of known calls"
    assert plan_lines(host.explain(tiny, PROMPT, functools.partial(str), 2)) == [
        "experiment host",
        "stage 1",
        f"  test_explain.py:{forward}  forward of GPT2LMHeadModel  reads transformer.h.1 output, the model output;"
        " writes transformer.h.0.mlp output; runs to its end",
        f"  test_explain.py:{inside}  {host_op}  {known}; in the middle of the forward, at transformer.h.1 output",
        f"  test_explain.py:{condition}  {host_op}  {known}; in each round of line {loop}",
        f"  test_explain.py:{then}  {host_op}  {known}; in each round of line {loop}; if line {condition} says so",
        "A host op runs as it is, each time its line is reached; it may read and change whatever it can get at.",
    ]


def test_many_variants_are_folded() -> None:
    @intervene
    def one_of(net: Any, x: Any, layer: list[int]) -> Any:
        number = layer.pop()
        with net.trace(x):  # one of
            return net[number].output

    net, x = NNsight(nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)))), torch.ones(1, 2)
    for layer in range(7):
        one_of(net, x, [layer])
    place = f"test_explain.py:{line_of('with net.trace(x):  # one of')}"
    expected = ["experiment one_of", "stage 1", "  no forward and no host op"]
    expected += [f"stage 2 begins at {place}, where it must be known which module this is; specialised 7 times so far"]
    for layer in range(4):
        expected += [
            f"  given number={layer}",
            f"    {place}  forward of Sequential  reads {layer} output; ends after it",
        ]
    expected += ["  and 3 more: given number=4; or number=5; or number=6"]
    assert plan_lines(one_of.explain(net, x, [0])) == expected


def test_what_a_stage_is_given_reads_as_the_source() -> None:
    @intervene
    def told(net: Any, x: Any, text: str) -> Any:
        try:
            number = int(text)
        except ValueError:
            number = 0
        with net.trace(x):  # told
            return net[number % 2].output

    net, x = NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), torch.ones(1, 2)
    told(net, x, "3")
    place = f"test_explain.py:{line_of('with net.trace(x):  # told')}"
    assert plan_lines(told.explain(net, x, "3"))[3:] == [
        f"stage 2 begins at {place}, where it must be known which module this is, given number % 2=1",
        f"  {place}  forward of Sequential  reads 1 output; ends after it",
    ]


def test_files_elsewhere_have_their_whole_path(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert f"  {HERE}:{line_of('with model.trace(prompt):  # lens')}  forward of" in str(lens.explain(tiny, PROMPT))


def test_as_data_holds_lines_as_numbers(tiny: LanguageModel) -> None:
    data = lens.with_options(without={"fuse_calls"}).explain(tiny, PROMPT).as_data()
    [stage] = data["stages"]
    [variant] = stage["variants"]
    assert variant["given"] == ("len(transformer.h)=3",)
    assert [(step["kind"], step["line"], step["times"]) for step in variant["steps"]] == [
        ("forward", line_of("with model.trace(prompt):  # lens"), 1),
        ("module", line_of("return torch.stack("), 3),
        ("module", line_of("return torch.stack("), 3),
    ]
    assert {step["file"] for step in variant["steps"]} == {str(HERE)}


# --- what forwards cost ---


class Toy(nn.Module):
    """Three layers of width 4, and a head of width 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@intervene(without=[name for name in OPTIMISATIONS if name != "stop_early"])
def moved(net: Any, x: Any, others: Any) -> Any:
    with net.trace(x):  # moved from
        source = net.layers[1].output
    outputs = []
    for other in others:
        with net.trace(other):  # moved to
            net.layers[1].output = source
            outputs.append(net.head.output.save())
    return outputs


@pytest.fixture
def toy() -> NNsight:
    return NNsight(Toy().eval())


@pytest.fixture
def inputs() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.ones(2, 4), [torch.ones(2, 4)] * 3


LAYER, HEAD = 2 * 2 * 4 * 4, 2 * 2 * 4 * 2
"""Operations of one layer and of the head on two rows; what each gives is 32 and 16 bytes."""


def test_figures_are_those_worked_out_by_hand(toy: NNsight, inputs: Any) -> None:
    moved.cache_clear()
    one, other = (
        f"test_explain.py:{line_of(f'with net.trace({name}')}" for name in ("x):  # moved", "other):  # moved")
    )
    loop = line_of("for other in others")
    text = [
        "experiment moved",
        "stage 1",
        f"  {one}  forward of Toy  reads layers.1 output; ends after it",
        f"      estimate  2 rows; 2 of 3 layers; {2 * LAYER} FLOP; 96 B at the peak; 32 B kept",
        f"  {other}  forward of Toy  reads head output; writes layers.1 output; ends after head output; in each"
        f" round of line {loop}",
        "      estimate  its input is known only when it runs",
    ]
    assert lines_of(moved.explain(toy, *inputs)) == text
    moved.measure(toy, *inputs)  # the first run of these shapes runs to its end
    text.insert(4, f"      last run  2 rows; 3 of 3 layers; {3 * LAYER + HEAD} FLOP; 96 B at the peak; 32 B kept; # ms")
    text += [
        f"      last run  3 runs of the model; 6 rows; {3 * (3 * LAYER + HEAD)} FLOP; 96 B at the peak; 48 B kept;"
        " # ms",
        "last run: the model ran 4 times; # ms; 160 B at the peak",
    ]
    assert lines_of(moved.explain(toy, *inputs)) == text
    moved(toy, *inputs)
    text[4] = "      last run  2 rows; 2 of 3 layers; # ms"
    text[7:] = ["      last run  3 runs of the model; 6 rows; # ms", "last run: the model ran 4 times; # ms"]
    assert lines_of(moved.explain(toy, *inputs)) == text


def test_a_run_of_another_program_is_not_shown_beside_this_one(toy: NNsight, inputs: Any) -> None:
    @intervene
    def one(net: Any, x: Any, layer: int) -> Any:
        with net.trace(x):
            return net.layers[layer].output

    one(toy, inputs[0], 0)
    assert "last run" in str(one.explain(toy, inputs[0], 0))
    assert "last run" not in str(one.explain(toy, inputs[0], 1))
    assert one.explain(toy, inputs[0], 1).last_run is None


def test_a_forward_with_gradients_says_that_its_memory_is_not_estimated(toy: NNsight, inputs: Any) -> None:
    @intervene
    def sloped(net: Any, x: Any) -> Any:
        with net.trace(x):
            hidden = net.layers[1].output
            loss = net.output.sum()
            with loss.backward():
                grad = hidden.grad
        return grad

    [line] = [line.strip() for line in lines_of(sloped.explain(toy, inputs[0])) if "estimate" in line]
    assert line == (
        f"estimate  2 rows; 3 of 3 layers; {3 * LAYER + HEAD} FLOP; its memory is not estimated, since gradients are"
        " recorded"
    )


def test_where_a_cost_cannot_be_told_the_reason_is(toy: NNsight, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AxisError("the model takes ones only")

    monkeypatch.setattr(estimates, "cost_of", refused)
    moved(toy, *inputs)
    lines = [line.strip() for line in lines_of(moved.explain(toy, *inputs))]
    assert lines[3:5] == ["estimate  the model takes ones only", "last run  2 rows; # ms"]


def test_forwards_before_and_after_optimisation(toy: NNsight, inputs: Any) -> None:
    @intervene
    def wasted(net: Any, x: Any) -> Any:
        with net.trace(x):
            unused = net.layers[1].output.save()  # noqa: F841
        with net.trace(x):
            used = net.layers[2].output.save()
        return used

    found = wasted.with_options(without=[name for name in OPTIMISATIONS if name != "eliminate_dead_saves"]).explain(
        toy, inputs[0]
    )
    assert (found.forwards, found.forwards_written) == (1, 2)
    assert "2 forwards as written, 1 after optimisation" in str(found).splitlines()
    plain = wasted.with_options(without="all").explain(toy, inputs[0])
    assert (plain.forwards, plain.forwards_written) == (2, 2)
    assert "as written" not in str(plain)


def test_optimisations_say_what_they_did_or_why_not_with_their_lines(toy: NNsight, inputs: Any) -> None:
    compiled = moved.compile(toy, *inputs)
    span = Span(str(HERE), 7, 0, 7, 1)
    remarks = Remark("narrow", True, span, "one row"), Remark("narrow", False, replace(span, line=9), "a host op")
    lowered = moved._lowered(moved._options, (toy, *inputs), {})
    found = explanation_of("moved", replace(compiled, remarks=remarks), lowered, None, None)
    assert str(found).splitlines()[-3:] == [
        "optimisations",
        "  test_explain.py:7  narrow  one row",
        "  test_explain.py:9  narrow  not done: a host op",
    ]
    assert [(each.fired, each.line) for each in found.optimisations] == [(True, 7), (False, 9)]


FIGURES = {
    "forwards": int, "runs": int, "rows": (int, NoneType), "tokens": (int, NoneType), "modules": (int, NoneType),
    "of_modules": (int, NoneType), "layers": (int, NoneType), "of_layers": (int, NoneType), "skipped": int,
    "shared": int, "flops": (int, NoneType), "peak": (int, NoneType), "kept": (int, NoneType),
    "seconds": (float, NoneType),
}  # fmt: skip
SCHEMA = {
    "version": int, "name": str, "forwards": int, "forwards_written": (int, NoneType),
    "last_run": {"forwards": int, "seconds": float, "peak": (int, NoneType)},
    "crossings": [],
    "optimisations": [{"name": str, "fired": bool, "file": str, "line": int, "what": str}],
    "stages": [
        {
            "number": int, "file": str, "line": int, "needs": str,
            "variants": [
                {
                    "given": [str],
                    "steps": [
                        {
                            "kind": str, "file": str, "line": int, "what": str, "why": str, "within": [str],
                            "times": int, "unknown": str, "estimate": FIGURES, "last_run": FIGURES,
                        }
                    ],
                }
            ],
        }
    ],
}  # fmt: skip


def require(data: Any, schema: Any, where: str = "") -> None:
    """That data are as a schema says; what is a dict in it may be `None`."""
    if isinstance(schema, dict) and data is not None:
        assert data.keys() == schema.keys(), where
        for name, inner in schema.items():
            require(data[name], inner, f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(data, list), where
        for item in data:
            require(item, schema[0], f"{where}[]")
    elif data is not None or not isinstance(schema, dict):
        assert isinstance(data, schema), (where, data)


def test_the_data_have_the_documented_form(toy: NNsight, inputs: Any) -> None:
    moved.measure(toy, *inputs)
    data = json.loads(json.dumps(moved.explain(toy, *inputs).as_data()))
    require(data, SCHEMA)
    first = data["stages"][0]["variants"][0]["steps"][0]
    assert (first["estimate"]["flops"], first["estimate"]["layers"], first["last_run"]["rows"]) == (2 * LAYER, 2, 2)
    assert data["last_run"]["forwards"] == 4
