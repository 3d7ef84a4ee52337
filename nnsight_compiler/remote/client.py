"""Sending jobs to a service: few round trips, each repeatable, and nothing of what comes back is trusted."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, final

import torch

from nnsight_compiler.remote.answers import Fields
from nnsight_compiler.remote.connection import Answer, Connection, DeadlineError
from nnsight_compiler.remote.credentials import address, key_for, known_host
from nnsight_compiler.remote.handles import JobHandle, OnEvent
from nnsight_compiler.remote.job import Job, blob, pack
from nnsight_compiler.remote.listeners import OnToken
from nnsight_compiler.remote.progress import Progress, screen
from nnsight_compiler.remote.refusals import AnswerError, JobRefusedError, NotThereError, ServiceError

T = TypeVar("T")

QUICK_SECONDS = 0.25
"""How long the service may wait with its first answer, so that a quick job costs one round trip."""
CANCEL_SECONDS = 3.0
"""How long a client that gives up tries to tell the service so."""
MAX_INLINE = 2**22
"""Bytes of a result that is taken from the first answer. A larger one is downloaded by itself, in parts if need be."""
BLOB_BYTES = 2**16
"""Tensors of as many bytes or more are sent by themselves, once."""


@final
class HttpBackend:
    """A service, as what runs jobs. Connections are kept open from one job to the next; threads may share it.

    Args:
        url: where the service is.
        key: the API key for it, where it wants one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.connection = Connection(address(url), key)
        self._blobs: set[str] = set()

    @property
    def url(self) -> str:
        """Where the service is."""
        return self.connection.url

    def __repr__(self) -> str:
        return f"HttpBackend({self.url!r})"

    def run(self, job: Job, on_token: OnToken | None = None) -> bytes:
        """Runs a job; gives its result file, or raises what the job raised.

        Args:
            on_token: called with the number of the function that wants them and the ids of a step's tokens, one of each
                row, as they come.
        """
        return self._packed(job, lambda payload: self.send(payload, self._telling(on_token)))

    def submit(self, job: Job, on_token: OnToken | None = None) -> JobHandle:
        """Sends a job, and does not wait for it. Tokens are told while its result is waited for."""
        return self._packed(job, lambda payload: self.post(payload, self._telling(on_token)))

    def _telling(self, on_token: OnToken | None) -> OnEvent | None:
        """Takes the tokens among the events."""
        if on_token is None:
            return None

        def tell(name: str, data: dict[str, Any]) -> None:
            if name == "token":
                token = Fields(data, self.url, "an event `token`")
                ids = token.array("ids")
                if not all(type(each) is int and -(2**63) <= each < 2**63 for each in ids):
                    raise AnswerError(f"{self.url} answers with tokens that are no numbers")
                on_token(token.number("function"), torch.tensor(ids, dtype=torch.long))

        return tell

    def _packed(self, job: Job, send: Callable[[bytes], T]) -> T:
        """Sends a job. Large tensors that the service has are not sent again: a new one is uploaded by itself, and
        named by its hash from then on."""
        sent = self._uploaded(job)
        try:
            return send(pack(job, sent))
        except JobRefusedError as error:
            if error.code != "unknown_blob":
                raise
        self._blobs.difference_update(sent.values())  # it keeps them for a limited time
        sent = self._uploaded(job)
        return send(pack(job, sent))

    def _uploaded(self, job: Job) -> dict[str, str]:
        """The hashes of a job's large tensors, all of which the service has now."""
        sent = {}
        for name, tensor in job.tensors.items():
            if tensor.nbytes < BLOB_BYTES:
                continue
            content = blob(tensor)
            sent[name] = hash = hashlib.sha256(content).hexdigest()
            if hash not in self._blobs:
                self._upload(hash, content)
                self._blobs.add(hash)
        return sent

    def _upload(self, hash: str, content: bytes) -> None:
        try:
            self.connection.ask("HEAD", f"/v1/blobs/{hash}", "this tensor")
        except NotThereError:
            self.connection.ask(
                "PUT",
                f"/v1/blobs/{hash}",
                "a tensor of this job",
                content=content,
                headers={"Content-Type": "application/octet-stream"},
            )

    def send(self, payload: bytes, on_event: OnEvent | None = None) -> bytes:
        """Sends a job file; gives its result file.

        Whatever ends the waiting (an interrupt, an error of `on_event`) ends the job, too.

        Args:
            on_event: told of each `token` and `printed` event, and of others that come before a quick job has ended.
        """
        key = secrets.token_hex(16)
        progress = Progress(screen(), f"a job on {self.url}")
        handle: JobHandle | None = None
        try:
            progress.say("sending")
            answer = self._submit(payload, key, QUICK_SECONDS, progress)
            handle = self._handle(answer, on_event)
            if answer.is_json or not answer.is_whole:
                progress.end()
                return handle.wait()
            if answer.headers.get("nnsight-events") != "0":
                handle.listen(None, progress)
            return self._inline(answer)
        except BaseException as error:
            if handle is None or not handle.has_ended:
                self._give_up(error, handle, payload, key)
            raise
        finally:
            progress.end()

    def post(self, payload: bytes, on_event: OnEvent | None = None) -> JobHandle:
        """Sends a job file; gives a handle of the job."""
        key = secrets.token_hex(16)
        try:
            return self._handle(self._submit(payload, key, None, None), on_event)
        except KeyboardInterrupt as error:
            self._give_up(error, None, payload, key)
            raise

    def _submit(
        self, payload: bytes, key: str, wait: float | None, progress: Progress | None, deadline: float | None = None
    ) -> Answer:
        return self.connection.ask(
            "POST",
            "/v1/jobs" if wait is None else f"/v1/jobs?wait={wait:g}",
            "this job",
            content=payload,
            headers={"Content-Type": "application/octet-stream", "Idempotency-Key": key},
            limit=MAX_INLINE,
            in_parts=True,
            deadline=deadline,
            notice=progress.say if progress else None,
        )

    def _handle(self, answer: Answer, on_event: OnEvent | None = None) -> JobHandle:
        """The handle of the job that an answer speaks of."""
        if answer.is_json:
            id = Fields(answer.json(), self.url, "the answer to a job").text("id")
        else:
            id = answer.headers.get("nnsight-job", "")
        return JobHandle(self.connection, id, on_event=on_event)

    def _inline(self, answer: Answer) -> bytes:
        """A result that came with the first answer."""
        tag = answer.headers.get("etag", "").strip('"')
        if hashlib.sha256(answer.body).hexdigest() != tag:
            raise AnswerError(f"{self.url} sends a result that is not the one it announced (sha256)")
        return answer.body

    def _give_up(self, error: BaseException, handle: JobHandle | None, payload: bytes, key: str) -> None:
        """Ends a job that nobody waits for any more, also one whose id is not known yet: sent again with the same key,
        it is the same job."""
        if isinstance(error, ServiceError) and not (handle is not None and isinstance(error, AnswerError)):
            return  # there is no job, or it cannot be reached
        deadline = time.monotonic() + CANCEL_SECONDS
        try:
            if handle is None:
                handle = self._handle(self._submit(payload, key, None, None, deadline))
            handle.cancel(deadline)
        except (ServiceError, DeadlineError) as second:
            error.add_note(f"the job could not be cancelled, and may go on: {second}")


_backends: dict[tuple[int, str, str | None], HttpBackend] = {}
_backends_lock = threading.Lock()


def connect(remote: bool | str = True) -> HttpBackend:
    """The service at an address, or the one that is known here, with the key that is known for it. The same one each
    time, so that its connections are used again; a forked process has its own."""
    url = address(remote) if isinstance(remote, str) else known_host()
    wanted = os.getpid(), url, key_for(url)
    with _backends_lock:
        found = _backends.get(wanted)
        if found is None:
            found = _backends[wanted] = HttpBackend(url, wanted[2])
        return found
