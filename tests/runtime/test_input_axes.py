"""Which dimensions of the arguments are rows and tokens, and the arguments of other sizes that are made by that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from nnsight_compiler.runtime.axes import infer_axes
from nnsight_compiler.runtime.input_axes import InputAxes, Sampler, input_axes

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50))


class Plain(nn.Module):
    def forward(self, input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
        return input_ids


def test_inputs_of_transformers_by_name_also_by_position():
    ids = torch.zeros(3, 7).long()
    kwargs = {
        "attention_mask": ids,
        "position_ids": ids[:1],  # one row of positions for all
        "inputs_embeds": torch.zeros(3, 7, 16),
        "labels": ids[:, :4],  # not of the prompt's length
        "use_cache": False,
        "logits_to_keep": torch.zeros(3).long(),
    }
    axes = input_axes(llama(), (ids,), kwargs)
    assert axes.dims == {
        "0": ("rows", "tokens"),
        "attention_mask": ("rows", "tokens"),
        "position_ids": (None, "tokens"),
        "inputs_embeds": ("rows", "tokens"),
        "labels": ("rows", None),
        "logits_to_keep": ("rows",),
    }
    assert axes.sizes((ids,), kwargs) == (3, 7)
    assert axes.without("tokens").names == {"rows"}
    mask = {"input_ids": ids, "attention_mask": torch.zeros(3, 1, 7, 7)}
    assert input_axes(llama(), (), mask).dims["attention_mask"] == ("rows", None, "tokens", "tokens")


def test_inputs_of_any_other_module_have_rows_first():
    args = (torch.zeros(3, 7).long(), [torch.zeros(3, 2), torch.zeros(())])
    axes = input_axes(Plain(), args, {"weights": {"left": torch.zeros(1, 3)}, "scale": 2.0})
    assert axes.dims == {"0": ("rows",), "1.0": ("rows",), "1.1": (), "weights.left": (None,)}


def test_one_row_is_as_good_as_many():
    assert input_axes(Plain(), (torch.zeros(1, 4), torch.zeros(1)), {}).dims == {"0": ("rows",), "1": ("rows",)}


def test_arguments_of_other_sizes():
    kwargs = {
        "input_ids": torch.zeros(1, 4).long(),
        "attention_mask": torch.ones(1, 4).long(),
        "position_ids": torch.arange(4)[None],
        "inputs_embeds": torch.zeros(1, 4, 16, dtype=torch.bfloat16),
        "labels": torch.tensor([[3, 4, 5, 5]]),
        "use_cache": False,
    }
    model = llama()
    sampler = Sampler(model, (), kwargs, input_axes(model, (), kwargs))
    args, made = sampler.sample(3, 6, seed=0, padded=True)
    assert args == ()
    assert {name: tuple(one.shape) for name, one in made.items() if name != "use_cache"} == {
        "input_ids": (3, 6),
        "attention_mask": (3, 6),
        "position_ids": (3, 6),
        "inputs_embeds": (3, 6, 16),
        "labels": (3, 6),
    }
    assert made["inputs_embeds"].dtype == torch.bfloat16
    assert made["use_cache"] is False
    assert made["position_ids"].tolist() == [list(range(6))] * 3
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1]] + [[1] * 6] * 2
    assert set(made["labels"].flatten().tolist()) <= {3, 4, 5}
    assert made["input_ids"].max() > 5  # anything in the vocabulary, not only what was given
    assert made["input_ids"].max() < 50
    _, plain = sampler.sample(3, 6, seed=1, padded=False)
    assert plain["attention_mask"].all()
    assert not torch.equal(plain["input_ids"], made["input_ids"])


def test_two_kinds_of_rows():
    """Two texts and three images: the texts are the rows, and the images are held at three."""
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4}, projection_dim=8)
    with torch.device("meta"):
        model = CLIPModel(config).eval()
    kwargs = {"input_ids": torch.ones(2, 6).long(), "pixel_values": torch.zeros(3, 3, 8, 8)}
    axes = infer_axes(model, (), kwargs)
    assert axes.inputs == InputAxes({"input_ids": ("rows", "tokens"), "pixel_values": (None,)})
    assert (axes.how, axes.fixed) == ("fake", {})
    assert repr(axes.types("text_model", "output").last_hidden_state) == "float32[rows, tokens, 16]"
    assert repr(axes.types("vision_model", "output").last_hidden_state) == "float32[3, 5, 16]"
    assert repr(axes.types("", "output").logits_per_text) == "float32[rows, 3]"
