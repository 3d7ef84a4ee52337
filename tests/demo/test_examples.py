"""The examples run as they stand, without a download, and find what they set out to show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(name: str) -> list[str]:
        torch.set_num_threads(1)
        monkeypatch.setattr(sys, "argv", [name])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return call


def numbers(line: str) -> list[float]:
    words = line.replace("'", " ").replace(":", " ").split()
    return [float(word) for word in words if word.replace(".", "", 1).lstrip("+-").isdigit()]


def test_first_example_finds_the_fact_at_the_last_token(run) -> None:
    lines = run("first_example.py")
    patched = [line for line in lines if line.startswith("layer")]
    assert "' Seattle'" in next(line for line in patched if line.startswith("layer 2, position  2"))
    assert "' Paris'" in next(line for line in patched if line.startswith("layer 2, position -1"))
    assert any(line.startswith("experiment patch(") for line in lines)


def test_the_logit_lens_ends_at_paris(run) -> None:
    lines = run("logit_lens.py")
    assert len(lines) == 3
    assert lines[-1].startswith("layer  2: ' Paris'")


def test_patching_restores_all_at_one_place_and_nothing_before_it(run) -> None:
    header, *rows = run("activation_patching.py")
    position = [index for index, word in enumerate(header.split()) if word == "Mary"][1]
    assert len(rows) == 3
    first = numbers(rows[0])[1:]
    assert first[position] == pytest.approx(1, abs=0.05)
    assert all(abs(value) < 1e-3 for value in first[:position])


def test_steering_raises_what_it_steers_towards(run) -> None:
    lines = [line for line in run("steering.py") if line.startswith("strength")]
    paris = [numbers(line)[1] for line in lines]
    assert paris[0] < 0.1
    assert paris[-1] > 0.9


def test_ablating_a_unit_that_is_silent_moves_nothing(run) -> None:
    lines = run("any_module.py")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    hidden = network[1](network[0](torch.randn(1, 4)))[0]
    moved = [float(line.split()[-1]) for line in lines]
    assert len(moved) == 8
    assert all((change == 0) == (unit == 0) for change, unit in zip(moved, hidden.tolist(), strict=True))
    assert any(moved)


def test_an_mlp_that_does_not_see_its_attention_loses_the_fact(run) -> None:
    lines = run("source.py")
    assert any(line.startswith("self_mlp_0 ─┐") for line in lines)
    (plain,) = (numbers(line)[-1] for line in lines if line.startswith("' Paris'"))
    layers = [numbers(line)[-1] for line in lines if line.startswith("layer")]
    assert len(layers) == 3
    assert layers[0] < plain - 1
    assert layers[2] < plain - 1


def test_the_fact_reaches_the_last_token_through_attention(run) -> None:
    lines = run("attention.py")
    assert "layer 0: the last token looks most at 'ĠTower'" in lines
    edges = [numbers(line)[-1] for line in lines if "without the edge" in line]
    assert edges[0] > 4
    assert abs(edges[1]) < 0.1
    assert "computed from q, k and the mask" in lines[-1]
