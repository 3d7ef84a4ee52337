"""Experiments whose layer only a run can give, through a file: equal draws and values, mistakes at their lines."""

from __future__ import annotations

import linecache
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsight_compiler
from nnsight_compiler import CompileError, Experiment, LanguageModel

PROMPT = "The Eiffel Tower is in the city of"

STAGED = """\
import random

import torch

from nnsight_compiler import intervene

STEER = torch.linspace(-1, 1, 128).to(torch.bfloat16)


def draw(layers):
    return random.choice(layers)


@intervene
def drawn(model, prompt):
    layer = draw([0, 1, 2])
    with model.trace(prompt):
        hidden = model.layers[layer].output[0, -1]
    return layer, hidden


@intervene
def picked(model, prompt):
    with model.trace(prompt):
        norms = torch.stack([layer.output.norm() for layer in model.layers])
    layer = int(norms.argmax())
    with model.trace(prompt):
        model.layers[layer].output[:, -1] += STEER
        logits = model.lm_head.output[0, -1]
    return layer, logits


@intervene
def wandering(model, prompt, rounds):
    layer, path = 0, []
    for _ in range(rounds):
        with model.trace(prompt):
            model.layers[layer].output[:, -1] *= 1.5
            top = model.lm_head.output[0, -1].argmax()
        layer = (int(top) + random.randrange(3)) % 3
        path.append(layer)
    return path, top
"""

MISTAKEN = """\
import random

from nnsight_compiler import intervene


@intervene
def mistaken(model, prompt):
    layer = random.choice([0, 1])
    with model.trace(prompt):
        hidden = model.layers[layer].output
        hidden[:, :, 200] = 0
        logits = model.lm_head.output
    return logits
"""

CHILD = """
import random
import sys
import torch
folder, package, prompt = sys.argv[1:]
sys.path.insert(0, package)
torch.set_num_threads(1)
from nnsight_compiler import Experiment, LanguageModel

model = LanguageModel("tiny")
found = {}
for name, arguments in (("drawn", ()), ("picked", ()), ("wandering", (4,))):
    experiment = Experiment.load(f"{folder}/{name}.safetensors")
    for seed in range(6):
        random.seed(seed)
        found[name, seed] = experiment(model, prompt, *arguments)
torch.save(found, folder + "/found.pt")
"""


def by_hand(model: LanguageModel, layer: int, change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """The last logits of a run in which the last position after a layer is changed in place, with a torch hook."""
    hooked = model._ready().get_submodule(f"transformer.h.{layer}")

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        change(output[:, -1])

    handle = hooked.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(PROMPT).logits[0, -1]
    finally:
        handle.remove()
    return logits


def states(model: LanguageModel) -> list[torch.Tensor]:
    """What each layer gives in a plain run."""
    kept: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
        for block in model._ready().get_submodule("transformer.h").children()
    ]
    with torch.no_grad():
        model(PROMPT)
    for handle in handles:
        handle.remove()
    return kept


def test_a_process_without_the_source_draws_and_picks_the_same(
    tiny: LanguageModel, written: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    scope = written(STAGED, "staged.py")
    for name in ("drawn", "picked", "wandering"):
        scope[name].save(tmp_path / f"{name}.safetensors")
    (tmp_path / "staged.py").unlink()
    package = str(Path(nnsight_compiler.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), package, PROMPT], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt")

    streams = states(tiny)
    loudest = max(range(3), key=lambda layer: float(streams[layer].norm()))
    steer = torch.linspace(-1, 1, 128).to(torch.bfloat16)
    steered = by_hand(tiny, loudest, lambda last: last.add_(steer))
    for seed in range(6):
        random.seed(seed)
        layer = random.choice([0, 1, 2])
        assert found["drawn", seed][0] == layer
        torch.testing.assert_close(found["drawn", seed][1], streams[layer][0, -1], rtol=1e-4, atol=1e-4)

        assert found["picked", seed][0] == loudest
        torch.testing.assert_close(found["picked", seed][1], steered, rtol=1e-4, atol=1e-4)

        random.seed(seed)
        layer, path, top = 0, [], torch.tensor(0)
        for _ in range(4):
            top = by_hand(tiny, layer, lambda last: last.mul_(1.5)).argmax()
            layer = (int(top) + random.randrange(3)) % 3
            path.append(layer)
        assert found["wandering", seed] == (path, top)
    assert len({found["drawn", seed][0] for seed in range(6)}) > 1
    assert len({tuple(found["wandering", seed][0]) for seed in range(6)}) > 1


def test_a_mistake_in_a_stage_is_found_at_the_stored_line(
    tiny: LanguageModel, written: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    written(MISTAKEN, "mistaken.py")["mistaken"].save(tmp_path / "mistaken.safetensors")
    (tmp_path / "mistaken.py").unlink()
    linecache.clearcache()  # as in a process that never saw the source
    loaded = Experiment.load(tmp_path / "mistaken.safetensors")
    with pytest.raises(CompileError) as refused:
        loaded(tiny, PROMPT)
    assert str(refused.value) == (
        f"{tmp_path}/mistaken.py:11:9: index 200 is out of range: this dimension has 128 entries\n"
        "            hidden[:, :, 200] = 0\n"
        "            ^^^^^^^^^^^^^^^^^\n"
        "  way out: use an index from -128 to 127"
    )


def test_a_loaded_experiment_with_stages_is_checked_and_explained(
    tiny: LanguageModel, written: Callable[..., dict[str, Any]], through: Callable[..., Experiment], tmp_path: Path
) -> None:
    original = written(MISTAKEN, "mistaken.py")["mistaken"]
    loaded = through(original)
    assert str(loaded.check(tiny, PROMPT)) == str(original.check(tiny, PROMPT))
    assert str(loaded.check(tiny, PROMPT)).startswith(f"not checked: {tmp_path}/mistaken.py:10:18")
    assert str(loaded.explain(tiny, PROMPT)) == str(original.explain(tiny, PROMPT))
