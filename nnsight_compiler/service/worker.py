"""A process that runs jobs, or checks them: it waits for the front end's word, and knows its model alone.

It has nothing that a job could take: no key, no path of a job, no connection but the one to the front end.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast, final

from nnsight_compiler.service.engine import Data, EngineError, JobLimits, RefusedError, record
from nnsight_compiler.service.frames import Channel, Frame, FrameError, encode
from nnsight_compiler.service.interrupts import Interrupted, Interrupts
from nnsight_compiler.service.printed import Allowance, Printed
from nnsight_compiler.service.runner import ChangedModelError, Runner, Task, content
from nnsight_compiler.service.sandbox import blank_memory, confine, readable

SMALL = 2**16
"""Bytes of a result that goes with the message which says that a job has ended; a larger one goes into a file."""

_MESSAGE = 4000
"""Characters of a message that is too long to be sent whole."""

_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory")
"""What torch and what it is built on say."""


@final
@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a process is to run.

    sandbox: whether it gives up what `sandbox` says. jobs, growth: after so many jobs, or when it has become so many
    bytes larger, another takes its place. lasting: another is not had quickly, so that it goes on after a job was
    interrupted.
    """

    threads: int
    sandbox: bool
    jobs: int
    growth: int
    lasting: bool = False

    def as_data(self) -> Data:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> WorkerSettings:
        """From what `as_data` gave, through JSON."""
        return cls(**data)


def serve(channel: Channel, runner: Runner, settings: WorkerSettings) -> None:
    """Does what it is told until the front end closes its end."""
    handle = os.pidfd_open(os.getpid())  # a sandbox lets none be opened
    try:
        confined = confine(readable()) if settings.sandbox else ()
    except EngineError as error:
        channel.send({"is": "failed", "message": str(error)})
        return
    blank_memory()
    runner.begin(settings.threads)
    channel.send({"is": "ready", "pid": os.getpid(), "confined": list(confined)}, descriptors=[handle])
    os.close(handle)
    with suppress(EOFError):
        _Worker(channel, runner, settings).serve()


@final
class _Job:
    """A task, with what the front end gave for it, and what it prints."""

    def __init__(self, frame: Frame, worker: _Worker) -> None:
        self.id = frame.text("id")
        self.frame, self.worker = frame, worker
        payload, self.result, *blobs = frame.descriptors
        self.task = Task(
            self.id, lambda: content(payload), _blobs(frame, blobs), _limits(frame), self.begin, self.wait, self.tell
        )
        self.begun = self.ended = False
        allowance = Allowance()

        def stream(name: str) -> TextIO:
            return cast(TextIO, Printed(lambda text: self.tell("printed", {"text": text, "stream": name}), allowance))

        self.streams = stream("stdout"), stream("stderr")

    def begin(self) -> None:
        """It is in progress, and what is printed is its own."""
        self.begun = True
        self.worker.interrupts.progress.add(self.id)
        self.worker.limit_memory()
        sys.stdout, sys.stderr = self.streams
        self.tell("running", {})

    def wait(self) -> None:
        """It is in progress no more, and is to begin again."""
        self.begun = False
        self.worker.interrupts.progress.discard(self.id)
        self.worker.interrupts.send({"is": "waiting", "id": self.id})

    def tell(self, name: str, data: Data) -> None:
        """An event of it."""
        self.worker.interrupts.send({"is": "event", "id": self.id, "name": name, "data": data})

    def end(self, answer: bytes | Data) -> None:
        """Tells how it ended: with a result, or with the record of an error."""
        for stream in self.streams:
            stream.flush()
        self.ended = True
        self.worker.interrupts.progress.discard(self.id)
        message: Data = {"is": "done", "id": self.id}
        body = b""
        if isinstance(answer, dict):
            message["error"] = _bounded(answer)
        elif len(answer) > (most := self.task.limits.max_result_bytes):
            text = f"the result has {len(answer):,} bytes; at most {most:,} are allowed: return less of it"
            message["error"] = record("result_too_large", text)
        elif len(answer) <= SMALL:
            body = answer
        else:
            try:
                _write(self.result, answer)
            except OSError as error:
                message |= {"error": record("no_space", f"the result cannot be kept: {error.strerror}"), "retry": True}
        self.worker.interrupts.send(message, body)


