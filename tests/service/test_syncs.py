"""Waiting for the disk: nothing is told before it is kept, and many wait for one sync."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from running_service import asynchronous, service
from service_stand_ins import job

from nnsight_compiler.service.records import StoreError
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.syncs import Syncs


class Counted:
    """A queue without a disk: its syncs wait for `gate`, and each notes what it found committed."""

    def __init__(self) -> None:
        self.committed = 0
        self.gate = threading.Event()
        self.reached: list[int] = []
        self.fails = False

    def sync(self) -> None:
        reached = self.committed
        assert self.gate.wait(10)
        self.reached.append(reached)
        if self.fails:
            raise StoreError("the disk fails")


@asynchronous
async def test_those_that_wait_share_a_sync_that_began_after_their_commit() -> None:
    counted = Counted()
    syncs = Syncs(counted)  # type: ignore[arg-type]
    waiting = []
    for number in range(1, 6):
        counted.committed = number
        waiting.append(asyncio.create_task(syncs.settled()))
        await asyncio.sleep(0.01)
    assert not any(each.done() for each in waiting)
    counted.gate.set()
    await asyncio.gather(*waiting)
    assert counted.reached == [1, 5]
    await syncs.settled()
    assert counted.reached == [1, 5]  # nothing was committed since
    syncs.close()


@asynchronous
async def test_a_disk_that_fails_is_told_to_all_who_wait() -> None:
    counted = Counted()
    syncs = Syncs(counted)  # type: ignore[arg-type]
    counted.committed, counted.fails = 1, True
    waiting = [asyncio.create_task(syncs.settled()) for _ in range(3)]
    await asyncio.sleep(0.01)
    counted.gate.set()
    for each in waiting:
        with pytest.raises(StoreError, match="the disk fails"):
            await each
    syncs.close()


@asynchronous
async def test_one_who_gives_up_takes_the_sync_from_nobody() -> None:
    counted = Counted()
    syncs = Syncs(counted)  # type: ignore[arg-type]
    counted.committed = 1
    impatient, patient = (asyncio.create_task(syncs.settled()) for _ in range(2))
    await asyncio.sleep(0.01)
    impatient.cancel()
    counted.gate.set()
    await patient
    assert counted.reached == [1]
    syncs.close()


@asynchronous
async def test_nothing_is_told_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(tmp_path) as running:
        gate, sync = threading.Event(), Store.sync

        def late(store: Store) -> None:
            assert gate.wait(10)
            sync(store)

        assert await running.jobs() == 0
        monkeypatch.setattr(Store, "sync", late)
        sent = asyncio.create_task(running.client.post("/v1/jobs?wait=5", content=job(["result", "values"])))
        while not running.engine.batches:  # it runs meanwhile
            await asyncio.sleep(0.005)
        (id,) = running.engine.batches[0]
        shown = asyncio.create_task(running.client.get(f"/v1/jobs/{id}"))
        await asyncio.sleep(0.1)
        assert not sent.done()
        assert not shown.done()
        gate.set()
        assert (await sent).content == b"values"
        assert (await shown).json()["id"] == id
