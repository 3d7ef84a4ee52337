"""Jobs of a real model in the engine's processes: what comes back is what a run in this process gives."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_compiler import CompileError, LanguageModel, intervene
from nnsight_compiler.ir.errors import LimitError
from nnsight_compiler.remote import routing
from nnsight_compiler.remote.errors import RemoteError, raise_from
from nnsight_compiler.remote.job import Job, pack
from nnsight_compiler.remote.outside import sent
from nnsight_compiler.service import execution
from nnsight_compiler.service.engine import Assignment, Data, JobLimits, Outcome, RefusedError
from nnsight_compiler.service.execution import ModelRunner
from nnsight_compiler.service.local_engine import LocalEngine, LocalSettings
from nnsight_compiler.service.processes import Served
from nnsight_compiler.service.runner import Task

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the engine's processes need Linux")

MIB = 2**20
LIMITS = JobLimits(wall_seconds=60, memory_bytes=500 * MIB, forwards=1000, max_result_bytes=10 * MIB)
CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


@dataclass
class Submitted:
    """A job that waits for its batch."""

    job: Job
    read: Callable[[bytes], Any] = bytes

    def reading(self, read: Callable[[bytes], Any], failed: Any) -> Submitted:
        self.read = read
        return self


class Bench:
    """An engine in an event loop of its own, which is a backend of remote experiments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        settings = LocalSettings(workers=1, threads=2)
        self.engine = LocalEngine([Served.language_model("tiny")], folder / "results", settings)
        self.events: list[tuple[str, str, Data]] = []
        self.sent: list[Submitted] = []
        self.checks = True
        self.when: Callable[[str], None] = lambda id: None

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(100)

    def written(self, job: Job) -> Path:
        self.number += 1
        payload = self.folder / f"{self.number}.job"
        payload.write_bytes(pack(job))
        return payload

    def run(self, job: Job, on_token: object = None) -> bytes:
        """The result of a job, which was admitted where that is not left out; raises what it raised."""
        payload = self.written(job)
        try:
            if self.checks:
                self.do(self.engine.admit(payload, {}, LIMITS))
        except RefusedError as refused:
            raise_from(refused.record)
        (result,) = self.results([payload])
        return result

    def submit(self, job: Job) -> Submitted:
        """A job that `batch` runs."""
        submitted = Submitted(job)
        self.sent.append(submitted)
        return submitted

    def batch(self) -> list[Any]:
        """What the submitted jobs give, which run as one batch."""
        sent, self.sent = self.sent, []
        results = self.results([self.written(each.job) for each in sent])
        return [each.read(result) for each, result in zip(sent, results, strict=True)]

    def results(self, payloads: list[Path]) -> list[bytes]:
        """The results of one batch; raises what one of them raised."""
        self.events = []

        async def outcomes() -> dict[str, Outcome]:
            jobs = [Assignment(payload.stem, payload, {}, LIMITS) for payload in payloads]
            return {outcome.id: outcome async for outcome in self.engine.run(jobs, self.event)}

        ended, found = self.do(outcomes()), []
        for payload in payloads:
            outcome = ended[payload.stem]
            if outcome.error is not None:
                raise_from(outcome.error)
            found.append(outcome.result if isinstance(outcome.result, bytes) else outcome.result.read_bytes())
        return found

    def event(self, id: str, name: str, data: Data) -> None:
        self.events.append((id, name, data))
        if name == "running":
            self.when(id)

    def stop(self) -> None:
        self.do(self.engine.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("engine"))
    bench.do(bench.engine.start())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "backend_for", lambda remote, model: bench)
        yield bench
    bench.stop()


@pytest.fixture
def unchecked(bench: Bench) -> Iterator[Bench]:
    """What the check of a job would refuse comes to the worker, as what no check can foresee."""
    bench.checks = False
    yield bench
    bench.checks = True


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


