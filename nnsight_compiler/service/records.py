"""What the queue answers with, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.service.engine import Content, Data
from nnsight_compiler.service.tenants import Tenant

Status = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]


class StoreError(ExperimentError):
    """The queue cannot be used, or was asked for what it cannot do."""


class QueueFullError(StoreError):
    """As many jobs wait as may wait. `retry_after` is when to try again, in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class NoSpaceError(StoreError):
    """The disk is full. Nothing was acknowledged, and nothing has changed."""


class ConflictError(StoreError):
    """An idempotency key that stands for another job."""


class MissingBlobsError(StoreError):
    """A job that names tensors which were never uploaded, or which are no longer kept. `missing` are their hashes."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        super().__init__(f"not uploaded, or no longer kept: {', '.join(missing)}")
        self.missing = missing


class WrongHashError(StoreError):
    """An upload that is not what its name says."""


class StoredBytesError(StoreError):
    """An upload beyond what a tenant may store."""


@final
@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is in the queue for good.

    created: False where its idempotency key was known. place: counts from 1; 0 where it waits no more.
    """

    id: str
    created: bool
    place: int


@final
@dataclass(frozen=True, slots=True)
class Result:
    """A result that is kept: how long it is, its sha256 in hex, and until when, in seconds since 1970."""

    bytes: int
    sha256: str
    expires: float

    def as_data(self) -> dict[str, object]:
        return {"bytes": self.bytes, "sha256": self.sha256, "expires": self.expires}


@final
@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as its tenant may see it. Times are seconds since 1970; `attempts` counts how often it was begun,
    `events` how many it has, `said` those that are its own words: what it printed, and tokens."""

    id: str
    status: Status
    model: str
    created: float
    started: float | None
    ended: float | None
    attempts: int
    cost: Data
    error: Data | None
    result: Result | None
    events: int
    said: int


@final
@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job that is to run now. Whatever is recorded of it needs its fence; that of an earlier lease is stale.

    fence: how often the job was begun, this time included. blobs: files of its uploaded tensors, by sha256. waited:
    seconds since it was submitted.
    """

    id: str
    fence: int
    tenant: Tenant
    payload: Content
    blobs: Mapping[str, Path]
    cost: Data
    waited: float


@final
@dataclass(frozen=True, slots=True)
class Lease:
    """Jobs of one group, which may share their forwards. A job that was begun before is alone in its lease.

    damaged: the ids of those that failed instead, since their files are not what was acknowledged.
    """

    model: str
    group: str
    jobs: tuple[LeasedJob, ...]
    damaged: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job; `number` counts from 1 within the job."""

    number: int
    name: str
    data: Data


@final
@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found at the start: jobs that run again, jobs that were given up, and files that belonged to none."""

    queued: int
    failed: int
    orphans: int


@final
@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep took away: jobs whose results and events expired, records of jobs, uploads."""

    results: int
    records: int
    blobs: int
