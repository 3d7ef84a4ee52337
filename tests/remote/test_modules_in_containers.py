"""Modules of the model that an experiment is given in lists, tuples and dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import FileError

ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


def outputs(net: NNsight) -> list[torch.Tensor]:
    plain = net._wrapped
    with torch.no_grad():
        found = [plain[0](ROWS)]
        found.append(torch.tanh(found[0]))
        found.append(plain[2](found[1]))
    return found


@intervene
def chosen(net, rows, layers, named):
    with net.trace(rows):
        found = [layer.output for layer in layers]
        other = named["first"].output * named["factors"][0]
    return found, other, named["factors"]


def test_modules_in_containers(net: NNsight) -> None:
    first, second, third = outputs(net)
    factors = [torch.full((4,), 3.0)]
    found, other, same = chosen(net, ROWS, net[1:3], {"first": net[0], "factors": factors}, remote="local")
    torch.testing.assert_close(found, [second, third])
    torch.testing.assert_close(other, first * 3)
    assert same is factors
    found, _, _ = chosen(net, ROWS, (net[0],), {"first": net[0], "factors": factors}, remote="local")
    torch.testing.assert_close(found, [first])


class Scorer:
    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.sum()


@intervene
def scored(net, rows, layers, scorer):
    with net.trace(rows):
        hidden = layers[0].output
    scores = [scorer.score(hidden)]
    for layer in layers:
        with net.trace(rows):
            layer.output[:] = scores[0]
            out = net.output
        scores.append(out)
    return scores


def test_they_cross_to_each_part_of_an_experiment(net: NNsight) -> None:
    score = outputs(net)[0].sum()
    with torch.no_grad():
        wanted = [score, net._wrapped[2](torch.tanh(score.expand(8, 4))), score.expand(8, 4)]
    torch.testing.assert_close(scored(net, ROWS, [net[0], net[2]], Scorer(), remote="local"), wanted)


@intervene
def appends(net, rows, layers):
    layers.append(net[2])
    with net.trace(rows):
        found = [layer.output for layer in layers]
    return found


@intervene
def assigns(net, rows, layers):
    layers[0] = net[2]
    with net.trace(rows):
        found = [layer.output for layer in layers]
    return found


def test_such_a_container_cannot_be_changed_there(net: NNsight) -> None:
    line = Path(__file__).read_text().splitlines().index("    layers.append(net[2])") + 1
    text = rf"test_modules_in_containers.py:{line}:5: `layers` holds modules of the model, and what is changed of it"
    with pytest.raises(FileError, match=text):
        appends(net, ROWS, [net[0]], remote="local")
    with pytest.raises(FileError, match=r"`layers` holds modules of the model, and what is changed of it"):
        assigns(net, ROWS, [net[0]], remote="local")


def test_a_file_says_that_it_holds_no_such_container(net: NNsight, tmp_path: Path) -> None:
    layers = [net[0]]

    @intervene
    def around(rows):
        with net.trace(rows):
            found = layers[0].output
        return found

    with pytest.raises(FileError, match=r"`layers`\[0\]: it is a module of the model, which only a name may stand for"):
        around.save(tmp_path / "around.safetensors")
