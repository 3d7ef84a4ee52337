"""The cost of a job that is like an earlier one is that one's: it equals what looking again would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from admitting import Limits, job_of

from nnsight_compiler import Experiment, LanguageModel, intervene
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.service import admission
from nnsight_compiler.service.admission import Admitter, Cost, NotAdmittedError

SHORT, OTHER, LONG = "The Eiffel Tower", "The Eiffel Eiffel", "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny")


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Cost]:
    """The costs that were found by looking."""
    found: list[Cost] = []
    look = admission._cost

    def noted(*given: Any) -> Cost:
        found.append(look(*given))
        return found[-1]

    monkeypatch.setattr(admission, "_cost", noted)
    return found


@intervene
def steer(model, prompt, vector, strength, layer):
    with model.trace(prompt):
        model.layers[layer].output += vector * strength
        logits = model.lm_head.output[:, -1]
    return logits


@intervene
def rounds(model, prompt, times):
    kept = []
    for number in range(times):
        with model.trace(prompt):
            model.layers[0].output[:] *= number
            kept.append(model.layers[1].output)
    return kept


@intervene
def sized(model, prompt, width):
    with model.trace(prompt):
        hidden = model.layers[1].output
    return hidden, torch.zeros(int(width * 10))


@intervene
def told(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[1].output
    return hidden, prompt * 100


def of(experiment: Experiment, model: LanguageModel, *values: Any) -> Any:
    names = [parameter.value.name for parameter in experiment.ir.parameters]
    return job_of(experiment, dict(zip(names, (model, *values), strict=True)))


VECTOR = torch.linspace(-1, 1, 128)
CALLS: list[tuple[Experiment, tuple[Any, ...], bool]] = [
    (steer, (SHORT, VECTOR, 2.0, 1), True),
    (steer, (SHORT, VECTOR, 2.0, 1), False),
    (steer, (OTHER, VECTOR + 1, -3.5, 1), False),
    (steer, (LONG, VECTOR, 2.0, 1), True),
    (steer, (SHORT, VECTOR, 2.0, 2), True),
    (steer, (SHORT, VECTOR[None, None], 2.0, 1), True),
    (steer, (SHORT, VECTOR, 2, 1), True),
    (steer, (LONG, VECTOR, 0.0, 1), False),
    (rounds, (SHORT, 3), True),
    (rounds, (OTHER, 3), False),
    (rounds, (SHORT, 4), True),
    (rounds, (SHORT, 3), False),
    (sized, (SHORT, 1.5), True),
    (sized, (SHORT, 2.5), True),
    (sized, (OTHER, 2.5), False),
    (told, (SHORT,), True),
    (told, (OTHER,), True),
    (told, (SHORT,), False),
]


def test_what_is_known_is_what_looking_again_says(model: LanguageModel, looked: list[Cost]) -> None:
    assert len(model.tokenizer(SHORT).input_ids) == len(model.tokenizer(OTHER).input_ids)
    admitter = Admitter(Executor(model))
    for experiment, values, new in CALLS:
        before = len(looked)
        admitted = admitter.admit(of(experiment, model, *values), Limits())
        assert (len(looked) > before) == new, (experiment, values)
        assert admitted == Admitter(Executor(model)).admit(of(experiment, model, *values), Limits())


def test_limits_are_asked_again(model: LanguageModel, looked: list[Cost]) -> None:
    admitter, job = Admitter(Executor(model)), of(rounds, model, SHORT, 3)
    admitter.admit(job, Limits())
    admitter.admit(job, Limits(forwards=3))
    with pytest.raises(NotAdmittedError, match="this runs the model 3 times, and 2 are allowed"):
        admitter.admit(job, Limits(forwards=2))
    with pytest.raises(NotAdmittedError, match="this runs the model 3 times, and 2 are allowed"):
        admitter.admit(job, Limits(forwards=2))
    admitter.admit(job, Limits())
    assert len(looked) == 2


def test_data_of_other_kinds_is_looked_at_each_time(model: LanguageModel, looked: list[Cost]) -> None:
    @intervene
    def listed(model, prompt, held):
        with model.trace(prompt):
            hidden = model.layers[1].output
        return hidden, held

    admitter = Admitter(Executor(model))
    for held, new in (([1, (2, "x")], 1), ([1, (2, "x")], 1), ([1, (2, "y")], 2), ({1, 2}, 3), ({1, 2}, 4),
                      (list(range(2000)), 5), (list(range(2000)), 6)):  # fmt: skip
        admitter.admit(of(listed, model, SHORT, held), Limits())
        assert len(looked) == new, held
