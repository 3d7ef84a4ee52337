"""Python in bodies that no compiler can foresee: arrays, objects, libraries, debuggers. The oracle is Python itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import torch

from nnsight_compiler import CompileError, LanguageModel, intervene

ARRAY = np.random.default_rng(0).normal(size=32)
IDS = torch.tensor([[5, 17, 42, 3]])


class Statistics:
    """A class of the user's."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def note(self, value: torch.Tensor) -> torch.Tensor:
        self.norms.append(value.norm().item())
        return value * 2

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value - 1


def test_arrays_of_numpy_are_written(model: LanguageModel):
    with model.trace(IDS):
        model.transformer.h[0].output[:, -1] = ARRAY
        put = model.transformer.h[0].output[0, -1].save()
        model.transformer.h[1].output = np.zeros((1, 4, 32))
        replaced = model.transformer.h[1].output.save()
        hidden = model.transformer.h[2].output
        before = hidden.clone().save()
        hidden += ARRAY
        added = model.transformer.h[2].output.save()
        logits = model.output.logits.save()  # noqa: F841
    np.testing.assert_allclose(put.numpy(), ARRAY, rtol=1e-5)
    assert not replaced.any()
    torch.testing.assert_close(added, before + torch.tensor(ARRAY, dtype=torch.float32))
    assert added.dtype == torch.float32


def test_an_array_that_is_written_stays_the_users(model: LanguageModel):
    array = np.ones((1, 4, 32), dtype=np.float32)
    with model.trace(IDS):
        model.transformer.h[0].output = array
        model.transformer.h[0].output[:] *= 3
        logits = model.output.logits.save()  # noqa: F841
    assert (array == 1).all()


def test_arrays_and_numbers_of_numpy_are_indices(model: LanguageModel):
    rows, number, mask = np.array([1, 3]), np.int64(2), np.array([True, False, True, False])
    with model.trace(IDS):
        hidden = model.transformer.h[number].output
        whole = hidden.save()
        several, one, masked = hidden[:, rows].save(), hidden[:, number].save(), hidden[:, mask].save()
    assert torch.equal(several, whole[:, [1, 3]])
    assert torch.equal(one, whole[:, 2])
    assert torch.equal(masked, whole[:, [0, 2]])


def test_a_round_trip_through_numpy(model: LanguageModel, grab, plain_gpt2):
    with model.trace(IDS):
        hidden = model.transformer.h[0].output
        left, values, right = np.linalg.svd(hidden[0].numpy(), full_matrices=False)
        values[0] = 0
        hidden[0] = torch.from_numpy(left @ np.diag(values) @ right)
        found = model.transformer.h[0].output.save()
    left, values, right = torch.linalg.svd(grab(plain_gpt2, IDS, "transformer.h.0")[0], full_matrices=False)
    values[0] = 0
    torch.testing.assert_close(found[0], left @ torch.diag(values) @ right, atol=1e-5, rtol=1e-4)


def test_objects_of_the_users(model: LanguageModel, grab, plain_gpt2):
    statistics = Statistics()
    with model.trace(IDS):
        model.transformer.h[0].output = statistics.note(model.transformer.h[0].output)
        called = statistics(model.transformer.h[0].output).save()
        text = f"{model.transformer.h[0].output.norm():.4f}"
    plain = grab(plain_gpt2, IDS, "transformer.h.0")
    assert statistics.norms == [plain.norm().item()]
    torch.testing.assert_close(called, plain * 2 - 1)
    assert text == f"{(plain * 2).norm():.4f}"


def test_einops_on_live_values(model: LanguageModel):
    with model.trace(IDS):
        heads = einops.rearrange(model.transformer.h[0].output, "b t (n d) -> b t n d", n=4)
        heads[:, :, 1] = 0
        found = model.transformer.h[0].output.save()
        mean = einops.reduce(found, "b t d -> b d", "mean").save()
    assert not found[..., 8:16].any()
    assert found[..., :8].all()
    torch.testing.assert_close(mean, found.mean(1))


@intervene
def printing(model, ids):
    with model.trace(ids):
        hidden = model.transformer.h[0].output
        print("norm", hidden.norm().item(), hidden.shape)
    return hidden


def test_print_shows_values(model: LanguageModel, capsys: pytest.CaptureFixture[str]):
    hidden = printing(model, IDS)
    expected = f"norm {hidden.norm().item()} torch.Size([1, 4, 32])\n"
    assert capsys.readouterr().out == expected
    with model.trace(IDS):
        print("norm", model.transformer.h[0].output.norm().item(), model.transformer.h[0].output.shape)
    assert capsys.readouterr().out == expected


