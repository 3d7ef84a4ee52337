"""Where what is known of a value meets what the program does to it: tensors as layers, `getattr`, the tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nnsight_compiler import LanguageModel, intervene

PROMPT = "The Eiffel Tower is in the city of"
COUNTER = torch.tensor(0)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


@pytest.fixture(scope="module")
def streams(tiny: LanguageModel) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
        for block in tiny._ready().get_submodule("transformer.h").children()
    ]
    with torch.no_grad():
        tiny(PROMPT)
    for handle in handles:
        handle.remove()
    return kept


def test_a_tensor_that_was_written_to_names_another_layer(tiny: LanguageModel, streams: list[torch.Tensor]) -> None:
    @intervene
    def stepped(model: Any, prompt: Any, layer: Any) -> Any:
        layer.add_(1)
        with model.trace(prompt):
            return model.layers[layer].output

    @intervene
    def counted(model: Any, prompt: Any) -> Any:
        COUNTER.add_(1)
        with model.trace(prompt):
            return model.layers[COUNTER].output

    assert torch.equal(stepped(tiny, PROMPT, torch.tensor(0)), streams[1])
    for layer in (1, 2):
        assert torch.equal(counted(tiny, PROMPT), streams[layer])


def test_getattr_of_a_module(tiny: LanguageModel) -> None:
    @intervene
    def drawn(model: Any, prompt: Any, names: Any) -> Any:
        name = random.choice(names)
        with model.trace(prompt):
            return getattr(model.layers[1], name).output

    with tiny.trace(PROMPT):
        attn, mlp = tiny.layers[1].attn.output[0].save(), tiny.layers[1].mlp.output.save()
    assert torch.equal(drawn(tiny, PROMPT, ["mlp"]), mlp)
    assert torch.equal(drawn(tiny, PROMPT, ["attn"])[0], attn)


def test_the_tokenizer_between_forwards(tiny: LanguageModel) -> None:
    @intervene
    def greedy(model: Any, prompt: Any, count: Any) -> Any:
        ids = model.tokenizer(prompt)["input_ids"]
        for _ in range(count):
            with model.trace(ids):
                token = model.lm_head.output[0, -1].argmax()
            ids = [*ids, int(token)]
        return model.tokenizer.decode(ids)

    ids = tiny.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            ids = [*ids, int(tiny(ids).logits[0, -1].argmax())]
    assert greedy(tiny, PROMPT, 3) == tiny.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["int", "remainder", "item"])
def test_a_layer_computed_from_a_tensor_in_the_body(
    tiny: LanguageModel, streams: list[torch.Tensor], kind: str
) -> None:
    @intervene
    def by_int(model, prompt, k):
        with model.trace(prompt):
            hidden = model.layers[int(k) % 3].output
        return hidden

    @intervene
    def by_remainder(model, prompt, k):
        with model.trace(prompt):
            hidden = model.layers[k % 3].output
        return hidden

    @intervene
    def by_item(model, prompt, k):
        with model.trace(prompt):
            seen = model.layers[0].output.sum()
            hidden = model.layers[k.item() % 3].output + 0 * seen
        return hidden

    run = {"int": by_int, "remainder": by_remainder, "item": by_item}[kind]
    for k in (torch.tensor(1), torch.tensor(5)):
        assert torch.equal(run(tiny, PROMPT, k), streams[int(k) % 3])


def test_a_layer_computed_in_the_body_from_an_earlier_forward(tiny: LanguageModel, streams: list[torch.Tensor]) -> None:
    @intervene
    def run(model, prompt):
        with model.trace(prompt):
            k = model.lm_head.output[0, -1].argmax()
        with model.trace(prompt):
            hidden = model.layers[k.item() % 3].output
        return k, hidden

    k, hidden = run(tiny, PROMPT)
    assert torch.equal(hidden, streams[int(k) % 3])
