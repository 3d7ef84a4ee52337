"""The values of attention on many architectures: against transformers' own pattern, from an eager copy of the same
weights, and against the products that define them, written out in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from chosen import some
from torch import nn

from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.attention import form_of
from nnsight_compiler.runtime.operations import Operations

torch.set_num_threads(1)

LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {**LAYERS, "num_key_value_heads": 2}
HEADS = {**CAUSAL, "head_dim": 4}
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32}
BOTH = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4}
VALUES = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True)
class Architecture:
    """A small model.

    attention: the path of an attention module, the second where there are several kinds.
    patterns: what its output calls its patterns, and which of them is that of the module.
    scale: what `q·k` is multiplied with; `None` where that is one over the root of the width. bias: whether something
    else is added to it. sinks: whether its softmax has an entry more, which no key has.
    """

    model: str
    sizes: dict[str, Any]
    attention: str
    patterns: str = "attentions"
    scale: float | None = None
    bias: bool = False
    sinks: bool = False

    def build(self, implementation: str) -> nn.Module:
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        made = kind._from_config(kind.config_class(**{**TOKENS, **self.sizes}), attn_implementation=implementation)
        with torch.no_grad():
            for weight in made.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)
        return made.eval()

    def build_fast(self) -> nn.Module:
        """With torch's kernel, where transformers has it for the architecture."""
        try:
            return self.build("sdpa")
        except ValueError:
            return self.build("eager")

    def inputs(self) -> dict[str, torch.Tensor]:
        """Two prompts, the first padded on the left."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 50, (2, 6), generator=generator)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :2] = 0
        match self.model:
            case "ViTModel":
                return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
            case "WhisperForConditionalGeneration":
                return {"input_features": torch.randn(2, 8, 12, generator=generator), "decoder_input_ids": ids}
            case "T5ForConditionalGeneration" | "BartForConditionalGeneration":
                return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
        return {"input_ids": ids, "attention_mask": mask}


SELF = "model.layers.1.self_attn"
ARCHITECTURES = {
    "gpt2": Architecture("GPT2LMHeadModel", OLD, "transformer.h.1.attn"),
    "llama": Architecture("LlamaForCausalLM", HEADS, SELF),
    "mistral": Architecture("MistralForCausalLM", {**HEADS, "sliding_window": 3}, SELF),
    "qwen2": Architecture("Qwen2ForCausalLM", CAUSAL, SELF),
    "qwen3": Architecture("Qwen3ForCausalLM", HEADS, SELF),
    "gemma": Architecture("GemmaForCausalLM", HEADS, SELF),
    "gemma2": Architecture("Gemma2ForCausalLM", {**HEADS, "sliding_window": 3}, SELF, scale=256**-0.5, bias=True),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", {**HEADS, "sliding_window": 3}, "model.layers.0.self_attn", scale=256**-0.5
    ),
    "phi": Architecture("PhiForCausalLM", LAYERS, SELF),
    "phi3": Architecture("Phi3ForCausalLM", CAUSAL, SELF),
    "neox": Architecture("GPTNeoXForCausalLM", LAYERS, "gpt_neox.layers.1.attention"),
    "opt": Architecture(
        "OPTForCausalLM",
        {**LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "model.decoder.layers.1.self_attn",
        scale=1.0,
    ),
    "mixtral": Architecture("MixtralForCausalLM", {**HEADS, **EXPERTS}, SELF),
    "gpt_oss": Architecture("GptOssForCausalLM", {**HEADS, **EXPERTS, "sliding_window": 3}, SELF, sinks=True),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", OLD, "transformer.h.1.attn"),
    "stablelm": Architecture("StableLmForCausalLM", CAUSAL, SELF, scale=0.5),
    "starcoder2": Architecture("Starcoder2ForCausalLM", CAUSAL, SELF),
    "olmo2": Architecture("Olmo2ForCausalLM", CAUSAL, SELF),
    "cohere": Architecture("CohereForCausalLM", CAUSAL, SELF),
    "granite": Architecture("GraniteForCausalLM", CAUSAL, SELF, scale=1.0),
    "biogpt": Architecture(
        "BioGptForCausalLM", {**LAYERS, "max_position_embeddings": 32}, "biogpt.layers.1.self_attn"
    ),
    "bloom": Architecture(
        "BloomForCausalLM", {"n_layer": 2, "n_head": 4, "hidden_size": 16}, "transformer.h.1.self_attention", bias=True
    ),
    "gptj": Architecture("GPTJForCausalLM", {**OLD, "rotary_dim": 4}, "transformer.h.1.attn"),
    "codegen": Architecture("CodeGenForCausalLM", {**OLD, "rotary_dim": 4}, "transformer.h.1.attn"),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "hidden_size": 16, "attention_types": [[["global", "local"], 1]],
         "window_size": 3, "max_position_embeddings": 32},
        "transformer.h.1.attn.attention",
        scale=1.0,
    ),
    "falcon": Architecture("FalconForCausalLM", LAYERS, "transformer.h.1.self_attention"),
    "mpt": Architecture(
        "MptForCausalLM",
        {"n_layers": 2, "n_heads": 4, "d_model": 16, "max_seq_len": 32},
        "transformer.blocks.1.attn",
        bias=True,
    ),
    "xglm": Architecture(
        "XGLMForCausalLM",
        {"num_layers": 2, "attention_heads": 4, "d_model": 16, "ffn_dim": 24, "max_position_embeddings": 32},
        SELF,
        scale=1.0,
    ),
    "openai": Architecture("OpenAIGPTLMHeadModel", OLD, "transformer.h.1.attn"),
    "bert": Architecture("BertModel", LAYERS, "encoder.layer.1.attention.self"),
    "roberta": Architecture(
        "RobertaModel",
        {**LAYERS, "pad_token_id": 1, "max_position_embeddings": 32},
        "encoder.layer.1.attention.self",
    ),
    "distilbert": Architecture(
        "DistilBertModel", {"n_layers": 2, "n_heads": 4, "dim": 16, "hidden_dim": 24}, "transformer.layer.1.attention"
    ),
    "clip": Architecture("CLIPTextModel", {**LAYERS, "max_position_embeddings": 32}, "encoder.layers.1.self_attn"),
    "vit": Architecture("ViTModel", {**LAYERS, "image_size": 8, "patch_size": 4}, "layers.1.attention"),
    "t5_encoder": Architecture(
        "T5ForConditionalGeneration",
        {"num_layers": 2, "num_heads": 4, "d_model": 16, "d_kv": 4, "d_ff": 24, "decoder_start_token_id": 0},
        "encoder.block.1.layer.0.SelfAttention",
        "encoder_attentions",
        scale=1.0,
        bias=True,
    ),
    "t5_decoder": Architecture(
        "T5ForConditionalGeneration",
        {"num_layers": 2, "num_heads": 4, "d_model": 16, "d_kv": 4, "d_ff": 24, "decoder_start_token_id": 0},
        "decoder.block.1.layer.0.SelfAttention",
        "decoder_attentions",
        scale=1.0,
        bias=True,
    ),
    "t5_cross": Architecture(
        "T5ForConditionalGeneration",
        {"num_layers": 2, "num_heads": 4, "d_model": 16, "d_kv": 4, "d_ff": 24, "decoder_start_token_id": 0},
        "decoder.block.1.layer.1.EncDecAttention",
        "cross_attentions",
        scale=1.0,
    ),
    "whisper_decoder": Architecture(
        "WhisperForConditionalGeneration",
        {**BOTH, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16,
         "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        "model.decoder.layers.1.self_attn",
        "decoder_attentions",
        scale=1.0,
    ),
    "bart_cross": Architecture(
        "BartForConditionalGeneration",
        {**BOTH, "max_position_embeddings": 32},
        "model.decoder.layers.1.encoder_attn",
        "cross_attentions",
    ),
}  # fmt: skip


@contextmanager
def seen(model: nn.Module, path: str, names: tuple[str, ...], **changes: Any) -> Iterator[dict[str, torch.Tensor]]:
    """While it is open, forwards put these values of an attention module into what it yields, and change some."""
    held: dict[str, torch.Tensor] = {}
    run = object()
    operations = Operations(model, run)

    def look(name: str) -> Any:
        def hook(_: Any, __: Any, value: torch.Tensor) -> Any:
            held[name] = value.clone()
            return changes[name](value) if name in changes else None

        return hook

    for name in names:
        operations.operation(f"{path}:{name}").register_forward_hook(look(name))
    try:
        with ACTIVE.running(run), torch.no_grad():
            yield held
    finally:
        operations.remove()


NAMES = some(
    ARCHITECTURES,
    "gpt2",
    "mistral",
    "gemma2",
    "gpt_oss",
    "bloom",
    "gptj",
    "falcon",
    "bert",
    "t5_decoder",
    "whisper_decoder",
)


def first(output: Any) -> torch.Tensor:
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_values_of_attention(name: str) -> None:
    this = ARCHITECTURES[name]
    eager, model = this.build("eager"), this.build_fast()
    model.load_state_dict(eager.state_dict())
    inputs = this.inputs()
    with torch.no_grad():
        plain = first(model(**inputs))
        wanted = eager(**inputs, output_attentions=True)[this.patterns]
    wanted = wanted[1 if this.attention.count("1") else 0]
    with seen(model, this.attention, VALUES) as held:
        read = first(model(**inputs))
    assert not any("forward" in vars(part) for part in model.modules())
    real = torch.ones(plain.shape[:2], dtype=torch.bool)  # the queries that are tokens: what padding sees, no one does
    if "attention_mask" in inputs and wanted.shape[2] == 6:
        real = inputs["attention_mask"].bool()
    pattern = held["pattern"]
    queries = real[:, None, :, None] if real.shape[1] == pattern.shape[2] else torch.tensor(True)
    assert pattern.shape == wanted.shape
    assert ((pattern - wanted) * queries).abs().max() < 1e-5
    assert pattern.std() > 0.005, "a pattern of equal numbers would show nothing"
    if plain.shape[:2] == real.shape:
        assert ((read - plain) * real[..., None]).abs().max() < 1e-5

    q, k, v, z = (held[each] for each in "qkvz")
    heads = pattern.shape[1]
    keys, values = (each.repeat_interleave(heads // each.shape[2], 2) for each in (k, v))
    assert torch.allclose(torch.einsum("rhqk,rkhd->rqhd", pattern, values), z, atol=1e-5)
    if this.sinks:
        return
    assert torch.allclose(held["scores"].float().softmax(-1).nan_to_num(), pattern, atol=1e-5)
    if not this.bias:
        product = torch.einsum("rqhd,rkhd->rhqk", q, keys) * (q.shape[-1] ** -0.5 if this.scale is None else this.scale)
        attended = (held["scores"] > -1e3) & queries
        assert (held["scores"] - product)[attended.expand(pattern.shape)].abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_writing_the_pattern_is_what_the_layer_computes(name: str) -> None:
    """A pattern in which each query attends to the first key alone makes `z` the first value."""
    this = ARCHITECTURES[name]
    model = this.build_fast()

    def first_key(pattern: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(pattern)
        made[..., 0] = 1
        return made

    with torch.no_grad():
        plain = first(model(**this.inputs()))
    with seen(model, this.attention, ("pattern", "v", "z"), pattern=first_key) as held:
        changed = first(model(**this.inputs()))
    heads = held["z"].shape[2]
    expected = held["v"].repeat_interleave(heads // held["v"].shape[2], 2)[:, :1].expand_as(held["z"])
    assert torch.allclose(held["z"], expected, atol=1e-6)
    assert (changed - plain).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(first(model(**this.inputs())), plain)


def test_what_computes_no_attention_has_no_form() -> None:
    model = ARCHITECTURES["gpt2"].build("sdpa")
    found = {path for path, module in model.named_modules() if form_of(module) is not None}
    assert found == {"transformer.h.0.attn", "transformer.h.1.attn"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj"])
def test_in_bfloat16(name: str) -> None:
    this = ARCHITECTURES[name]
    exact, model = this.build("eager"), this.build_fast()
    model.load_state_dict(exact.state_dict())
    model.to(torch.bfloat16)
    exact.to(torch.bfloat16)
    inputs = this.inputs()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain, wanted = first(model(**inputs)), exact(**inputs, output_attentions=True).attentions[1]
    with seen(model, this.attention, VALUES) as held:
        read = first(model(**inputs))
    assert held["pattern"].dtype == held["z"].dtype == torch.bfloat16
    assert ((held["pattern"] - wanted) * real[:, None, :, None]).abs().max() < 0.05
    assert ((read - plain) * real[..., None]).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "bloom", "gptj", "xglm"])
def test_steps_of_a_generation_see_the_keys_of_the_cache(name: str) -> None:
    """At each step after the first one query meets all keys so far (or those of its window)."""
    this = ARCHITECTURES[name]
    model, exact = this.build_fast(), this.build("eager")
    exact.load_state_dict(model.state_dict())
    inputs = this.inputs()
    steps: list[dict[str, torch.Tensor]] = [{}]
    run = object()
    operations = Operations(model, run)

    def look(each: str) -> Any:
        def hook(_: Any, __: Any, value: torch.Tensor) -> None:
            if each in steps[-1]:
                steps.append({})
            steps[-1][each] = value.clone()

        return hook

    for each in ("pattern", "q", "k", "v", "z"):
        operations.operation(f"{this.attention}:{each}").register_forward_hook(look(each))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "min_new_tokens": 3}
    with ACTIVE.running(run), torch.no_grad():
        found = model.generate(**inputs, **options)
    operations.remove()
    with torch.no_grad():
        wanted = exact.generate(**inputs, **options, output_attentions=True)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(steps) == 3
    for step, theirs in zip(steps, wanted.attentions, strict=True):
        pattern = step["pattern"]
        real = inputs["attention_mask"].bool()[:, None, :, None] if pattern.shape[2] == 6 else 1
        assert pattern.shape == theirs[1].shape
        assert ((pattern - theirs[1]) * real).abs().max() < 1e-5
        assert step["k"].shape[1] == step["v"].shape[1] == pattern.shape[3]
        assert step["q"].shape[1] == step["z"].shape[1] == pattern.shape[2]
    assert steps[2]["q"].shape[1] == 1