def library(value: Any) -> Any:
    return value * 2


library.__module__ = "torch"  # a function that is not looked into


@intervene
def calls_a_library(model, ids):
    with model.trace(ids):
        found = library(model.transformer.h[0].output)
    return found


def test_explain_lists_a_call_of_a_library_with_its_line(model: LanguageModel):
    line = calls_a_library._function.__code__.co_firstlineno + 3
    assert f"test_dynamic_python.py:{line}  host op `library(…)`" in str(calls_a_library.explain(model, IDS))


# --- debuggers ---

PROGRAM = """
import pdb

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import NNsight, intervene

config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)
model, ids = NNsight(GPT2LMHeadModel(config).eval()), torch.tensor([[1, 2, 3]])


@intervene
def experiment(model, ids):
    with model.trace(ids):
        early = model.transformer.h[0].output.sum()
        late = model.transformer.h[1].output
        breakpoint()
        late[:] = 0
        logits = model.output.logits
    return logits


experiment(model, ids)
with model.trace(ids):
    hidden = model.transformer.h[0].output
    pdb.set_trace()
    doubled = (hidden * 2).save()
"""
COMMANDS = """
p "shapes", early.shape, late.shape, bool(late.any())
n
p "line", late.any().item()
c
p "block", hidden.shape
c
"""


def test_breakpoints_show_the_users_line_and_values(tmp_path: Path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(file)],
        input=COMMANDS.lstrip(),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    lines = PROGRAM.splitlines()
    after = lines.index("        late[:] = 0") + 1
    assert f"> {file}({after})experiment()" in done.stdout
    assert "-> late[:] = 0" in done.stdout
    assert "('shapes', torch.Size([]), torch.Size([1, 3, 8]), True)" in done.stdout
    assert "('line', False)" in done.stdout
    assert "-> doubled = (hidden * 2).save()" in done.stdout
    assert "('block', torch.Size([1, 3, 8]))" in done.stdout


# --- writes to what a container gives back ---

CONTAINERS = {
    "list": "held = []\n  held.append(model.transformer.h[1].output)\n  held[k][:] = 0",
    "two": "held = []\n  held.append(model.transformer.h[1].output)\n  held.append(torch.zeros(3))\n  held[k].mul_(0)",
    "dict": "held = {}\n  held[0] = model.transformer.h[1].output\n  held[k][:] = 0",
    "view": "held = []\n  held.append(model.transformer.h[1].output)\n  part = held[k][:, 1:]\n  part += 1",
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_write_that_would_only_reach_a_copy_is_refused(model: LanguageModel, kind: str):
    body = f"  {CONTAINERS[kind]}\n  out = model.output.logits\n"
    source = f"def program(model, ids, k):\n with model.trace(ids):\n{body} return out\n"
    experiment = intervene.from_source(source, {"torch": torch})
    with pytest.raises(CompileError) as caught:
        experiment(model, IDS, 0)
    [mistake] = caught.value.diagnostics
    assert "this writes to what was put into a container, which holds a copy" in str(mistake)
    assert "index with a number that the source spells out" in str(mistake)
    assert mistake.span.line == 2 + len(CONTAINERS[kind].splitlines())
    [(span, _)] = mistake.related
    assert span.line == 4


@pytest.mark.parametrize(
    "body",
    [
        "held = []\n  held.append(model.transformer.h[1].output)\n  held[0][:] = 0",
        "held = [model.transformer.h[1].output]\n  held[k][:] = 0",
    ],
)
def test_a_write_that_reaches_the_model_is_not(model: LanguageModel, body: str):
    source = (
        f"def program(model, ids, k):\n with model.trace(ids):\n  {body}\n"
        "  out = model.transformer.h[2].input\n return out\n"
    )
    assert not intervene.from_source(source)(model, IDS, 0).any()


def test_reading_from_a_container_is_allowed(model: LanguageModel):
    @intervene
    def program(model, ids, k):
        with model.trace(ids):
            held = []
            for layer in model.transformer.h:
                held.append(layer.output)
            total = held[k].sum()
        kept = held[k]
        kept[:] = 0
        return total, kept

    total, kept = program(model, IDS, 1)
    assert total != 0
    assert not kept.any()
