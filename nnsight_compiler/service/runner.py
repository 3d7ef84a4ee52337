"""What runs jobs inside a process of the service. The processes know no more of experiments than stands here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.service.engine import Admission, Data, JobLimits


@final
class ChangedModelError(ExperimentError):
    """A job left the model changed for others, so that the process that has it is to end."""


Blobs = Callable[[str], bytes]
"""The file of a tensor that was uploaded before, by its sha256. `KeyError` for one that the job does not name."""


@final
@dataclass(frozen=True, slots=True)
class Task:
    """A job inside a worker.

    begin: is called before anything of the job runs; its time is counted from then on. wait: is called where it is to
    begin again, after others. send: takes its events: `printed`, `token`, `progress`.
    """

    id: str
    payload: Callable[[], bytes]
    blobs: Blobs
    limits: JobLimits
    begin: Callable[[], None]
    wait: Callable[[], None]
    send: Callable[[str, Data], None]


class Runner(Protocol):
    """A model, and what is done with it."""

    def describe(self) -> tuple[Data, Mapping[str, bytes]]:
        """What clients are told of the model, and the files of its tokenizer."""

    def begin(self, threads: int) -> None:
        """Called once in each process that runs or checks jobs, before the first, when its sandbox is closed."""

    def admit(self, payload: bytes, blobs: Blobs, limits: JobLimits) -> Admission:
        """Checks a job. Raises `RefusedError`."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes | Exception]]:
        """Runs tasks of one group, within their limits of forwards; for each, as it ends, the result file or what was
        raised. The other limits are kept for it."""

    def record(self, error: BaseException) -> Data:
        """An exception as clients are told of it: class, message, the lines of the experiment."""


def content(descriptor: int) -> bytes:
    """All bytes of a file, which may be read again."""
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size, 0)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), len(data))
        if not more:
            break
        data += more
    return data
