"""Where jobs run: a service, or this process itself, through everything that a service is sent and sends."""

from __future__ import annotations

from typing import Any, Protocol, final
from weakref import WeakKeyDictionary

import torch

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.models import NNsight
from nnsight_compiler.remote.errors import error_record, raise_from
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import Job, pack, unpack
from nnsight_compiler.remote.listeners import OnToken
from nnsight_compiler.runtime.tokens import hearing

Remote = bool | str
"""What `remote=` may be: `True` for the service that is set up here, a URL, or "local"."""


class Backend(Protocol):
    """Runs jobs."""

    def run(self, job: Job, on_token: OnToken | None = None) -> bytes:
        """Runs a job. Returns the file of its result; raises what the job raised, or what `on_token` did."""

    def submit(self, job: Job) -> Any:
        """Sends a job. Returns a handle, whose `result()` is the file of its result."""


_executors: WeakKeyDictionary[NNsight, Executor] = WeakKeyDictionary()


@final
class LocalBackend:
    """Runs jobs in this process, and has them written, read and checked as a service would."""

    def __init__(self, model: NNsight) -> None:
        self.model = model

    def run(self, job: Job, on_token: OnToken | None = None) -> bytes:
        model = self.model._base
        executor = _executors.get(model) or _executors.setdefault(model, Executor(model))
        raised: list[BaseException] = []

        def hear(number: int, ids: list[int]) -> None:
            assert on_token is not None, "a job has listeners where there is someone to tell"
            try:
                on_token(number, torch.tensor(ids))
            except BaseException as error:
                raised.append(error)
                raise

        with torch.inference_mode(False):  # a service is not in it, and in it torch counts no changes
            received = unpack(pack(job))
            try:
                with hearing(hear):
                    return executor.run(received)
            except Exception as error:
                if raised:  # it is the caller's own
                    raise raised[0] from None
                record = error_record(error)
        raise_from(record)

    def submit(self, job: Job) -> Any:
        raise ExperimentError(
            'remote="local" runs a job in this process, and has nothing to wait for\n'
            "  way out: leave `blocking=False` out"
        )


def backend_for(remote: Remote, model: NNsight) -> Backend:
    """What runs the jobs of an experiment on a model.

    Raises:
        ExperimentError: there is no such service.
    """
    if remote == "local":
        return LocalBackend(model)
    from nnsight_compiler.remote.client import connect

    return connect(remote)
