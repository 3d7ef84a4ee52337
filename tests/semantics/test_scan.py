"""Scans: the shapes and dtypes that a run gives, without weights and without numbers. The oracle is the run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import random_model
from chosen import some
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from nnsight_compiler import CompileError, ExperimentError, LanguageModel, NNsight, RunError, intervene
from nnsight_compiler.models.language import weights_withheld

PROMPTS = ["The Eiffel Tower is in", "The Space Needle"]


@pytest.fixture
def untouched() -> LanguageModel:
    return LanguageModel("tiny")


def body(tracer: Any, model: Any, vector: torch.Tensor) -> tuple[Any, ...]:
    hidden = model.layers[0].output
    model.layers[0].resid_mid[:, -1] += vector
    model.layers[1].mlp.output = 0
    last = model.lm_head.output[:, -1]
    lens = model.lm_head(model.ln_final(hidden))
    weights = model.lm_head.weight.half() @ vector.half()
    return hidden, last.argmax(-1), lens, weights, hidden.mean().double()


@intervene
def scanned(model, prompts, vector):
    with model.scan(prompts) as tracer:
        values = body(tracer, model, vector)
    return values


@intervene
def traced(model, prompts, vector):
    with model.trace(prompts) as tracer:
        values = body(tracer, model, vector)
    return values


def test_the_same_shapes_and_dtypes_as_a_run_without_loading_weights(untouched: LanguageModel):
    vector = torch.ones(128)
    with weights_withheld():
        fakes = scanned(untouched, PROMPTS, vector)
    assert not untouched._loaded
    reals = traced(untouched, PROMPTS, vector)
    assert untouched._loaded
    for fake, real in zip(fakes, reals, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_an_undecorated_block(untouched: LanguageModel):
    with weights_withheld(), untouched.scan(PROMPTS[0]) as tracer:
        place = tracer.position("Eiffel Tower")
        untouched.layers[0].output[:, place.first] = torch.zeros(128)
        hidden = untouched.layers[0].output[:, place].save()
        width = untouched.layers[0].output.shape[-1]
    assert hidden.shape == (1, 2, 128)
    assert (hidden + 1).shape == (1, 2, 128)
    assert width == 128
    assert place == (1, 2)
    assert not untouched._loaded


@pytest.mark.parametrize("kind", some(["gpt2", "llama", "gemma2", "mixtral", "bloom", "opt"], "gpt2", "mixtral"))
def test_architectures(kind: str):
    # On tensors without data torch knows the experts' matrix products in bfloat16 only.
    plain = random_model(kind).to(torch.bfloat16 if kind == "mixtral" else torch.float32)
    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True)
    with torch.device("meta"):
        empty = type(plain)(plain.config).to(plain.dtype).eval()
    model: Any = NNsight(empty)
    with model.scan(ids):
        hidden = model.layers[1].resid_post.save()
        logits = model.output.logits.save()
    assert hidden.shape == expected.hidden_states[1].shape
    assert (logits.shape, logits.dtype) == (expected.logits.shape, expected.logits.dtype)


def test_any_module_and_dtype():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).bfloat16()
    before = [parameter.clone() for parameter in module.parameters()]
    model, x = NNsight(module), torch.ones(5, 3, dtype=torch.bfloat16)
    with torch.inference_mode(), model.scan(x):
        model[1].output[:] = 7
        found = model[2].output.save()
    assert (found.shape, found.dtype) == ((5, 2), torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
    assert not module[1]._forward_hooks


def test_two_models_in_one_scan():
    first, second = NNsight(nn.Linear(3, 4)), NNsight(nn.Linear(4, 2))

    @intervene
    def chain(first, second, x):
        with first.scan(x):
            hidden = first.output
        with second.scan(hidden):
            found = second.output
        return found

    assert chain(first, second, torch.ones(5, 3)).shape == (5, 2)


def test_four_threads(untouched: LanguageModel):
    def run(rows: int) -> torch.Size:
        with weights_withheld():
            return scanned(untouched, ["The city"] * rows, torch.ones(128))[0].shape

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(1, 5))) == [(rows, 2, 128) for rows in range(1, 5)]


# --- mistakes ---


def here(line: int, function: Any) -> str:
    return f"{__file__}:{function._function.__code__.co_firstlineno + line}"


@intervene
def branches(model, prompt):
    with model.scan(prompt):
        hidden = model.layers[0].output
        if hidden.norm() > 1:
            hidden[:] = 0
        logits = model.output.logits
    return logits


@intervene
def takes_a_number(model, prompt):
    with model.scan(prompt):
        number = model.layers[0].output[0, 0, 0].item()
    return number


@intervene
def to_numpy(model, prompt):
    with model.scan(prompt):
        array = model.layers[0].output.numpy()
    return array


@pytest.mark.parametrize(("experiment", "line"), [(branches, 4), (takes_a_number, 3), (to_numpy, 3)])
def test_code_that_needs_numbers_is_refused_at_its_line(untouched: LanguageModel, experiment: Any, line: int):
    with pytest.raises(RunError) as caught:
        experiment(untouched, PROMPTS[0])
    assert str(caught.value) == (
        f"{here(line, experiment)}: this needs the numbers in a tensor, and a scan has shapes and dtypes only\n"
        "  way out: run it with `model.trace(…)`, or leave this line out of the scan"
    )
    assert not untouched._loaded


def test_a_model_that_needs_numbers_says_where():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    model = NNsight(Looks())
    scan = intervene.from_source("def scan(model, x):\n with model.scan(x):\n  out = model.output\n return out\n")
    with pytest.raises(RunError, match=r"or the model's own, needs the numbers in a tensor.*test_scan\.py"):
        scan(model, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model.layers[0].output[:, 99]", "index 99 is out of range"),
        ("model.layers[9].output", "no index 9"),
        ("model.layers[0].mpl.output", "did you mean"),
        ("model.layers[0].output @ torch.ones(3)", "128"),
    ],
)
def test_names_indices_and_shapes_are_checked(untouched: LanguageModel, line: str, message: str):
    source = f"def scan(model, prompt):\n with model.scan(prompt):\n  found = {line}\n return found\n"
    experiment = intervene.from_source(source, {"torch": torch})
    with pytest.raises(CompileError, match=message) as caught:
        experiment(untouched, PROMPTS[0])
    assert caught.value.diagnostics[0].span.line == 3
    assert not untouched._loaded


def test_a_scan_without_with_runs_nothing(untouched: LanguageModel):
    with pytest.raises(ExperimentError, match=r"`\.scan\(…\)` without `with` runs nothing"):
        untouched.scan(PROMPTS[0])

    @intervene
    def alone(model, prompt):
        model.scan(prompt)

    with pytest.raises(CompileError, match=r"`\.scan\(…\)` without `with` runs nothing"):
        alone(untouched, PROMPTS[0])


def test_arguments_of_generate_are_refused(untouched: LanguageModel):
    with (
        pytest.raises(TypeError, match="`scan` runs one forward and takes no max_new_tokens"),
        untouched.scan(PROMPTS[0], max_new_tokens=3),
    ):
        pass


def test_a_scan_beside_a_run_is_refused(untouched: LanguageModel):
    @intervene
    def both(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[0].output
        with model.scan(prompt):
            model.layers[1].output = hidden
            found = model.output.logits
        return found

    with pytest.raises(CompileError, match="this is a scan, whose values have shapes only"):
        both(untouched, PROMPTS[0])


def test_gradients_are_refused() -> None:
    @intervene
    def run(model, x):
        with model.scan(x):
            hidden = model[0].output
            with model.output.sum().backward():
                gradient = hidden.grad
        return gradient

    with pytest.raises(CompileError, match=r"test_scan\.py:\d+:\d+: a scan records no gradients[\s\S]*way out: leave"):
        run(NNsight(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.ones(1, 4))
