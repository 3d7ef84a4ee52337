"""Models whose weights are at a service: equal to transformers' own but for the weights, and nothing is executed."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scripted_service import Reply, ScriptedService

from nnsight_compiler import LanguageModel
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import tiny_folder
from nnsight_compiler.remote import served_models
from nnsight_compiler.remote.credentials import HOST
from nnsight_compiler.remote.refusals import AnswerError, NotThereError

NAME = "some-lab/tiny v1"


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    """What a service says of the model that comes with this package, made by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder())
    files = {
        file.name: base64.b64encode(file.read_bytes()).decode()
        for file in tiny_folder().iterdir()
        if file.name.startswith("tokenizer")
    }
    modules = [
        {
            "path": path,
            "class": type(module).__name__,
            "parameters": {name: list(held.shape) for name, held in module.named_parameters(recurse=False)},
        }
        for path, module in model.named_modules()
    ]
    size = sum(parameter.nbytes for parameter in model.parameters())
    card = {"name": NAME, "class": type(model).__name__, "bytes": size, "layers": 3}
    return {
        "card": card,
        "model": {**card, "config": json.loads(json.dumps(model.config.to_dict())), "dtype": "float32"},
        "modules": {"modules": modules},
        "tokenizer": {"files": files},
    }


@pytest.fixture
def service(description: dict[str, Any]) -> Iterator[ScriptedService]:
    with ScriptedService() as started:
        started.models[NAME] = json.loads(json.dumps(description))
        yield started


@pytest.fixture
def model(service: ScriptedService) -> LanguageModel:
    return LanguageModel(NAME, remote=service.url)


def test_the_modules_are_those_of_transformers_without_their_weights(model: LanguageModel) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder())
    own = dict(model._wrapped.named_parameters())
    assert {name: (p.shape, p.dtype) for name, p in own.items()} == {
        name: (p.shape, p.dtype) for name, p in plain.named_parameters()
    }
    assert {parameter.device.type for parameter in own.values()} == {"meta"}
    assert len(model.layers) == 3


def test_the_tokenizer_is_that_of_transformers(model: LanguageModel) -> None:
    plain = transformers.AutoTokenizer.from_pretrained(tiny_folder())
    text = "The Eiffel Tower is in the city of"
    assert model.tokenizer(text).input_ids == plain(text).input_ids
    assert model.tokenizer.name_or_path == NAME


def test_an_experiment_is_checked_without_weights(model: LanguageModel) -> None:
    with model.scan("The Eiffel Tower is in the city of"):
        shape = model.layers[1].output.save().shape
    assert shape == (1, 8, 128)


def test_only_what_is_needed_is_asked_for(service: ScriptedService, model: LanguageModel) -> None:
    asked = [request.path for request in service.requests]
    assert asked == ["/v1/models/some-lab/tiny%20v1", "/v1/models/some-lab/tiny%20v1/modules"]
    assert service.connections == 1
    del model


@pytest.mark.parametrize(
    "use",
    [
        lambda model: torch.as_tensor(model.lm_head.weight[0]),
        lambda model: model.device,
        lambda model: model("The Eiffel Tower is in the city of"),
    ],
    ids=["weight", "device", "call"],
)
def test_what_needs_weights_here_is_refused(
    service: ScriptedService, model: LanguageModel, use: Callable[[LanguageModel], object]
) -> None:
    with pytest.raises(ModelError) as raised:
        use(model)
    assert str(raised.value) == (
        f"this needs the weights of {NAME} here, and they are at {service.url}\n"
        f"  way out: do it inside a trace, which runs there; or load the model here: `LanguageModel('{NAME}')`"
    )


def test_models_are_listed(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST, service.url)
    (listed,) = served_models.served_models()
    assert str(listed) == f"{NAME} (GPT2LMHeadModel, 3 layers, 0.0 GiB)"
    assert listed.bytes == service.models[NAME]["card"]["bytes"]
    assert LanguageModel(listed.name, remote=True)._host == service.url


def test_a_name_that_the_service_does_not_have(service: ScriptedService) -> None:
    with pytest.raises(NotThereError) as raised:
        LanguageModel("tony", remote=service.url)
    assert str(raised.value) == f"{service.url} does not know model tony: no model tony"


def test_a_model_without_a_tokenizer_takes_token_ids(service: ScriptedService, model: LanguageModel) -> None:
    service.instead = [("GET .*/tokenizer", Reply.error(404, "this model has no tokenizer"))]
    with pytest.raises(ModelError) as raised:
        _ = model.tokenizer
    assert str(raised.value) == (
        f"{NAME} at {service.url} comes without a tokenizer; give one as `tokenizer=`, or token ids as input"
    )
    assert model._prepare((torch.tensor([[1, 2, 3]]),), {})[1]["input_ids"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"dtype": torch.float16, "dispatch": True, "revision": "main"},
            "dtype, dispatch, revision: options for loading, given with a model that a service has loaded\n"
            "  way out: leave them out",
        ),
        (
            {"source": Path("here")},
            "with `remote=`, a model is named as its service names it, and this is PosixPath\n"
            "  way out: give the name; a model in memory goes without `remote=`, which its traces can say",
        ),
    ],
)
def test_arguments_that_do_not_go_together(service: ScriptedService, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError) as raised:
        LanguageModel(**{"source": NAME, "remote": service.url, **arguments})
    assert str(raised.value) == text


