"""Uploads: kept once for their tenant, under the hash of what arrived."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from running_service import asynchronous, client, service
from service_stand_ins import job, safetensors, upload


def path_of(data: bytes) -> str:
    return f"/v1/blobs/{hashlib.sha256(data).hexdigest()}"


@asynchronous
async def test_an_upload_is_kept_once(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        data = upload(7)
        assert (await running.client.head(path_of(data))).status_code == 404
        first = await running.client.put(path_of(data), content=data)
        assert first.status_code == 201
        assert first.json() == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        assert (await running.client.head(path_of(data))).status_code == 200
        assert (await running.client.put(path_of(data), content=data)).status_code == 200
        assert not list(running.front.settings.incoming.iterdir())


@asynchronous
async def test_an_upload_is_what_its_name_says(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.put(path_of(upload(7)), content=upload(8))
        assert answer.status_code == 422
        assert answer.json()["error"]["message"] == (
            f"the body has the hash {path_of(upload(8))[10:]}, not the one that the path names"
        )
        for data in (upload(7), upload(8)):
            assert (await running.client.head(path_of(data))).status_code == 404


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04pickle", "the body is no upload: this is no safetensors file, or it is cut off"),
        (job(), "the body is no upload: it holds 0 tensors, and not one that is called 'tensor'"),
        (
            safetensors({"other": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
            "the body is no upload: it holds 1 tensors, and not one that is called 'tensor'",
        ),
        (upload() + b"x", "the body is no upload: the file has bytes that belong to no tensor"),
    ],
)
@asynchronous
async def test_an_upload_is_one_tensor(tmp_path: Path, data: bytes, message: str) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.put(path_of(data), content=data)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(message)
        assert (await running.client.head(path_of(data))).status_code == 404


@asynchronous
async def test_an_upload_is_named_by_a_hash(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for name in ("x", "A" * 64, "0" * 63, "0" * 65, "..%2f..%2fetc%2fpasswd"):
            answer = await running.client.put(f"/v1/blobs/{name}", content=upload())
            assert answer.status_code in (400, 404)
            assert not list(tmp_path.rglob("passwd"))


@asynchronous
async def test_an_upload_beyond_a_tenants_room_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, running.small_key) as small:
        answer = await small.put(path_of(upload()), content=upload())
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "stored_bytes"
        assert (await small.head(path_of(upload()))).status_code == 404


@asynchronous
async def test_a_body_over_the_tenants_limit_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path, max_body=300) as running:
        for path in ("/v1/jobs", path_of(upload())):
            send = running.client.post if path == "/v1/jobs" else running.client.put
            answer = await send(path, content=b"x" * 301)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
            assert answer.headers["connection"] == "close"
        assert (await running.client.post("/v1/jobs", content=b"x" * 300)).status_code == 400


@asynchronous
async def test_a_compressed_body_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        answer = await running.client.post("/v1/jobs", content=job(), headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415
        assert answer.json()["error"]["message"] == "the body is compressed: send it as it is, without Content-Encoding"
