"""What all routes share: the queue, the engine, and what is known while the service runs."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from nnsight_compiler.service.bodies import Arrivals
from nnsight_compiler.service.dispatcher import Dispatcher
from nnsight_compiler.service.durable import Staged
from nnsight_compiler.service.engine import Content, Data, Engine
from nnsight_compiler.service.known_jobs import KnownJobs
from nnsight_compiler.service.metrics import Metrics
from nnsight_compiler.service.notices import Notices
from nnsight_compiler.service.records import JobRecord, NoSpaceError, StoreError, Submitted
from nnsight_compiler.service.refusals import no_such_job, not_ready
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.syncs import Syncs
from nnsight_compiler.service.tenants import Tenant
from nnsight_compiler.service.turns import Turns

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


class FrontEnd:
    """A service: what its routes need. `start` and `stop` are called in the event loop that answers requests."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        settings: Settings,
        thread: StoreThread,
    ) -> None:
        self.store, self.engine, self.settings = store, engine, settings
        self.notices = Notices()
        self.arrivals = Arrivals(settings)
        self.turns = Turns()
        self.known = KnownJobs()
        self.metrics = Metrics()
        self.models: dict[str, Data] = {}
        self._thread = thread
        self._syncs = Syncs(store)
        self._dispatcher = Dispatcher(store, thread, self._syncs, engine, self.notices, self.metrics, settings)
        self._engine_is_ready = False
        self._start_failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def failure(self) -> Exception | None:
        """Why the service ends by itself: it could not start, or its disk failed, so that only a new start finds out
        what is on it."""
        return self._start_failure or self._syncs.failure

    async def call(self, function: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> T:
        """Calls the queue, in the thread that is its own. What it says then may be told: what was queued, kept or ended
        before is on the disk."""
        result = await self._thread.call(function, *args, **keywords)
        await self._syncs.settled()
        return result

    async def stage(self, data: Content) -> Staged:
        """A body that is ready to be kept, as a payload."""
        if self.store.is_small(data):
            return self.store.stage(data)
        return await asyncio.to_thread(self.store.stage, data)

    async def start(self) -> None:
        """Takes up what is in the queue, and starts the engine beside: until it is ready, the service answers, and says
        that it is not."""
        self.settings.incoming.mkdir(parents=True, exist_ok=True)
        try:
            await self.call(self.store.recover)
        except StoreError as error:
            self._start_failure = error
            return
        self._tasks = [asyncio.create_task(self._start_engine()), asyncio.create_task(self._sweep_forever())]

    async def stop(self) -> None:
        """Ends: streams first, then what runs; what does not end in time goes back to the queue. Whatever fails of it,
        the engine ends."""
        self.close_streams()
        try:
            await self._dispatcher.stop()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.engine.stop()
            self._syncs.close()

    def close_streams(self) -> None:
        """Ends event streams, waits and uploads, so that their connections can close; clients come again."""
        self.arrivals.stop()
        self.notices.stop()

    def most(self, tenant: Tenant) -> int:
        """The bytes that a body of the tenant may have."""
        return min(tenant.limits.max_body, self.settings.max_body)

    def unready(self) -> str | None:
        """Why no job is taken now; None where jobs are taken."""
        if self.notices.stopping or self.failure is not None:
            return "the service is about to stop"
        if not self._engine_is_ready:
            return "the models are being loaded"
        if shutil.disk_usage(self.settings.state).free < self.settings.free_disk:
            return "the disk of the service is almost full"
        return None

    def check_ready(self) -> None:
        """Refuses, where nothing is taken now."""
        if (reason := self.unready()) is not None:
            raise not_ready(reason)

    async def submit(self, tenant: Tenant, payload: Content, **keywords: Any) -> Submitted:
        """Puts a job into the queue, as `Store.submit` does, for good once this returns. It may begin before."""
        staged = await self.stage(payload)
        submitted = await self._thread.call(self.store.submit, tenant, staged, **keywords)
        if submitted.created:
            self.metrics.submitted()
            self._dispatcher.wake()
        await self._syncs.settled()
        return submitted

    async def cancel(self, id: str, tenant: Tenant) -> bool:
        """Cancels a job that has not ended, from now on; whether it was running, so that the engine must end it."""
        before = await self.call(self.store.cancel, id, tenant)
        if before is None:
            raise no_such_job()
        self.notices.tell(id, over=True)
        if before == "queued":
            self.notices.queue_moved()
        elif before == "running":
            await self._dispatcher.cancel(id)
        return before == "running"

    async def job(self, id: str, tenant: Tenant) -> JobRecord:
        """A job of this tenant; others' are as if they were not."""
        record = await self.call(self.store.job, id, tenant)
        if record is None:
            raise no_such_job()
        return record

    async def _start_engine(self) -> None:
        try:
            await self.engine.start()
            self.models = {str(model["name"]): model for model in await self.engine.describe()}
        except Exception as error:
            self._start_failure = error  # whoever runs the service tells it
            return
        self._engine_is_ready = True
        self._dispatcher.start()
        if (reason := self.unready()) is not None:
            log.warning("the models are loaded, but no job is taken: %s", reason)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.call(self.store.sweep, time.time())
            except NoSpaceError:
                log.warning("the disk is full: what has expired could not be swept away")
            except Exception:
                log.exception(
                    "what has expired could not be swept away; it is tried again in %s s", self.settings.sweep
                )
            await asyncio.sleep(self.settings.sweep)