# --- services of other versions, or hostile ones ---


def changed(service: ScriptedService, **config: Any) -> None:
    service.models[NAME]["model"]["config"].update(config)


def refused(service: ScriptedService) -> str:
    began = time.monotonic()
    with pytest.raises((ModelError, AnswerError)) as raised:
        LanguageModel(NAME, remote=service.url)
    assert time.monotonic() - began < 10
    return str(raised.value).replace(service.url, "URL")


def test_another_release_of_transformers_that_makes_other_modules(service: ScriptedService) -> None:
    release = service.models[NAME]["model"]["config"]["transformers_version"]
    (attention,) = (m for m in service.models[NAME]["modules"]["modules"] if m["path"] == "transformer.h.1.attn")
    attention["class"] = "FusedAttention"
    assert refused(service) == (
        f"{NAME} at URL is not the model that transformers {transformers.__version__} makes of its configuration:"
        " its module `transformer.h.1.attn` is FusedAttention() there and GPT2Attention() here\n"
        f"  way out: use the release that the service has ({release})"
    )


def test_modules_that_only_one_of_the_two_has(service: ScriptedService) -> None:
    del service.models[NAME]["modules"]["modules"][-1]
    assert "its module `lm_head` is missing there and Linear(weight: [1007, 128]) here" in refused(service)


def test_weights_of_another_shape(service: ScriptedService) -> None:
    service.models[NAME]["modules"]["modules"][-1]["parameters"] = {"weight": [1008, 128]}
    assert "`lm_head` is Linear(weight: [1008, 128]) there and Linear(weight: [1007, 128]) here" in refused(service)


def test_another_class(service: ScriptedService) -> None:
    service.models[NAME]["model"]["class"] = "GPT2MagicModel"
    assert "its class is GPT2MagicModel there, and GPT2LMHeadModel here" in refused(service)


def test_a_kind_of_model_that_transformers_does_not_have(service: ScriptedService) -> None:
    changed(service, model_type="transformer-xxl")
    assert refused(service).startswith(
        f"{NAME} at URL: the model cannot be made of its configuration: ValueError: Unrecognized model identifier"
    )


def test_code_in_a_configuration_is_not_loaded(service: ScriptedService) -> None:
    changed(service, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert LanguageModel(NAME, remote=service.url)._wrapped.__class__ is transformers.GPT2LMHeadModel


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"n_layer": 10**12}, "URL sends a configuration with the number 1000000000000, which is none of a model"),
        ({"n_layer": -1}, "its module `transformer.h.0` is"),
        ({"n_layer": 10**5}, "it has more than 100 modules"),
        ({"n_layer": "many"}, "the model cannot be made of its configuration"),
        ({"n_embd": None}, "the model cannot be made of its configuration"),
        ({"n_embd": 2**30}, "Storage size calculation overflowed"),
        ({"nested": {"deep": [{"x": 2**70}]}}, "which is none of a model"),
        ({"model_type": ["gpt2"]}, "the model cannot be made of its configuration"),
    ],
    ids=str,
)
def test_configurations_that_no_model_has(
    service: ScriptedService, config: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_models, "MAX_MODULES", 100)
    changed(service, **config)
    assert text in refused(service)


def test_a_huge_model_takes_no_memory(service: ScriptedService) -> None:
    changed(service, n_embd=2**25)
    assert "there and Embedding(weight: [1007, 33554432]) here" in refused(service), "it was made, and has no data"


def test_files_that_hold_code_are_not_kept(service: ScriptedService, model: LanguageModel) -> None:
    files = service.models[NAME]["tokenizer"]["files"]
    config = json.loads(base64.b64decode(files["tokenizer_config.json"]))
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    files["tokenizer_config.json"] = base64.b64encode(json.dumps(config).encode()).decode()
    for name in ("evil.py", "../escaped.json", "/tmp/escaped.json", "vocab.pkl", ".hidden.json", "a/b.json"):
        files[name] = base64.b64encode(b"import os; os.abort()").decode()
    assert model.tokenizer("a").input_ids


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer.json": "%%%"}, "URL sends a file tokenizer.json that cannot be read"),
        ({"tokenizer.json": 7}, "URL sends the file tokenizer.json as something that is no text"),
        ({"tokenizer_config.json": base64.b64encode(b"[" * 10**5).decode()}, "tokenizer_config.json that cannot be"),
        ({"tokenizer.json": base64.b64encode(b"{}").decode()}, "its tokenizer cannot be used"),
        ({}, "its tokenizer cannot be used"),
    ],
    ids=["base64", "type", "nesting", "empty", "none"],
)
def test_tokenizers_that_are_damaged(
    service: ScriptedService, model: LanguageModel, files: dict[str, Any], text: str
) -> None:
    service.models[NAME]["tokenizer"]["files"] = files
    with pytest.raises(ModelError) as raised:
        _ = model.tokenizer
    assert text in str(raised.value).replace(service.url, "URL")
    assert "/tmp" not in str(raised.value)
