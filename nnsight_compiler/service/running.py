"""A whole service on this machine: the queue, the keys, the engine and the front end, put together and run."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnsight_compiler.service.app import app
from nnsight_compiler.service.arrived import header_of_job
from nnsight_compiler.service.connections import Patience
from nnsight_compiler.service.keys import Keys
from nnsight_compiler.service.local_engine import LocalEngine, LocalSettings
from nnsight_compiler.service.processes import Served
from nnsight_compiler.service.server import Server
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.tenants import Limits, Tenant

LOCAL = "local"
"""The one tenant of a service that wants no keys."""


OPEN_FILES = 4 * Patience().connections
"""Connections, bodies that arrive, results that are read, and files of the jobs that run, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is served, and how.

    models: what clients call each, and what it is loaded from. api_keys: the file of keys; without one, there is one
    tenant, whose `limits` these are. Of these, `max_body` counts for all tenants.
    """

    models: Sequence[tuple[str, str]]
    state: Path
    api_keys: Path | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    max_batch: int = 16
    workers: int = 1
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    max_queued: int = 4096
    sandbox: bool = True

    def run(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serves at a socket until it is told to stop.

        Raises:
            StoreError: the state cannot be used.
            EngineError: a model cannot be loaded, or the system has no sandbox.
        """
        _allow_open_files()
        thread = StoreThread()
        opened: list[Store | Keys] = []
        try:
            store = thread.run(Store, self.state, max_queued=self.max_queued)
            opened.append(store)
            keys: Keys | Tenant = Tenant(LOCAL, limits=Limits(**self.limits))
            if self.api_keys is not None:
                keys = thread.run(Keys, self.api_keys)
                opened.append(keys)
            made = app(store, keys, self._engine(), self._settings(), thread)
            Server(made, Patience(), on_ready).run([listener])
            failure: BaseException | None = made.state.front.failure
            if failure is not None:
                raise failure
        finally:
            for each in reversed(opened):
                thread.run(each.close)
            thread.close()

    def _engine(self) -> LocalEngine:
        served = [Served.language_model(name, source, self.dtype, self.device) for name, source in self.models]
        settings = LocalSettings(workers=self.workers, threads=self.threads, sandbox=self.sandbox)
        several = len(served) > 1
        model_of = (lambda content: header_of_job(content).model) if several else None
        return LocalEngine(served, self.state / "running", settings, model_of)

    def _settings(self) -> Settings:
        given = {} if "max_body" not in self.limits else {"max_body": self.limits["max_body"]}
        return Settings(state=self.state, max_batch=self.max_batch, **given)


def _allow_open_files() -> None:
    """Raises the number of files that may be open, as far as the system allows: the usual one, of a shell, is what
    connections alone may take, and a job whose files cannot be opened fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
