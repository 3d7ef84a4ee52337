"""What this version does not run is refused by name and line, decorated or not; nothing is ignored."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, LanguageModel, NNsight, intervene


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('model.trace(x, max_new_tokens=3)', "these are arguments of `generate`"),
        ('model.trace(x, **{"remote": True})', "`trace` takes no remote here: `remote=` is said in a trace of the"),
        ('model.trace(x, backend=1)', "`trace` takes no backend here"),
    ],
)  # fmt: skip
def test_arguments_that_a_forward_would_ignore(tiny: LanguageModel, header: str, reason: str) -> None:
    body = f"    with {header}:\n        out = model.output.save()\n"
    experiment = intervene.from_source(f"def use(model, x):\n{body}    return out\n")
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        experiment(tiny, "The Eiffel Tower")
    assert found.value.diagnostics[0].span.line == 2


def test_the_same_undecorated(tiny: LanguageModel) -> None:
    with pytest.raises(ExperimentError, match="`trace` takes no backend here"), tiny.trace("a", backend=1):
        tiny.output.save()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("for step in tracer.iter[:2]: pass", "`trace` runs one forward, which has no steps"),
        ("tracer.log(1)", "a tracer has no `.log`"),
        ("tracer.foo", "a tracer has no `.foo`"),
        ("tracer.all(1)", "`tracer.all` is not called like this"),
    ],
)
def test_what_a_tracer_has_not(line: str, reason: str) -> None:
    body = f"    with model.trace(x) as tracer:\n        {line}\n        out = model.output\n"
    text = f"def use(model, x):\n{body}    return out\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(NNsight(nn.Sequential(nn.Linear(4, 4))), torch.ones(1, 4))
    assert found.value.diagnostics[0].span.line == 3
    assert "way out" in str(found.value)


def test_a_scan_runs_here(tiny: LanguageModel) -> None:
    with (
        pytest.raises(ExperimentError, match="`scan` takes no remote: it needs no weights"),
        tiny.scan("a", remote=True),
    ):
        tiny.output.save()
