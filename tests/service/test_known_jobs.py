"""A job that is like one before is admitted like that one: what would be said of it if it were checked."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from admitting import Limits as OfJob
from admitting import job_of
from running_service import asynchronous, service
from service_stand_ins import job, safetensors

from nnsight_compiler import Experiment, LanguageModel, intervene
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import blob, pack
from nnsight_compiler.service import known_jobs
from nnsight_compiler.service.admission import Admitter
from nnsight_compiler.service.engine import Admission
from nnsight_compiler.service.known_jobs import KnownJobs
from nnsight_compiler.service.refusals import Refusal
from nnsight_compiler.service.tenants import Limits, Tenant

ADA, BOB = Tenant("ada"), Tenant("bob")
SHORT, OTHER = "The Eiffel Tower", "The Space Needle"
VECTOR = torch.linspace(-1, 1, 128)
held = VECTOR.clone()


def add(hidden):
    return hidden + held


@intervene
def steer(model, prompt, vector, layer):
    with model.trace(prompt):
        model.layers[layer].output += vector
        logits = model.lm_head.output[:, -1]
    return logits


@intervene
def captured(model, prompt):
    with model.trace(prompt):
        model.layers[1].output[:] = add(model.layers[1].output)
        logits = model.lm_head.output[:, -1]
    return logits


@intervene
def chosen(model, prompt, which):
    with model.trace(prompt):
        hidden = model.layers[int(which)].output
    return hidden, torch.zeros(int(which) * 10)


@intervene
def indexed(model, prompt, layer):
    with model.trace(prompt):
        hidden = model.layers[layer].output
    return hidden


@intervene
def listed(model, prompt, layers):
    found = []
    for layer in layers:
        with model.trace(prompt):
            found.append(model.layers[layer].output)
    return found


@intervene
def drawn(model, prompt, strength):
    with model.trace(prompt):
        model.layers[0].output += torch.randn(128) * strength
        logits = model.lm_head.output[:, -1]
    return logits


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny")


def test_two_jobs_of_a_kind_are_admitted_alike(model: LanguageModel) -> None:
    calls: list[tuple[Experiment, tuple[Any, ...]]] = [
        (steer, (SHORT, VECTOR, 1)), (steer, (SHORT, VECTOR * 3, 1)), (steer, (SHORT, VECTOR, 2)),
        (steer, (OTHER, VECTOR, 1)), (steer, (SHORT, VECTOR[None], 1)), (steer, (SHORT, VECTOR.double(), 1)),
        (chosen, (SHORT, torch.tensor(0.0))), (chosen, (SHORT, torch.tensor(2.0))), (chosen, (SHORT, torch.tensor(2))),
        (listed, (SHORT, torch.tensor([0, 1]))), (listed, (SHORT, torch.tensor([2, 0, 1]))),
        (drawn, (SHORT, 1.0)), (drawn, (SHORT, 1.0)), (drawn, (SHORT, 2.0)),
    ]  # fmt: skip
    kinds: dict[object, list[Any]] = {}
    known = KnownJobs()
    for experiment, values in calls:
        torch.rand(1)  # the state of the generator, which goes along, is another one each time
        made = job_of(experiment, {"model": model, **dict(zip(_names(experiment)[1:], values, strict=True))})
        admitted = Admitter(Executor(model)).admit(made, OfJob())
        kinds.setdefault(known.arrived(pack(made), ADA).kind, []).append((experiment, admitted))
    assert [len(alike) for alike in kinds.values()] == [2, 1, 1, 1, 1, 2, 1, 1, 1, 2, 1]
    for alike in kinds.values():
        assert all(each == alike[0] for each in alike)


def test_what_belongs_to_the_code_is_looked_at(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    for vector in (VECTOR, VECTOR * 2, VECTOR.clone()):
        monkeypatch.setitem(globals(), "held", vector)
        kinds.append(KnownJobs().arrived(pack(job_of(captured, {"model": model, "prompt": SHORT})), ADA).kind)
    assert kinds[0] == kinds[2]
    assert kinds[0] != kinds[1]
    edits = []
    for strength in (1.0, 2.0):
        vector = VECTOR * strength
        with model.edit() as edited:
            edited.layers[0].output[:] += vector
        edits.append(KnownJobs().arrived(pack(job_of(steer, _given(edited))), ADA).kind)
    assert edits[0] != edits[1]


@pytest.mark.parametrize(
    ("experiment", "name", "given"),
    [
        (indexed, "layer", [torch.tensor(0), torch.tensor(2), torch.tensor(99)]),
        (indexed, "layer", [numpy.array(0), numpy.array(2), numpy.array(99)]),
        (indexed, "layer", [torch.tensor(True), torch.tensor(False)]),
        (listed, "layers", [list(torch.tensor(each).unbind()) for each in ([0, 1], [0, 2], [0, 99])]),
    ],
)
def test_a_tensor_that_may_be_an_index_is_looked_at(
    model: LanguageModel, experiment: Experiment, name: str, given: list[Any]
) -> None:
    jobs = [job_of(experiment, {"model": model, "prompt": SHORT, name: each}) for each in given]
    kinds = [KnownJobs().arrived(pack(each), ADA).kind for each in jobs]
    assert len(set(kinds)) == len(given)


def test_a_tensor_that_was_uploaded_counts_by_its_hash(model: LanguageModel) -> None:
    made = job_of(steer, _given(model))
    (name,) = made.of("data")
    one, other = (KnownJobs().arrived(pack(made, {name: sha * 64}), ADA) for sha in "ab")
    assert one.header.blobs == {name: "a" * 64}
    assert one.kind != other.kind


def test_a_tenant_is_not_told_what_others_sent_nor_keeps_limits_that_it_had() -> None:
    known, first = KnownJobs(), job(["result", "a"])
    known.admitted(known.arrived(first, ADA), Admission("group"))
    assert known.admission(known.arrived(first, ADA)) == Admission("group")
    for tenant in (BOB, Tenant("ada", limits=Limits(forwards=1))):
        assert known.admission(known.arrived(first, tenant)) is None


def test_each_byte_of_a_header_counts_and_the_length_of_the_file() -> None:
    known, whole = KnownJobs(), job(["result", "abc"])
    known.admitted(known.arrived(whole, ADA), Admission("group"))
    for place in range(len(whole)):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with contextlib.suppress(Refusal):
            assert known.admission(known.arrived(changed, ADA)) is None
    for cut in (whole[:-1], whole + b" ", b""):
        with pytest.raises(Refusal, match="the body is no job"):
            known.arrived(cut, ADA)


def test_files_and_long_headers_are_not_kept(tmp_path: Path) -> None:
    known, long = KnownJobs(), job(["result", "a" * known_jobs.LONGEST])
    path = tmp_path / "job"
    path.write_bytes(job())
    for content in (long, path):
        arrived = known.arrived(content, ADA)
        assert (arrived.kind, arrived.header.model) == (None, "tiny")
        known.admitted(arrived, Admission("group"))
        assert known.admission(known.arrived(content, ADA)) is None
    assert not known._headers
    assert not known._admissions


def test_only_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_jobs, "MOST", 3)
    known, jobs = KnownJobs(), [job(["result", text]) for text in "abcd"]
    for each in jobs[:3]:
        known.admitted(known.arrived(each, ADA), Admission("group"))
    assert known.admission(known.arrived(jobs[0], ADA)) is not None
    known.admitted(known.arrived(jobs[3], ADA), Admission("group"))
    found = [known.admission(known.arrived(each, ADA)) is not None for each in jobs]
    assert found == [True, False, True, True]
    assert len(known._headers) == len(known._admissions) == 3


@asynchronous
async def test_a_service_checks_a_job_that_it_knows_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with service(tmp_path) as running:
        checked = []
        admit = running.engine.admit

        async def count(payload: Any, *given: Any) -> Any:
            checked.append(payload)
            return await admit(payload, *given)

        monkeypatch.setattr(running.engine, "admit", count)
        entry = {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}
        document = _header(job(["result", "a"]))
        numbers = itertools.count()
        for name in ("data.0", "data.0", "code.0", "code.0"):
            sent = safetensors({**document, name: entry}, bytes([next(numbers)]))
            assert (await running.client.post("/v1/jobs?wait=5", content=sent)).content == b"a"
        assert [each[-1] for each in checked] == [0, 2, 3]

        refused = job(refuse=[422, {"message": "no"}])
        for _ in range(2):
            assert (await running.client.post("/v1/jobs", content=refused)).status_code == 422
        assert len(checked) == 5, "what was refused is checked again"


@asynchronous
async def test_an_upload_of_a_known_job_has_to_be_there_still(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        content = blob(torch.ones(2))
        sha = hashlib.sha256(content).hexdigest()
        sent = job(["result", "a"], blobs={"data.0": sha})
        assert (await running.client.post("/v1/jobs", content=sent)).status_code == 422
        await running.client.put(f"/v1/blobs/{sha}", content=content)
        for _ in range(2):
            assert (await running.client.post("/v1/jobs?wait=5", content=sent)).status_code == 200
        await running.front.call(running.store._database.execute, "DELETE FROM job_blobs")
        await running.front.call(running.store._database.execute, "DELETE FROM blobs")
        assert (await running.client.post("/v1/jobs", content=sent)).status_code == 422


def _given(model: Any) -> dict[str, Any]:
    return {"model": model, "prompt": SHORT, "vector": VECTOR, "layer": 1}


def _names(experiment: Experiment) -> list[str]:
    return [parameter.value.name for parameter in experiment.ir.parameters]


def _header(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    found: dict[str, Any] = json.loads(content[8 : 8 + length])
    return found
