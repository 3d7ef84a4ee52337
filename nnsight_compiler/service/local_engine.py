"""An engine of processes on this machine: for each model, some that run jobs and one that checks them.

A job never waits for the check of another, nor a check for a job. A process that dies takes nothing with it but the job
that was in progress; another is forked in milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from nnsight_compiler.service import sandbox
from nnsight_compiler.service.engine import (
    Admission,
    Assignment,
    Content,
    Data,
    EngineError,
    JobLimits,
    Limits,
    Outcome,
    RefusedError,
    Send,
    record,
)
from nnsight_compiler.service.frames import DESCRIPTORS, FrameError, opened
from nnsight_compiler.service.processes import Family, Process, Served
from nnsight_compiler.service.shifts import Job, Shift
from nnsight_compiler.service.worker import WorkerSettings

BLOBS = DESCRIPTORS - 2
"""Uploaded tensors that one job may name: each is an open file of the worker."""

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class LocalSettings:
    """How the processes are kept.

    workers: for each model, how many jobs run at once. threads: of each; where it is not said, all have as many as the
    machine. sandbox: whether processes give up what `sandbox.py` says. check_seconds: a job whose check takes longer is
    refused. jobs, growth: a worker is replaced after so many jobs, or so many bytes more. grace: seconds from telling a
    job to end to killing its process.
    """

    workers: int = 1
    threads: int | None = None
    sandbox: bool = True
    check_seconds: float = 10.0
    jobs: int = 20_000
    growth: int = 2**30
    grace: float = 2.0


@final
class LocalEngine:
    """Runs jobs in processes of this machine.

    Args:
        models: what is served; no two of one name.
        folder: where results are written; each is its receiver's afterwards. What is left there is removed at start.
        model_of: the name of the model that a job file is for; needed where several are served. Raises `RefusedError`.
    """

    def __init__(
        self,
        models: Sequence[Served],
        folder: Path,
        settings: LocalSettings | None = None,
        model_of: Callable[[Content], str] | None = None,
    ) -> None:
        settings = settings or LocalSettings()
        if not models or len({model.name for model in models}) < len(models):
            raise EngineError("an engine serves one model or more, each by a name of its own")
        if len(models) > 1 and model_of is None:
            raise EngineError("an engine that serves several models is told which one a job is for")
        threads = settings.threads or max(1, (os.cpu_count() or 1) // (settings.workers * len(models)))
        self._settings, self._folder, self._model_of = settings, folder, model_of
        self._crews = {
            model.name: _Crew(
                Family(
                    model, WorkerSettings(threads, settings.sandbox, settings.jobs, settings.growth, not model.forks)
                ),
                settings,
            )
            for model in models
        }
        self._jobs: dict[str, Job] = {}

    @property
    def workers(self) -> int:
        """How many jobs can run at once."""
        return self._settings.workers * len(self._crews)

    async def start(self) -> None:
        """Loads the models, and forks the processes.

        Raises:
            EngineError: a model cannot be loaded, or the system has no sandbox.
        """
        if self._settings.sandbox:
            sandbox.require()
            if (around := sandbox.exposed(self._folder)) is not None:
                _log.warning("workers can read what lies in %s, since libraries lie in %s", self._folder, around)
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob("*.result"):
            left.unlink()
        try:
            async with asyncio.TaskGroup() as starts:
                for crew in self._crews.values():
                    starts.create_task(crew.start())
        except BaseExceptionGroup as errors:
            await self.stop()
            raise errors.exceptions[0] from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends all that runs, and leaves no process."""
        for crew in self._crews.values():
            await crew.stop()

    async def describe(self) -> Sequence[Data]:
        """What a client needs to know of each model; files of tokenizers are in base64."""
        return [crew.family.description for crew in self._crews.values()]

    async def admit(self, payload: Content, blobs: Mapping[str, Path], limits: Limits) -> Admission:
        """Checks a job in a process of its own.

        Raises:
            RefusedError: it may not be queued.
        """
        if len(blobs) > BLOBS:
            message = f"a job may name at most {BLOBS} uploaded tensors, and this one names {len(blobs)}"
            raise RefusedError(422, record("too_many_blobs", message))
        return await self._crew(payload).admit(payload, blobs, limits)

    async def run(self, batch: Sequence[Assignment], send: Send) -> AsyncIterator[Outcome]:
        """Runs jobs of one group, and gives the outcome of each as it ends."""
        jobs = [Job(each) for each in batch]
        self._jobs |= {job.id: job for job in jobs}
        try:
            groups = deque([jobs])
            while groups:
                group = groups.popleft()
                async for outcome in self._shift(group, groups, send):
                    yield outcome
        finally:
            for job in jobs:
                self._jobs.pop(job.id, None)

    async def cancel(self, id: str) -> None:
        """Ends a job of a batch that is running; its outcome says so."""
        job = self._jobs.get(id)
        if job is not None:
            job.end("cancelled")

    def _crew(self, payload: Content) -> _Crew:
        """The processes of the model that a job is for."""
        if self._model_of is None:
            (crew,) = self._crews.values()
            return crew
        name = self._model_of(payload)
        if name not in self._crews:
            message = f"there is no model {name[:200]!r} here; there are: {', '.join(self._crews)}"
            raise RefusedError(422, record("unknown_model", message))
        return self._crews[name]

    async def _shift(self, group: list[Job], groups: deque[list[Job]], send: Send) -> AsyncIterator[Outcome]:
        """Gives a group to a worker, and its outcomes; what is still to be done then is put back among the groups."""
        many, begun, died = len(group), group, ""
        try:
            crew = self._crew(group[0].assignment.payload)
            async with crew.worker() as process:
                shift = Shift(process, group, send, self._folder, self._settings.grace)
                try:
                    async for outcome in shift.outcomes():
                        yield outcome
                    if len(group) == many:
                        raise FrameError("it did nothing")
                except (EOFError, FrameError) as error:
                    died = f"{error}, and was ended" if str(error) else await crew.family.bury(process)
                begun = shift.begun
        except (EngineError, RefusedError) as error:
            died = str(error)
        if not died:
            if group:
                groups.appendleft(group)
            return
        _log.warning("a worker is lost: %s", died)
        waiting = [job for job in group if job not in begun]
        if len(waiting) == many:  # it died of them, or before it had them
            begun, waiting = waiting, []
        for job in begun:
            if job.ending is not None:
                yield Outcome(job.id, error=job.ended())
            elif len(begun) > 1 and begun is not group:  # it is to be seen whose death it was
                groups.append([job])
            else:
                yield Outcome(job.id, error=record("worker_died", f"the process that ran this job: {died}"), retry=True)
        if waiting:
            groups.append(waiting)


