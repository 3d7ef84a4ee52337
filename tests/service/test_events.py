"""Streams of events: numbered, taken up again, silent only for so long, and ended by `done`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from running_service import Service, asynchronous, events, service
from starlette.types import Message

from nnsight_compiler.service import dispatcher


@asynchronous
async def test_events_come_in_order_until_done(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["print", "one\n"], ["sleep", 0.02], ["print", "two\nthree ü\n"], ["result", "values"])
        answer = await running.client.get(f"/v1/jobs/{id}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        found = events(answer.text)
        assert [number for number, _, _ in found] == [1, 2, 3, 4, 5]
        assert [name for _, name, _ in found] == ["queued", "running", "printed", "printed", "done"]
        assert found[0][2] == {"place": 1}
        assert [data for _, name, data in found if name == "printed"] == [{"text": "one\n"}, {"text": "two\nthree ü\n"}]
        done = found[-1][2]
        shown = (await running.client.get(f"/v1/jobs/{id}")).json()
        assert done == {"status": "completed", "error": None, "result": shown["result"]}


@asynchronous
async def test_events_are_taken_up_after_the_last_that_was_received(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["print", "one"], ["print", "two"], ["result", "values"])
        assert await running.status(id, 5) == "completed"
        answer = await running.client.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "3"})
        assert [(number, name) for number, name, _ in events(answer.text)] == [(4, "printed"), (5, "done")]
        over = await running.client.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "5"})
        assert (over.status_code, over.content) == (204, b"")


@asynchronous
async def test_a_last_event_id_is_checked(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for number in ("x", "-1", "1.5", "9" * 19):
            id = await running.send()
            answer = await running.client.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": number})
            assert answer.status_code == 400
            assert (
                answer.json()["error"]["message"] == "Last-Event-ID is the number of the last event that was received"
            )


@asynchronous
async def test_a_stream_taken_up_after_a_number_that_was_never_given_still_ends(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["print", "one"], ["result", "values"])
        await running.reaches(id, "running")
        stream = asyncio.create_task(
            running.client.get(f"/v1/jobs/{id}/events", headers={"Last-Event-ID": "999999999999999999"})
        )
        await asyncio.sleep(0.05)
        running.engine.gates["go"].set()
        async with asyncio.timeout(5):
            assert [name for _, name, _ in events((await stream).text)] == ["printed", "done"]


@asynchronous
async def test_a_job_whose_worker_died_is_queued_again_in_the_same_stream(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["die"])
        found = events((await running.client.get(f"/v1/jobs/{id}/events")).text)
        names = [name for _, name, _ in found]
        assert names == ["queued", "running", "queued", "running", "done"]
        assert found[-1][2]["error"]["kind"] == "interrupted"


@asynchronous
async def test_a_silent_stream_shows_that_it_is_alive(tmp_path: Path) -> None:
    async with service(tmp_path, heartbeat=0.02) as running:
        id = await running.send(["sleep", 0.09], ["result", "x"])
        text = (await running.client.get(f"/v1/jobs/{id}/events")).text
        assert 2 <= text.count(": alive\n\n") <= 4


@asynchronous
async def test_a_flood_of_events_comes_whole(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(*(["print", f"{number}"] for number in range(3000)), ["result", "x"])
        found = events((await running.client.get(f"/v1/jobs/{id}/events")).text)
        assert [data["text"] for _, name, data in found if name == "printed"] == [str(n) for n in range(3000)]
        assert running.store.calls.count("append_events") < 100  # those of one moment are kept together


@asynchronous
async def test_how_far_a_job_is_comes_now_and_then_and_never_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "PROGRESS_SECONDS", 0.05)
    async with service(tmp_path) as running:
        counted = [["forward", count] for count in range(1, 100)]
        id = await running.send(*counted, ["sleep", 0.2], ["forward", 100], ["print", "x"], ["result", "x"])
        found = events((await running.client.get(f"/v1/jobs/{id}/events")).text)
        said = [(name, data) for _, name, data in found if name in ("progress", "printed")]
        assert said == [("progress", {"forwards": 99}), ("printed", {"text": "x"})]
        await asyncio.sleep(0.1)
        assert events((await running.client.get(f"/v1/jobs/{id}/events")).text) == found


@asynccontextmanager
async def stream(running: Service, id: str) -> AsyncIterator[tuple[asyncio.Queue[bytes], asyncio.Event, Any]]:
    """A stream whose client can go away: what it sends, the event that is the client's going, the task that sends."""
    sent: asyncio.Queue[bytes] = asyncio.Queue()
    gone = asyncio.Event()
    started = False

    async def receive() -> Message:
        nonlocal started
        if not started:
            started = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            sent.put_nowait(message["body"])

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": f"/v1/jobs/{id}/events",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {running.key}".encode())],
    }
    task = asyncio.create_task(running.app(scope, receive, send))
    yield sent, gone, task
    gone.set()
    await task


@asynchronous
async def test_events_are_sent_as_they_happen(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "print"], ["print", "one"], ["wait", "end"], ["result", "x"])
        async with stream(running, id) as (sent, _, _):
            assert b"event: queued" in await sent.get()
            assert b"event: running" in await sent.get()
            await asyncio.sleep(0.05)
            assert sent.empty()
            before = list(running.store.calls)
            await asyncio.sleep(0.05)
            assert running.store.calls == before  # a stream that waits asks nothing
            running.engine.gates["print"].set()
            assert b'event: printed\ndata: {"text":"one"}' in await sent.get()
            running.engine.gates["end"].set()
            assert b"event: done" in await sent.get()


@asynchronous
async def test_a_client_that_goes_away_ends_its_stream_and_not_the_job(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "end"], ["result", "x"])
        async with stream(running, id) as (sent, gone, task):
            await sent.get()
            gone.set()
            await asyncio.wait_for(task, 1)
        assert await running.status(id) == "running"
        running.engine.gates["end"].set()
        assert await running.status(id, 5) == "completed"


@asynchronous
async def test_a_job_that_waits_is_told_its_new_place_under_the_same_number(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "first"], ["result", "x"])
        await running.reaches(first, "running")
        second = await running.send(["wait", "second"], ["result", "x"], group="b")
        third = await running.send(group="c")
        async with stream(running, third) as (sent, _, _):
            assert await sent.get() == b'id: 1\nevent: queued\ndata: {"place":2}\n\n'
            running.engine.gates["first"].set()
            assert await sent.get() == b'id: 1\nevent: queued\ndata: {"place":1}\n\n'
            await running.reaches(second, "running")
            running.engine.gates["second"].set()
            assert b"id: 2\nevent: running" in await sent.get()
            assert b"id: 3\nevent: done" in await sent.get()


@asynchronous
async def test_streams_and_waits_end_when_the_service_stops(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "end"], ["result", "x"])
        waiting = asyncio.create_task(running.status(id, 50))
        following = asyncio.create_task(running.client.get(f"/v1/jobs/{id}/events"))
        await asyncio.sleep(0.05)
        running.front.close_streams()
        assert await waiting == "running"
        assert [name for _, name, _ in events((await following).text)] == ["queued", "running"]
        refused = await running.client.post("/v1/jobs", content=b"{}")
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the service is about to stop"