@final
class _Worker:
    """What a process has done and has before it.

    base: the bytes that it had when it began. done: how many jobs it has run. spoilt: a job left something half done.
    changed: a job left the model changed.
    """

    def __init__(self, channel: Channel, runner: Runner, settings: WorkerSettings) -> None:
        self.channel, self.runner, self.settings = channel, runner, settings
        self.interrupts = Interrupts(channel)
        self.base = _data_bytes()
        self.done = 0
        self.spoilt = self.changed = False
        self.jobs: list[_Job] = []

    def serve(self) -> None:
        retire = False
        while not retire:
            frame = self.channel.receive()
            assert frame is not None
            match frame.header.get("do"):
                case "task":
                    self.jobs.append(_Job(frame, self))
                    continue
                case "cancel":  # a job that has ended meanwhile
                    continue
                case "run":
                    self.run()
                case "admit":
                    self.admit(frame)
                case unknown:
                    raise FrameError(f"there is nothing to do that is called {unknown!r}")
            grown = _data_bytes() - self.base > self.settings.growth
            spoilt = self.spoilt and not self.settings.lasting
            retire = spoilt or self.changed or grown or self.done >= self.settings.jobs
            self.channel.send({"is": "idle", "retire": retire})

    def run(self) -> None:
        """Runs the tasks that it was given, until one is interrupted."""
        jobs = {job.id: job for job in self.jobs}
        streams = sys.stdout, sys.stderr
        try:
            with self.interrupts.jobs():
                for task, answer in self.runner.run([job.task for job in self.jobs]):
                    sys.stdout, sys.stderr = streams
                    jobs[task.id].end(self.error(answer) if isinstance(answer, Exception) else answer)
        except Interrupted as interrupted:
            self.interrupts.close()
            sys.stdout, sys.stderr = streams
            self.spoilt = True
            jobs[interrupted.job].end({**self.runner.record(interrupted), "kind": interrupted.reason})
        except Exception as error:  # whatever it is: it is told, and this process ends
            sys.stdout, sys.stderr = streams
            self.spoilt = True
            for job in self.jobs:
                if job.begun and not job.ended:
                    job.end(self.error(error))
        finally:
            _limit_memory(None)
        self.done += len(self.jobs)
        for job in self.jobs:
            job.frame.close()
        self.jobs.clear()
        if self.spoilt and self.settings.lasting:
            gc.collect()

    def limit_memory(self) -> None:
        """Lets the jobs in progress have together what each may have."""
        progress = self.interrupts.progress
        _limit_memory(sum(job.task.limits.memory_bytes for job in self.jobs if job.id in progress))

    def admit(self, frame: Frame) -> None:
        """Checks a job."""
        payload, *blobs = frame.descriptors
        limits = _limits(frame)
        _limit_memory(limits.memory_bytes)
        answer: Data
        try:
            admission = self.runner.admit(content(payload), _blobs(frame, blobs), limits)
            answer = {"is": "admitted", "group": admission.group, "cost": admission.cost}
        except RefusedError as error:
            answer = {"is": "refused", "status": error.status, "record": _bounded(error.record)}
        except Exception as error:  # whatever it is: it is told
            answer = {"is": "refused", "status": 422 if _lacks_memory(error) else 500, "record": self.error(error)}
        finally:
            _limit_memory(None)
        self.done += 1
        frame.close()
        self.channel.send(answer)

    def error(self, error: Exception) -> Data:
        """The record of an exception; of one for want of memory, after which this process ends."""
        _limit_memory(None)
        told = self.runner.record(error)
        self.changed = self.changed or isinstance(error, ChangedModelError)
        if _lacks_memory(error):
            told["kind"], self.spoilt = "out_of_memory", True
        return _bounded(told)


def _limits(frame: Frame) -> JobLimits:
    return JobLimits(**frame.data("limits"))  # type: ignore[arg-type]  # from the front end, which made it of one


def _blobs(frame: Frame, descriptors: list[int]) -> Any:
    names = frame.header["blobs"]
    assert isinstance(names, list)
    files = dict(zip(names, descriptors, strict=True))
    return lambda name: content(files[name])


def _bounded(told: Data) -> Data:
    """A record that fits into a message: with the beginning of its text, where the whole does not."""
    try:
        encode(told)
    except FrameError:
        return record(str(told.get("kind"))[:100], str(told.get("message"))[:_MESSAGE])
    return told


def _lacks_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(each in text for each in _NO_MEMORY)
    )


def _data_bytes() -> int:
    """The bytes of this process's own data, as the limit counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise EngineError("the system does not say how much memory a process has")


def _limit_memory(more: int | None) -> None:
    """Lets this process allocate so many bytes beyond what it has; or as many as there are."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = hard if more is None else _data_bytes() + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[: 2**30]) :]
