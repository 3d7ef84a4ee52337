"""How long things are kept: each tenant's results, events and uploads within its bytes, and the records of jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from nnsight_compiler.service.database import Database, Row

DAY = 86_400.0

MAX_RECORDS = 100_000
"""Records of jobs that ended go, however young, once so many jobs were submitted after them."""

AT_ONCE = 1000
"""What a sweep takes away of a kind; the rest waits for the next one, since nobody else is served meanwhile."""

IN_USE = "EXISTS (SELECT 1 FROM job_blobs WHERE blob = blobs.number)"
OLDEST = f"""
SELECT 'job' AS kind, number, result AS file, tenant, kept AS bytes, ended AS at FROM jobs
WHERE expires IS NOT NULL AND kept > 0 AND tenant = ?1 AND number IS NOT
    (SELECT number FROM jobs WHERE state = 'completed' AND tenant = ?1 ORDER BY ended DESC, number DESC LIMIT 1)
UNION ALL
SELECT 'blob', number, file, tenant, bytes, used FROM blobs WHERE tenant = ?1 AND NOT {IN_USE}
ORDER BY at, number
"""
EXPIRED = "SELECT number, result AS file, tenant, kept AS bytes FROM jobs WHERE expires <= ? LIMIT ?"
UNUSED = f"SELECT number, file, tenant, bytes FROM blobs WHERE used <= ? AND NOT {IN_USE} LIMIT ?"
FORGOTTEN = "SELECT number, result AS file, tenant, kept AS bytes FROM jobs WHERE ended <= ? LIMIT ?"
SURPLUS = """
SELECT number, result AS file, tenant, kept AS bytes FROM jobs
WHERE number <= (SELECT max(number) FROM jobs) - ? AND ended IS NOT NULL LIMIT 2
"""
SHED = """
UPDATE jobs SET state = iif(state = 'completed', 'expired', state), kept = 0, expires = NULL, result = NULL
WHERE number = ?
"""


@final
@dataclass(frozen=True, slots=True)
class Periods:
    """For how many seconds results and events are kept after their job ended, records after their job ended, uploads
    after their last use."""

    results: float = DAY
    records: float = 3 * DAY
    blobs: float = DAY


@final
class Retention:
    """Takes away what is old.

    Every method belongs into a transaction of its caller, and adds to `removed` the files that are to go once that is
    committed.
    """

    def __init__(self, database: Database, folder: Path, periods: Periods) -> None:
        self._database = database
        self._folder = folder
        self.periods = periods

    def store(self, tenant: str, size: int) -> None:
        """Counts bytes that are kept for a tenant from now on, or fewer where `size` is below 0."""
        self._database.execute("UPDATE tenants SET stored = stored + ? WHERE name = ?", size, tenant)

    def make_room(self, tenant: str, most: int, need: int, removed: list[Path]) -> int:
        """Takes away what is oldest of a tenant's until `need` more bytes fit `most`.

        Its newest result stays, and so do uploads that a job still needs. Returns the bytes that are free then, fewer
        than `need` where they do not fit.
        """
        free = most - int(self._database.number("SELECT stored FROM tenants WHERE name = ?", tenant))
        if free < need:
            for row in self._database.rows(OLDEST, tenant):
                (self.shed if row["kind"] == "job" else self._forget_blob)(row, removed)
                free += row["bytes"]
                if free >= need:
                    break
        return free

    def expire(self, now: float, removed: list[Path]) -> int:
        """Results and events whose time is over."""
        expired = self._database.rows(EXPIRED, now, AT_ONCE)
        for row in expired:
            self.shed(row, removed)
        return len(expired)

    def forget_records(self, now: float, removed: list[Path]) -> int:
        """Records of jobs that ended long ago, with their idempotency keys."""
        forgotten = self._database.rows(FORGOTTEN, now - self.periods.records, AT_ONCE)
        for row in forgotten:
            self._forget(row, removed)
        return len(forgotten)

    def forget_surplus(self, removed: list[Path]) -> None:
        """Up to two of the oldest records of too many; with each new job, that keeps them bounded."""
        for row in self._database.rows(SURPLUS, MAX_RECORDS):
            self._forget(row, removed)

    def forget_blobs(self, now: float, removed: list[Path]) -> int:
        """Uploads that nobody used for long."""
        unused = self._database.rows(UNUSED, now - self.periods.blobs, AT_ONCE)
        for row in unused:
            self._forget_blob(row, removed)
        return len(unused)

    def shed(self, row: Row, removed: list[Path]) -> None:
        """Takes away the result of a job that ended, and its events but the last.

        row: the job's `number`, its `tenant`, the `file` of its result, and the `bytes` that it counts for.
        """
        self._database.execute("DELETE FROM events WHERE job = ? AND name != 'done'", row["number"])
        self._database.execute("DELETE FROM contents WHERE job = ? AND kind = 'result'", row["number"])
        self._database.execute(SHED, row["number"])
        self.store(row["tenant"], -row["bytes"])
        if row["file"] is not None:
            removed.append(self._folder / str(row["file"]))

    def _forget(self, row: Row, removed: list[Path]) -> None:
        self.shed(row, removed)
        self._database.execute("DELETE FROM jobs WHERE number = ?", row["number"])

    def _forget_blob(self, row: Row, removed: list[Path]) -> None:
        self._database.execute("DELETE FROM blobs WHERE number = ?", row["number"])
        self.store(row["tenant"], -row["bytes"])
        removed.append(self._folder / str(row["file"]))
