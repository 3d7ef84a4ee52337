"""The axes of twenty architectures: as their code has them, and as real forwards at other sizes show them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime.axes import Axes, AxisError, Opaque, TensorAxes, infer_axes

torch.set_num_threads(1)

LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {**LAYERS, "num_key_value_heads": 2, "head_dim": 4}
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Inputs = Callable[[int, int], dict[str, torch.Tensor]]


def prompt(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}


def ids(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (rows, tokens))}


def images(size: int) -> Inputs:
    return lambda rows, tokens: {"pixel_values": torch.randn(rows, 3, size, size)}


@dataclass(frozen=True)
class Architecture:
    """A small model, and by hand the shapes at some of its sites, by `path port`; for an input those of its first
    tensor, for a keyword of an input `path input keyword`; for several in one, of the first."""

    model: str
    sizes: dict[str, Any]
    shapes: dict[str, str]
    inputs: Inputs = prompt
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        cls = getattr(transformers, self.model)
        return cls._from_config(cls.config_class(**self.sizes), **self.options).eval()


def rotary(block: str = "model.layers.1", heads: int = 4) -> dict[str, str]:
    return {
        "model.embed_tokens output": "rows, tokens, 16",
        "model.rotary_emb output": f"1, tokens, {heads}",
        f"{block} input position_embeddings": f"1, tokens, {heads}",
        f"{block} output": "rows, tokens, 16",
        f"{block}.self_attn output": "rows, tokens, 16",
        f"{block}.mlp output": "rows, tokens, 16",
        "lm_head output": "rows, tokens, 50",
    }


GATED = {"model.layers.1.mlp.act_fn input": "rows, tokens, 24"}
QUERY_NORM = {"model.layers.1.self_attn.q_norm input": "rows, tokens, 4, 4"}
EXPERTS = {
    "model.layers.1.mlp output": "rows, tokens, 16",
    "model.layers.1.mlp.gate input": "rows*tokens, 16",
    "model.layers.1.mlp.gate output": "rows*tokens, 4",
    "model.layers.1.mlp.experts input": "rows*tokens, 16",
    "lm_head output": "rows, tokens, 50",
}

ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, **TOKENS},
        {
            "transformer.wte output": "rows, tokens, 16",
            "transformer.wpe input": "1, tokens",
            "transformer.wpe output": "1, tokens, 16",
            "transformer.h.1.attn.c_attn output": "rows, tokens, 48",
            "transformer.h.1.mlp.act output": "rows, tokens, 64",
            "transformer.h.1 output": "rows, tokens, 16",
            "lm_head output": "rows, tokens, 50",
        },
    ),
    "llama": Architecture("LlamaForCausalLM", {**CAUSAL, **TOKENS}, rotary() | GATED),
    "mistral": Architecture("MistralForCausalLM", {**CAUSAL, **TOKENS, "sliding_window": 8}, rotary() | GATED),
    "qwen3": Architecture("Qwen3ForCausalLM", {**CAUSAL, **TOKENS}, rotary() | GATED | QUERY_NORM),
    "gemma2": Architecture("Gemma2ForCausalLM", {**CAUSAL, **TOKENS, "sliding_window": 8}, rotary() | GATED),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        {**CAUSAL, **TOKENS, "sliding_window": 8},
        rotary() | GATED | {"model.layers.1.self_attn.q_norm input": "rows, 4, tokens, 4"},
    ),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        {
            **CAUSAL,
            **TOKENS,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 50,
            "hidden_size_per_layer_input": 4,
            "altup_num_inputs": 4,
            "laurel_rank": 4,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        },
        {
            "model.layers.1 input": "4, rows, tokens, 16",
            "model.layers.1 output": "4, rows, tokens, 16",
            "model.layers.1.self_attn output": "rows, tokens, 16",
            "lm_head output": "rows, tokens, 50",
        },
    ),
    "phi": Architecture(
        "PhiForCausalLM",
        {**LAYERS, **TOKENS},
        {"model.rotary_emb output": "1, tokens, 2", "model.layers.1.mlp.fc1 output": "rows, tokens, 24"},
    ),
    "neox": Architecture(
        "GPTNeoXForCausalLM",
        {**LAYERS, **TOKENS},
        {
            "gpt_neox.rotary_emb output": "1, tokens, 2",
            "gpt_neox.layers.1.attention.query_key_value output": "rows, tokens, 48",
            "gpt_neox.layers.1.mlp output": "rows, tokens, 16",
        },
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
            **TOKENS,
        },
        {
            "model.decoder.embed_positions output": "rows, tokens, 16",
            "model.decoder.layers.1.fc1 input": "rows*tokens, 16",
            "model.decoder.layers.1.fc1 output": "rows*tokens, 24",
            "model.decoder.layers.1.activation_fn output": "rows*tokens, 24",
            "model.decoder.layers.1.fc2 output": "rows*tokens, 16",
            "model.decoder.layers.1.final_layer_norm output": "rows*tokens, 16",
            "model.decoder.layers.1 output": "rows, tokens, 16",
        },
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {"hidden_size": 16, "n_layer": 2, "n_head": 4, **TOKENS},
        {
            "transformer.h.1 input alibi": "4*rows, 1, tokens",
            "transformer.h.1 output": "rows, tokens, 16",
            "transformer.h.1.self_attention.attention_dropout input": "rows, 4, tokens, tokens",
        },
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**CAUSAL, **TOKENS, "num_local_experts": 4},
        EXPERTS | {"model.layers.1.mlp.experts.act_fn input": "2*rows*tokens, 24"},
    ),
    "mixtral, experts one by one": Architecture(
        "MixtralForCausalLM",
        {**CAUSAL, **TOKENS, "num_local_experts": 4},
        EXPERTS,
        options={"experts_implementation": "eager"},
        refused=r"model\.layers\.[01]\.mlp\.experts\.act_fn",
    ),
    "bert": Architecture(
        "BertForMaskedLM",
        {**LAYERS, **TOKENS, "max_position_embeddings": 32},
        {
            "bert.embeddings.position_embeddings output": "1, tokens, 16",
            "bert.embeddings.word_embeddings output": "rows, tokens, 16",
            "bert.encoder.layer.1.intermediate output": "rows, tokens, 24",
            "cls.predictions.decoder output": "rows, tokens, 50",
        },
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, **TOKENS},
        {
            "encoder.block.1 input": "rows, tokens, 16",
            "encoder.block.1.layer.0 input position_bias": "1, 4, tokens, tokens",
            "decoder.block.1.layer.1 input position_bias": "1, 4, tokens, tokens",
            "decoder.block.1.layer.2.DenseReluDense.wi output": "rows, tokens, 24",
            "lm_head output": "rows, tokens, 50",
        },
        inputs=lambda rows, tokens: {**prompt(rows, tokens), "decoder_input_ids": ids(rows, tokens)["input_ids"]},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            **TOKENS,
        },
        {
            "model.encoder.conv1 output": "rows, 16, 40",
            "model.encoder.embed_positions input": "20",
            "model.encoder.embed_positions output": "20, 16",
            "model.encoder.layers.1 output": "rows, 20, 16",
            "model.decoder.layers.1.encoder_attn.k_proj output": "rows, 20, 16",
            "model.decoder.layers.1 output": "rows, tokens, 16",
        },
        inputs=lambda rows, tokens: {
            "input_features": torch.randn(rows, 8, 40),
            "decoder_input_ids": ids(rows, tokens)["input_ids"],
        },
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        {**LAYERS, "image_size": 8, "patch_size": 4},
        {
            "vit.embeddings.patch_embeddings.projection output": "rows, 16, 2, 2",
            "vit.embeddings output": "rows, 5, 16",
            "classifier output": "rows, 2",
        },
        inputs=images(8),
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        {
            "swin.encoder.layers.0.blocks.0 input": "rows, 16, 8",
            "swin.encoder.layers.0.blocks.0.attention input": "4*rows, 4, 8",
            "swin.encoder.layers.1.blocks.0.attention input": "rows, 4, 16",
            "classifier output": "rows, 2",
        },
        inputs=images(8),
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, **TOKENS},
        {
            "backbone.layers.0.mixer.in_proj output": "rows, tokens, 64",
            "backbone.layers.0.mixer.out_proj input": "rows, tokens, 32",
            "backbone.layers.0 output": "rows, tokens, 16",
        },
        inputs=ids,
    ),
    "xlnet": Architecture(
        "XLNetLMHeadModel",
        {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24, **TOKENS},
        {
            "transformer.word_embedding input": "tokens, rows",
            "transformer.layer.1 output": "tokens, rows, 16",
            "transformer.layer.1 input r": "2*tokens, rows, 16",
            "lm_loss output": "rows, tokens, 50",
        },
        inputs=ids,
    ),
}


@pytest.fixture(scope="module")
def inferred() -> Callable[[str], Axes]:
    """The axes of an architecture, found without its weights."""
    found: dict[str, Axes] = {}

    def of(name: str) -> Axes:
        if name not in found:
            with torch.device("meta"):
                empty = ARCHITECTURES[name].build()
            found[name] = infer_axes(empty, (), ARCHITECTURES[name].inputs(1, 4))
        return found[name]

    return of


def text(value: Any) -> str:
    """The shape of the first tensor of a value."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, TensorAxes)]
    return ", ".join(map(str, tensors[0].shape))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_that_the_architectures_have(name: str, inferred: Callable[[str], Axes]):
    axes = inferred(name)
    told = {}
    for site in ARCHITECTURES[name].shapes:
        path, port, *keyword = site.split(" ")
        value = axes.types(path, port)  # type: ignore[arg-type]
        told[site] = text(value[1][keyword[0]] if keyword else value)
    assert told == ARCHITECTURES[name].shapes
    assert axes.fixed == {}
    assert axes.how == ("real" if "mixtral" in name else "fake")


