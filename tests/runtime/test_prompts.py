"""A text that several forwards of one run are given is tokenised once; where code might change how, each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_compiler import LanguageModel, intervene


class Counting:
    """A tokenizer that notes what it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.given = tokenizer, []
        self.doubled = False

    def __call__(self, texts: list[str]) -> Any:
        self.given.append(list(texts))
        return self.tokenizer([text + text for text in texts] if self.doubled else texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture
def model(tiny: LanguageModel) -> LanguageModel:
    return LanguageModel(tiny._ready(), tokenizer=Counting(tiny.tokenizer))


CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


@intervene(without="all")
def patch(model, clean, corrupt):
    rows = []
    for layer in (0, 1, 2):
        with model.trace(clean):
            source = model.layers[layer].output[0, -1]
        with model.trace(corrupt):
            model.layers[layer].output[0, -1] = source
            rows.append(model.lm_head.output[0, -1])
    return torch.stack(rows)


@intervene(without="all")
def many(model, prompts, strengths):
    rows = []
    for prompt in prompts:
        for strength in strengths:
            with model.trace(prompt):
                model.layers[0].output[:] *= strength
                rows.append(model.lm_head.output[0, -1])
    return torch.stack(rows)


def test_each_text_is_tokenised_once_a_run(model: LanguageModel, tiny: LanguageModel) -> None:
    patch(model, CLEAN, CORRUPT)
    for _ in range(2):
        model.tokenizer.given.clear()
        result = patch(model, CLEAN, CORRUPT)
        assert model.tokenizer.given == [[CLEAN], [CORRUPT]]
    assert torch.equal(result, patch(tiny, CLEAN, CORRUPT))
    many(model, [CLEAN, CORRUPT], [1.0, 0.5, 2.0])
    model.tokenizer.given.clear()
    many(model, [CLEAN, CORRUPT], [1.0, 0.5, 2.0])
    assert model.tokenizer.given == [[CLEAN], [CORRUPT]]


def test_another_run_looks_again(model: LanguageModel) -> None:
    before = patch(model, CLEAN, CORRUPT)
    model.tokenizer.doubled = True
    assert not torch.equal(patch(model, CLEAN, CORRUPT), before)


@intervene(without="all")
def between(model, prompt, change):
    with model.trace(prompt):
        first = model.layers[0].output.shape
    change()
    with model.trace(prompt):
        second = model.layers[0].output.shape
    return first, second


@intervene(without="all")
def assigned(model, prompt, tokenizer):
    with model.trace(prompt):
        first = model.layers[0].output.shape
    tokenizer.doubled = True
    with model.trace(prompt):
        second = model.layers[0].output.shape
    return first, second


@pytest.mark.parametrize("run", [between, assigned])
def test_code_that_changes_the_tokenizer_is_heeded(model: LanguageModel, run: Any) -> None:
    given = model.tokenizer if run is assigned else lambda: setattr(model.tokenizer, "doubled", True)
    first, second = run(model, CLEAN, given)
    assert (first[1], second[1]) == (8, 16)


@intervene(without="all")
def changed(model, prompt):
    with model.trace(prompt):
        model.transformer.wte.input[:] = 5
        first = model.transformer.wte.input
    with model.trace(prompt):
        second = model.transformer.wte.input
    return first, second


def test_forwards_share_no_tensor(model: LanguageModel, tiny: LanguageModel) -> None:
    first, second = changed(model, CLEAN)
    assert (first == 5).all()
    assert second[0].tolist() == tiny.tokenizer([CLEAN])["input_ids"][0]
