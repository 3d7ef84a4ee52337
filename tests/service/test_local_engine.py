"""The engine of processes: jobs run, fail, are ended, and die, and nobody else is concerned.

A scripted runner (`scripted_runner`) stands for the model; what a job does is written in its payload.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import scripted_zygote

from nnsight_compiler.service import processes, sandbox
from nnsight_compiler.service.engine import Assignment, Data, EngineError, JobLimits, Outcome, RefusedError
from nnsight_compiler.service.local_engine import BLOBS, LocalEngine, LocalSettings
from nnsight_compiler.service.processes import Served
from nnsight_compiler.service.worker import SMALL

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the engine's processes need Linux")

RUNNER = "scripted_runner:load"
MIB = 2**20
LIMITS = JobLimits(wall_seconds=20, memory_bytes=60 * MIB, forwards=10, max_result_bytes=MIB)
SETTINGS = LocalSettings(workers=2, threads=1, check_seconds=1.0, jobs=500, growth=100 * MIB, grace=0.5)

Step = Sequence[object]


def taken(outcome: Outcome) -> bytes:
    """A result; where it is a file, that is gone then."""
    content = outcome.result
    assert content is not None
    if isinstance(content, bytes):
        assert len(content) <= SMALL
        return content
    data = content.read_bytes()
    assert len(data) > SMALL
    content.unlink()
    return data


class Bench:
    """An engine in an event loop of its own, for tests that share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.engine = LocalEngine([Served("scripted", "x", runner=RUNNER)], folder / "results", SETTINGS)
        self.events: list[tuple[str, str, Data]] = []
        self.number = 0

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def job(
        self, *steps: Step, limits: JobLimits = LIMITS, id: str | None = None, blobs: Mapping[str, Path] | None = None
    ) -> Assignment:
        self.number += 1
        payload = self.folder / f"{self.number}.job"
        payload.write_text(json.dumps(steps))
        return Assignment(id or f"job{self.number}", payload, blobs or {}, limits)

    async def outcomes(self, *jobs: Assignment, when: Callable[[str, str, Data], None] | None = None) -> list[Outcome]:
        def send(id: str, name: str, data: Data) -> None:
            self.events.append((id, name, data))
            if when is not None:
                when(id, name, data)

        return [outcome async for outcome in self.engine.run(jobs, send)]

    def run(self, *jobs: Assignment) -> list[Outcome]:
        """The outcomes of one batch, in the order in which they came; its events are in `events`."""
        self.events = []
        found: list[Outcome] = self.do(self.outcomes(*jobs))
        return found

    def value(self, *steps: Step, **options: Any) -> Any:
        """What a job of these steps gives."""
        (outcome,) = self.run(self.job(*steps, **options))
        assert outcome.error is None
        return json.loads(taken(outcome))

    def error(self, *steps: Step, **options: Any) -> Data:
        """The record of the error of a job of these steps."""
        (outcome,) = self.run(self.job(*steps, **options))
        assert outcome.error is not None
        assert outcome.result is None
        assert not outcome.retry
        return outcome.error

    def admit(self, *steps: Step, limits: JobLimits = LIMITS) -> Any:
        return self.do(self.engine.admit(self.job(*steps).payload, {}, limits))

    def stop(self) -> None:
        self.do(self.engine.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PROGRAM", (scripted_zygote.__file__,))
        bench = Bench(tmp_path_factory.mktemp("engine"))
        bench.do(bench.engine.start())
        yield bench
        bench.stop()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not list((bench.folder / "results").glob("*.result")), "results that nobody was given are left"


def message(error: Data) -> str:
    return str(error["message"])


# --- jobs ---


def test_a_job_gives_its_result(bench: Bench) -> None:
    assert bench.value(["say", "hello"]) == "hello"


def test_the_engine_describes_its_models(bench: Bench) -> None:
    (model,) = bench.do(bench.engine.describe())
    assert model == {"name": "scripted", "source": "x", "tokenizer": {"words.txt": "AP8="}}


def test_what_fails_in_a_batch_fails_alone(bench: Bench) -> None:
    jobs = [bench.job(["say", 1]), bench.job(["fail", "no"]), bench.job(["say", 3])]
    first, second, third = bench.run(*jobs)
    assert [each.id for each in (first, second, third)] == [job.id for job in jobs]
    assert (taken(first), taken(third)) == (b"1", b"3")
    assert second.error is not None
    assert (second.error["kind"], second.error["message"]) == ("ValueError", "no")


def test_a_runner_that_breaks_ends_the_job_that_it_was_at(bench: Bench) -> None:
    jobs = [bench.job(["say", 1]), bench.job(["break"]), bench.job(["say", 3])]
    assert kinds(bench.run(*jobs)) == {jobs[0].id: "1", jobs[1].id: "RuntimeError", jobs[2].id: "3"}


def test_what_was_printed_before_a_job_is_ended_is_seen(bench: Bench) -> None:
    steps = [["print", "begun …", "stdout", ""], ["sleep", 20]]
    assert bench.error(*steps, limits=replace(LIMITS, wall_seconds=0.1))["kind"] == "time_limit"
    assert printed(bench) == [{"text": "begun …", "stream": "stdout"}]


def test_a_job_that_is_cancelled_while_it_waits_for_a_worker_never_begins(bench: Bench) -> None:
    async def cancelled() -> dict[str, str]:
        busy = [asyncio.ensure_future(bench.outcomes(bench.job(["sleep", 0.3]))) for _ in range(SETTINGS.workers)]
        await asyncio.sleep(0.05)
        job = bench.job(["die"])
        waits = asyncio.ensure_future(bench.outcomes(job))
        await asyncio.sleep(0.05)
        await bench.engine.cancel(job.id)
        for each in busy:
            kinds(await each)
        found = kinds(await waits)
        assert not any(id == job.id for id, _, _ in bench.events)
        return found

    assert list(bench.do(cancelled()).values()) == ["cancelled"]


def test_uploaded_tensors_are_given_by_their_names(bench: Bench) -> None:
    upload = bench.folder / "upload"
    upload.write_text("its bytes")
    assert bench.value(["blob", "aa"], blobs={"bb": upload, "aa": upload}) == "its bytes"
    assert bench.error(["blob", "cc"], blobs={"aa": upload})["kind"] == "KeyError"


def at_once(bench: Bench) -> set[int]:
    """The processes of as many jobs at once as there are workers."""

    async def both() -> list[list[Outcome]]:
        jobs = [bench.job(["sleep", 0.3], ["process"]) for _ in range(SETTINGS.workers)]
        return list(await asyncio.gather(*(bench.outcomes(job) for job in jobs)))

    found = set()
    for (outcome,) in bench.do(both()):
        found.add(int(taken(outcome)))
    return found


def test_jobs_run_at_once_in_as_many_workers_as_there_are(bench: Bench) -> None:
    assert len(at_once(bench)) == SETTINGS.workers


# --- jobs that share a forward ---


def kinds(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The result of each job, or the kind of its error."""
    found = {}
    for outcome in outcomes:
        if outcome.result is not None:
            found[outcome.id] = taken(outcome).decode()
        else:
            found[outcome.id] = ("again: " if outcome.retry else "") + str((outcome.error or {})["kind"])
    return found


def test_jobs_that_share_a_forward_may_be_interrupted_one_by_one(bench: Bench) -> None:
    jobs = [bench.job(["together"], ["sleep", 0.3]) for _ in range(3)]
    jobs[1] = replace(jobs[1], limits=replace(LIMITS, wall_seconds=0.1))
    found = kinds(bench.run(*jobs))
    assert found == {jobs[0].id: "together", jobs[1].id: "time_limit", jobs[2].id: "together"}


def test_whose_death_it_was_is_seen_when_each_runs_alone(bench: Bench) -> None:
    jobs = [bench.job(["together"]), bench.job(["together"], ["die"]), bench.job(["together"])]
    found = kinds(bench.run(*jobs))
    assert found == {jobs[0].id: "together", jobs[1].id: "again: worker_died", jobs[2].id: "together"}


def test_jobs_that_share_a_forward_have_their_memory_together(bench: Bench) -> None:
    jobs = [bench.job(["together"], ["allocate", 100 * MIB]), bench.job(["together"])]
    assert set(kinds(bench.run(*jobs)).values()) == {"together"}


def test_the_time_of_a_job_that_waits_for_others_is_not_counted(bench: Bench) -> None:
    jobs = [bench.job(["together"], ["apart"], limits=replace(LIMITS, wall_seconds=0.35)) for _ in range(5)]
    assert set(kinds(bench.run(*jobs)).values()) == {"apart"}


# --- what they print ---


def printed(bench: Bench) -> list[Data]:
    return [data for _, name, data in bench.events if name == "printed"]


def test_what_a_job_prints_comes_line_by_line_from_both_streams(bench: Bench) -> None:
    bench.value(["print", "one"], ["print", "two\nthree"], ["print", "four", "stderr"], ["print", "five", "stdout", ""])
    assert printed(bench) == [
        {"text": "one\n", "stream": "stdout"},
        {"text": "two\n", "stream": "stdout"},
        {"text": "three\n", "stream": "stdout"},
        {"text": "four\n", "stream": "stderr"},
        {"text": "five", "stream": "stdout"},
    ]


def test_what_each_job_of_a_batch_prints_is_its_own(bench: Bench) -> None:
    jobs = [bench.job(["print", "a", "stdout", ""], ["fail", ""]), bench.job(["print", "b"])]
    for outcome in bench.run(*jobs):
        if outcome.result is not None:
            taken(outcome)
    told = [(id, data["text"]) for id, name, data in bench.events if name == "printed"]
    assert told == [(jobs[0].id, "a"), (jobs[1].id, "b\n")]


def test_a_job_that_prints_without_end_is_cut_and_says_so(bench: Bench) -> None:
    bench.value(*[["print", "x" * 300_000]] * 6)
    text = "".join(str(data["text"]) for data in printed(bench))
    assert MIB <= len(text) < MIB + 200
    assert text.endswith("\n… this job has printed as much as a job may; the rest is not shown\n")


# --- limits ---


def test_a_job_that_runs_too_long_is_ended_and_the_next_is_not_concerned(bench: Bench) -> None:
    begin = time.monotonic()
    error = bench.error(["sleep", 10], limits=replace(LIMITS, wall_seconds=0.2))
    assert time.monotonic() - begin < 2
    assert (error["kind"], message(error)) == ("time_limit", "this job ran for 0.2 s, which is its limit")
    assert bench.value(["say", "next"]) == "next"


def test_a_job_that_asks_for_too_much_memory_gets_an_error_and_its_worker_lives_to_tell(bench: Bench) -> None:
    error = bench.error(["allocate", 80 * MIB])
    assert error["kind"] == "out_of_memory"
    assert bench.value(["allocate", 40 * MIB]) == 40 * MIB


def test_a_job_may_have_its_memory_beside_what_the_worker_has_already(bench: Bench) -> None:
    for _ in range(SETTINGS.workers):
        bench.value(["keep", 40 * MIB])
    assert bench.value(["allocate", 40 * MIB]) == 40 * MIB


def test_a_worker_that_has_grown_is_replaced(bench: Bench) -> None:
    before = at_once(bench)
    for _ in range(SETTINGS.workers * (SETTINGS.growth // (40 * MIB) + 1)):
        bench.value(["keep", 40 * MIB])
    assert not before & at_once(bench)


def test_a_result_that_is_too_large_is_refused(bench: Bench) -> None:
    error = bench.error(["bytes", MIB + 1])
    assert error["kind"] == "result_too_large"
    assert message(error) == "the result has 1,048,577 bytes; at most 1,048,576 are allowed: return less of it"


def test_an_error_that_is_longer_than_a_message_is_cut(bench: Bench) -> None:
    error = bench.error(["fail", "x" * 2 * MIB])
    assert (error["kind"], message(error)) == ("ValueError", "x" * 4000)


# --- cancelling ---


def cancelled(bench: Bench, *jobs: Assignment, which: int = 0, after: float = 0.0) -> tuple[list[Outcome], float]:
    """The outcomes of a batch of which one job is cancelled when the first has begun, and the seconds from then on."""
    at = [0.0]

    def when(id: str, name: str, data: Data) -> None:
        if name == "running" and not at[0]:
            at[0] = time.monotonic() + after
            loop = asyncio.get_running_loop()
            loop.call_later(after, lambda: asyncio.ensure_future(bench.engine.cancel(jobs[which].id)))

    outcomes = bench.do(bench.outcomes(*jobs, when=when))
    return outcomes, time.monotonic() - at[0]


def test_a_job_is_cancelled_within_a_quarter_of_a_second(bench: Bench) -> None:
    """On a machine that has time for it: at the best of several times."""
    took = []
    for _ in range(4):
        (outcome,), seconds = cancelled(bench, bench.job(["sleep", 20]), after=0.05)
        assert outcome.error is not None
        assert (outcome.error["kind"], message(outcome.error)) == ("cancelled", "this job was cancelled")
        assert not outcome.retry
        took.append(seconds)
    assert min(took) < 0.25
    assert max(took) < 2


def test_the_others_of_a_batch_run_when_one_is_cancelled(bench: Bench) -> None:
    jobs = [bench.job(["sleep", 20]), bench.job(["say", 2]), bench.job(["say", 3])]
    outcomes, _ = cancelled(bench, *jobs)
    found = {outcome.id: outcome for outcome in outcomes}
    assert found[jobs[0].id].error is not None
    for job, value in zip(jobs[1:], (b"2", b"3"), strict=True):
        assert taken(found[job.id]) == value


def test_a_job_that_waits_for_others_of_its_batch_does_not_begin_once_it_is_cancelled(bench: Bench) -> None:
    jobs = [bench.job(["sleep", 0.2]), bench.job(["sleep", 20])]
    outcomes, seconds = cancelled(bench, *jobs, which=1)
    assert seconds < 2
    assert [outcome.error and outcome.error["kind"] for outcome in outcomes] == [None, "cancelled"]
    taken(outcomes[0])


@pytest.mark.parametrize("step", ["hang", "stubborn"])
def test_a_job_that_cannot_be_interrupted_is_killed(bench: Bench, step: str) -> None:
    (outcome,), seconds = cancelled(bench, bench.job([step, 20]), after=0.1)
    assert SETTINGS.grace <= seconds < SETTINGS.grace + 2
    assert outcome.error is not None
    assert outcome.error["kind"] == "cancelled"
    assert not outcome.retry
    assert bench.value(["say", "next"]) == "next"


def test_cancelling_at_any_moment_leaves_one_outcome_and_a_worker_that_works(bench: Bench) -> None:
    """Around the beginning and the end of a job, and between two of a batch: the result, or that it was cancelled."""

    async def round(delay: float) -> list[Outcome]:
        jobs = [bench.job(["print", "x"], ["sleep", 0.002]) for _ in range(2)]

        async def cancel() -> None:
            await asyncio.sleep(delay)
            await bench.engine.cancel(jobs[0].id)

        outcomes, _ = await asyncio.gather(bench.outcomes(*jobs), cancel())
        assert sorted(outcome.id for outcome in outcomes) == sorted(job.id for job in jobs)
        return outcomes

    kinds = set()
    for number in range(20):
        for outcome in bench.do(round(0.0005 * number)):
            assert outcome.error is None or outcome.error["kind"] == "cancelled"
            assert not outcome.retry
            kinds.add("cancelled" if outcome.error else "done")
            if outcome.result is not None:
                assert taken(outcome) == b"null"
    assert kinds == {"cancelled", "done"}


def test_what_is_small_goes_without_files(bench: Bench) -> None:
    for text in ("x", "x" * (SMALL - 2), "x" * SMALL):
        job = Assignment("from memory", json.dumps([["say", text]]).encode(), {}, LIMITS)
        (outcome,) = bench.run(job)
        assert json.loads(taken(outcome)) == text
    assert bench.do(bench.engine.admit(job.payload, {}, LIMITS)).group == "all"


# --- deaths ---


def test_a_worker_that_dies_is_seen_at_once_and_its_job_comes_back(bench: Bench) -> None:
    """Fifty times. Others of the batch, before it and after it, have their results."""
    took = []
    for number in range(50):
        how: Step = ["die"] if number % 2 else ["leave", 3]
        begin = time.monotonic()
        first, second, third = bench.run(bench.job(["say", 1]), bench.job(how), bench.job(["say", number]))
        took.append(time.monotonic() - begin)
        assert (first.retry, second.retry, third.retry) == (False, True, False)
        assert second.error is not None
        fate = "it was killed by SIGKILL" if number % 2 else "it exited with status 3"
        assert (second.error["kind"], message(second.error)) == (
            "worker_died",
            f"the process that ran this job: {fate}",
        )
        assert taken(third) == str(number).encode()
    assert sorted(took)[len(took) // 2] < 1


def test_a_worker_that_dies_while_it_is_idle_is_replaced(bench: Bench) -> None:
    for _ in range(SETTINGS.workers):
        worker = psutil.Process(bench.value(["process"]))
        worker.kill()
        worker.wait(10)
    assert bench.value(["say", "next"]) == "next"


def test_a_job_whose_files_are_gone_comes_back(bench: Bench) -> None:
    job = bench.job(["say", 1])
    assert isinstance(job.payload, Path)
    job.payload.unlink()
    gone, other = bench.run(job, bench.job(["say", 2]))
    assert gone.error is not None
    assert (gone.retry, gone.error["kind"]) == (True, "no_files")
    assert message(gone.error) == "the files of this job cannot be opened: No such file or directory"
    taken(other)


def test_when_the_process_that_forks_dies_so_do_its_workers_and_jobs_run_on_others(bench: Bench) -> None:
    before = {psutil.Process(process) for process in at_once(bench)}
    (zygote,) = {process.parent() for process in before}
    assert zygote is not None

    def kill(id: str, name: str, data: Data) -> None:
        if name == "running":
            zygote.kill()

    (outcome,) = bench.do(bench.outcomes(bench.job(["sleep", 20]), when=kill))
    assert outcome.retry
    assert psutil.wait_procs(list(before), 5)[1] == []
    assert bench.value(["say", "next"]) == "next"
    assert bench.admit(["say", 1]).group == "all"


def test_a_worker_has_no_descriptors_but_its_own(bench: Bench) -> None:
    held = bench.value(["descriptors"])
    assert held[:2] == ["/dev/null", "/dev/null"]
    assert held[3:4] == ["socket"]
    assert [Path(path).suffix for path in held[4:]] == [".job", ".result"]


def test_nothing_is_left_open_in_the_front_end(bench: Bench) -> None:
    def held() -> int:
        """The descriptors while all workers are there."""
        for process in at_once(bench):
            assert psutil.pid_exists(process)
        return len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(3):
        bench.run(bench.job(["die"]))
        bench.error(["fail", ""])
        bench.admit(["say", 1])
    assert held() == before


# --- checks ---


def test_a_job_is_checked_without_being_run(bench: Bench) -> None:
    admission = bench.admit(["say", 1], ["die"])
    assert (admission.group, admission.cost) == ("all", {"steps": 2, "forwards": 10, "weights": True})


def test_a_refusal_has_the_status_and_the_record(bench: Bench) -> None:
    with pytest.raises(RefusedError, match="too many") as caught:
        bench.admit(["refuse", "too many"])
    assert (caught.value.status, caught.value.record["kind"]) == (422, "refused")


@pytest.mark.parametrize(
    ("step", "status", "kind"),
    [
        (["check hang", 5], 422, "too_long_to_check"),
        (["check die"], 422, "check_died"),
        (["check allocate", 80 * MIB], 422, "out_of_memory"),
        (["check fail", "a mistake of ours"], 500, "ValueError"),
    ],
)
def test_what_goes_wrong_in_a_check_is_refused_and_the_next_check_is_not_concerned(
    bench: Bench, step: Step, status: int, kind: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        bench.admit(step)
    assert (caught.value.status, caught.value.record["kind"]) == (status, kind)
    assert bench.admit(["say", 1]).group == "all"


def test_a_check_does_not_wait_for_jobs(bench: Bench) -> None:
    async def checked() -> float:
        jobs = [asyncio.ensure_future(bench.outcomes(bench.job(["sleep", 1.0]))) for _ in range(SETTINGS.workers)]
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        await bench.engine.admit(bench.job(["say", 1]).payload, {}, LIMITS)
        seconds = time.monotonic() - begin
        for (outcome,) in await asyncio.gather(*jobs):
            taken(outcome)
        return seconds

    assert bench.do(checked()) < 0.8


def test_a_job_that_names_too_many_uploads_is_refused(bench: Bench) -> None:
    job = bench.job(["say", 1])
    with pytest.raises(RefusedError, match=f"at most {BLOBS} uploaded tensors, and this one names {BLOBS + 1}"):
        bench.do(bench.engine.admit(job.payload, {str(number): job.payload for number in range(BLOBS + 1)}, LIMITS))
    blobs = {str(number): job.payload for number in range(BLOBS)}
    assert bench.value(["blob", "7"], blobs=blobs) == '[["say", 1]]'


# --- other engines ---


async def problem(engine: LocalEngine) -> str:
    with pytest.raises(EngineError) as caught:
        await engine.start()
    return str(caught.value)


def test_a_model_that_cannot_be_loaded_is_told_at_the_start(bench: Bench) -> None:
    async def problems() -> list[str]:
        sources = ("broken", "dies")
        engines = [
            LocalEngine([Served(source, source, runner=RUNNER)], bench.folder / "other", SETTINGS) for source in sources
        ]
        return list(await asyncio.gather(*map(problem, engines)))

    assert bench.do(problems()) == [
        "broken cannot be served: ValueError: this model is broken",
        "dies cannot be served: while it was loaded, the process exited with status 7",
    ]


def test_processes_that_are_not_forked_load_the_model_themselves_and_go_on_after_an_interrupt(bench: Bench) -> None:
    async def both() -> list[str]:
        models = [Served("alone", "alone", runner=RUNNER, forks=False)]
        engine = LocalEngine(models, bench.folder / "alone", replace(SETTINGS, workers=1))
        await engine.start()
        found = []
        try:
            for job in (bench.job(["process"]), bench.job(["sleep", 20]), bench.job(["process"])):
                job = replace(job, limits=replace(LIMITS, wall_seconds=0.3))
                async for outcome in engine.run([job], lambda *_: None):
                    found.append(taken(outcome).decode() if outcome.result else str((outcome.error or {})["kind"]))
            admission = await engine.admit(bench.job(["loaded"]).payload, {}, LIMITS)
            found.append(str(admission.cost["weights"]))
        finally:
            await engine.stop()
        return found

    first, interrupted, second, weights = bench.do(both())
    assert (interrupted, weights) == ("time_limit", "False")
    assert first == second


PARENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import scripted_zygote
scripted_zygote.leave_torch_out()
from nnsight_compiler.service import processes
processes.PROGRAM = (scripted_zygote.__file__,)
from nnsight_compiler.service.local_engine import LocalEngine, LocalSettings
from nnsight_compiler.service.processes import Served

async def main():
    engine = LocalEngine([Served("x", "x", runner="scripted_runner:load")], Path(sys.argv[1]), LocalSettings(threads=1))
    await engine.start()
    print("started", flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def test_when_the_front_end_dies_so_do_all_processes(bench: Bench, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(Path(scripted_zygote.__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 3  # the one that forks, a worker, the one that checks
        parent.kill()
        assert psutil.wait_procs(below, 5)[1] == []


def test_an_engine_of_several_models_must_know_which_one_a_job_is_for(tmp_path: Path) -> None:
    models = [Served("one", "x"), Served("two", "x")]
    with pytest.raises(EngineError, match="is told which one a job is for"):
        LocalEngine(models, tmp_path)
    engine = LocalEngine(models, tmp_path, model_of=lambda path: path.read_text())
    (tmp_path / "a.job").write_text("three")
    with pytest.raises(RefusedError, match=r"there is no model 'three' here; there are: one, two"):
        asyncio.run(engine.admit(tmp_path / "a.job", {}, LIMITS))
    with pytest.raises(EngineError, match="each by a name of its own"):
        LocalEngine([models[0], models[0]], tmp_path)


# --- the sandbox ---


def test_a_folder_beside_libraries_can_be_read_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.exposed(tmp_path / "state") is None
    monkeypatch.syspath_prepend(tmp_path)
    assert sandbox.exposed(tmp_path / "state") == tmp_path


def test_a_system_without_a_sandbox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(EngineError) as caught:
        asyncio.run(LocalEngine([Served("one", "x")], tmp_path).start())
    assert str(caught.value) == (
        "the workers' sandbox needs Linux on x86-64 or aarch64, which is not to be had here (linux on riscv64); "
        "serve without a sandbox if all who have keys are trusted"
    )


@pytest.mark.parametrize(
    "what", ["socket", "unix socket", "exec", "fork", "spawn", "kill", "memory file", "pidfd", "look into"]
)
def test_a_worker_reaches_nothing_outside(bench: Bench, what: str) -> None:
    assert bench.value(["attempt", what]) == "PermissionError"


@pytest.mark.parametrize("what", ["write", "append", "truncate", "remove", "rename", "folder", "mode", "link"])
def test_a_worker_writes_to_no_file(bench: Bench, what: str) -> None:
    file = bench.folder / "a file"
    file.write_text("as it was")
    assert bench.value(["attempt", what, str(file)]) == "PermissionError"
    assert file.read_text() == "as it was"


def test_a_worker_reads_libraries_and_nothing_else(bench: Bench) -> None:
    secret = bench.folder / "keys"
    secret.write_text("a secret")
    assert bench.value(["attempt", "read", os.__file__]) == "done"
    if "landlock" in confined(bench):
        assert bench.value(["attempt", "read", str(secret)]) == "PermissionError"
        assert bench.value(["attempt", "list", str(bench.folder)]) == "PermissionError"


def confined(bench: Bench) -> list[str]:
    """What is in force, as the processes say."""
    (crew,) = bench.engine._crews.values()
    return crew._free[0].confined


def test_a_worker_may_start_threads(bench: Bench) -> None:
    assert bench.value(["thread"]) == "ran"
