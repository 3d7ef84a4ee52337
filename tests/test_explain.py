"""What `explain` says: stages, forwards, host ops, each with its line; before a run and after."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, intervene

HERE = Path(__file__)
PROMPT = "The Eiffel Tower is in the city of"
LAYERS = [0, 1, 2]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


@pytest.fixture(autouse=True)
def working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)


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
    assert str(lens.explain(tiny, PROMPT)).splitlines() == [
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
    assert str(drawn.explain(tiny, PROMPT)).splitlines() == [
        *first,
        stage,
        f"  {begins}  forward  specialised when the run reaches it",
    ]
    random.seed(1)
    layers = [int(drawn(tiny, PROMPT)[0])]
    only = f"  {begins}  forward of GPT2LMHeadModel  reads transformer.h.{layers[0]} output; ends after it"
    assert str(drawn.explain(tiny, PROMPT)).splitlines() == [*first, f"{stage}, given layer={layers[0]}", only]
    while len(layers) < 3:
        layer, _ = drawn(tiny, PROMPT)
        layers += [layer] * (layer not in layers)
    expected = [*first, f"{stage}; specialised 3 times so far"]
    for layer in layers:
        reads = f"reads transformer.h.{layer} output; ends after it"
        expected += [f"  given layer={layer}", f"    {begins}  forward of GPT2LMHeadModel  {reads}"]
    assert str(drawn.explain(tiny, PROMPT)).splitlines() == expected


def test_host_ops_say_where_they_run(tiny: LanguageModel) -> None:
    forward, loop, condition = map(line_of, ("with model.trace(prompt):  # host", "for each in", "if function(each)"))
    inside, then = line_of("function(model.layers[1]"), line_of("function(each + 1)")
    host_op = "host op `function(…)`     "
    known = "not in the table of known calls"
    assert str(host.explain(tiny, PROMPT, functools.partial(str), 2)).splitlines() == [
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
    assert str(one_of.explain(net, x, [0])).splitlines() == expected


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
    assert str(told.explain(net, x, "3")).splitlines()[3:] == [
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
    data = lens.explain(tiny, PROMPT).as_data()
    [stage] = data["stages"]
    [variant] = stage["variants"]
    assert variant["given"] == ("len(transformer.h)=3",)
    assert [(step["kind"], step["line"], step["times"]) for step in variant["steps"]] == [
        ("forward", line_of("with model.trace(prompt):  # lens"), 1),
        ("module", line_of("return torch.stack("), 3),
        ("module", line_of("return torch.stack("), 3),
    ]
    assert {step["file"] for step in variant["steps"]} == {str(HERE)}