@final
class _Crew:
    """The processes of one model: those that are free, those that are at work, and the one that checks jobs."""

    def __init__(self, family: Family, settings: LocalSettings) -> None:
        self.family, self._settings = family, settings
        self._slots = asyncio.Semaphore(settings.workers)
        self._checking = asyncio.Lock()
        self._free: deque[Process] = deque()
        self._checker: Process | None = None
        self._known: set[Process] = set()

    async def start(self) -> None:
        """Loads the model, and has all processes ready."""
        await self.family.start()
        for _ in range(self._settings.workers):
            self._free.append(await self._born())
        self._checker = await self._born(checks=True)
        _log.info("%s: sandbox: %s", self.family.served.name, ", ".join(self._checker.confined) or "none")

    async def stop(self) -> None:
        """Ends all processes."""
        for process in self._known:
            process.close()
        self._known.clear()
        await self.family.stop()

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Process]:
        """A worker, when one is free. It is kept if it is idle afterwards."""
        async with self._slots:
            process = self._free.popleft() if self._free else await self._born()
            if not process.alive:
                self._forget(process)
                process = await self._born()
            try:
                yield process
            finally:
                if process.reusable:
                    self._free.append(process)
                else:
                    self._forget(process)

    async def admit(self, payload: Content, blobs: Mapping[str, Path], limits: Limits) -> Admission:
        """Has a job checked, after those that came before."""
        async with self._checking:
            process = self._checker
            if process is None or not process.alive:
                process = await self._born(checks=True)
            self._checker, process.reusable = process, False
            try:
                async with asyncio.timeout(self._settings.check_seconds):
                    return await self._check(process, payload, blobs, limits)
            except TimeoutError:
                message = f"this job takes more than {self._settings.check_seconds:g} s to check: make it smaller"
                raise RefusedError(422, record("too_long_to_check", message)) from None
            except (EOFError, FrameError) as error:
                died = str(error) or await self.family.bury(process)
                _log.warning("a process that checked a job is lost: %s", died)
                raise RefusedError(422, record("check_died", "the check of this job ended its process")) from None
            finally:
                if not process.reusable:
                    self._forget(process)
                    self._checker = None

    async def _check(self, process: Process, payload: Content, blobs: Mapping[str, Path], limits: Limits) -> Admission:
        files: list[int] = []
        try:
            files += [opened(each) for each in (payload, *blobs.values())]
            asked: Data = {"do": "admit", "limits": asdict(JobLimits.of(limits)), "blobs": list(blobs)}
            await process.line.send(asked, descriptors=files)
        finally:
            for file in files:
                os.close(file)
        answer = await process.line.receive()
        idle = await process.line.receive()
        process.reusable = idle.header.get("retire") is False
        if answer.header.get("is") == "admitted":
            return Admission(answer.text("group"), answer.data("cost"))
        status = answer.header.get("status")
        if not isinstance(status, int):
            raise FrameError("a refusal without a status")
        raise RefusedError(status, answer.data("record"))

    async def _born(self, checks: bool = False) -> Process:
        process = await self.family.born(checks)
        self._known.add(process)
        return process

    def _forget(self, process: Process) -> None:
        self.family.forget(process)
        self._known.discard(process)
