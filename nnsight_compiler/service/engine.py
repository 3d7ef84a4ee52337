"""What the front end asks of an engine: to check jobs, to run them, to cancel them.

An engine lives in the front end's event loop, and runs jobs somewhere else: in processes of this machine
(`local_engine.py`), or on others. It executes no code of users, keeps no queue, and knows no tenants.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

from nnsight_compiler.ir.errors import ExperimentError

Data = dict[str, object]
"""A JSON object."""

Content = bytes | Path
"""What a job or a result is: its bytes, or the file that holds them."""

Send = Callable[[str, str, Data], None]
"""Takes an event of a running job: the job's id, the event's name, what it says. Called in the event loop."""


class Limits(Protocol):
    """What one job may use."""

    @property
    def wall_seconds(self) -> float: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def forwards(self) -> int: ...

    @property
    def max_result_bytes(self) -> int: ...


@final
@dataclass(frozen=True, slots=True)
class JobLimits:
    """The limits of one job, by themselves.

    memory_bytes: what it may allocate beyond what the process has already. forwards: runs of the model.
    """

    wall_seconds: float
    memory_bytes: int
    forwards: int
    max_result_bytes: int

    @classmethod
    def of(cls, limits: Limits) -> JobLimits:
        """Those among a tenant's limits."""
        return cls(limits.wall_seconds, limits.memory_bytes, limits.forwards, limits.max_result_bytes)


@final
@dataclass(frozen=True, slots=True)
class Assignment:
    """A job that is to be run.

    payload: the job file, or its bytes. blobs: the files of the tensors that were uploaded before, by sha256.
    """

    id: str
    payload: Content
    blobs: Mapping[str, Path]
    limits: Limits


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: with a result, bytes or a file that is the caller's from now on; or with an error.

    retry: it did not come to an end of its own, since its process died; `error` says what happened to that.
    """

    id: str
    result: Content | None = None
    error: Data | None = None
    retry: bool = False


@final
@dataclass(frozen=True, slots=True)
class Admission:
    """A job that may be queued.

    group: jobs of one group may share a forward. cost: what the run is expected to take.
    """

    group: str
    cost: Data = field(default_factory=dict)


class EngineError(ExperimentError):
    """The engine cannot start, or cannot go on."""


class RefusedError(Exception):
    """A job that is not admitted: the HTTP status that says so, and the record of what is wrong."""

    def __init__(self, status: int, record: Data) -> None:
        self.status, self.record = status, record
        super().__init__(str(record.get("message", "")))


def record(kind: str, message: str) -> Data:
    """The record of an error that is the service's and not an exception of the experiment."""
    return {"kind": kind, "module": None, "message": message, "notes": [], "where": [], "op": None}


class Engine(Protocol):
    """What admits and runs jobs."""

    @property
    def workers(self) -> int:
        """How many batches it runs at once."""

    async def start(self) -> None:
        """Returns when jobs can run.

        Raises:
            EngineError: they cannot; the message says why.
        """

    async def stop(self) -> None:
        """Ends all that runs, and leaves no process."""

    async def describe(self) -> Sequence[Data]:
        """The models that it holds: what a client needs to know of them to make programs without their weights."""

    async def admit(self, payload: Content, blobs: Mapping[str, Path], limits: Limits) -> Admission:
        """Checks a job, and runs nothing.

        Raises:
            RefusedError: it may not be queued.
        """

    def run(self, batch: Sequence[Assignment], send: Send) -> AsyncIterator[Outcome]:
        """Runs jobs of one group, and gives the outcome of each as it ends. Waits for a free worker."""

    async def cancel(self, id: str) -> None:
        """Ends a job of a batch that is running; its outcome says so. Any other id is nothing to it."""
