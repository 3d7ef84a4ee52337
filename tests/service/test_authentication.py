"""Who may ask what: every path and method, with no key, a wrong one, one that was revoked, another tenant's."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest
from running_service import ALICE, Service, asynchronous, client, service
from service_stand_ins import job, upload

from nnsight_compiler.service.operations import OPERATIONS
from nnsight_compiler.service.tenants import Tenant

BLOB = hashlib.sha256(upload()).hexdigest()
OPEN = {"/healthz", "/readyz"}
PATHS = [(each.method, each.path) for each in OPERATIONS]
NOWHERE = [("GET", "/"), ("GET", "/v1/unknown"), ("POST", "/v1/jobs/"), ("PATCH", "/v1/jobs"), ("GET", "/docs")]


def filled(path: str, id: str = "none") -> str:
    return path.replace("{id}", id).replace("{sha256}", BLOB).replace("{name}", "tiny")


def content(method: str, path: str) -> bytes | None:
    return upload() if method == "PUT" else job() if method == "POST" else None


async def begun(running: Service) -> str:
    id = await running.send(["print", "x"], ["wait", "end"], ["result", "x"])
    await running.reaches(id, "running")
    return id


@asynchronous
async def test_each_path_wants_a_key_that_is_known(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        id = await begun(running)
        await running.client.delete(f"/v1/jobs/{id}")  # or the stream of its events goes on
        revoked = await running.front.call(running.keys.add, ALICE)
        async with client(running.app, revoked) as later:
            for method, path in [*PATHS, *NOWHERE]:
                answer = await later.request(method, filled(path, id), content=content(method, path))
                assert answer.status_code != 401, (method, path)
        await running.front.call(running.keys.revoke, revoked.split("_")[1])
        kept = [await running.front.call(running.store.counts), sorted(tmp_path.rglob("*"))]
        key = running.key
        for wrong in (None, "wrong", revoked, f"{key}x", key[:-1], key[:20] + key[21:], f" {key} {key}"):
            async with client(running.app, wrong) as stranger:
                for method, path in [*PATHS, *NOWHERE]:
                    answer = await stranger.request(method, filled(path, id), content=content(method, path))
                    if path in OPEN:
                        assert answer.status_code == 200
                        continue
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert answer.json()["error"]["code"] == "unauthorized"
                        assert answer.json()["error"]["message"] == (
                            "this service wants a key that it knows: send the header 'Authorization: Bearer <key>'"
                        )
        assert [await running.front.call(running.store.counts), sorted(tmp_path.rglob("*"))] == kept


@asynchronous
async def test_a_key_comes_as_a_bearer(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for header in ("{}", "Basic {}", "Bearer{}", "Bearer", "Bearer ", "", "Token {}"):
            answer = await running.client.get("/v1/models", headers={"Authorization": header.format(running.key)})
            assert answer.status_code == 401
            answer = await running.client.get("/v1/models", headers={"Authorization": f"bearer {running.key}"})
            assert answer.status_code == 200


@asynchronous
async def test_two_keys_are_none(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, None) as asked:
        both = [("Authorization", f"Bearer {key}") for key in (running.key, running.other_key)]
        assert (await asked.get("/v1/models", headers=both)).status_code == 401


@asynchronous
async def test_a_key_in_the_address_is_none(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, None) as asked:
        assert (await asked.get("/v1/models", params={"key": running.key, "api_key": running.key})).status_code == 401


@asynchronous
async def test_another_tenant_finds_no_job(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, running.other_key) as other:
        id = await begun(running)
        asked = [each for each in OPERATIONS if "{id}" in each.path]
        assert len(asked) == 4
        for operation in asked:
            answer = await other.request(operation.method, filled(operation.path, id))
            assert answer.status_code == 404, operation.path
        assert await running.status(id) == "running"


@asynchronous
async def test_another_tenant_finds_no_upload(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, running.other_key) as other:
        assert (await running.client.put(f"/v1/blobs/{BLOB}", content=upload())).status_code == 201
        assert (await running.client.head(f"/v1/blobs/{BLOB}")).status_code == 200
        assert (await other.head(f"/v1/blobs/{BLOB}")).status_code == 404


@asynchronous
async def test_where_one_tenant_is_served_no_key_is_wanted(tmp_path: Path) -> None:
    async with service(tmp_path, local=True) as running, client(running.app, None) as asked:
        answer = await asked.post("/v1/jobs?wait=5", content=job())
        assert answer.content == b"done"
        assert await running.front.call(running.store.job, answer.headers["nnsight-job"], Tenant("local"))
        assert (await asked.get("/metrics")).status_code == 200


@asynchronous
async def test_keys_stand_in_no_log_metric_answer_or_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    wrong = "nnc_0123456789ab_5d41402abc4b2a76b9719d911017c592abcdefghijk"
    try:
        async with service(tmp_path) as running, client(running.app, wrong) as stranger:
            key = running.key
            answers: list[Any] = []
            id = await running.send(["print", "x"], ["break"])
            for method, path in [*PATHS, *NOWHERE]:
                answers.append(await stranger.request(method, filled(path, id), content=content(method, path)))
                if path.endswith("/events"):
                    await running.client.delete(f"/v1/jobs/{id}")
                answers.append(await running.client.request(method, filled(path, id), content=content(method, path)))
            kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
            running.front.store = None  # type: ignore[assignment]
            answers.append(await running.client.get(f"/v1/jobs/{id}"))
            assert answers[-1].status_code == 500
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    captured = capfd.readouterr()
    shown = written.getvalue() + captured.out + captured.err
    shown += "".join(answer.text + str(answer.headers) for answer in answers)
    assert "the engine failed" in shown
    assert "nnsight_requests_total" in shown
    assert len(kept) > 3
    for secret in (key[-43:], wrong[-43:]):
        assert secret not in shown
        assert not any(secret.encode() in data for data in kept)


@asynchronous
async def test_no_tenant_has_all_of_the_connections(tmp_path: Path) -> None:
    async with service(tmp_path, requests=2) as running, client(running.app, running.other_key) as other:
        id = await begun(running)
        waiting = [asyncio.create_task(running.client.get(f"/v1/jobs/{id}?wait=60")) for _ in range(2)]
        async with asyncio.timeout(5):
            while len(running.front.notices._waiting.get(id, ())) < 2:
                await asyncio.sleep(0)
        for method, path in (("GET", f"/v1/jobs/{id}"), ("POST", "/v1/jobs"), ("GET", "/v1/models")):
            answer = await running.client.request(method, path)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"] == {
                "code": "too_many_requests",
                "message": "2 requests of alice are being answered, as many as may be at once; try again later",
                "where": None,
                "op": None,
            }
        assert (await other.get("/v1/models")).status_code == 200
        assert (await running.client.get("/healthz")).status_code == 200
        running.engine.gates["end"].set()
        assert [(await answer).json()["status"] for answer in waiting] == ["completed"] * 2
        assert (await running.client.get(f"/v1/jobs/{id}")).status_code == 200
