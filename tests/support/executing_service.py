"""The service as it is, on a port, but for its processes: jobs are run by a thread of the test."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from safetensors.torch import load

from nnsight_compiler import LanguageModel
from nnsight_compiler.remote.errors import error_record
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import unpack
from nnsight_compiler.runtime.tokens import hearing
from nnsight_compiler.service.app import app
from nnsight_compiler.service.engine import Content
from nnsight_compiler.service.model_card import model_card, tokenizer_files
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.tenants import Tenant


@dataclass
class Admission:
    group: str
    cost: Mapping[str, object]


@dataclass
class Outcome:
    id: str
    result: Path | None = None
    error: Mapping[str, object] | None = None
    retry: bool = False


class ThreadEngine:
    """Runs jobs one after the other, on the model that comes with the package. `hold` makes them wait before."""

    workers = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = LanguageModel("tiny", dispatch=True)
        self.executor = Executor(self.model)
        self.hold: threading.Event | None = None
        self.restarts = 0
        self.cancelled: list[str] = []
        self.ran: list[str] = []

    async def start(self) -> None:
        self.folder.mkdir()

    async def stop(self) -> None:
        """Nothing is left behind."""

    async def describe(self) -> Sequence[Mapping[str, object]]:
        files = {name: base64.b64encode(data).decode() for name, data in tokenizer_files(self.model).items()}
        return [{"name": "tiny", **model_card(self.model), "tokenizer": files}]

    async def admit(self, payload: Content, blobs: Mapping[str, Path], limits: Any) -> Admission:
        return Admission("one at a time", {"bytes": len(_read(payload))})

    async def run(self, batch: Sequence[Any], send: Any) -> AsyncIterator[Outcome]:
        loop = asyncio.get_running_loop()
        for job in batch:

            def tell(name: str, data: Mapping[str, object], id: str = job.id) -> None:
                loop.call_soon_threadsafe(send, id, name, data)

            yield await asyncio.to_thread(self._run, job, tell)

    def _run(self, job: Any, tell: Any) -> Outcome:
        while self.hold is not None and not self.hold.wait(0.01):
            if job.id in self.cancelled:
                return Outcome(job.id, error={"kind": "cancelled", "message": "it was cancelled"})
        self.ran.append(job.id)
        printed = io.StringIO()

        def heard(number: int, ids: list[int]) -> None:
            tell("token", {"function": number, "ids": ids})

        try:
            with contextlib.redirect_stdout(printed), hearing(heard):
                received = unpack(_read(job.payload), lambda sha: load(job.blobs[sha].read_bytes())["tensor"])
                result = self.executor.run(received)
        except Exception as error:
            return Outcome(job.id, error=error_record(error))
        finally:
            if printed.getvalue():
                tell("printed", {"text": printed.getvalue()})
        file = self.folder / job.id
        file.write_bytes(result)
        return Outcome(job.id, file)

    async def cancel(self, id: str) -> None:
        self.cancelled.append(id)


def _read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


@contextmanager
def executing_service(state: Path) -> Iterator[tuple[str, ThreadEngine]]:
    """The address of a service that runs in threads of this process, and its engine."""
    thread = StoreThread()
    store = thread.run(Store, state)
    engine = ThreadEngine(state / "worker")
    settings = Settings(state=state, free_disk=0, drain=0.5)
    made = app(store, Tenant("local"), engine, settings, thread)
    config = uvicorn.Config(made, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    runs = threading.Thread(target=server.run, daemon=True)
    runs.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        runs.join()
        thread.run(store.close)
        thread.close()
