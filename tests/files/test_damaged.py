"""A few thousand damaged files: each is refused with a reason, or is a valid experiment. No other exception, no import,
no hang."""

from __future__ import annotations

import copy
import json
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import Experiment, FileError, intervene
from nnsight_compiler.files.format import parse
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.files.saving import experiment_document
from nnsight_compiler.ir.ops import ALL_OPS
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify

DOCUMENTS = 2600
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


def places(held: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a document."""
    yield path
    if isinstance(held, dict):
        for key, part in held.items():
            yield from places(part, (*path, key))
    elif isinstance(held, list):
        for index, part in enumerate(held):
            yield from places(part, (*path, index))


def at(held: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        held = held[step]
    return held


def nested(depth: int) -> Any:
    held: Any = {"constant": "None"}
    for _ in range(depth):
        held = {"tuple": [held]}
    return held


OTHERS: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 1.5, "", "x", "__class__", "__subclasses__", "../..", "a b",
    "lambda", "\ud800", "\0", "torch.from_file", "os:system", [], {}, [[]], {"": 0}, {"object": 0}, {"object": 99},
    {"host": "os:system"}, {"known": "builtins.eval"}, {"namespace": "torch"}, {"model": ""}, nested(50), nested(150),
    {"constant": "unbound"}, {"int": "0x" + "f" * 5000}, {"float": "nan"}, {"bytes": "!"}, [0, 2**40, 0, 0, 0],
]  # fmt: skip
KINDS = [kind.__name__ for kind in ALL_OPS]


def mutate(text: str, paths: list[tuple[Any, ...]], chance: random.Random) -> Any:
    """The document with one thing wrong in it, or several. `paths` are those of all parts of the whole document."""
    document = json.loads(text)
    for changed in range(chance.choice((1, 1, 1, 2, 5))):
        known = [path for path in places(document) if path] if changed else paths
        path = chance.choice(known)
        owner, last = at(document, path[:-1]), path[-1]
        match chance.randrange(8):
            case 0:
                owner[last] = copy.deepcopy(chance.choice(OTHERS))
            case 1:
                owner[last] = copy.deepcopy(at(document, chance.choice(known)))
            case 2:
                del owner[last]
            case 3 if isinstance(owner, dict):
                owner[chance.choice(("x", "op", "kind", "__class__", "program"))] = owner[last]
            case 4 if isinstance(owner, list):
                owner.insert(last, copy.deepcopy(owner[last]))
            case 5:
                ops = [each for each in known if each[-1] == "op"]
                if ops:
                    at(document, chance.choice(ops)[:-1])["op"] = chance.choice(KINDS)
            case 6:
                texts = [each for each in known if isinstance(at(document, each), str)]
                one, two = chance.choice(texts), chance.choice(texts)
                left, right = at(document, one), at(document, two)
                at(document, one[:-1])[one[-1]], at(document, two[:-1])[two[-1]] = right, left
            case _ if isinstance(owner[last], int):
                owner[last] += chance.choice((-1, 1, 1000))
    return document


def test_thousands_of_damaged_documents(documents) -> None:
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
