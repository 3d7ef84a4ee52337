"""Jobs that strangers make: damaged ones, and well-formed ones that no compiler wrote. Each is refused with a reason or
admitted, at once and in little memory; reading it imports nothing, and no other exception ever comes out."""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from admitting import Limits, job_of
from chosen import PROGRAMS
from every_feature import FEATURES
from mutations import mutate, places, turn

from nnsight_compiler import Experiment, ExperimentError, FileError
from nnsight_compiler.remote.container import job_header, read_header
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import pack, packed, unpack, unpacked
from nnsight_compiler.service.admission import Admitter, NotAdmittedError

CASES = int(PROGRAMS or 60)
"""How many jobs of each kind."""
SEED = None if PROGRAMS else 20
SECONDS, BYTES = 2.0, 200 * 2**20


@dataclass(frozen=True)
class Sound:
    """A job as the client writes it, and where it runs."""

    name: str
    document: str
    tensors: dict[str, torch.Tensor]
    admitter: Admitter

    def file(self, document: Any) -> bytes | None:
        """The file of another document; `None` for one that is no JSON."""
        try:
            return packed(document, self.tensors)
        except (TypeError, ValueError, RecursionError):
            return None


@pytest.fixture(scope="module")
def jobs() -> list[Sound]:
    torch.set_num_threads(1)
    wrapped: dict[Any, Any] = {}
    admitters: dict[Any, Admitter] = {}
    found = []
    for feature in FEATURES:
        experiment = feature.program
        if not isinstance(experiment, Experiment):
            continue  # a function with blocks in it
        if feature.make not in wrapped:
            wrapped[feature.make] = feature.wrapped(feature.module())
            admitters[feature.make] = Admitter(Executor(wrapped[feature.make]))
        names = [parameter.value.name for parameter in experiment.ir.parameters]
        given = dict(zip(names, (wrapped[feature.make], feature.inputs(0)), strict=False))
        try:
            job = job_of(experiment, given)
        except FileError:
            continue  # what reads something that cannot be sent
        document, tensors = unpacked(pack(job))
        found.append(Sound(feature.name, json.dumps(document), tensors, admitters[feature.make]))
    assert len(found) > len(FEATURES) / 2
    return found


class Importing:
    """Finds nothing, and notes what was looked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, *_: object) -> None:
        self.names.append(name)


class LateError(BaseException):
    """Nothing that is looked at takes this long."""


@contextmanager
def at_once() -> Iterator[None]:
    """Fails where what is inside computes too long."""

    def late(*_: object) -> None:
        raise LateError

    previous = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


@contextmanager
def nothing_is_imported() -> Iterator[None]:
    watcher = Importing()
    sys.meta_path.insert(0, watcher)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(watcher)  # type: ignore[arg-type]
    assert watcher.names == []


def outcome(sound: Sound, data: bytes) -> str:
    """How a service answers a file."""
    refusal: NotAdmittedError | None = None
    with at_once():
        try:
            with nothing_is_imported():
                job_header(read_header(data))
                job = unpack(data)
        except FileError:
            return "damaged"
        try:
            sound.admitter.admit(job, Limits())
        except NotAdmittedError as error:
            refusal = error
    if refusal is None:
        return "admitted"
    assert refusal.status in (413, 422)
    assert refusal.message
    assert json.dumps(refusal.record(), allow_nan=False)
    cause = refusal.__cause__
    if cause is not None and not isinstance(cause, ExperimentError) and not of_the_model(cause):
        raise cause
    return "refused"


def of_the_model(error: BaseException) -> bool:
    """Whether an error comes out of the model's own code, or of its tokenizer: it was given what it does not take."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(file.endswith(("every_feature.py", "runtime/observe.py", "models/nnsight.py")) for file in files)


@contextmanager
def in_little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_sound_jobs_are_admitted(jobs: list[Sound]) -> None:
    for sound in jobs:
        data = sound.file(json.loads(sound.document))
        assert data is not None
        try:
            job_header(read_header(data))
            sound.admitter.admit(unpack(data), Limits())
        except ExperimentError as error:
            raise AssertionError(sound.name) from error


def test_damaged_documents(jobs: list[Sound]) -> None:
    chance, found = random.Random(SEED), Counter[str]()
    with in_little_memory():
        for _ in range(2 * CASES):
            sound = chance.choice(jobs)
            paths = [path for path in places(json.loads(sound.document)) if path]
            data = sound.file(mutate(sound.document, paths, chance))
            found["no JSON" if data is None else outcome(sound, data)] += 1
    assert found["damaged"]
    assert found["refused"] > CASES / 2


def test_programs_that_no_compiler_wrote(jobs: list[Sound]) -> None:
    chance, found = random.Random(SEED), Counter[str]()
    with in_little_memory():
        for _ in range(2 * CASES):
            sound = chance.choice(jobs)
            document = json.loads(sound.document)
            document["code"] = turn(json.dumps(document["code"]), chance)
            data = sound.file(document)
            found["no JSON" if data is None else outcome(sound, data)] += 1
    assert found["refused"] > CASES / 4
    assert found["admitted"] > CASES / 4


def test_data_that_no_program_wants(jobs: list[Sound]) -> None:
    chance, found = random.Random(SEED), Counter[str]()
    with in_little_memory():
        for _ in range(CASES):
            sound = chance.choice(jobs)
            parts = (
                "arguments", "objects", "attributes", "gradients", "options", "grad_enabled", "default_dtype", "blobs",
                "model",
            )  # fmt: skip
            paths = [path for path in places(json.loads(sound.document)) if path and path[0] in parts]
            data = sound.file(mutate(sound.document, paths, chance))
            found["no JSON" if data is None else outcome(sound, data)] += 1
    assert found["damaged"] > CASES / 10
    assert found["refused"] > CASES / 10


def test_damaged_files(jobs: list[Sound]) -> None:
    chance, found = random.Random(SEED), Counter[str]()
    with in_little_memory():
        for number in range(2 * CASES):
            sound = chance.choice(jobs)
            data = sound.file(json.loads(sound.document))
            assert data is not None
            content = bytearray(data)
            match number % 3:
                case 0:
                    content = content[: chance.randrange(len(content))]
                case 1:
                    for _ in range(chance.choice((1, 8))):
                        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                case _:
                    start = chance.randrange(len(content))
                    content[start : start + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(64))
            found[outcome(sound, bytes(content))] += 1
    assert found["damaged"] > CASES
