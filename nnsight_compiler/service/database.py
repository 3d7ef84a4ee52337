"""The queue's database: one SQLite file, written by one process and one thread, synced when somebody has to rely on it.

SQLite would sync at each commit, while all else waits. Here a commit writes to the log alone, and `sync` syncs the log,
in any thread: so many commits share one sync, and what they lead to goes on meanwhile. Before SQLite copies the log
into the database it syncs it itself.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import final

from nnsight_compiler.service import durable
from nnsight_compiler.service.records import NoSpaceError, StoreError

VERSION = 1
"""Of the schema."""

SCHEMA = """
CREATE TABLE shares (virtual REAL NOT NULL) STRICT;
INSERT INTO shares VALUES (0);
CREATE TABLE tenants (
    name TEXT PRIMARY KEY, weight REAL NOT NULL, limits TEXT NOT NULL,
    finish REAL NOT NULL DEFAULT 0, stored INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    model TEXT NOT NULL,
    batch TEXT NOT NULL,
    cost TEXT NOT NULL,
    charge REAL NOT NULL,
    tag REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled', 'expired')),
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    idempotency_key TEXT,
    payload TEXT,
    payload_bytes INTEGER NOT NULL,
    payload_sha256 TEXT NOT NULL,
    error TEXT,
    result TEXT,
    result_bytes INTEGER,
    result_sha256 TEXT,
    expires REAL,
    kept INTEGER NOT NULL DEFAULT 0,
    events INTEGER NOT NULL DEFAULT 0,
    event_bytes INTEGER NOT NULL DEFAULT 0,
    said INTEGER NOT NULL DEFAULT 0,
    truncated INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX jobs_by_key ON jobs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX queued ON jobs (tag, number) WHERE state = 'queued';
CREATE INDEX queued_of_batch ON jobs (model, batch, tag, number) WHERE state = 'queued';
CREATE INDEX queued_of_tenant ON jobs (tenant, number) WHERE state = 'queued';
CREATE INDEX running ON jobs (number) WHERE state = 'running';
CREATE INDEX states ON jobs (state);
CREATE INDEX completed ON jobs (tenant, ended, number) WHERE state = 'completed';
CREATE INDEX kept ON jobs (tenant, ended, number) WHERE expires IS NOT NULL;
CREATE INDEX expires ON jobs (expires) WHERE expires IS NOT NULL;
CREATE INDEX ended ON jobs (ended, number) WHERE ended IS NOT NULL;
CREATE TABLE events (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE contents (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('payload', 'result')),
    data BLOB NOT NULL,
    PRIMARY KEY (job, kind)
) STRICT;
CREATE TABLE blobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    sha256 TEXT NOT NULL,
    file TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL,
    used REAL NOT NULL,
    UNIQUE (tenant, sha256)
) STRICT;
CREATE TABLE job_blobs (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    blob INTEGER NOT NULL REFERENCES blobs (number),
    PRIMARY KEY (job, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX jobs_of_blob ON job_blobs (blob);
"""

Row = sqlite3.Row
Argument = str | int | float | bytes | None


@final
class Database:
    """The one connection to the queue's file.

    Raises:
        StoreError: another process has the file, it is of a newer version, it is damaged, or another thread asks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.committed = 0
        """How many transactions somebody may rely on, since the start."""
        self.failure: str | None = None
        self._thread = threading.get_ident()
        with ExitStack() as opened:
            opened.callback(os.close, _locked(path.with_suffix(".lock")))
            try:
                self._connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
                opened.callback(self._connection.close)
                self._open(opened)
            except sqlite3.DatabaseError as error:
                raise _damaged(path, str(error)) from error
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack) -> None:
        connection = self._connection
        connection.row_factory = sqlite3.Row
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise StoreError(
                f"{self.path} was written by a newer release (its schema is {version}, this release reads {VERSION}); "
                "use that release, or another --state folder"
            )
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _damaged(self.path, found)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        if version == 0:
            if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise StoreError(f"{self.path} is a database of something else; use another --state folder")
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        with self.transaction():  # the first write of a connection makes the log
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("PRAGMA synchronous = NORMAL")
        log = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, log)
        durable.sync_folder(self.path.parent)
        self._log = log

    def close(self) -> None:
        """Gives the file up; a second time does nothing."""
        self._check_thread()
        self._opened.close()

    def sync(self) -> None:
        """Returns when all that was committed before is on the disk. Any thread may call it.

        Raises:
            StoreError: the disk fails, so that nobody knows what of the log is on it.
        """
        if self.failure is not None:
            raise StoreError(f"the disk of {self.path} failed before ({self.failure}); start the service anew")
        try:
            durable.sync(self._log)
        except OSError as error:
            self.failure = error.strerror or str(error)  # a second sync would succeed, and what was lost would stay so
            raise StoreError(f"{self.path} cannot be synced: {self.failure}; start the service anew") from error

    @contextmanager
    def transaction(self, *, kept: bool = True) -> Iterator[None]:
        """All of what is executed within, or nothing of it.

        It outlives the process from then on, and the power once `sync` was called; `kept` counts it among what
        somebody relies on.
        """
        self.execute("BEGIN IMMEDIATE")  # a read that becomes a write could fail half way
        try:
            yield
            self.execute("COMMIT")
            self.committed += kept
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def execute(self, statement: str, *arguments: Argument) -> sqlite3.Cursor:
        """
        Raises:
            NoSpaceError: the disk is full.
            StoreError: the file is damaged.
        """
        self._check_thread()
        try:
            return self._connection.execute(statement, arguments)
        except sqlite3.DatabaseError as error:
            self._report(error)
            raise

    def execute_each(self, statement: str, rows: Sequence[tuple[Argument, ...]]) -> None:
        """The same for each row of arguments."""
        self._check_thread()
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.DatabaseError as error:
            self._report(error)
            raise

    def row(self, statement: str, *arguments: Argument) -> Row | None:
        """The first row, if there is any."""
        found = self.rows(statement, *arguments)
        return found[0] if found else None

    def rows(self, statement: str, *arguments: Argument) -> list[Row]:
        """
        Raises:
            StoreError: the file is damaged.
        """
        self._check_thread()
        try:
            return self._connection.execute(statement, arguments).fetchall()
        except sqlite3.DatabaseError as error:  # also while rows are fetched
            self._report(error)
            raise

    def number(self, statement: str, *arguments: Argument) -> float:
        """The one number that is asked for; 0 where there is none."""
        found = self.row(statement, *arguments)
        return found[0] if found is not None and found[0] is not None else 0

    def _report(self, error: sqlite3.DatabaseError) -> None:
        """Tells a full disk and a damaged file from other errors, which are mistakes of this package."""
        # A file that may not grow is reported as full, or as a write that failed.
        code = error.sqlite_errorcode & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise NoSpaceError(f"no space for {self.path}: {error}") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(self.path, str(error)) from error

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise StoreError(
                "the queue is used from another thread than the one that opened it; call it from a thread of its own"
            )


def _locked(path: Path) -> int:
    """A lock that lasts as long as the process, also where it is killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace")
        os.close(descriptor)
        raise StoreError(
            f"{path.parent} belongs to a service that runs (process {holder}); stop it, or use another --state folder"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode("ascii"), 0)
    return descriptor


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {reason}; put a copy of the folder back, or move {path.parent} away and start with an "
        f"empty one (results that were kept are whole files in {path.parent / 'files'})"
    )
