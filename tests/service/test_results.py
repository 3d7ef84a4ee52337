"""Downloads: whole, in ranges, again, and no more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from running_service import asynchronous, service

from nnsight_compiler.service.result_routes import PIECE

VALUES = "".join(chr(33 + number % 90) for number in range(1000))


@pytest.mark.parametrize("values", [VALUES, VALUES * (3 * PIECE // 1000)], ids=["small", "large"])
@asynchronous
async def test_a_result_comes_whole_with_its_hash(tmp_path: Path, values: str) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["result", values])
        answer = await running.client.get(f"/v1/jobs/{id}/result?wait=5")
        assert answer.status_code == 200
        assert answer.content == values.encode()
        assert answer.headers["content-length"] == str(len(values))
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["accept-ranges"] == "bytes"
        shown = (await running.client.get(f"/v1/jobs/{id}")).json()
        assert answer.headers["etag"] == f'"{shown["result"]["sha256"]}"'
        head = await running.client.head(f"/v1/jobs/{id}/result")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(values))
        same = await running.client.get(f"/v1/jobs/{id}/result", headers={"If-None-Match": answer.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
        middle = await running.client.get(f"/v1/jobs/{id}/result", headers={"Range": f"bytes=10-{len(values) - 10}"})
        assert middle.content == values.encode()[10:-9]


@asynchronous
async def test_a_range_is_the_bytes_that_it_names(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for wanted, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=10-19", 10, 20),
            ("bytes=990-", 990, 1000),
            ("bytes=-5", 995, 1000),
            ("bytes=-5000", 0, 1000),
            ("bytes=900-5000", 900, 1000),
        ):
            id = await running.send(["result", VALUES])
            answer = await running.client.get(f"/v1/jobs/{id}/result?wait=5", headers={"Range": wanted})
            assert answer.status_code == 206
            assert answer.content == VALUES.encode()[start:stop]
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/1000"
            assert answer.headers["content-length"] == str(stop - start)


@asynchronous
async def test_a_range_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["result", VALUES])
        for wanted in ("bytes=1000-", "bytes=5000-6000", "bytes=-0"):
            answer = await running.client.get(f"/v1/jobs/{id}/result?wait=5", headers={"Range": wanted})
            assert answer.status_code == 416
            assert answer.headers["content-range"] == "bytes */1000"
            assert answer.json()["error"]["message"] == (
                f"the result has 1000 bytes; there is nothing in the range '{wanted}'"
            )


@asynchronous
async def test_a_range_that_is_none_gives_the_whole(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for wanted in (
            "bytes=0-1,5-6",
            "bytes=x-y",
            "items=0-1",
            "bytes=20-10",
            "bytes=-",
            "bytes=" + "9" * 30 + "-",
        ):
            id = await running.send(["result", VALUES])
            answer = await running.client.get(f"/v1/jobs/{id}/result?wait=5", headers={"Range": wanted})
            assert (answer.status_code, answer.content) == (200, VALUES.encode())


@asynchronous
async def test_a_range_of_another_result_gives_the_whole(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send(["result", VALUES])
        path = f"/v1/jobs/{id}/result?wait=5"
        etag = (await running.client.get(path)).headers["etag"]
        same = await running.client.get(path, headers={"Range": "bytes=5-", "If-Range": etag})
        assert (same.status_code, same.content) == (206, VALUES.encode()[5:])
        other = await running.client.get(path, headers={"Range": "bytes=5-", "If-Range": '"0"'})
        assert (other.status_code, other.content) == (200, VALUES.encode())


@asynchronous
async def test_a_job_without_a_result_says_why(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        first = await running.send(["wait", "go"], ["error", "no such layer"])
        second = await running.send(group="b")
        await running.reaches(first, "running")
        for id, state in ((first, "running"), (second, "queued")):
            answer = await running.client.get(f"/v1/jobs/{id}/result")
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == f"job_{state}"
        await running.client.delete(f"/v1/jobs/{second}")
        running.engine.gates["go"].set()
        failed = await running.client.get(f"/v1/jobs/{first}/result?wait=5")
        assert failed.status_code == 409
        assert failed.json()["error"]["code"] == "job_failed"
        assert failed.json()["error"]["job_error"]["message"] == "no such layer"
        cancelled = await running.client.get(f"/v1/jobs/{second}/result")
        assert (cancelled.status_code, cancelled.json()["error"]["code"]) == (409, "job_cancelled")


@asynchronous
async def test_a_result_that_expired_is_gone(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await running.send()
        assert await running.status(id, 5) == "completed"
        await running.front.call(running.store.sweep, time.time() + 2 * 86_400)
        answer = await running.client.get(f"/v1/jobs/{id}/result")
        assert answer.status_code == 410
        assert answer.json()["error"]["message"] == "the result is no longer kept; send the job again"
        assert await running.status(id) == "expired"
