"""Tensors that tenants upload once and name in their jobs by hash. One tenant's are nothing to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from nnsight_compiler.service.database import Database, Row
from nnsight_compiler.service.durable import Staged
from nnsight_compiler.service.records import MissingBlobsError, StoredBytesError, WrongHashError
from nnsight_compiler.service.retention import Retention
from nnsight_compiler.service.tenants import Tenant

FIND = "SELECT * FROM blobs WHERE tenant = ? AND sha256 = ?"
ADD = """
INSERT INTO blobs (tenant, sha256, file, bytes, used) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (tenant, sha256) DO UPDATE SET file = excluded.file, used = excluded.used
"""
OF_JOB = "SELECT sha256, file FROM blobs JOIN job_blobs ON blob = number WHERE job = ?"


@final
class Uploads:
    """The uploads of all tenants, and which jobs need them. Every method belongs into a transaction of its caller."""

    def __init__(self, database: Database, folder: Path, retention: Retention) -> None:
        self._database = database
        self._folder = folder
        self._retention = retention

    def find(self, tenant: Tenant, sha256: str, now: float) -> Path | None:
        """The file of an upload, which counts as used."""
        row = self._present(tenant, sha256)
        if row is None:
            return None
        self._use(row, now)
        return self._folder / str(row["file"])

    def add(self, tenant: Tenant, sha256: str, staged: Staged, now: float, removed: list[Path]) -> None:
        """Keeps a file as an upload that is not there yet, or whose file was lost.

        Raises:
            WrongHashError: the file has another hash.
            StoredBytesError: it does not fit what the tenant may store, whatever goes.
        """
        if staged.sha256 != sha256:
            raise WrongHashError(f"the upload {sha256} has the hash {staged.sha256}; hash the whole file that is sent")
        most = tenant.limits.stored_bytes
        if self._retention.make_room(tenant.name, most, staged.bytes, removed) < staged.bytes:
            raise StoredBytesError(
                f"an upload of {staged.bytes} bytes does not fit the {most} bytes that "
                f"{tenant.name} may store; wait until jobs end that need earlier ones, or send less"
            )
        if self._database.row(FIND, tenant.name, sha256) is None:
            self._retention.store(tenant.name, staged.bytes)
        self._database.execute(ADD, tenant.name, sha256, staged.file, staged.bytes, now)

    def check(self, tenant: Tenant, names: Sequence[str]) -> None:
        """Raises MissingBlobsError where a job names what is not there."""
        missing = tuple(name for name in names if self._present(tenant, name) is None)
        if missing:
            raise MissingBlobsError(missing)

    def hold(self, job: int, tenant: Tenant, names: Sequence[str], now: float) -> None:
        """Keeps what a job names until it has ended."""
        for name in dict.fromkeys(names):
            row = self._database.row(FIND, tenant.name, name)
            assert row is not None, "what a job names was checked"
            self._use(row, now)
            self._database.execute("INSERT INTO job_blobs VALUES (?, ?)", job, row["number"])

    def held(self, job: int) -> Mapping[str, Path]:
        return {row["sha256"]: self._folder / row["file"] for row in self._database.rows(OF_JOB, job)}

    def release(self, job: int) -> None:
        self._database.execute("DELETE FROM job_blobs WHERE job = ?", job)

    def _present(self, tenant: Tenant, sha256: str) -> Row | None:
        row = self._database.row(FIND, tenant.name, sha256)
        return row if row is not None and (self._folder / str(row["file"])).is_file() else None

    def _use(self, row: Row, now: float) -> None:
        self._database.execute("UPDATE blobs SET used = ? WHERE number = ?", now, row["number"])
