"""Jobs that one worker has before it: what it tells of them, when they are ended, and what becomes of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

from nnsight_compiler.service.engine import Assignment, Data, JobLimits, Outcome, Send, record
from nnsight_compiler.service.frames import DESCRIPTORS, Frame, FrameError, opened
from nnsight_compiler.service.processes import Process

EVENTS = frozenset({"running", "printed", "token", "progress"})
STALL_SECONDS = 60.0
"""A worker that has jobs before it, begins none, and says nothing for so long, is taken for dead."""


@final
@dataclass(slots=True, eq=False)
class Job:
    """A job that the engine has. `shift`: where it is now; `ending`: why it is to end."""

    assignment: Assignment
    shift: Shift | None = None
    ending: str | None = None

    @property
    def id(self) -> str:
        return self.assignment.id

    def end(self, reason: str) -> None:
        """Has it ended, for a reason: `cancelled`, `time_limit`."""
        if self.ending is None:
            self.ending = reason
            if self.shift is not None:
                self.shift.interrupt(self)

    def ended(self) -> Data:
        """The record of a job that was ended."""
        if self.ending == "time_limit":
            seconds = self.assignment.limits.wall_seconds
            return record("time_limit", f"this job ran for {seconds:g} s, which is its limit")
        return record("cancelled", "this job was cancelled")


@final
@dataclass(slots=True, eq=False)
class Shift:
    """Some jobs, given to a worker together.

    begun: those that are in progress. left: those that have no outcome yet.
    """

    process: Process
    left: list[Job]
    send: Send
    folder: Path
    grace: float
    begun: list[Job] = field(default_factory=list)
    _timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _results: dict[str, Path] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """The outcome of each job as it ends. Ends when the worker is idle.

        Raises:
            EOFError: the worker died; what is `begun` and what is `left` says how far it came.
            FrameError: it sent what it may not.
        """
        jobs = {job.id: job for job in self.left}
        self.process.reusable = False
        try:
            for job in list(self.left):
                if job.ending is not None:
                    self.left.remove(job)
                    yield Outcome(job.id, error=job.ended())
                    continue
                try:
                    await self._give(job)
                except OSError as error:  # its files are gone, or the disk is full
                    self.left.remove(job)
                    reason = f"the files of this job cannot be opened: {error.strerror}"
                    yield Outcome(job.id, error=record("no_files", reason), retry=True)
                else:
                    job.shift = self
            if not self.left:
                self.process.reusable = True
                return
            await self.process.line.send({"do": "run"})
            while True:
                async with asyncio.timeout(None if self.begun else STALL_SECONDS):
                    frame = await self.process.line.receive()
                if frame.header.get("is") == "idle":
                    self.process.reusable = frame.header.get("retire") is False
                    return
                job = jobs[frame.text("id")]
                if job not in self.left:
                    raise FrameError("a worker that speaks of a job which has ended")
                if frame.header.get("is") == "event":
                    self._event(job, frame.text("name"), frame.data("data"))
                elif frame.header.get("is") == "waiting":
                    self._stop_timer(job)
                    self.begun.remove(job)
                else:
                    outcome = self._outcome(job, frame)
                    self._stop_timer(job)
                    self.left.remove(job)
                    if job in self.begun:
                        self.begun.remove(job)
                    yield outcome
        except (KeyError, ValueError, TimeoutError) as error:
            raise FrameError("a worker that speaks of other jobs, or not at all") from error
        finally:
            for job in jobs.values():
                self._stop_timer(job)
                job.shift = None
            for result in self._results.values():
                result.unlink(missing_ok=True)

    def interrupt(self, job: Job) -> None:
        """Has a job ended that is in progress; one that is not, when it begins."""
        if job in self.begun:
            self._tasks.add(task := asyncio.create_task(self._interrupt(job)))
            task.add_done_callback(self._tasks.discard)

    async def _interrupt(self, job: Job) -> None:
        self._timer(job, self.grace, self.process.kill)
        try:
            await self.process.line.send({"do": "cancel", "id": job.id, "why": job.ending})
        except EOFError:  # it has died, and is seen to have
            return
        self.process.interrupt()

    async def _give(self, job: Job) -> None:
        """Sends a job, as open files: no path means anything to a worker."""
        given = job.assignment
        assert len(given.blobs) <= DESCRIPTORS - 2
        result = self.folder / f"{os.urandom(16).hex()}.result"
        files: list[int] = []
        try:
            files.append(opened(given.payload))
            files.append(os.open(result, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._results[job.id] = result
            for path in given.blobs.values():
                files.append(opened(path))
            limits = asdict(JobLimits.of(given.limits))
            task: Data = {"do": "task", "id": job.id, "limits": limits, "blobs": list(given.blobs)}
            await self.process.line.send(task, descriptors=files)
        finally:
            for file in files:
                os.close(file)

    def _event(self, job: Job, name: str, data: Data) -> None:
        if name not in EVENTS:
            raise FrameError("a worker that tells what is no event of a job")
        if name == "running" and job not in self.begun:
            self.begun.append(job)
            self._timer(job, job.assignment.limits.wall_seconds, lambda: job.end("time_limit"))
            if job.ending is not None:
                self.interrupt(job)
        self.send(job.id, name, data)

    def _outcome(self, job: Job, frame: Frame) -> Outcome:
        told = frame.header
        error = told.get("error")
        if error is None:
            return Outcome(job.id, result=frame.body or self._results.pop(job.id))
        if not isinstance(error, dict):
            raise FrameError("an error that is no record")
        if job.ending is not None and error.get("kind") == job.ending:
            error = {**error, "message": job.ended()["message"]}
        return Outcome(job.id, error=error, retry=told.get("retry") is True)

    def _timer(self, job: Job, seconds: float, act: Callable[[], None]) -> None:
        self._stop_timer(job)
        self._timers[job.id] = asyncio.get_running_loop().call_later(seconds, act)

    def _stop_timer(self, job: Job) -> None:
        timer = self._timers.pop(job.id, None)
        if timer is not None:
            timer.cancel()
