"""What happened to each job, in order: bounded, so that a job which prints without end fills no disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import final

from nnsight_compiler.service.database import Database, Row
from nnsight_compiler.service.engine import Data
from nnsight_compiler.service.records import Event

MAX_EVENTS = 10_000
MAX_BYTES = 2**20
"""Of the names and data of one job's events."""

READ = "SELECT number, name, data FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?"
COUNT = "UPDATE jobs SET events = ?, event_bytes = ?, said = said + ?, truncated = ? WHERE number = ?"
WORDS = ("printed", "token")
"""Events that are a job's own words."""


@final
class EventLog:
    """The events of all jobs. What writes belongs into a transaction of its caller."""

    def __init__(self, database: Database, most: int = MAX_EVENTS, most_bytes: int = MAX_BYTES) -> None:
        self._database = database
        self._most = most
        self._most_bytes = most_bytes

    def append(self, job: int, name: str, data: Data) -> None:
        """Records a change of state, which is never left out."""
        counted = self._counted(job)
        number = counted["events"] + 1
        self._write(job, [(number, name, _json(data))])
        self._database.execute(COUNT, number, counted["event_bytes"], 0, counted["truncated"], job)

    def extend(self, job: int, events: Iterable[tuple[str, Data]]) -> None:
        """Records what a job sent. Once it has sent more than is kept, one event `truncated` says so, and no other
        follows but changes of state."""
        counted = self._counted(job)
        if counted["truncated"]:
            return
        number, size, truncated, kept = counted["events"], counted["event_bytes"], 0, []
        for name, data in events:
            text = _json(data)
            size += len(name) + len(text)
            number += 1
            if number > self._most or size > self._most_bytes:
                truncated = 1
                kept.append((number, "truncated", _json({"events": self._most, "bytes": self._most_bytes})))
                break
            kept.append((number, name, text))
        self._write(job, kept)
        said = sum(name in WORDS for _, name, _ in kept)
        self._database.execute(COUNT, number, min(size, self._most_bytes), said, truncated, job)

    def after(self, job: int, number: int, most: int) -> list[Event]:
        """Up to `most` of the events that follow one."""
        return [
            Event(row["number"], row["name"], json.loads(row["data"]))
            for row in self._database.rows(READ, job, number, most)
        ]

    def _counted(self, job: int) -> Row:
        row = self._database.row("SELECT events, event_bytes, truncated FROM jobs WHERE number = ?", job)
        assert row is not None, "events are of a job that is there"
        return row

    def _write(self, job: int, events: list[tuple[int, str, str]]) -> None:
        self._database.execute_each("INSERT INTO events VALUES (?, ?, ?, ?)", [(job, *each) for each in events])


def _json(data: Data) -> str:
    return json.dumps(data, separators=(",", ":"))