def real_values(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[tuple[str, str, int], Any]:
    """The oracle: what torch's own hooks see in a real forward."""
    seen: dict[tuple[str, str, int], Any] = {}

    def keep(path: str, port: str, value: Any) -> None:
        call = sum(key[:2] == (path, port) for key in seen)
        seen[path, port, call] = value

    handles = []
    for path, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(
                lambda _, a, k, path=path: keep(path, "input", (a, dict(k))), with_kwargs=True
            ),
            part.register_forward_hook(lambda _, a, output, path=path: keep(path, "output", output)),
        ]
    with torch.no_grad():
        module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def disagreements(axes: Axes, real: dict[tuple[str, str, int], Any], rows: int, tokens: int) -> list[str]:
    """Where what was inferred is not what a real forward shows; refused events and opaque parts claim nothing."""
    wrong: list[str] = []
    told = {(event.path, event.port, event.call) for event in axes.events}
    for event in real.keys() | told:
        try:
            value = axes.value(*event, rows, tokens)
        except AxisError:
            continue
        except KeyError:
            wrong.append(f"{event} is not told")
            continue
        if event not in real:
            wrong.append(f"{event} does not happen")
            continue
        expected, expected_structure = pytree.tree_flatten(value)
        leaves, structure = pytree.tree_flatten(real[event])
        if structure != expected_structure:
            wrong.append(f"{event}: {structure} is said to be {expected_structure}")
            continue
        for leaf, one in zip(leaves, expected, strict=True):
            if isinstance(one, Opaque):
                continue
            if isinstance(leaf, torch.Tensor):
                if not (isinstance(one, torch.Tensor) and (leaf.shape, leaf.dtype) == (one.shape, one.dtype)):
                    wrong.append(f"{event}: {leaf.dtype}{list(leaf.shape)} is said to be {one}")
            elif leaf != one:
                wrong.append(f"{event}: {leaf!r} is said to be {one!r}")
    return wrong


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_value_of_a_real_forward_at_other_sizes(name: str, inferred: Callable[[str], Axes]):
    one, axes = ARCHITECTURES[name], inferred(name)
    real = real_values(one.build(), (), one.inputs(2, 11))
    assert disagreements(axes, real, rows=2, tokens=11) == []
    assert disagreements(axes, real, rows=3, tokens=11) != []  # the comparison can fail
    refused = {event.path for event in axes.refused}
    assert all(re.fullmatch(one.refused, path) for path in refused)
    assert bool(refused) == bool(one.refused)


