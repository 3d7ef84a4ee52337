"""Small models of many architectures, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_GROUPED: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PLAIN = {name: value for name, value in _GROUPED.items() if name not in ("num_key_value_heads", "head_dim")}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | {"final_logit_softcapping": 2.0},
    "gemma3_text": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": _GROUPED | {"num_local_experts": 2},
    "starcoder2": _GROUPED,
    "phi": _PLAIN,
    "gpt_neox": _PLAIN,
    "opt": _PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "falcon": _PLAIN | {"new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 100, "max_seq_len": 64},
}  # fmt: skip
IDS = torch.tensor([[5, 7, 11, 13, 17], [3, 9, 27, 81, 43]])


def random_model(kind: str, **options: Any) -> Any:
    """A causal language model of two layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(FAMILIES[kind] | options))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases begin as ones and zeros, which would hide mix-ups
        nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    return model
