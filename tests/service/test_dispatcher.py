"""Between the queue and the engine: what fails, what is full, what dies, what is given back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from running_service import Service, asynchronous, events, service
from service_stand_ins import job

from nnsight_compiler.service import dispatcher
from nnsight_compiler.service.records import NoSpaceError


@asynchronous
async def test_jobs_of_a_group_run_together_and_no_more_than_may(tmp_path: Path) -> None:
    async with service(tmp_path, max_batch=3) as running:
        first = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(first, "running")
        same = [await running.send(group="b") for _ in range(4)]
        other = await running.send(group="c")
        running.engine.gates["go"].set()
        for id in (*same, other):
            assert await running.status(id, 5) == "completed"
        assert sorted(map(len, running.engine.batches)) == [1, 1, 1, 3]
        assert {id for batch in running.engine.batches for id in batch} == {first, *same, other}


@asynchronous
async def test_a_job_that_fails_leaves_its_batch_mates(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(first, "running")
        good, bad, dying = await running.send(), await running.send(["error", "no"]), await running.send(["die"])
        running.engine.gates["go"].set()
        assert await running.status(good, 5) == "completed"
        assert await running.status(bad, 5) == "failed"
        assert await running.status(dying, 5) == "failed"
        assert running.engine.batches == [[first], [good, bad, dying], [dying]]  # tried again once, and alone


@asynchronous
async def test_an_engine_that_breaks_is_got_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with service(tmp_path) as running:
        with caplog.at_level(logging.ERROR):
            broken = await running.send(["break"])
            assert await running.status(broken, 5) == "failed"
        assert "the engine failed; the jobs that it ran go back to the queue" in caplog.text
        assert (await running.client.post("/v1/jobs?wait=5", content=job())).content == b"done"


@asynchronous
async def test_a_queue_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "PAUSE", 0.02)
    async with service(tmp_path) as running:
        lease, failures = running.store.lease, [NoSpaceError("full"), NoSpaceError("full")]

        def fails_twice(free: int, most: int) -> object:
            if failures:
                raise failures.pop()
            return lease(free, most)

        monkeypatch.setattr(running.store, "lease", fails_twice)
        assert (await running.client.post("/v1/jobs?wait=5", content=job())).content == b"done"
        assert not failures


@asynchronous
async def test_an_error_is_kept_once_the_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "PAUSE", 0.02)
    async with service(tmp_path) as running:
        fail, failures = running.store.fail, [NoSpaceError("full"), NoSpaceError("full")]

        def fails_twice(id: str, fence: int, error: dict[str, object]) -> bool:
            if failures:
                raise failures.pop()
            return fail(id, fence, error)

        monkeypatch.setattr(running.store, "fail", fails_twice)
        answer = await running.client.post("/v1/jobs?wait=5", content=job(["error", "no such layer"]))
        assert answer.json()["error"]["message"] == "no such layer"
        assert not failures


@asynchronous
async def test_a_result_that_does_not_fit_on_the_disk_is_an_error_of_its_job(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(id, "running")
        running.store.full = True
        running.engine.gates["go"].set()
        assert await running.status(id, 5) == "failed"
        error = (await running.client.get(f"/v1/jobs/{id}")).json()["error"]
        assert error["kind"] == "no_space"
        assert error["message"] == "the service's disk could not keep the result; send the job again later"
        running.store.full = False
        assert (await running.client.post("/v1/jobs?wait=5", content=job())).content == b"done"


async def follow(running: Service, id: str) -> list[str]:
    found = events((await running.client.get(f"/v1/jobs/{id}/events")).text)
    return [name for _, name, _ in found]


@asynchronous
async def test_what_runs_goes_back_to_the_queue_when_the_service_stops(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        long = await running.send(["wait", "never"], ["result", "x"])
        await running.reaches(long, "running")
        waiting = await running.send(group="b")
    async with service(tmp_path / "again", state=tmp_path / "state") as running:
        await running.reaches(long, "running")
        assert await running.status(waiting) == "queued"
        running.engine.gates["never"].set()
        assert await running.status(long, 5) == "completed"
        assert await running.status(waiting, 5) == "completed"
        assert await follow(running, long) == ["queued", "running", "queued", "running", "done"]
        assert await follow(running, waiting) == ["queued", "running", "done"]


@asynchronous
async def test_what_can_end_in_time_ends_when_the_service_stops(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        short = await running.send(["sleep", 0.1], ["result", "x"])
        await running.reaches(short, "running")
    async with service(tmp_path / "again", state=tmp_path / "state") as running:
        assert await running.status(short) == "completed"
        assert running.engine.batches == []


@asynchronous
async def test_many_clients_at_once_each_get_their_own_result(tmp_path: Path) -> None:
    async with service(tmp_path) as running:

        async def one(number: int) -> None:
            answer = await running.client.post("/v1/jobs?wait=10", content=job(["result", f"result {number}"]))
            assert answer.content == f"result {number}".encode()

        await asyncio.gather(*map(one, range(30)))
        assert len(running.engine.batches) < 30