@intervene
def patched(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


def test_an_experiment(bench: Bench, tiny: LanguageModel) -> None:
    here = patched(tiny, CLEAN, CORRUPT, layer=1, position=-1)
    there = patched(tiny, CLEAN, CORRUPT, layer=1, position=-1, remote=True)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


@intervene
def spoiling(model, prompt):
    with model.trace(prompt):
        logits = model.lm_head.output[:, -1].save()
    raw = [model._wrapped]
    raw[0].lm_head.weight.data.zero_()
    return logits


def test_the_next_job_finds_the_model_as_it_was(bench: Bench, tiny: LanguageModel) -> None:
    here = patched(tiny, CLEAN, CORRUPT, layer=1, position=-1)
    with pytest.raises(RemoteError, match=r"this job changed `transformer\.wte\.weight` of the model, which jobs of"):
        spoiling(tiny, CLEAN, remote=True)
    there = patched(tiny, CLEAN, CORRUPT, layer=1, position=-1, remote=True)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


@intervene
def filling(model, prompt, value):
    with model.trace(prompt):
        model.lm_head.output[:, -1].save()
    held = []
    for _ in range(20):
        held.append(torch.full((5000,), value))
    return sum(each.sum() for each in held)


@intervene
def looking(model, prompt):
    with model.trace(prompt):
        model.lm_head.output[:, -1].save()
    return [torch.empty(5000), torch.empty(5000), torch.empty(5000)]


def test_memory_shows_nothing_of_the_job_before(bench: Bench, tiny: LanguageModel) -> None:
    assert filling(tiny, CLEAN, 1234.5, remote=True) > 0
    for found in looking(tiny, CLEAN, remote=True):
        assert not (found == 1234.5).any()


def test_jobs_of_one_group_run_as_one(bench: Bench, tiny: LanguageModel) -> None:
    prompts = [CLEAN, "The Colosseum is in the city of", "The Great Wall is in the country of", CLEAN]
    for prompt in prompts:
        patched(tiny, prompt, CORRUPT, layer=1, position=-1, remote=True, blocking=False)
    values = bench.batch()
    for prompt, value in zip(prompts, values, strict=True):
        here = patched(tiny, prompt, CORRUPT, layer=1, position=-1)
        torch.testing.assert_close(value, here, rtol=1e-4, atol=1e-6)
    assert [name for _, name, _ in bench.events].count("running") == len(prompts), "they ran one by one"


def test_jobs_of_one_group_that_cannot_run_as_one_run_one_by_one(bench: Bench, tiny: LanguageModel) -> None:
    for size in (1000, 10**10, 2000):
        large(tiny, CLEAN, size, remote=True, blocking=False)
    with pytest.raises(RemoteError, match="out_of_memory"):
        bench.batch()
    for size in (1000, 2000):
        large(tiny, CLEAN, size, remote=True, blocking=False)
    for size, value in zip((1000, 2000), bench.batch(), strict=True):
        torch.testing.assert_close(value, large(tiny, CLEAN, size), rtol=1e-4, atol=1e-4)


def test_a_job_runs_the_model_as_often_as_it_may_and_no_more(
    unchecked: Bench, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "LIMITS", replace(LIMITS, forwards=6))
    assert steered(tiny, CLEAN, torch.zeros(128, requires_grad=True), 4, remote=True).isfinite()
    with pytest.raises(LimitError, match="this may run the model 6 times"):
        steered(tiny, CLEAN, torch.zeros(128, requires_grad=True), 8, remote=True)


def test_how_far_a_job_is_is_told_now_and_then(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = pack(
        sent(
            steered.ir,
            {},
            {},
            {"model": tiny, "prompt": CLEAN, "vector": torch.zeros(128, requires_grad=True), "steps": 3},
            lambda _: "tiny",
        ).job
    )
    runner, told = ModelRunner(tiny), []
    nothing = lambda: None  # noqa: E731
    for seconds, tells in ((0, True), (1000, False)):
        monkeypatch.setattr(execution, "PROGRESS_SECONDS", seconds)
        told.clear()
        task = Task(
            "a", lambda: payload, {}.__getitem__, LIMITS, nothing, nothing, lambda name, data: told.append((name, data))
        )
        ((_, result),) = runner.run([task])
        assert isinstance(result, bytes)
        counts = [data["forwards"] for name, data in told if name == "progress"]
        assert counts == sorted(counts)
        assert bool(counts) == tells


@intervene
def steered(model, prompt, vector, steps):
    for _ in range(steps):
        with model.trace(prompt):
            model.layers[1].output += vector
            loss = model.lm_head.output[:, -1].logsumexp(-1).sum()
            loss.backward()
    return loss.detach()


def test_gradients_of_what_was_sent_come_back(bench: Bench, tiny: LanguageModel) -> None:
    vectors = [torch.zeros(128, requires_grad=True) for _ in range(2)]
    steered(tiny, CLEAN, vectors[0], 2)
    steered(tiny, CLEAN, vectors[1], 2, remote=True)
    assert vectors[0].grad is not None
    assert vectors[1].grad is not None
    torch.testing.assert_close(vectors[1].grad, vectors[0].grad, rtol=1e-4, atol=1e-6)


def test_what_it_prints_is_sent(bench: Bench, tiny: LanguageModel) -> None:
    with tiny.trace(CLEAN, remote=True):
        print("width", tiny.layers[0].output.shape[-1])
    printed = [data for _, name, data in bench.events if name == "printed"]
    assert printed == [{"text": "width 128\n", "stream": "stdout"}]


@intervene
def drawn(model, prompt):
    with model.trace(prompt):
        noise = torch.randn(4)
        loud = model.layers[0].output.sum() * 0
    return noise + loud


def test_no_two_jobs_draw_the_same(bench: Bench, tiny: LanguageModel) -> None:
    draws = [drawn(tiny, CLEAN, remote=True) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


@intervene
def large(model, prompt, size):
    with model.trace(prompt):
        h = model.layers[0].output[:, -1]
        wide = h.new_zeros(size) + h.sum()
    return wide.sum()


def test_a_job_without_memory_gets_an_error_and_the_next_runs(unchecked: Bench, tiny: LanguageModel) -> None:
    with pytest.raises(RemoteError, match=r"out_of_memory: .*allocate memory"):
        large(tiny, CLEAN, 10**10, remote=True)
    there = large(tiny, CLEAN, 1000, remote=True)
    torch.testing.assert_close(there, large(tiny, CLEAN, 1000), rtol=1e-4, atol=1e-4)


def test_what_it_raises_has_its_line(bench: Bench, tiny: LanguageModel) -> None:
    @intervene
    def divides(model, prompt, number):
        with model.trace(prompt):
            width = model.layers[0].output.shape[-1]
        return width // number

    with pytest.raises(ZeroDivisionError) as caught:
        divides(tiny, CLEAN, 0, remote=True)
    assert any("return width // number" in note for note in caught.value.__notes__)


def test_a_job_that_does_not_compile_is_not_admitted(bench: Bench, tiny: LanguageModel) -> None:
    with pytest.raises(CompileError, match="layers"):
        patched(tiny, CLEAN, CORRUPT, layer=30, position=-1, remote=True)


def test_a_job_with_many_forwards_is_cancelled_between_two_operations(unchecked: Bench, tiny: LanguageModel) -> None:
    at, cancelling = [], []

    def soon(id: str) -> None:
        def cancel() -> None:
            at.append(time.monotonic())
            cancelling.append(asyncio.ensure_future(unchecked.engine.cancel(id)))

        unchecked.loop.call_later(0.3, cancel)

    unchecked.when = soon
    try:
        with pytest.raises(RemoteError, match="cancelled: this job was cancelled"):
            steered(tiny, CLEAN, torch.zeros(128, requires_grad=True), 900, remote=True)
    finally:
        unchecked.when = lambda id: None
    assert time.monotonic() - at[0] < 0.25 + 0.5


def test_the_description_is_of_the_model(bench: Bench, tiny: LanguageModel) -> None:
    (card,) = bench.do(bench.engine.describe())
    module = tiny._wrapped
    assert {name: card[name] for name in ("name", "class", "dtype", "layers")} == {
        "name": "tiny", "class": "GPT2LMHeadModel", "dtype": "float32", "layers": 3,
    }  # fmt: skip
    assert card["bytes"] == sum(each.numel() * 4 for each in module.parameters())
    config = json.loads(json.dumps(module.config.to_dict()))
    assert {**card["config"], "_name_or_path": config["_name_or_path"]} == config
    assert [each["path"] for each in card["modules"]] == [path for path, _ in module.named_modules()]
    assert set(card["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}
