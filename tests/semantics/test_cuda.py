"""Experiments on a GPU: the same values as plain hooks there, whatever device the program's own tensors are on."""

from __future__ import annotations

import copy

import pytest
import torch
from every_feature import FEATURES, Feature
from test_every_feature import assert_same

from nnsight_compiler import LanguageModel, NNsight, intervene

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IDS = torch.tensor([[5, 17, 3, 44, 8, 2]])


@pytest.fixture(scope="module")
def gpu(plain_gpt2):
    return copy.deepcopy(plain_gpt2).cuda()


@pytest.fixture(scope="module")
def model(gpu):
    return LanguageModel(gpu)


@intervene
def steer(model, ids, vector, strength):
    with model.trace(ids):
        model.layers[1].output[:, -1] += strength * vector
        hidden = model.layers[2].output.save()
        logits = model.lm_head.output[:, -1]
    return hidden, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_is_what_a_hook_does(gpu, grab, dtype) -> None:
    module = copy.deepcopy(gpu).to(dtype)
    vector = torch.randn(32, device="cuda", dtype=dtype)

    def add(out):
        out[:, -1] += 2.0 * vector

    hook = ("transformer.h.1", "output", add)
    hidden, logits = steer(LanguageModel(module), IDS, vector, 2.0)
    assert hidden.device.type == "cuda"
    assert hidden.dtype == dtype
    assert torch.equal(hidden, grab(module, IDS.cuda(), "transformer.h.2", "output", hook))
    assert torch.equal(logits, grab(module, IDS.cuda(), "lm_head", "output", hook)[:, -1])


def test_a_value_goes_to_the_device_and_dtype_of_the_site(gpu, model, grab) -> None:
    patch = torch.randn(1, 6, 32, dtype=torch.float64)

    @intervene
    def replace(model, ids, patch):
        with model.trace(ids):
            model.layers[0].mlp.output = patch
            return model.output.logits

    found = replace(model, IDS, patch)
    hook = ("transformer.h.0.mlp", "output", lambda _: patch.float().cuda())
    assert torch.equal(found, grab(gpu, IDS.cuda(), "lm_head", "output", hook))


def test_two_models_on_two_devices(plain_gpt2, model) -> None:
    on_cpu = LanguageModel(plain_gpt2)

    @intervene
    def move(source, target, ids):
        with source.trace(ids):
            hidden = source.layers[1].output
        with target.trace(ids):
            target.layers[1].output = hidden
            return target.lm_head.output

    with torch.no_grad():
        plain = plain_gpt2(IDS).logits
    torch.testing.assert_close(move(model, on_cpu, IDS), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(move(on_cpu, model, IDS).cpu(), plain, atol=1e-4, rtol=1e-4)


def test_what_was_saved_is_not_what_the_model_changes_later() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)).cuda()
    inputs = torch.randn(3, 4, device="cuda")
    wrapped = NNsight(module)
    with wrapped.trace(inputs):
        before = wrapped[0].output.save()
        after = wrapped[1].output.save()
    assert torch.equal(before, module[0](inputs))
    assert torch.equal(after, before.relu())


def test_the_tiny_model_is_loaded_to_a_device_map() -> None:
    model = LanguageModel("tiny", device_map="cuda")
    with model.trace("The Eiffel Tower is in the city of"):
        logits = model.lm_head.output[:, -1].save()
    assert logits.device.type == "cuda"
    assert model.tokenizer.decode(logits.argmax(-1)[0]).strip() == "Paris"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_means_the_same_there(feature: Feature, dtype: torch.dtype) -> None:
    module = feature.module().to("cuda", dtype)
    x = feature.inputs(0).to("cuda")
    x = x.to(dtype) if x.is_floating_point() else x
    found = feature.program(feature.wrapped(module), x)
    with torch.set_grad_enabled(feature.gradients):
        wanted = feature.oracle(module, x)
    assert_same(found, wanted, feature, 1e-5 if dtype == torch.float32 else 2e-2)
