"""From the queue to the engine and back: leases what is to run, has it run, and records how it ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from nnsight_compiler.service import durable
from nnsight_compiler.service.engine import Assignment, Content, Data, Engine, Outcome
from nnsight_compiler.service.jobs import error_record
from nnsight_compiler.service.metrics import Metrics
from nnsight_compiler.service.notices import Notices
from nnsight_compiler.service.records import Lease, LeasedJob, StoreError
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.syncs import Syncs

T = TypeVar("T")

PAUSE = 1.0
"""Seconds before the queue is asked again after it failed."""

PROGRESS_SECONDS = 0.2
"""Between two events that tell how far a job is."""

log = logging.getLogger(__name__)


class Dispatcher:
    """Keeps the engine busy while jobs are queued.

    Events of running jobs go to the queue in the order in which they came, as many at a time as have come while the
    disk was busy; whoever watches the job is told after they are kept, so that an event has one number for good. While
    the end of a job is recorded, its worker has the next one.
    """

    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        syncs: Syncs,
        engine: Engine,
        notices: Notices,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._store, self._thread, self._syncs, self._engine = store, thread, syncs, engine
        self._notices, self._metrics, self._settings = notices, metrics, settings
        self._awake = asyncio.Event()
        self._begun: dict[str, asyncio.Event] = {}
        self._batches: set[asyncio.Task[None]] = set()
        self._records: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._jobs_wait = self._stopping = False

    @property
    def running(self) -> int:
        """How many jobs are running."""
        return len(self._begun)

    def start(self) -> None:
        """Begins to lease."""
        self._loop = asyncio.create_task(self._lease_forever(), name="dispatcher")
        self.wake()

    def wake(self) -> None:
        """There are jobs in the queue."""
        self._jobs_wait = True
        self._awake.set()

    async def cancel(self, id: str) -> None:
        """Asks the engine to end a job, if it runs."""
        begun = self._begun.get(id)
        if begun is not None:
            await begun.wait()
            if id in self._begun:
                await self._engine.cancel(id)

    async def stop(self) -> None:
        """Leases no more, waits a while for what runs, and gives back what still does."""
        self._stopping = True
        if self._loop is not None:
            self.wake()  # and not cancelled: what is being leased would run nowhere
            await self._loop
        if self._batches:
            _, late = await asyncio.wait(self._batches, timeout=self._settings.drain)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await asyncio.gather(*self._records, return_exceptions=True)  # what failed is in the log

    async def _lease_forever(self) -> None:
        while not self._stopping:
            await self._awake.wait()
            self._awake.clear()
            try:
                while (
                    self._jobs_wait and not self._stopping and (free := self._engine.workers - len(self._batches)) > 0
                ):
                    self._jobs_wait = False  # another may come meanwhile
                    leases, more = await self._thread.call(self._lease, free)
                    self._jobs_wait |= more
                    for lease in leases:
                        self._begin(lease)
                    if leases:
                        self._notices.queue_moved()
            except Exception:
                self._jobs_wait = True
                log.exception("the queue could not be asked for jobs; it is asked again in %s s", PAUSE)
                asyncio.get_running_loop().call_later(PAUSE, self.wake)

    def _lease(self, free: int) -> tuple[list[Lease], bool]:
        """What is to run now, and whether there is more."""
        return self._store.lease(free, self._settings.max_batch), self._store.waits()

    def _begin(self, lease: Lease) -> None:
        for id in lease.damaged:
            self._notices.tell(id, over=True)
        if not lease.jobs:
            return
        self._metrics.batch(lease.jobs)
        for job in lease.jobs:
            self._begun[job.id] = asyncio.Event()
            self._notices.tell(job.id)
        self._keep(self._batches, self._run(lease.jobs))

    def _keep(self, tasks: set[asyncio.Task[None]], coroutine: Coroutine[Any, Any, None]) -> None:
        """Begins a task, which stands among these until it ends."""

        def end(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error(
                    "how jobs ended may not be kept; those that are not run again after the next start", exc_info=error
                )
            self._awake.set()

        task = asyncio.create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(end)

    async def _run(self, jobs: Sequence[LeasedJob]) -> None:
        """Runs the jobs of a lease; each is recorded as it ends, and those that did not end go back to the queue."""
        began = time.monotonic()
        open_jobs = {job.id: job for job in jobs}
        journal = Journal(self._keep_events)
        died = False
        try:
            batch = [Assignment(job.id, job.payload, job.blobs, job.tenant.limits) for job in jobs]
            outcomes = self._engine.run(batch, lambda id, name, data: journal.add(open_jobs.get(id), name, data))
            for job in jobs:  # the loop below takes the first step of `run` at once, so that the engine knows them then
                asyncio.get_running_loop().call_soon(self._begun[job.id].set)
            async for outcome in outcomes:
                job = open_jobs.pop(outcome.id)
                self._keep(self._records, self._ended(job, partial(self._record, job, outcome), journal, began))
        except Exception:
            died = True
            log.exception("the engine failed; the jobs that it ran go back to the queue")
        finally:
            for job in open_jobs.values():
                self._keep(self._records, self._ended(job, partial(self._give_back, job, died), journal, began))
            await journal.close()

    async def _ended(self, job: LeasedJob, keep: Callable[[], Awaitable[str]], journal: Journal, began: float) -> None:
        """Records how a job ended, after all that it sent; `keep` does, and says it in a word."""
        how = "lost"
        try:
            await journal.written()
            how = await keep()
        finally:
            self._forget(job)
            self._metrics.ended(how, time.monotonic() - began)
        await self._syncs.settled()

    async def _record(self, job: LeasedJob, outcome: Outcome) -> str:
        """Records how a job ended, and says it in a word: `stale` where it counts for nothing, since the job was
        cancelled or given to another worker."""
        if outcome.retry:
            self._metrics.worker_died()
            return await self._give_back(job, died=True)
        if outcome.result is not None:
            kept, how = await self._finish(job, outcome.result)
        else:
            kept, how = await self._insist(partial(self._store.fail, job.id, job.fence, outcome.error or {})), "failed"
        return how if kept else "stale"

    async def _give_back(self, job: LeasedJob, died: bool) -> str:
        kept = await self._insist(partial(self._store.give_back, job.id, job.fence, died=died))
        self.wake()
        return "given back" if kept else "stale"

    async def _finish(self, job: LeasedJob, result: Content) -> tuple[bool, str]:
        try:
            staged = result if self._store.is_small(result) else await asyncio.to_thread(self._store.stage, result)
            return await self._thread.call(self._store.finish, job.id, job.fence, staged), "completed"
        except StoreError as error:
            log.warning("the result of job %s cannot be kept: %s", job.id, error)
            durable.discard(result)
            record = error_record("no_space", "the service's disk could not keep the result; send the job again later")
            return await self._insist(partial(self._store.fail, job.id, job.fence, record)), "failed"

    async def _keep_events(self, job: LeasedJob, events: Sequence[tuple[str, Data]]) -> None:
        try:
            await self._thread.call(self._store.append_events, job.id, job.fence, events)
        except StoreError as error:
            log.warning("events of job %s are not kept: %s; its result still counts", job.id, error)
        self._notices.tell(job.id)

    def _forget(self, job: LeasedJob) -> None:
        begun = self._begun.pop(job.id, None)
        if begun is not None:
            begun.set()
        self._notices.tell(job.id, over=True)

    async def _insist(self, function: Callable[[], T]) -> T:
        """Calls the queue until it has kept what it was told: a disk that is full may have room again."""
        while True:
            try:
                return await self._thread.call(function)
            except StoreError as error:
                if self._stopping:
                    raise
                log.warning("how a job ended cannot be kept: %s; tried again in %s s", error, PAUSE)
                await asyncio.sleep(PAUSE)


class Journal:
    """Events of running jobs on their way to the queue: in order, as many at once as came while the disk was busy.

    How far a job is (`progress`) is kept now and then, and only the latest of it: it is of use while the job runs.
    """

    def __init__(self, keep: Callable[[LeasedJob, Sequence[tuple[str, Data]]], Awaitable[None]]) -> None:
        self._keep = keep
        self._pending: dict[str, tuple[LeasedJob, list[tuple[str, Data]]]] = {}
        self._progress: dict[str, tuple[LeasedJob, Data]] = {}
        self._writer: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, job: LeasedJob | None, name: str, data: Data) -> None:
        """An event of a job that runs; of one that has ended, it is dropped. That it runs, the queue noted itself."""
        if job is None or name == "running":
            return
        if name == "progress":
            self._progress[job.id] = (job, data)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(PROGRESS_SECONDS, self._add_progress)
        else:
            self._append(job, name, data)

    async def written(self) -> None:
        """Returns when what was added before is kept."""
        while self._writer is not None:
            await asyncio.shield(self._writer)

    async def close(self) -> None:
        """Drops progress that nobody can use any more, and returns when all else is kept."""
        if self._timer is not None:
            self._timer.cancel()
        await self.written()

    def _add_progress(self) -> None:
        self._timer = None
        for job, data in self._progress.values():
            self._append(job, "progress", data)
        self._progress.clear()

    def _append(self, job: LeasedJob, name: str, data: Data) -> None:
        self._pending.setdefault(job.id, (job, []))[1].append((name, data))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._pending:
                job, events = self._pending.pop(next(iter(self._pending)))
                await self._keep(job, events)
        finally:
            self._writer = None
