"""Generations of rounds of which one fails in a step: effects and the exception are those of unoptimised code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_failing_rounds import ended
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel, intervene

PROMPT = torch.tensor([[3, 14, 15, 9]])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=41, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    made = GPT2LMHeadModel(config).eval()
    assert made.generation_config is not None
    made.generation_config.pad_token_id = 0
    return LanguageModel(made)


@intervene
def before_the_steps(model, prompt, start, stop):
    for number in range(start, stop):
        print("begins", number)
        with model.generate(prompt, max_new_tokens=3, do_sample=False) as tracer:
            print("inside", number, model.transformer.h[0].output.shape)
            hidden = model.transformer.h[1].output[0, [number]]
            ids = tracer.result
        print("ends", number, hidden.shape, ids.shape)


@intervene
def in_a_step(model, prompt, start, stop):
    for number in range(start, stop):
        with model.generate(prompt, max_new_tokens=3, do_sample=False) as tracer:
            tokens = []
            for _step in tracer.iter[:]:
                tokens.append(model.lm_head.output[0, -1].argmax())
                model.transformer.h[1].output[:, -1] *= 1 / (4 - number)
            ids = tracer.result
        print("ends", number, len(tokens), ids.shape)


@intervene
def of_the_result(model, prompt, start, stop):
    for number in range(start, stop):
        with model.generate(prompt, max_new_tokens=3, do_sample=False) as tracer:
            print("inside", number)
            token = tracer.result[0, [number + 3]]
        print("ends", number, token.shape)


PROGRAMS = [before_the_steps, in_a_step, of_the_result]


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 6), (4, 6), (3, 5)])
@pytest.mark.parametrize("experiment", PROGRAMS, ids=lambda each: each.__name__)
def test_what_a_round_did_before_a_step_failed(model: LanguageModel, experiment: Any, start: int, stop: int) -> None:
    plain = experiment.with_options(without="all")
    for _ in range(2):
        found, wanted = (ended(lambda: each(model, PROMPT, start, stop)) for each in (experiment, plain))  # noqa: B023
        assert found[1:3] == wanted[1:3]
        assert (wanted[2] != "") == (stop > 4), wanted[2]
