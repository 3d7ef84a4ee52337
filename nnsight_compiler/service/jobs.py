"""The jobs of the queue, and how each goes from one state to the next."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, final

from nnsight_compiler.service import durable
from nnsight_compiler.service.database import Argument, Database, Row
from nnsight_compiler.service.durable import Staged
from nnsight_compiler.service.engine import Content, Data
from nnsight_compiler.service.event_log import EventLog
from nnsight_compiler.service.fair_shares import FairShares
from nnsight_compiler.service.records import JobRecord, LeasedJob, Result, Status
from nnsight_compiler.service.retention import Retention
from nnsight_compiler.service.tenants import Limits, Tenant
from nnsight_compiler.service.uploads import Uploads

DEATHS = 2
"""Workers that may die on a job before it is given up."""

RESTARTS = 5
"""Times that the whole service may end while a job runs before the job is given up."""

BEGIN = "UPDATE jobs SET state = 'running', attempts = attempts + 1, started = ? WHERE number = ?"
AGAIN = "UPDATE jobs SET state = 'queued', deaths = ?, restarts = ? WHERE number = ?"
END = """
UPDATE jobs SET state = ?, ended = ?, error = ?, result = ?, result_bytes = ?, result_sha256 = ?,
    expires = ?, kept = ? WHERE number = ?
"""
CONTENT = "SELECT data FROM contents WHERE job = ? AND kind = ?"
DROP = "DELETE FROM contents WHERE job = ? AND kind = ?"


@final
class Jobs:
    """Changes of state, each with its event. Every method that changes belongs into a transaction of its caller."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        shares: FairShares,
        events: EventLog,
        uploads: Uploads,
        retention: Retention,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._folder = folder
        self._shares = shares
        self._events = events
        self._uploads = uploads
        self._retention = retention
        self._clock = clock

    def of(self, id: str, tenant: Tenant) -> Row | None:
        return self._database.row("SELECT * FROM jobs WHERE id = ? AND tenant = ?", id, tenant.name)

    def held(self, id: str, fence: int) -> Row | None:
        """The job that runs under this fence."""
        return self._database.row("SELECT * FROM jobs WHERE id = ? AND attempts = ? AND state = 'running'", id, fence)

    def queue(self, tenant: Tenant, share: float, blobs: Sequence[str], payload: Staged, **columns: Argument) -> int:
        """A new job, and its place."""
        now = self._clock()
        self._shares.know(tenant)
        tag, charge = self._shares.charge(tenant, share)
        values = {
            "tenant": tenant.name, "tag": tag, "charge": charge, "created": now, "state": "queued",
            "payload": payload.file, "payload_bytes": payload.bytes, "payload_sha256": payload.sha256, **columns,
        }  # fmt: skip
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        number = self._database.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", *values.values()).lastrowid
        assert number is not None
        self._hold(number, "payload", payload)
        self._uploads.hold(number, tenant, blobs, now)
        return self._wait(number)

    def begin(self, row: Row) -> LeasedJob | None:
        """The job, running; None, and failed, where its files are not what was acknowledged."""
        payload = self.content(row, "payload")
        blobs = self._uploads.held(row["number"])
        if payload is None or not _is_whole(payload, row) or not all(path.is_file() for path in blobs.values()):
            self.end(
                row,
                "failed",
                error=error_record("damaged", "the job's file was damaged on the service's disk; send it again"),
            )
            return None
        now = self._clock()
        self._database.execute(BEGIN, now, row["number"])
        attempt = row["attempts"] + 1
        self._events.append(row["number"], "running", {"attempt": attempt})
        return LeasedJob(
            row["id"],
            attempt,
            self.tenant(row["tenant"]),
            payload,
            blobs,
            json.loads(row["cost"]),
            max(0.0, now - row["created"]),
        )

    def end(self, row: Row, state: Status, *, error: Data | None = None, result: Staged | None = None) -> None:
        """A job that has not ended, ended."""
        now = self._clock()
        expires = now + self._retention.periods.results
        kept = int(self._database.number("SELECT event_bytes FROM jobs WHERE number = ?", row["number"]))
        file, size, sha256, shown = None, None, None, None
        if result is not None:
            file, size, sha256 = result.file, result.bytes, result.sha256
            shown = Result(size, sha256, expires).as_data()
            kept += size
        text = None if error is None else json.dumps(error)
        self._database.execute(END, state, now, text, file, size, sha256, expires, kept, row["number"])
        self._database.execute(DROP, row["number"], "payload")
        if result is not None:
            self._hold(row["number"], "result", result)
        self._retention.store(row["tenant"], kept)
        self._uploads.release(row["number"])
        self._events.append(row["number"], "done", {"status": state, "error": error, "result": shown})

    def again(self, row: Row, *, deaths: int = 0, restarts: int = 0) -> bool:
        """Puts a job back into the queue, at its place; False where it was given up instead."""
        deaths, restarts = row["deaths"] + deaths, row["restarts"] + restarts
        if deaths >= DEATHS or restarts >= RESTARTS:
            what = f"{deaths} workers died" if deaths >= DEATHS else f"the service ended {restarts} times"
            self.end(
                row, "failed", error=error_record("interrupted", f"{what} while the job ran; it is not tried again")
            )
            return False
        self._database.execute(AGAIN, deaths, restarts, row["number"])
        self._wait(row["number"])
        return True

    def content(self, row: Row, kind: Literal["payload", "result"]) -> Content | None:
        """The payload or the result of a job, as it is kept; None where it is not."""
        if row[kind] is not None:
            return self._folder / str(row[kind])
        held = self._database.row(CONTENT, row["number"], kind)
        return None if held is None else bytes(held["data"])

    def tenant(self, name: str) -> Tenant:
        """A tenant as it was known when it last submitted a job."""
        row = self._database.row("SELECT weight, limits FROM tenants WHERE name = ?", name)
        assert row is not None, "a job's tenant is known"
        return Tenant(name, row["weight"], Limits.from_json(row["limits"]))

    def _hold(self, number: int, kind: str, staged: Staged) -> None:
        if isinstance(staged.content, bytes):
            self._database.execute("INSERT INTO contents VALUES (?, ?, ?)", number, kind, staged.content)

    def _wait(self, number: int) -> int:
        row = self._database.row("SELECT * FROM jobs WHERE number = ?", number)
        assert row is not None
        place = self._shares.place(row)
        self._events.append(number, "queued", {"place": place})
        return place


def record(row: Row) -> JobRecord:
    """A job as its tenant may see it."""
    return JobRecord(
        row["id"],
        row["state"],
        row["model"],
        row["created"],
        row["started"],
        row["ended"],
        row["attempts"],
        json.loads(row["cost"]),
        None if row["error"] is None else json.loads(row["error"]),
        Result(row["result_bytes"], row["result_sha256"], row["expires"]) if row["state"] == "completed" else None,
        row["events"],
        row["said"],
    )


def error_record(kind: str, message: str) -> Data:
    """The record of an error that is the queue's, and not an exception of the experiment."""
    return {"kind": kind, "module": None, "message": message, "notes": [], "where": [], "op": None}


def _is_whole(payload: Content, row: Row) -> bool:
    try:
        return durable.hash_of(payload) == (row["payload_sha256"], row["payload_bytes"])
    except OSError:
        return False
