"""Sweeps on the architectures of transformers, optimised, against hooks: rows, prefixes and parts of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from nnsight_compiler import LanguageModel, intervene
from tests.support.architectures import FAMILIES, random_model
from tests.support.chosen import some


@intervene
def sweep(model, ids, vectors):
    found = []
    for layer in range(len(model.layers)):
        for vector in vectors:
            with model.trace(ids):
                model.layers[layer].output[:, 1:] += vector
                last = model.lm_head.output[:, -1]
            found.append(last)
    return found


def by_hand(module: Any, layers: Any, given: dict[str, Any], vectors: list[Tensor]) -> list[Tensor]:
    found = []
    for layer in layers:
        for vector in vectors:

            def add(part: Any, args: Any, output: Any, vector: Tensor = vector) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                first = torch.cat([first[:, :1], first[:, 1:] + vector], 1)
                return (first, *output[1:]) if isinstance(output, tuple) else first

            handle = layer.register_forward_hook(add)
            try:
                with torch.no_grad():
                    found.append(module(**given).logits[:, -1])
            finally:
                handle.remove()
    return found


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", some(FAMILIES, "gpt2", "gemma2", "opt", "mixtral"))
def test_a_sweep_over_layers_and_vectors(kind: str) -> None:
    module = random_model(kind)
    model, ids = LanguageModel(module), torch.tensor([[5, 17, 3, 42, 8], [9, 1, 7, 7, 30]])
    vectors = list(torch.randn(3, 32))
    found = sweep(model, ids, vectors)
    softcap = getattr(module.config, "final_logit_softcapping", None)
    wanted = by_hand(module, [layer._module for layer in model.layers], {"input_ids": ids}, vectors)
    assert_near([torch.tanh(each / softcap) * softcap if softcap else each for each in found], wanted)


def test_states_that_the_model_collects_are_those_of_the_rows() -> None:
    @intervene
    def collected(model, ids, vectors):
        found = []
        for vector in vectors:
            with model.trace(ids, output_hidden_states=True):
                model.layers[1].output[:, 1:] += vector
                states = model.output.hidden_states
            found.append(states[0] + states[-1])
        return found

    module = random_model("llama")
    vectors, ids = list(torch.randn(3, 32)), torch.tensor([[5, 17, 3, 42, 8]])
    assert_near(
        collected(LanguageModel(module), ids, vectors),
        collected.with_options(without="all")(LanguageModel(module), ids, vectors),
    )


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_encoder_decoder(side: str) -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    module = T5ForConditionalGeneration(config).eval()
    experiments = {}
    for name in ("encoder", "decoder"):
        source = (
            "def sweep(model, ids, start, vectors):\n"
            "    found = []\n"
            "    for layer in range(2):\n"
            "        for vector in vectors:\n"
            "            with model.trace(ids, decoder_input_ids=start):\n"
            f"                model.{name}.block[layer].layer[0].output[0][:, 1:] += vector\n"
            "                last = model.lm_head.output[:, -1]\n"
            "            found.append(last)\n"
            "    return found\n"
        )
        experiments[name] = intervene.from_source(source, {})
    ids, start, vectors = torch.tensor([[5, 17, 3, 42, 8]]), torch.tensor([[0, 4, 9]]), list(torch.randn(3, 32))
    experiment = experiments[side]
    found = experiment(LanguageModel(module), ids, start, vectors)
    layers = [block.layer[0] for block in getattr(module, side).block]
    assert_near(found, by_hand(module, layers, {"input_ids": ids, "decoder_input_ids": start}, vectors))
    fired = {
        remark.optimisation
        for remark in experiment.compile(LanguageModel(module), ids, start, vectors).remarks
        if remark.fired
    }
    assert "share_prefixes" in fired
