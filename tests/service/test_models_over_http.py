"""Models, health and counters as clients see them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from running_service import Service, asynchronous, client, service
from service_stand_ins import job, upload


@asynchronous
async def test_models_are_described(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        asked = running.client
        listed = (await asked.get("/v1/models")).json()["models"]
        assert listed[0] == {"name": "tiny", "class": "GPT2LMHeadModel", "bytes": 12}
        assert [model["name"] for model in listed] == ["tiny", "openai-community/gpt2"]
        shown = (await asked.get("/v1/models/tiny")).json()
        assert shown == listed[0] | {"config": {"n_layer": 2}}
        modules = (await asked.get("/v1/models/tiny/modules")).json()
        assert modules == {"modules": [{"path": "transformer", "class": "GPT2Model"}]}
        assert (await asked.get("/v1/models/tiny/tokenizer")).json() == {"files": {"tokenizer.json": "e30="}}
        for name in ("openai-community/gpt2", "openai-community%2Fgpt2"):
            assert (await asked.get(f"/v1/models/{name}")).json()["name"] == "openai-community/gpt2"
            assert (await asked.get(f"/v1/models/{name}/modules")).json() == {"modules": []}
        without = await asked.get("/v1/models/openai-community/gpt2/tokenizer")
        assert (without.status_code, without.json()["error"]["code"]) == (404, "no_tokenizer")
        unknown = await asked.get("/v1/models/huge/modules")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"] == (
            "this service has no model 'huge'; it has: tiny, openai-community/gpt2"
        )


@asynchronous
async def test_a_service_is_ready_when_its_models_are_loaded(tmp_path: Path) -> None:
    async with service(tmp_path, ready=False) as running, client(running.app, None) as anybody:
        assert (await anybody.get("/healthz")).json() == {"status": "ok"}
        waiting = await anybody.get("/readyz")
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "1")
        assert waiting.json()["error"]["message"] == "the models are being loaded"
        for path in ("/v1/models", "/v1/models/tiny", "/v1/models/tiny/modules"):
            assert (await running.client.get(path)).status_code == 503
        assert (await running.client.post("/v1/jobs", content=job())).status_code == 503
        running.engine.loading.set()
        while running.front.unready():
            assert running.front.failure is None
            await asyncio.sleep(0.001)
        assert (await anybody.get("/readyz")).json() == {"status": "ready"}
        assert (await running.client.post("/v1/jobs?wait=5", content=job())).content == b"done"


@asynchronous
async def test_a_service_whose_disk_is_almost_full_takes_nothing(tmp_path: Path) -> None:
    async with service(tmp_path, ready=False, free_disk=1 << 62) as running:
        running.engine.loading.set()
        while not running.front.models:
            await asyncio.sleep(0.001)
        answer = await running.client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.json()["error"]["message"] == "the disk of the service is almost full"
        for method, path in (("POST", "/v1/jobs"), ("PUT", f"/v1/blobs/{'0' * 64}")):
            assert (await running.client.request(method, path, content=upload())).status_code == 503


async def counters(running: Service) -> dict[str, float]:
    """All samples: `name{label="value"}` to number."""
    answer = await running.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@asynchronous
async def test_counters_count_what_happened(tmp_path: Path) -> None:
    async with service(tmp_path) as running, client(running.app, "wrong") as stranger:
        body = job(["result", "x" * 1000])
        assert (await running.client.post("/v1/jobs?wait=5", content=body)).status_code == 200
        await running.client.post("/v1/jobs?wait=5", content=job(["error", "no"]))
        await running.client.post("/v1/jobs?wait=5", content=job(["die"]))
        refused = job(refuse=[422, {"message": "no"}])
        await running.client.post("/v1/jobs", content=refused)
        blocking = await running.send(["wait", "end"], ["result", "x"])
        await running.reaches(blocking, "running")
        batched = [await running.send(), await running.send()]
        found = await counters(running)
        assert found["nnsight_jobs{state=queued}"] == 2
        assert found["nnsight_jobs{state=running}"] == 1
        running.engine.gates["end"].set()
        for id in batched:
            assert await running.status(id, 5) == "completed"
        assert (await stranger.get("/v1/models")).status_code == 401
        assert (await running.client.get("/v1/nothing")).status_code == 404
        found = await counters(running)
        assert found["nnsight_jobs{state=completed}"] == 4
        assert found["nnsight_jobs{state=failed}"] == 2
        assert found["nnsight_submitted_jobs_total"] == 6
        assert found["nnsight_refused_jobs_total{status=422}"] == 1
        assert found["nnsight_ended_runs_total{how=completed}"] == 4
        assert found["nnsight_ended_runs_total{how=failed}"] == 1
        assert found["nnsight_ended_runs_total{how=given back}"] == 2
        assert found["nnsight_worker_restarts_total"] == 2
        assert found["nnsight_batch_jobs_count"] == 6
        assert found["nnsight_batch_jobs_sum"] == 7
        assert found["nnsight_queued_seconds_count"] == found["nnsight_running_seconds_count"] == 7
        assert found["nnsight_requests_total{method=POST,route=/v1/jobs,status=200}"] == 3
        assert found["nnsight_requests_total{method=POST,route=/v1/jobs,status=202}"] == 3
        assert found["nnsight_requests_total{method=POST,route=/v1/jobs,status=422}"] == 1
        assert found["nnsight_requests_total{method=GET,route=unknown,status=401}"] == 1
        assert found["nnsight_requests_total{method=GET,route=unknown,status=404}"] == 1
        assert found["nnsight_received_bytes_total"] > len(body)
        assert found["nnsight_sent_bytes_total"] > 1000
        assert found["nnsight_ready"] == 1


@asynchronous
async def test_counters_are_few_and_name_nobody(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        ids = [await running.send() for _ in range(5)]
        for id in ids:
            assert await running.status(id, 5) == "completed"
            await running.client.get(f"/v1/jobs/{id}x")
        await running.client.request("PROPFIND", "/v1/jobs")
        text = (await running.client.get("/metrics")).text
        assert not any(id in text for id in ids)
        assert "alice" not in text
        assert 'method="other"' in text
        labels = set(re.findall(r"(\w+)=\"", text))
        assert labels == {"route", "method", "status", "state", "how", "le"}
