"""Sending jobs, looking at them, cancelling them."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from running_service import asynchronous, client, events, service
from service_stand_ins import job, upload


@asynchronous
async def test_a_job_is_queued_runs_and_completes(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs", content=job(["wait", "go"], ["result", "values"]))
        assert answer.status_code == 202
        sent = answer.json()
        assert sent["status"] in ("queued", "running")  # it begins while the disk keeps it
        assert sent["place"] == (1 if sent["status"] == "queued" else None)
        assert (sent["model"], sent["cost"]) == ("tiny", {"forwards": 1})
        assert answer.headers["location"] == f"/v1/jobs/{sent['id']}"
        await running.reaches(sent["id"], "running")
        running.engine.gates["go"].set()
        shown = (await running.client.get(f"/v1/jobs/{sent['id']}?wait=5")).json()
        assert shown["status"] == "completed"
        assert shown["created"] <= shown["started"] <= shown["ended"]
        assert shown["result"]["bytes"] == len("values")
        assert shown["place"] is None
        assert shown["error"] is None


@asynchronous
async def test_a_job_that_ends_in_time_is_answered_with_its_result(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs?wait=5", content=job(["print", "layer 0\n"], ["result", "values"]))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.content == b"values"
        id = answer.headers["nnsight-job"]
        shown = (await running.client.get(f"/v1/jobs/{id}")).json()
        assert answer.headers["etag"] == f'"{shown["result"]["sha256"]}"'
        assert answer.headers["nnsight-events"] == "1"
        stream = await running.client.get(f"/v1/jobs/{id}/events")
        assert (3, "printed", {"text": "layer 0\n"}) in events(stream.text)


@asynchronous
async def test_a_job_that_does_not_end_in_time_is_answered_with_how_it_stands(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs?wait=0.05", content=job(["wait", "go"], ["result", "values"]))
        assert answer.status_code == 202
        assert answer.json()["status"] == "running"
        running.engine.gates["go"].set()
        assert await running.status(answer.json()["id"], 5) == "completed"


@asynchronous
async def test_a_job_that_fails_in_time_is_answered_with_its_error(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs?wait=5", content=job(["error", "no such layer"]))
        assert answer.status_code == 200
        shown = answer.json()
        assert (shown["status"], shown["error"]["message"]) == ("failed", "no such layer")


@asynchronous
async def test_the_same_idempotency_key_is_the_same_job(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        asked = running.client
        first = await asked.post("/v1/jobs", content=job(), headers={"Idempotency-Key": "a.b_c-1"})
        again = await asked.post("/v1/jobs", content=job(), headers={"Idempotency-Key": "a.b_c-1"})
        assert (first.status_code, again.status_code) == (202, 200)
        assert first.json()["id"] == again.json()["id"]
        waited = await asked.post("/v1/jobs?wait=5", content=job(), headers={"Idempotency-Key": "a.b_c-1"})
        assert waited.content == b"done"
        other = await asked.post("/v1/jobs", content=job(group="b"), headers={"Idempotency-Key": "a.b_c-1"})
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "idempotency_conflict"
        assert await running.jobs() == 1
        assert [len(batch) for batch in running.engine.batches] == [1]


@asynchronous
async def test_an_idempotency_key_is_checked(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for key in ("", "a b", "ä", "x" * 129, "a/b"):
            headers = {"Idempotency-Key": key.encode()}
            answer = await running.client.post("/v1/jobs", content=job(), headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == (
                "Idempotency-Key is up to 128 letters, digits, '_', '.' and '-'"
            )


@asynchronous
async def test_a_wait_is_checked(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for wait in ("soon", "-1", "nan", "inf", "1&wait=2"):
            answer = await running.client.post(f"/v1/jobs?wait={wait}", content=job())
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "'wait' is a number of seconds, 0 or more, given once"
            assert await running.jobs() == 0


@asynchronous
async def test_what_is_no_job_is_refused_and_never_queued(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs", content=b"\x80\x04pickle")
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "not_a_job"
        assert error["message"] == "the body is no job: this is no safetensors file, or it is cut off"
        assert (error["where"], error["op"]) == (None, None)
        answer = await running.client.post("/v1/jobs", content=job(model="huge"))
        assert answer.status_code == 422
        assert answer.json()["error"]["message"] == (
            "this service has no model 'huge'; it has: tiny, openai-community/gpt2"
        )
        assert await running.jobs() == 0
        assert not list(running.front.settings.incoming.iterdir())


@asynchronous
async def test_a_job_that_is_not_admitted_says_at_which_line(tmp_path: Path) -> None:
    record = {
        "kind": "CompileError",
        "message": "layer 99 does not exist",
        "where": [{"file": "demo.py", "line": 12, "column": 8, "text": "model.layers[99]"}],
        "op": "read %1.output",
    }
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs", content=job(refuse=[422, record]))
        assert answer.status_code == 422
        assert answer.json()["error"] == {
            "code": "CompileError",
            "message": "layer 99 does not exist",
            "where": "demo.py:12:8",
            "op": "read %1.output",
            "error": record,
        }
        assert await running.jobs() == 0


@asynchronous
async def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    async with service(tmp_path, max_queued=1) as running:
        first = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(first, "running")
        await running.send(group="b")
        answer = await running.client.post("/v1/jobs", content=job())
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 300
        assert answer.json()["error"]["code"] == "queue_full"
        assert await running.jobs() == 2


@asynchronous
async def test_a_full_disk_acknowledges_nothing_and_is_got_over(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        running.store.full = True
        answer = await running.client.post("/v1/jobs", content=job())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["message"] == "the service's disk is full; nothing was kept"
        assert await running.jobs() == 0
        assert not list(running.front.settings.incoming.iterdir())
        running.store.full = False
        assert (await running.client.post("/v1/jobs?wait=5", content=job())).content == b"done"


@asynchronous
async def test_jobs_of_others_are_as_if_they_were_not(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, running.other_key) as other:
        id = await running.send()
        assert await running.status(id, 5) == "completed"
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/result")):
            theirs = await other.request(method, f"/v1/jobs/{id}{path}")
            never = await other.request(method, f"/v1/jobs/never{path}")
            assert theirs.status_code == never.status_code == 404
            assert theirs.json() == never.json()
            assert theirs.json()["error"]["code"] == "no_such_job"
        assert await running.status(id) == "completed"


@asynchronous
async def test_a_job_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "go"], ["result", "x"])
        second = await running.send(group="b")
        await running.reaches(first, "running")
        answer = await running.client.delete(f"/v1/jobs/{second}")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        running.engine.gates["go"].set()
        assert await running.status(first, 5) == "completed"
        assert running.engine.batches == [[first]]
        again = await running.client.delete(f"/v1/jobs/{second}")
        assert (again.status_code, again.json()["status"]) == (200, "cancelled")


@asynchronous
async def test_a_job_that_runs_is_cancelled_alone(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "first"], ["result", "x"])
        await running.reaches(first, "running")
        second = await running.send(["wait", "go"], ["result", "y"])
        third = await running.send(["wait", "go"], ["result", "z"])
        running.engine.gates["first"].set()
        await running.reaches(second, "running")
        answer = await running.client.delete(f"/v1/jobs/{second}")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
        assert running.engine.cancelled == [second]
        running.engine.gates["go"].set()
        assert await running.status(third, 5) == "completed"
        assert await running.status(second) == "cancelled"
        assert running.engine.batches == [[first], [second, third]]


@asynchronous
async def test_a_job_names_uploads_of_its_own_tenant(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(upload()).hexdigest()
    async with service(tmp_path) as running, client(running.app, running.other_key) as other:
        named = job(blobs={"data.0": sha256, "data.1": sha256})
        answer = await running.client.post("/v1/jobs", content=named)
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "unknown_blob"
        assert answer.json()["error"]["missing"] == [sha256]
        assert (await running.client.put(f"/v1/blobs/{sha256}", content=upload())).status_code == 201
        theirs = await other.post("/v1/jobs", content=named)
        assert theirs.status_code == 422
        answer = await running.client.post("/v1/jobs?wait=5", content=named)
        assert answer.content == b"done"
        ((known, path),) = running.engine.assignments[0].blobs.items()
        assert (known, path.read_bytes()) == (sha256, upload())


@asynchronous
async def test_waiting_asks_the_queue_only_when_there_is_news(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["wait", "go"], ["result", "x"])
        await running.reaches(id, "running")
        waiting = asyncio.create_task(running.status(id, 5))
        await asyncio.sleep(0.02)
        before = len(running.store.calls)
        await asyncio.sleep(0.1)
        assert running.store.calls[before:] == []
        running.engine.gates["go"].set()
        assert await waiting == "completed"


@asynchronous
async def test_paths_and_methods_that_are_not_there_are_answered_in_json(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        nowhere = await running.client.get("/v2/jobs")
        assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
        wrong = await running.client.put("/v1/jobs/a", content=b"x")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert "DELETE" in wrong.headers["allow"]


@asynchronous
async def test_an_error_of_the_service_itself_tells_nothing_of_it(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        running.front.store = None  # type: ignore[assignment]
        answer = await running.client.get("/v1/jobs/a")
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "code": "internal",
            "message": "the service failed at this request; its log says how",
            "where": None,
            "op": None,
        }
