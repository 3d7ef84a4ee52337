"""Language models by folder, file and in memory; the oracle is transformers, called directly."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import LanguageModel, PromptError, tiny_folder

torch.set_num_threads(1)
FACTS = ["The Eiffel Tower is located in the city of", "Big Ben is in the city of"]


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folder()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tiny")


def small_llama() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


def test_nothing_is_loaded_before_it_is_needed(reference: nn.Module):
    model = LanguageModel(tiny_folder())
    view = model.layers[1].mlp.c_fc
    assert model._module.device.type == "meta"
    assert repr(model).count("\n") > 10
    assert (len(model.layers), model.config.n_embd, model.dtype) == (3, 128, torch.float32)
    assert model._prepare(("Paris",), {})[1]["input_ids"].device.type == "cpu"
    assert model._module.device.type == "meta"
    assert torch.equal(view.weight, reference.transformer.h[1].mlp.c_fc.weight)  # asking for a weight loads it
    assert model._module.device.type == "cpu"
    assert not model._module.training
    assert model._ready() is model._ready() is model._module


def test_dispatch_loads_at_once_and_dtype_is_kept():
    model = LanguageModel("tiny", dispatch=True, dtype=torch.float64)
    assert model._module.device.type == "cpu"
    assert {parameter.dtype for parameter in model._module.parameters()} == {torch.float64}
    assert LanguageModel("tiny", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_methods_act_on_the_loaded_model():
    model = LanguageModel("tiny")
    assert model.requires_grad_(False) is model
    assert not any(parameter.requires_grad for parameter in model._ready().parameters())
    assert model.get_input_embeddings() == model.embed


def test_threads_share_one_load():
    model, modules = LanguageModel("tiny"), []
    threads = [threading.Thread(target=lambda: modules.append(model._ready())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modules) == 4
    assert len(set(map(id, modules))) == 1


def test_the_model_in_the_package_knows_its_facts(model: LanguageModel):
    with torch.no_grad():
        answers = model(FACTS).logits[:, -1].argmax(-1)
    assert [model.tokenizer.decode(token) for token in answers] == [" Paris", " London"]


def test_one_prompt_is_what_the_tokenizer_gives(model: LanguageModel, tokenizer):
    args, kwargs = model._prepare((FACTS[0],), {"output_attentions": False})
    assert args == ()
    assert kwargs.pop("output_attentions") is False
    expected = dict(tokenizer(FACTS[0], return_tensors="pt"))
    assert kwargs.keys() == expected.keys() - {"token_type_ids"}
    assert all(torch.equal(kwargs[name], expected[name]) for name in kwargs)


def test_padded_rows_are_as_if_alone(model: LanguageModel, reference: nn.Module, tokenizer):
    _, kwargs = model._prepare((FACTS,), {})
    lengths = [len(tokenizer(fact).input_ids) for fact in FACTS]
    assert lengths[0] != lengths[1]
    assert kwargs["attention_mask"].sum(1).tolist() == lengths
    assert kwargs["attention_mask"][:, -1].tolist() == [1, 1]
    with torch.no_grad():
        logits = model._ready()(**kwargs).logits
        for row, (fact, length) in enumerate(zip(FACTS, lengths, strict=True)):
            alone = reference(**tokenizer(fact, return_tensors="pt")).logits[0]
            torch.testing.assert_close(logits[row, -length:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        [[5, 6, 7]],
        (5, 6, 7),
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.int32),
        np.array([5, 6, 7]).tolist(),
        list(np.array([5, 6, 7])),
        [torch.tensor([5, 6, 7])],
        {"input_ids": torch.tensor([[5, 6, 7]])},
        {"input_ids": [5, 6, 7]},
    ],
    ids=str,
)
def test_token_ids_in_every_form(model: LanguageModel, prompt: object):
    for args, kwargs in (((prompt,), {}), ((), {"input_ids": prompt})):
        if isinstance(prompt, dict) and kwargs:
            continue
        _, prepared = model._prepare(args, kwargs)
        assert prepared.keys() == {"input_ids"}
        assert torch.equal(prepared["input_ids"], torch.tensor([[5, 6, 7]]))


def test_ids_of_different_lengths_are_padded_on_the_left(model: LanguageModel):
    _, kwargs = model._prepare(([[5, 6, 7], [8]],), {})
    assert kwargs["input_ids"][:, -1].tolist() == [7, 8]
    assert kwargs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert kwargs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_encodings_pass_as_they_are(model: LanguageModel, tokenizer):
    encoding = tokenizer(FACTS, return_tensors="pt", padding=True)
    _, kwargs = model._prepare((encoding,), {"use_cache": False})
    assert kwargs.keys() == {*encoding.keys(), "use_cache"}
    assert all(kwargs[name] is encoding[name] or torch.equal(kwargs[name], encoding[name]) for name in encoding)
    _, kwargs = model._prepare((), {"inputs_embeds": torch.zeros(1, 2, 128)})
    assert kwargs.keys() == {"inputs_embeds"}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "an empty list"),
        ("", "no tokens"),
        (["a", ""], "prompt 1 has no tokens"),
        (torch.ones(2), "whole numbers"),
        (torch.ones(2, 2, 2, dtype=torch.long), "shape"),
        (["a", 3], "a prompt is text"),
        ([True, False], "a prompt is text"),
        (3.5, "a float"),
        ({"input_ids": [[1, 2], [3]]}, "no rectangle"),
    ],
)
def test_what_is_no_prompt(model: LanguageModel, prompt: object, reason: str):
    with pytest.raises(PromptError, match=reason):
        model._prepare((prompt,), {})


def test_a_prompt_given_twice(model: LanguageModel):
    with pytest.raises(PromptError, match="twice"):
        model._prepare(("a",), {"input_ids": [1]})
    with pytest.raises(PromptError, match="by keyword"):
        model._prepare(("a", "b"), {})


def test_a_tokenizer_without_padding_token_stays_as_it_is(tokenizer):
    own = AutoTokenizer.from_pretrained(tiny_folder())
    own.pad_token = None
    own.padding_side = "right"
    model = LanguageModel("tiny", tokenizer=own)
    assert model.tokenizer is own
    _, kwargs = model._prepare((FACTS,), {})
    assert kwargs["attention_mask"][:, -1].tolist() == [1, 1]
    assert own.pad_token is None
    assert own.padding_side == "right"


def test_a_model_in_memory_and_no_tokenizer(reference: nn.Module, tokenizer):
    model = LanguageModel(reference)
    assert model._ready() is reference
    with pytest.raises(PromptError, match="tokenizer="):
        model._prepare(("text",), {})
    assert LanguageModel(reference, tokenizer)._prepare(("text",), {})[1]["input_ids"].shape[0] == 1
    with pytest.raises(ModelError, match=r"dtype, device_map.*loaded already"):
        LanguageModel(reference, dtype=torch.float16, device_map="cpu")


def test_an_example_runs(model: LanguageModel):
    args, kwargs = model._example()
    with torch.no_grad():
        assert model._ready()(*args, **kwargs).logits.shape[:2] == kwargs["input_ids"].shape


def test_device_map(reference: nn.Module):
    model = LanguageModel("tiny", device_map={"": "cpu"})
    assert model.device == torch.device("cpu")
    with torch.no_grad():
        assert torch.equal(model([5, 6]).logits, reference(torch.tensor([[5, 6]])).logits)


# --- what cannot be loaded: one line with a way out ---


def fails(source: object, match: str, **options: object) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        LanguageModel(source, dispatch=True, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_missing_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fails(tmp_path / "nowhere", "there is no file or folder")
    fails(str(tmp_path / "nowhere"), "there is no file or folder")
    fails("model.gguf", "there is no file or folder")
    fails(tmp_path, "without a config.json")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    fails(tmp_path, r"name the GGUF file itself: .*a\.gguf")
    fails("no/such-model", "no/such-model.*config.*check the name", local_files_only=True)


def test_damaged_folders(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    (folder / "config.json").write_text("{")
    fails(folder, "configuration cannot be read")
    shutil.copy(tiny_folder() / "config.json", folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(folder, "weights cannot be loaded")
    (folder / "model.safetensors").unlink()
    fails(folder, "weights cannot be loaded")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer=") as caught:
        LanguageModel(folder)._prepare(("text",), {})
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(folder, r"lacks 1 of the model's weights \(.*h\.1\.mlp\.c_fc\.weight")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model_type"] == "gpt2"


# --- GGUF ---


def write_gguf(model: nn.Module, file: Path) -> None:
    """A Llama in llama.cpp's layout: its names, and the halves of each rotary head interleaved."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(config.vocab_size - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([2, 3, 3] + [6] * (len(pieces) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = tensor.shape
                tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path: Path):
    reference, file = small_llama(), tmp_path / "small.gguf"
    write_gguf(reference, file)
    model = LanguageModel(file)
    assert model._module.device.type == "meta"
    assert type(model._module) is type(reference)
    ids = torch.tensor([[1, 5, 9, 33, 62]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    assert len(model.layers) == 2


def test_gguf_needs_its_package_and_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\x00" * 8)
    fails(file, "broken.gguf: its configuration cannot be read")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    fails(text, "not a GGUF file")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    fails(file, "pip install gguf")
