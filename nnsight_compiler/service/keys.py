"""Keys of tenants: random, shown once, kept as hashes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.service.tenants import Limits, Tenant

VERSION = 1
"""Of the schema."""

PREFIX = "nnc"
FORM = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")
NO_HASH = bytes(32)

SCHEMA = """
CREATE TABLE tenants (name TEXT PRIMARY KEY, weight REAL NOT NULL, limits TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    hash BLOB NOT NULL,
    created REAL NOT NULL,
    revoked REAL
) STRICT, WITHOUT ROWID;
CREATE TABLE secret (value BLOB NOT NULL) STRICT;
"""
TENANT = (
    "INSERT INTO tenants VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET weight = excluded.weight, limits = excluded.limits"
)
FIND = "SELECT hash, tenant, weight, limits FROM keys JOIN tenants ON tenant = name WHERE id = ? AND revoked IS NULL"
LIST = """
SELECT id, tenant, weight, limits, created, revoked FROM keys JOIN tenants ON tenant = name
ORDER BY tenant, created, id
"""


class KeysError(ExperimentError):
    """A file of keys that cannot be used, or a key that is not in it."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}; {way_out}")
        self.reason, self.way_out = reason, way_out


@final
@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key without what is secret of it. Times are seconds since 1970; `revoked` is None while it is valid."""

    id: str
    tenant: Tenant
    created: float
    revoked: float | None


@final
class Keys:
    """A file of keys. One thread makes it and calls it; other processes may change the file meanwhile."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            KeysError: the file is something else, or of a newer release.
        """
        self.path = path
        if not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=10)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._secret = self._opened()
        except sqlite3.DatabaseError as error:
            raise KeysError(f"{path} is no file of keys: {error}", "give the path of one, or of a new file") from error

    def _opened(self) -> bytes:
        """The file's secret; a new file gets its tables first."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version > VERSION:
                raise KeysError(
                    f"{self.path} is of a newer release (its schema is {version}, this release reads {VERSION})",
                    "use that release",
                )
            if version == 0:
                if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                    raise KeysError(f"{self.path} is a database of something else", "give another path")
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
                connection.execute(f"PRAGMA user_version = {VERSION}")
            found: bytes = connection.execute("SELECT value FROM secret").fetchone()[0]
            connection.execute("COMMIT")
            return found
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def add(self, tenant: Tenant) -> str:
        """A new key of a tenant, which is given its weight and limits from now on. It can be had this once."""
        id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute(TENANT, (tenant.name, tenant.weight, tenant.limits.as_json()))
            row = (id, tenant.name, self._hash(secret), time.time())
            self._connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, NULL)", row)
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        return f"{PREFIX}_{id}_{secret}"

    def tenant(self, name: str) -> Tenant | None:
        """A tenant that has or had a key."""
        found = self._connection.execute("SELECT name, weight, limits FROM tenants WHERE name = ?", (name,)).fetchone()
        return None if found is None else Tenant(found[0], found[1], Limits.from_json(found[2]))

    def authenticate(self, key: str) -> Tenant | None:
        """Whom a key stands for; None where it is wrong or revoked. How long this takes tells nothing of a secret."""
        parts = FORM.fullmatch(key)
        if parts is None:
            return None
        id, secret = parts.groups()
        found = self._connection.execute(FIND, (id,)).fetchone()
        expected = NO_HASH if found is None else found[0]
        if not hmac.compare_digest(self._hash(secret), expected) or found is None:
            return None
        return Tenant(found[1], found[2], Limits.from_json(found[3]))

    def records(self) -> list[KeyRecord]:
        """All keys, also those that were revoked."""
        return [
            KeyRecord(id, Tenant(name, weight, Limits.from_json(limits)), created, revoked)
            for id, name, weight, limits, created, revoked in self._connection.execute(LIST)
        ]

    def revoke(self, name: str) -> list[str]:
        """Makes a key invalid, given by its id, or all keys of a tenant; returns the ids.

        Raises:
            KeysError: no valid key has this id or this tenant.
        """
        rows = self._connection.execute(
            "UPDATE keys SET revoked = ? WHERE (id = ? OR tenant = ?) AND revoked IS NULL RETURNING id",
            (time.time(), name, name),
        ).fetchall()
        if not rows:
            raise KeysError(
                f"no valid key has the id or the tenant {name!r}", "`nnsightc keys list` shows those that there are"
            )
        return sorted(row[0] for row in rows)

    def _hash(self, secret: str) -> bytes:
        return hmac.digest(self._secret, secret.encode("ascii"), hashlib.sha256)