def test_the_page_on_axes_lists_the_sites_whose_first_dimension_is_not_rows():
    lines = [
        f"| {name} | `{site}` | `[{shape}]` |"
        for name, one in ARCHITECTURES.items()
        for site, shape in one.shapes.items()
        if not shape.startswith("rows, ")
    ]
    page = (Path(__file__).parents[2] / "docs" / "axes.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ") and "`[" in line] == lines


def test_a_mask_that_all_rows_share():
    """Without a mask of the user's, Mistral's is one in memory for all rows: writing to one row writes to all."""
    one = ARCHITECTURES["mistral"]
    model = one.build()
    axes = infer_axes(model, (), ids(1, 4))
    mask = axes.types("model.layers.1", "input")[1]["attention_mask"]
    assert repr(mask.sometimes) == "bool[rows (shared), 1, tokens, tokens]"
    real = real_values(model, (), ids(3, 11))["model.layers.1", "input", 0][1]["attention_mask"]
    assert (real.shape, real.stride(0)) == ((3, 1, 11, 11), 0)
    assert mask.sometimes.at(3, 11).stride(0) == 0
    assert real_values(model, (), ids(3, 5))["model.layers.1", "input", 0][1]["attention_mask"] is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_masks_that_are_there_only_if_they_hide_something_are_not_claimed(name: str, inferred: Callable[[str], Axes]):
    block = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "bert": "bert.encoder.layer.1"}[name]
    plain = prompt(2, 11)
    padded = {**plain, "attention_mask": plain["attention_mask"].index_fill(1, torch.tensor([0]), 0)}
    model, axes = ARCHITECTURES[name].build(), inferred(name)
    for inputs in (plain, padded):
        assert disagreements(axes, real_values(model, (), inputs), rows=2, tokens=11) == []
    args, kwargs = axes.types(block, "input")
    masks = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Opaque) and "None" in leaf.reason]
    assert [mask.reason for mask in masks] == ["None or a tensor: the sizes or the numbers decide"]
