"""What clients are told of a model, against the model."""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel
from nnsight_compiler.service.model_card import model_card, tokenizer_files


def test_a_card_is_of_its_model(tmp_path) -> None:
    model = LanguageModel("tiny", dispatch=True)
    module = model._wrapped
    card = json.loads(json.dumps(model_card(model)))
    assert (card["class"], card["dtype"], card["layers"]) == ("GPT2LMHeadModel", "float32", 3)
    assert card["bytes"] == sum(each.numel() * 4 for each in module.parameters())
    config = json.loads(json.dumps(module.config.to_dict()))
    assert {**card["config"], "_name_or_path": config["_name_or_path"]} == config
    assert [each["path"] for each in card["modules"]] == [path for path, _ in module.named_modules()]
    heads = {each["path"]: each for each in card["modules"]}
    assert heads["transformer.h.0.ln_1"]["class"] == "LayerNorm"
    assert heads["transformer.h.0.ln_1"]["parameters"] == {"weight": [128], "bias": [128]}

    for name, content in tokenizer_files(model).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "The Eiffel Tower is in the city of"
    assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_a_model_without_a_tokenizer_or_layers_has_none() -> None:
    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8)
    model = LanguageModel(GPT2LMHeadModel(config).to(torch.bfloat16))
    assert tokenizer_files(model) == {}
    assert (model_card(model)["dtype"], model_card(model)["layers"]) == ("bfloat16", 1)
    assert model_card(LanguageModel(nn.Linear(2, 3)))["layers"] == 0
