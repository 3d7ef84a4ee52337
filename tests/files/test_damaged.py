"""A few thousand damaged files: each is refused with a reason, or is a valid experiment. No other exception, no import,
no hang."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mutations import mutate, places
from torch import nn

from nnsight_compiler import Experiment, FileError, intervene
from nnsight_compiler.files.document import parse
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.files.saving import experiment_document
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify

DOCUMENTS = 1300
FILES = 400
VECTOR = torch.linspace(-1, 1, 4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = (2, "x")

    def forward(self, x):
        return self.double(self.inner(x)) * self.scale[0]

    def double(self, x):
        return x + x


def helper(x, factor=3):
    return x * factor + VECTOR


def experiments() -> list[Experiment]:
    small, settings = Small(), {"names": ["a", "b"], "position": -1, 3: (1.5, None)}

    @intervene
    def patch(model, clean, corrupt, layer=1, *rest, position=-1):
        with model.trace(clean):
            source = model.layers[layer].output[:, position]
        with model.trace(corrupt):
            model.layers[layer].output[:, position] = source
            logits = model.lm_head.output[:, -1]
        return logits.softmax(-1)

    @intervene
    def steer(model, prompt, seen=()):
        """Adds a vector."""
        with model.trace(prompt):
            for index, layer in enumerate(model.layers):
                if index > 0:
                    layer.output += helper(VECTOR[index])
        return [torch.stack([part for part in seen]), f"{index!r:>3}"]

    @intervene
    def classify(x):
        total = 0
        while total < 3:
            total += 1
            try:
                x = small(x)
            except ValueError as error:
                raise RuntimeError("no") from error
        return x, settings["names"], lambda y: y + total

    return [patch, steer, classify]


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, dict[str, torch.Tensor]]]:
    made = map(experiment_document, experiments())
    return [(json.dumps(document), tensors) for document, tensors in made]


class Importing:
    """Finds nothing, and notes what was looked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, *_: object) -> None:
        self.names.append(name)


@contextmanager
def nothing_is_imported(seconds: float) -> Iterator[None]:
    """Fails where anything inside imports, or takes longer than this."""

    def late(*_: object) -> None:
        raise AssertionError(f"a file took more than {seconds} s")

    watcher, before = Importing(), set(sys.modules)
    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    sys.meta_path.insert(0, watcher)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        sys.meta_path.remove(watcher)  # type: ignore[arg-type]
    assert watcher.names == []
    assert set(sys.modules) == before


def test_over_a_thousand_damaged_documents(documents) -> None:
    chance = random.Random(7)
    refused = valid = 0
    known = [(text, [path for path in places(json.loads(text)) if path], tensors) for text, tensors in documents]
    for number in range(DOCUMENTS):
        whole, paths, tensors = known[number % len(known)]
        text = json.dumps(mutate(whole, paths, chance))
        with nothing_is_imported(5):
            try:
                loaded = experiment_from(parse(text), tensors)
            except FileError:
                refused += 1
                continue
        valid += 1
        verify(loaded.ir)
        if valid % 10 == 0:
            assert parse_program(str(loaded.ir)) == loaded.ir
    assert refused > DOCUMENTS / 2
    assert valid > DOCUMENTS / 50, "some changes do no harm"


TEXTS = {
    "deep": "[" * 100_000,
    "deep and closed": '{"format":' * 50_000 + "1" + "}" * 50_000,
    "a key twice": '{"format": 1, "format": 2}',
    "many keys, one twice": "{" + ",".join(f'"{n % 99_999}": 0' for n in range(100_000)) + "}",
    "a long number": '{"version": ' + "9" * 100_000 + "}",
    "no number": '{"version": NaN}',
    "infinity": '{"version": -Infinity}',
    "no JSON": "import os",
    "nothing": "",
    "a list": "[]",
    "a number": "1",
}


@pytest.mark.parametrize("name", TEXTS)
def test_documents_that_are_bombs(name: str) -> None:
    with nothing_is_imported(5), pytest.raises(FileError):
        experiment_from(parse(TEXTS[name]), {})


def test_hundreds_of_damaged_files(tmp_path: Path) -> None:
    chance = random.Random(11)
    path, damaged = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    refused = 0
    for experiment in experiments()[1:]:
        experiment.save(path)
        whole = path.read_bytes()
        for number in range(FILES // 2):
            content = bytearray(whole)
            match number % 4:
                case 0:
                    content = content[: chance.randrange(len(content))]
                case 1:
                    for _ in range(chance.choice((1, 8))):
                        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                case 2:
                    content[:8] = chance.choice((0, 1, 2**20, 2**40, 2**64 - 1, len(content))).to_bytes(8, "little")
                case _:
                    start = chance.randrange(len(content))
                    content[start : start + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(64))
            damaged.write_bytes(content)
            with nothing_is_imported(5):
                try:
                    Experiment.load(damaged)
                except FileError as error:
                    refused += "damaged.safetensors" in str(error)
    assert refused > FILES / 2
