"""A prompt gives the same in a batch as alone, on many architectures. The oracle is the plain model, one prompt at a
time, with torch's own hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from chosen import some
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, intervene
from nnsight_compiler.ir.errors import RunError

torch.set_num_threads(1)

LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {**LAYERS, "num_key_value_heads": 2, "head_dim": 4}
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32},
        ("transformer.wte", "transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp.c_fc"),
    ),
    "llama": ("LlamaForCausalLM", CAUSAL, ("model.layers.1", "model.layers.1.self_attn.q_proj")),
    "mistral": ("MistralForCausalLM", {**CAUSAL, "sliding_window": 4}, ("model.layers.1",)),
    "qwen3": ("Qwen3ForCausalLM", CAUSAL, ("model.layers.1.self_attn.q_norm",)),
    "gemma2": ("Gemma2ForCausalLM", {**CAUSAL, "sliding_window": 4}, ("model.layers.1",)),
    "gemma3": ("Gemma3ForCausalLM", {**CAUSAL, "sliding_window": 4}, ("model.layers.1.self_attn.q_norm",)),
    "phi": ("PhiForCausalLM", LAYERS, ("model.layers.1.mlp.fc1",)),
    "neox": ("GPTNeoXForCausalLM", LAYERS, ("gpt_neox.layers.1.attention",)),
    "opt": ("OPTForCausalLM", OPT, ("model.decoder.layers.1.fc1", "model.decoder.layers.1.final_layer_norm")),
    "bloom": ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4}, ("transformer.h.1",)),
    "mixtral": (
        "MixtralForCausalLM",
        {**CAUSAL, "num_local_experts": 4},
        ("model.layers.1.mlp", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts"),
    ),
    "bert": ("BertForMaskedLM", {**LAYERS, "max_position_embeddings": 32}, ("bert.encoder.layer.1",)),
    "roberta": (
        "RobertaForMaskedLM",
        {**LAYERS, "max_position_embeddings": 32, "pad_token_id": 1},
        ("roberta.embeddings", "roberta.encoder.layer.1"),
    ),
    "t5": ("T5ForConditionalGeneration", T5, ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1")),
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, ("backbone.layers.1",)),
}


def build(name: str) -> LanguageModel:
    cls, sizes, _ = ARCHITECTURES[name]
    return LanguageModel(loaded(cls, sizes))


def loaded(cls: str, sizes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    module: nn.Module = kind._from_config(kind.config_class(**{**TOKENS, **sizes})).eval()
    for parameter in module.parameters():  # so that logits differ by more than rounding
        if parameter.dim() > 1 and cls != "MambaForCausalLM":
            parameter.data *= 5
    return module


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, shape, generator=generator) for shape in ((1, 9), (2, 5), (1, 7))]


def extras(name: str) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.tensor([[3, 7, 9]])} if name == "t5" else {}


def given(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids} | {key: value.expand(len(ids), -1) for key, value in extras(name).items()}


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def alone(module: nn.Module, path: str, inputs: dict[str, torch.Tensor], scale: float = 1) -> tuple[Any, Any]:
    """What the module at `path` gives, and the logits; the former scaled on its way on."""
    kept = {}

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        kept["value"] = first(output).clone()
        if scale == 1:
            return None
        return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = module(**inputs).logits
    finally:
        handle.remove()
    return kept["value"], logits


@intervene
def read_all(model, paths, inputs):
    kept = []
    with model.trace() as tracer:
        for each in inputs:
            with tracer.invoke(**each):
                values = []
                for path in paths:
                    values.append(model[path].output)
                kept.append((values, model.output.logits))
    return kept


@intervene
def scale_one(model, path, inputs, scale):
    kept = []
    with model.trace() as tracer:
        for number, each in enumerate(inputs):
            with tracer.invoke(**each):
                if number == 1:
                    value = model[path].output
                    if isinstance(value, tuple):
                        model[path].output[0][:] *= scale
                    else:
                        model[path].output = value * scale
                kept.append(model.output.logits)
    return kept


@pytest.mark.parametrize("name", some(ARCHITECTURES, "gemma3", "opt", "bert", "t5"))
def test_a_prompt_gives_in_a_batch_what_it_gives_alone(name: str) -> None:
    model = build(name)
    inputs = [given(name, ids) for ids in prompts()]
    paths = ARCHITECTURES[name][2]
    for each, (values, logits) in zip(inputs, read_all(model, paths, inputs), strict=True):
        for path, value in zip(paths, values, strict=True):
            expected, expected_logits = alone(model._wrapped, path, each)
            torch.testing.assert_close(first(value), expected, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", some(["gpt2", "opt", "mixtral", "bert"], "opt", "mixtral"))
def test_a_write_in_one_invoke_changes_that_one_as_alone(name: str) -> None:
    model, path = build(name), ARCHITECTURES[name][2][-1]
    inputs = [given(name, ids) for ids in prompts()]
    found = scale_one(model, path, inputs, 3.0)
    for number, (each, logits) in enumerate(zip(inputs, found, strict=True)):
        expected = alone(model._wrapped, path, each, 3.0 if number == 1 else 1)[1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)
        if number == 1:
            assert not torch.allclose(expected, alone(model._wrapped, path, each)[1], atol=1e-3)


def test_in_place_where_rows_and_tokens_are_one_dimension() -> None:
    """Two rows of an invoke, padding between them: what is read is a copy, and what is written reaches the model."""
    model = build("opt")
    long, pair, _ = prompts()

    @intervene
    def zeroed(model: Any, long: Any, pair: Any) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(long):
                plain = model.output.logits
            with tracer.invoke(pair):
                model.model.decoder.layers[1].fc1.output[0] = 0
                changed = model.output.logits
        return plain, changed

    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        output[0] = 0

    plain, changed = zeroed(model, long, pair)
    path = "model.decoder.layers.1.fc1"
    torch.testing.assert_close(plain, alone(model._wrapped, path, {"input_ids": long})[1], atol=1e-4, rtol=1e-3)
    handle = model._wrapped.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        expected = model._wrapped(input_ids=pair).logits
    handle.remove()
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-3)


def test_attention_has_two_dimensions_of_tokens() -> None:
    model = LanguageModel(loaded("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4}))
    inputs = prompts()

    @intervene
    def patterns(model: Any, inputs: Any) -> Any:
        kept = []
        with model.trace() as tracer:
            for ids in inputs:
                with tracer.invoke(ids):
                    kept.append(model.transformer.h[1].self_attention.attention_dropout.input)
        return kept

    for ids, found in zip(inputs, patterns(model, inputs), strict=True):
        kept = []
        module = model._wrapped.transformer.h[1].self_attention.attention_dropout
        handle = module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        with torch.no_grad():
            model._wrapped(input_ids=ids)
        handle.remove()
        assert found.shape == (len(ids), 4, ids.shape[1], ids.shape[1])
        torch.testing.assert_close(found, kept[0], atol=1e-5, rtol=1e-3)


def test_a_model_whose_positions_count_padding_is_refused_by_name() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    model = LanguageModel(loaded("BartForConditionalGeneration", {**sizes, **heads, "decoder_start_token_id": 2}))
    ids = prompts()
    start = torch.tensor([[3, 7, 9]])
    same = [{"input_ids": ids[0], "decoder_input_ids": start}] * 2
    read_all(model, ("model.encoder.layers.0",), same)  # of one length they may
    other = [same[0], {"input_ids": ids[2], "decoder_input_ids": start}]
    with pytest.raises(
        Exception, match="a BartForConditionalGeneration gives other values for a prompt that has padding"
    ):
        read_all(model, ("model.encoder.layers.0",), other)


def test_what_experts_are_given_in_an_order_of_their_own_is_refused() -> None:
    model = build("mixtral")
    with pytest.raises(RunError, match=r"counts 2\*rows\*tokens, in an order that is not known"):
        read_all(model, ("model.layers.1.mlp.experts.act_fn",), [given("mixtral", ids) for ids in prompts()])


def test_what_depends_on_the_router_is_refused_before_the_run() -> None:
    module = loaded("MixtralForCausalLM", {**CAUSAL, "num_local_experts": 4})
    module.set_experts_implementation("eager")
    path = "model.layers.1.mlp.experts.act_fn"
    with pytest.raises(CompileError):
        read_all(LanguageModel(module), (path,), [given("mixtral", ids) for ids in prompts()])
