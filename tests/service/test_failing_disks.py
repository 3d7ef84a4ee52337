"""Disks that fail: each request is answered with a reason, no job hangs, and the service ends where only a new start
can tell what is kept."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from typing import Any

import pytest
from running_service import asynchronous, events, service
from service_stand_ins import WatchedStore, job, upload

from nnsight_compiler.service import bodies, dispatcher, durable
from nnsight_compiler.service.records import NoSpaceError, StoreError
from nnsight_compiler.service.store import Store


def fails(*arguments: object) -> Any:
    raise OSError(errno.EIO, "Input/output error")


@asynchronous
async def test_a_sync_that_fails_is_an_answer_and_ends_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(tmp_path) as running:
        before = await running.send()
        assert await running.status(before, 5) == "completed"
        assert running.front.failure is None
        log, sync = running.store._database._log, durable.sync
        monkeypatch.setattr(durable, "sync", lambda file: fails() if file == log else sync(file))
        sent = await running.client.post("/v1/jobs?wait=5", content=job(), headers={"Idempotency-Key": "a"})
        shown = await running.client.get(f"/v1/jobs/{before}")
        for answer in (sent, shown):
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "10"
            assert answer.json()["error"] == {
                "code": "store_failed",
                "message": "the service's disk fails, and what was asked for may not be kept; its log says how",
                "where": None,
                "op": None,
            }
        assert "queue.sqlite cannot be synced: Input/output error; start the service anew" in caplog.text
        assert str(running.front.failure).endswith("Input/output error; start the service anew")
        assert (await running.client.get("/readyz")).status_code == 503
    assert running.engine.stopped
    monkeypatch.undo()
    async with service(tmp_path / "again", state=tmp_path / "state") as running:
        again = await running.client.post("/v1/jobs?wait=5", content=job(), headers={"Idempotency-Key": "a"})
        assert again.content == b"done"
        assert await running.jobs() == 2


@asynchronous
async def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(tmp_path) as running:
        large = job(text="x" * 100_000)
        monkeypatch.setattr(durable, "write_all", fails)
        sent = await running.client.post("/v1/jobs", content=large)
        put = await running.client.put(f"/v1/blobs/{durable.staged(upload()).sha256}", content=upload())
        for answer in (sent, put):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_failed")
            assert str(tmp_path) not in answer.text
        monkeypatch.undo()
        assert running.front.failure is None
        assert list((tmp_path / "state" / "files").iterdir()) == []
        assert (await running.client.post("/v1/jobs?wait=5", content=large)).content == b"done"


@asynchronous
async def test_a_result_that_cannot_be_written_is_an_error_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["large", 100_000])
        await running.reaches(id, "running")
        monkeypatch.setattr(durable, "_move", fails)
        running.engine.gates["go"].set()
        assert await running.status(id, 5) == "failed"
        error = (await running.client.get(f"/v1/jobs/{id}")).json()["error"]
        assert error["kind"] == "no_space"
        assert error["message"] == "the service's disk could not keep the result; send the job again later"
        assert list(running.engine.results.iterdir()) == []


@asynchronous
async def test_what_is_printed_and_cannot_be_kept_leaves_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(tmp_path) as running:

        def damaged(*arguments: object) -> None:
            raise StoreError("queue.sqlite is damaged")

        monkeypatch.setattr(running.store, "append_events", damaged)
        answer = await running.client.post("/v1/jobs?wait=5", content=job(["print", "a"], ["result", "x"]))
        assert answer.content == b"x"


@asynchronous
async def test_an_end_that_cannot_be_kept_does_not_keep_the_service_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatcher, "PAUSE", 0.02)
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["error", "no"])
        await running.reaches(id, "running")

        def full(*arguments: object) -> bool:
            raise NoSpaceError("full")

        monkeypatch.setattr(running.store, "fail", full)
        running.engine.gates["go"].set()
        while "tried again" not in caplog.text:
            await asyncio.sleep(0.005)
    assert running.engine.stopped
    assert "how jobs ended may not be kept" in caplog.text
    async with service(tmp_path / "again", state=tmp_path / "state") as running:
        running.engine.gates.setdefault("go", asyncio.Event()).set()
        assert await running.status(id, 5) == "failed"


@asynchronous
async def test_what_fails_unforeseen_is_told_to_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["error", "no"])
        await running.reaches(id, "running")
        waiting = asyncio.create_task(running.status(id, 5))

        def breaks(*arguments: object) -> bool:
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(running.store, "fail", breaks)
        running.engine.gates["go"].set()
        while "unforeseen" not in caplog.text:
            await asyncio.sleep(0.005)
        assert running.front._dispatcher.running == 0
        waiting.cancel()


@asynchronous
async def test_sweeping_goes_on_after_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(tmp_path, sweep=0.01) as running:
        sweep, failures = running.store.sweep, [StoreError("damaged"), NoSpaceError("full"), RuntimeError("unforeseen")]
        swept = asyncio.Event()
        loop = asyncio.get_running_loop()

        def fails_at_first(now: float) -> object:
            if failures:
                raise failures.pop()
            loop.call_soon_threadsafe(swept.set)
            return sweep(now)

        monkeypatch.setattr(running.store, "sweep", fails_at_first)
        await swept.wait()
    assert running.engine.stopped
    assert caplog.text.count("what has expired could not be swept away") == 3


@asynchronous
async def test_a_service_whose_queue_cannot_be_taken_up_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: WatchedStore) -> None:
        raise NoSpaceError("no space for queue.sqlite")

    monkeypatch.setattr(WatchedStore, "recover", full)
    async with service(tmp_path, ready=False) as running:
        assert str(running.front.failure) == "no space for queue.sqlite"
        assert (await running.client.post("/v1/jobs", content=job())).status_code == 503


@asynchronous
async def test_who_waits_for_a_job_whose_file_was_damaged_is_told_at_once(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(first, "running")
        damaged = await running.send(["result", "y"])
        await running.front._thread.call(
            running.store._database.execute,
            "UPDATE contents SET data = x'00' WHERE job = (SELECT number FROM jobs WHERE id = ?)",
            damaged,
        )
        waiting = asyncio.create_task(running.client.get(f"/v1/jobs/{damaged}?wait=15"))
        told = asyncio.create_task(running.client.get(f"/v1/jobs/{damaged}/events"))
        await asyncio.sleep(0.05)
        running.engine.gates["go"].set()
        async with asyncio.timeout(5):
            assert (await waiting).json()["error"]["kind"] == "damaged"
            assert events((await told).text)[-1][1] == "done"


@asynchronous
async def test_a_job_that_is_leased_while_the_service_stops_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(tmp_path) as running:
        lease = running.store.lease
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(free: int, most: int) -> object:
            found = lease(free, most)
            loop.call_soon_threadsafe(asked.set)
            time.sleep(0.1)
            return found

        monkeypatch.setattr(running.store, "lease", slow)
        id = await running.send(["result", "x"])
        await asked.wait()
    async with service(tmp_path / "again", state=tmp_path / "state") as running:
        told = events((await running.client.get(f"/v1/jobs/{id}/events")).text)
        assert [name for _, name, _ in told] == ["queued", "running", "done"]


@asynchronous
async def test_a_service_that_has_no_room_from_the_start_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(tmp_path, ready=False, free_disk=2**62) as running:
        running.engine.loading.set()
        while "no job is taken: the disk of the service is almost full" not in caplog.text:
            await asyncio.sleep(0.005)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"file/state cannot be used: Not a directory; give --state a folder that may"):
        Store(tmp_path / "file" / "state")


@asynchronous
async def test_bodies_go_to_files_where_many_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IN_MEMORY", 300_000)
    async with service(tmp_path) as running:
        arrivals, held = running.front.arrivals, []
        admit = running.engine.admit
        go = asyncio.Event()

        async def slow(payload: Any, *arguments: Any) -> Any:
            held.append(payload)
            await go.wait()
            return await admit(payload, *arguments)

        monkeypatch.setattr(running.engine, "admit", slow)

        async def pieces() -> Any:
            data = job(text="x" * 200_000)
            for start in range(0, len(data), 50_000):
                yield data[start : start + 50_000]

        keys = [running.key, running.other_key, running.small_key]
        sent = [
            asyncio.create_task(
                running.client.post("/v1/jobs?wait=5", content=pieces(), headers={"Authorization": f"Bearer {key}"})
            )
            for key in keys
        ]
        while len(held) < 3:
            await asyncio.sleep(0.005)
        assert sum(arrivals._held.values()) <= 300_000 + 3 * bodies.CROWDED
        assert any(isinstance(payload, Path) for payload in held)
        go.set()
        assert [(await each).content for each in sent] == [b"done"] * 3
        assert arrivals._held == {}
