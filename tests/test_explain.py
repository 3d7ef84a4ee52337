"""What `explain` says of stages, forwards and host ops, before a run and after."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_compiler import LanguageModel, intervene

PROMPT = "The Eiffel Tower is in the city of"
HERE = str(Path(__file__))


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel("tiny")


def line(text: str) -> int:
    """The number of the line of this file that ends in a comment."""
    return 1 + next(
        number for number, each in enumerate(Path(__file__).read_text().splitlines()) if each.endswith(text)
    )


@intervene
def wander(model: Any, prompt: Any, log: Any) -> Any:
    with model.trace(prompt):  # first
        hidden = model.layers[0].output[0, -1]
        model.layers[1].mlp.output[:] = 0
        logits = model.lm_head.output
    log(hidden.shape)  # host
    layer = random.choice([1, 2])
    with model.trace(prompt):  # second
        found = model.layers[layer].output
    return layer, found, logits


def test_stages_forwards_and_host_ops_are_told_with_lines_and_reasons(model: Any) -> None:
    seen: list[Any] = []
    before = wander.explain(model, PROMPT, seen.append)
    assert not seen
    first, second = before.stages
    (variant,) = first.variants
    forward, host = variant.steps
    assert (forward.kind, forward.place) == ("forward", f"{HERE}:{line('# first')}")
    assert forward.what == "forward of GPT2LMHeadModel"
    assert forward.why == (
        "reads transformer.h.0 output, lm_head output; writes transformer.h.1.mlp output; ends after lm_head output"
    )
    assert (host.kind, host.place, host.what) == ("host", f"{HERE}:{line('# host')}", "host op `log(…)`")
    assert "not in the table of known calls" in host.why
    assert (second.place, second.needs) == (f"{HERE}:{line('# second')}", "which module this is")
    ((step,),) = [each.steps for each in second.variants]
    assert step.why == "specialised when the run reaches it"


def test_what_runs_have_specialised_is_told(model: Any) -> None:
    found = set()
    for seed in range(6):
        random.seed(seed)
        layer, _, _ = wander(model, PROMPT, len)
        found.add(layer)
    _, second = wander.explain(model, PROMPT, len).stages
    assert {given for variant in second.variants for given in variant.given} == {f"layer={layer}" for layer in found}
    text = str(wander.explain(model, PROMPT, len))
    assert f"stage 2 begins at {HERE}:{line('# second')}, where it must be known which module this is" in text
    assert f"reads transformer.h.{layer} output; ends after transformer.h.{layer} output" in text


class Look:
    def __call__(self, value: Any) -> None:
        self.seen = value.shape


def test_a_call_inside_a_forward_says_where(model: Any) -> None:
    @intervene
    def inside(model: Any, prompt: Any, look: Any) -> Any:
        with model.trace(prompt):
            look(model.layers[1].output)
            out = model.output
        return out

    ((_, host),) = [variant.steps for variant in inside.explain(model, PROMPT, Look()).stages[0].variants]
    assert host.what == "host op `look(…)`"
    assert host.why.endswith("in the middle of the forward, at transformer.h.1 output")


def test_a_module_called_in_the_body_is_told(model: Any) -> None:
    @intervene
    def called(model: Any, prompt: Any) -> Any:
        with model.trace(prompt):
            logits = model.lm_head(model.layers[0].output)
        return logits

    steps = called.explain(model, PROMPT).stages[0].variants[0].steps
    assert [(step.kind, step.what) for step in steps] == [
        ("forward", "forward of GPT2LMHeadModel"),
        ("module", "module call `lm_head(…)`"),
    ]


def test_the_data_is_plain(model: Any) -> None:
    data = wander.explain(model, PROMPT, len).as_data()
    assert json.loads(json.dumps(data))["stages"][1]["needs"] == "which module this is"
    assert torch.is_tensor(wander(model, PROMPT, len)[1])
