"""The durable queue: what was acknowledged is on the disk, and every job ends once.

All is in one SQLite file, but for uploads, and payloads and results that are large: these are files, synced before the
row that names them is written (`durable.py`). Every method returns when what it did outlives this process; `sync`
returns when it outlives the power, and nothing of it is to be told before that. Only that a job has begun, and what it
sends while it runs, needs no sync: what is lost of that is done again.

A job that is leased has a *fence*, another one each time. Whoever holds an old one changes nothing: neither a worker
that was given up for dead, nor one whose job was cancelled meanwhile.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import final

from nnsight_compiler.service import durable
from nnsight_compiler.service.database import Database, Row
from nnsight_compiler.service.durable import Staged
from nnsight_compiler.service.engine import Content, Data
from nnsight_compiler.service.event_log import EventLog
from nnsight_compiler.service.fair_shares import FairShares
from nnsight_compiler.service.jobs import Jobs, record
from nnsight_compiler.service.records import (
    ConflictError,
    Event,
    JobRecord,
    Lease,
    Recovered,
    Status,
    StoreError,
    Submitted,
    Swept,
)
from nnsight_compiler.service.retention import Periods, Retention
from nnsight_compiler.service.room import MAX_QUEUED, Room
from nnsight_compiler.service.tenants import Tenant
from nnsight_compiler.service.uploads import Uploads

KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}")
COMPLETED = """
SELECT number, result AS file, tenant, kept AS bytes FROM jobs WHERE state = 'completed' AND result IS NOT NULL
"""
NAMED = """
SELECT payload FROM jobs WHERE state = 'queued' AND payload IS NOT NULL
UNION ALL SELECT result FROM jobs WHERE result IS NOT NULL UNION ALL SELECT file FROM blobs
"""
SMALL = 2**16
"""Bytes up to which a payload or a result stands in the database: it then needs no file, and no sync of its own."""
STATES: tuple[Status, ...] = ("queued", "running", "completed", "failed", "cancelled", "expired")


@final
class Store:
    """All jobs, in one folder, which no other process may use meanwhile.

    One thread makes it and calls it. Another one is refused with StoreError; only what waits for the disk may be called
    from any: `stage` and `sync`.

    Args:
        small: bytes up to which payloads and results stand in the database.
    """

    def __init__(
        self,
        state: Path,
        *,
        max_queued: int = MAX_QUEUED,
        small: int = SMALL,
        periods: Periods | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Raises:
            StoreError: the folder cannot be written, or is another service's that runs, or a newer release's, or its
                database is damaged.
        """
        self._files, self._incoming = state / "files", state / "incoming"
        try:
            for folder in (state, self._files, self._incoming):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.sync_folder(state)
            self._database = Database(state / "queue.sqlite")
        except OSError as error:
            raise StoreError(
                f"{state} cannot be used: {error.strerror}; give --state a folder that may be written"
            ) from error
        self._clock, self._small = clock, small
        self._shares = FairShares(self._database)
        self._events = EventLog(self._database)
        self._retention = Retention(self._database, self._files, periods or Periods())
        self._uploads = Uploads(self._database, self._files, self._retention)
        self._jobs = Jobs(
            self._database, self._files, self._shares, self._events, self._uploads, self._retention, clock
        )
        self._room = Room(self._database, state, max_queued, clock)

    def close(self) -> None:
        self._database.close()

    @property
    def committed(self) -> int:
        """How many changes were made that somebody may rely on; they are for good once `sync` was called after them."""
        return self._database.committed

    def sync(self) -> None:
        """Returns when all that was done before is on the disk.

        Raises:
            StoreError: the disk fails.
        """
        self._database.sync()

    # What a tenant asks for

    def is_small(self, data: Content) -> bool:
        """Whether a payload or a result stands in the database, so that to stage it takes no time."""
        return isinstance(data, bytes) and len(data) <= self._small

    def stage(self, data: Content, *, small: bool = True) -> Staged:
        """Writes, hashes and syncs a file of any size, in any thread; calls that take it need not wait for that.

        A file that is given is moved. What is given to no call after that is gone after the next start.

        Args:
            small: whether what is small may go without a file.
        """
        if small and isinstance(data, bytes) and self.is_small(data):
            return durable.staged(data)
        return durable.stage(self._files, data)

    def submit(
        self,
        tenant: Tenant,
        payload: Content | Staged,
        *,
        model: str,
        group: str,
        cost: Data,
        share: float = 1.0,
        blobs: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Puts a job into the queue.

        Args:
            payload: the job file. A file that is given is the queue's from now on, and gone where the job is refused.
            group: jobs of one group and model may share their forwards.
            cost: what the run is expected to take, for people.
            share: what its tenant is charged for it, in any unit that is the same for all jobs, as seconds.
            blobs: the uploads that it needs, by hash.
            idempotency_key: a second job of the tenant with this key is not queued; the first one's id comes back.

        Raises:
            ConflictError: the key stands for a job with another payload.
            MissingBlobsError: uploads are not there.
            QueueFullError: as many jobs, or bytes of jobs, wait as may.
            NoSpaceError: the disk is full; nothing was acknowledged.
        """
        removed: list[Path] = []
        with ExitStack() as refused:
            refused.callback(durable.discard, payload)
            if not math.isfinite(share) or share <= 0:
                raise StoreError(f"the share of a job is {share}; it is a number above 0")
            known = self._known(tenant, payload, idempotency_key)
            if known is not None:
                return Submitted(known["id"], False, self._shares.place(known))
            self._room.check_queue(tenant)
            self._uploads.check(tenant, blobs)
            self._room.check_disk()
            staged = payload if isinstance(payload, Staged) else self.stage(payload)
            refused.callback(durable.discard, staged)
            if staged.file is not None:  # those in the database are bounded by their number
                self._room.check_bytes(tenant, staged.bytes)
            id = secrets.token_hex(12)
            with self._database.transaction():
                place = self._jobs.queue(
                    tenant,
                    share,
                    blobs,
                    staged,
                    id=id,
                    model=model,
                    batch=group,
                    cost=json.dumps(cost),
                    idempotency_key=idempotency_key,
                )
                self._retention.forget_surplus(removed)
            refused.pop_all()
        self._remove(removed)
        return Submitted(id, True, place)

    def job(self, id: str, tenant: Tenant) -> JobRecord | None:
        """A job of this tenant; None where it has no such job."""
        row = self._jobs.of(id, tenant)
        return None if row is None else record(row)

    def place(self, id: str) -> int | None:
        """How many jobs are begun until this one is, itself counted, if no more arrive; 0 where it does not wait, None
        where there is none."""
        row = self._database.row("SELECT * FROM jobs WHERE id = ?", id)
        return None if row is None else self._shares.place(row)

    def cancel(self, id: str, tenant: Tenant) -> Status | None:
        """Ends a job that has not ended, and tells the state that it was in; None where the tenant has no such job.

        A job that ran is cancelled from now on, whatever its worker brings yet.
        """
        with self._database.transaction():
            row = self._jobs.of(id, tenant)
            if row is None:
                return None
            if row["state"] == "queued":
                self._shares.withdraw(row)
            if row["state"] in ("queued", "running"):
                self._jobs.end(row, "cancelled")
        self._drop_payload(row)
        state: Status = row["state"]
        return state

    def events(self, id: str, after: int = 0, most: int = 1000) -> list[Event]:
        """The events of a job that follow one, at most so many; none where there is no such job."""
        row = self._database.row("SELECT number FROM jobs WHERE id = ?", id)
        return [] if row is None else self._events.after(row["number"], after, most)

    def result(self, id: str, tenant: Tenant) -> Content | None:
        """A result that is kept."""
        row = self._jobs.of(id, tenant)
        return None if row is None else self._jobs.content(row, "result")

    def put_blob(self, tenant: Tenant, sha256: str, content: Content | Staged) -> bool:
        """Keeps an upload; False where it was there before. A file that is given is the queue's from now on.

        Raises:
            WrongHashError: its content has another hash.
            StoredBytesError: it does not fit what the tenant may store.
            NoSpaceError: the disk is full.
        """
        removed: list[Path] = []
        with ExitStack() as refused:
            refused.callback(durable.discard, content)
            self._room.check_disk()
            if self.blob_path(tenant, sha256) is not None:
                return False
            staged = content if isinstance(content, Staged) else self.stage(content, small=False)
            refused.callback(durable.discard, staged)
            with self._database.transaction():
                self._shares.know(tenant)
                self._uploads.add(tenant, sha256, staged, self._clock(), removed)
            refused.pop_all()
        self._remove(removed)
        return True

    def blob_path(self, tenant: Tenant, sha256: str) -> Path | None:
        """The file of an upload, which is kept for longer from now on."""
        with self._database.transaction(kept=False):
            return self._uploads.find(tenant, sha256, self._clock())

    # What runs the jobs asks for

    def lease(self, free: int, max_batch: int) -> list[Lease]:
        """Begins what is next: up to `free` leases, each of up to `max_batch` jobs that may run together.

        A job whose payload or uploads are damaged fails here, alone.
        """
        leases: list[Lease] = []
        ruined: list[Row] = []
        with self._database.transaction(kept=False):  # what is lost of it with the power is begun again
            while len(leases) < free and (rows := self._shares.next(max_batch)):
                begun = [(row, self._jobs.begin(row)) for row in rows]
                damaged = [row for row, job in begun if job is None]
                jobs = tuple(job for _, job in begun if job is not None)
                leases.append(Lease(rows[0]["model"], rows[0]["batch"], jobs, tuple(row["id"] for row in damaged)))
                ruined += damaged
        for row in ruined:
            self._drop_payload(row)
        self._room.begun(sum(len(lease.jobs) for lease in leases))
        return leases

    def waits(self) -> bool:
        """Whether any job waits."""
        return self._database.row("SELECT 1 FROM jobs WHERE state = 'queued' LIMIT 1") is not None

    def finish(self, id: str, fence: int, result: Content | Staged) -> bool:
        """Keeps a result, and ends its job. False where the fence is stale: then nothing has changed.

        A file that is given is the queue's from now on, and gone where it is not kept.

        Raises:
            NoSpaceError: the disk is full. The job counts as running: let it fail, or give it back.
        """
        removed: list[Path] = []
        with ExitStack() as refused:
            refused.callback(durable.discard, result)
            row = self._jobs.held(id, fence)
            if row is None:
                return False
            staged = result if isinstance(result, Staged) else self.stage(result)
            refused.callback(durable.discard, staged)
            with self._database.transaction():
                self._jobs.end(row, "completed", result=staged)
                most = self._jobs.tenant(row["tenant"]).limits.stored_bytes
                self._retention.make_room(row["tenant"], most, 0, removed)
            refused.pop_all()
        self._drop_payload(row)
        self._remove(removed)
        return True

    def fail(self, id: str, fence: int, error: Data) -> bool:
        """Ends a job with an error. False where the fence is stale."""
        row = self._jobs.held(id, fence)
        if row is None:
            return False
        with self._database.transaction():
            self._jobs.end(row, "failed", error=error)
        self._drop_payload(row)
        return True

    def give_back(self, id: str, fence: int, *, died: bool = True) -> bool:
        """Puts a job back that did not come to an end. False where the fence is stale.

        A second worker that dies on a job is the last: the job fails. `died` is False where the job has no part in it,
        as when the service stops.
        """
        row = self._jobs.held(id, fence)
        if row is None:
            return False
        with self._database.transaction():
            given_up = not self._jobs.again(row, deaths=int(died))
        if given_up:
            self._drop_payload(row)
        return True

    def append_events(self, id: str, fence: int, events: Iterable[tuple[str, Data]]) -> bool:
        """Records what a job sent while it ran. False where the fence is stale."""
        row = self._jobs.held(id, fence)
        if row is None:
            return False
        with self._database.transaction(kept=False):
            self._events.extend(row["number"], events)
        return True

    # What keeps the service in order asks for

    def recover(self) -> Recovered:
        """At the start: puts back what ran when the service ended, and takes away files that belong to nothing."""
        with self._database.transaction():
            running = self._database.rows("SELECT * FROM jobs WHERE state = 'running'")
            again = sum([self._jobs.again(row, restarts=1) for row in running])
            there = {path.name for path in self._files.iterdir()}
            for row in self._database.rows(COMPLETED):
                if row["file"] not in there:
                    self._retention.shed(row, [])
            named = {row[0] for row in self._database.rows(NAMED)}
            orphans = [*self._incoming.iterdir(), *(self._files / name for name in there - named)]
        self._remove(orphans)
        return Recovered(again, len(running) - again, len(orphans))

    def sweep(self, now: float | None = None) -> Swept:
        """Takes away results, records and uploads whose time is over, the first thousand of each."""
        now = self._clock() if now is None else now
        removed: list[Path] = []
        with self._database.transaction():
            results = self._retention.expire(now, removed)
            records = self._retention.forget_records(now, removed)
            blobs = self._retention.forget_blobs(now, removed)
        self._remove(removed)
        return Swept(results, records, blobs)

    def counts(self) -> dict[Status, int]:
        """How many jobs are in each state."""
        counted = {row[0]: row[1] for row in self._database.rows("SELECT state, count(*) FROM jobs GROUP BY state")}
        return {state: counted.get(state, 0) for state in STATES}

    # How it is done

    def _known(self, tenant: Tenant, payload: Content | Staged, key: str | None) -> Row | None:
        """The job that an idempotency key stands for."""
        if key is None:
            return None
        if not KEY.fullmatch(key):
            raise StoreError("an idempotency key is 1 to 128 letters, digits, '_', '.' and '-'")
        row = self._database.row("SELECT * FROM jobs WHERE tenant = ? AND idempotency_key = ?", tenant.name, key)
        if row is not None and row["payload_sha256"] != durable.digest_of(payload):
            raise ConflictError(f"the idempotency key {key} stands for another job; take a new key for a new job")
        return row

    def _drop_payload(self, row: Row) -> None:
        if row["payload"] is not None:
            self._remove([self._files / str(row["payload"])])

    def _remove(self, paths: Sequence[Path]) -> None:
        """Takes files away that no row names any more, which must be so for good before they go."""
        if paths:
            self.sync()
        for path in paths:
            path.unlink(missing_ok=True)
