"""A job that a service took: where it is, what it says, how it ended, and how to end it."""

from __future__ import annotations

import asyncio
import hashlib
import html
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, final

from nnsight_compiler.remote.answers import Fields
from nnsight_compiler.remote.connection import BROKEN, BUSY, Connection, DeadlineError, Pauses
from nnsight_compiler.remote.errors import raise_from
from nnsight_compiler.remote.event_stream import Event, read_events
from nnsight_compiler.remote.progress import Progress, screen
from nnsight_compiler.remote.refusals import AnswerError, JobCancelledError, NotThereError, ServiceError, failure, shown
from nnsight_compiler.runtime.free_memory import free_memory

OnEvent = Callable[[str, dict[str, Any]], None]
"""Told the name and the data of each event of a job, in order, each once."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STATES = ("queued", "running", "completed", "failed", "cancelled", "expired")


def checked_id(text: str, url: str) -> str:
    """The id of a job, which becomes part of an address."""
    if not _ID.fullmatch(text):
        raise AnswerError(f"{url} names a job {shown(repr(text), 80)}")
    return text


@final
class JobHandle:
    """A job on a service. `handle.result()` waits for what the experiment returns, and so does `await handle`.

    What the job prints appears on the standard output while its result is waited for, each line once. A handle can be
    pickled, and `JobHandle.from_id` makes one in another process, whose result is the bytes of the result file: the
    objects that the job was given are not there. The API key does not travel with it.

    Args:
        read: makes the experiment's value of the bytes of a result.
    """

    def __init__(
        self,
        connection: Connection,
        id: str,
        read: Callable[[bytes], Any] = bytes,
        on_event: OnEvent | None = None,
        status: str = "queued",
    ) -> None:
        self.id = checked_id(id, connection.url)
        self._connection, self._read, self._on_event = connection, read, on_event
        self._status, self._seen = status, 0
        self._done: dict[str, Any] | None = None
        self._failed: Callable[[BaseException], None] | None = None
        self._outcome: tuple[Any, Exception | None] | None = None
        self._lock = threading.RLock()

    @classmethod
    def from_id(cls, id: str, host: str | None = None, read: Callable[[bytes], Any] = bytes) -> JobHandle:
        """The handle of a job that was sent before, from anywhere. Without a host, the one that is known is asked."""
        from nnsight_compiler.remote.client import connect  # it makes handles

        return cls(connect(host or True).connection, id, read)

    def reading(self, read: Callable[[bytes], Any], failed: Callable[[BaseException], None]) -> JobHandle:
        """This handle, whose result is what `read` makes of the bytes that come back. `failed` is told of the error of
        a job that failed, before it is raised."""
        self._read, self._failed = read, failed
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return JobHandle.from_id, (self.id, self.host)

    @property
    def host(self) -> str:
        """The address of the service."""
        return self._connection.url

    @property
    def has_ended(self) -> bool:
        """Whether it is known here that the job has ended. Nothing is asked."""
        return self._done is not None

    # --- asking ---

    def record(self) -> dict[str, Any]:
        """All that the service says of the job: status, place in the queue, cost, times, error, result."""
        return self._record(None)

    def status(self) -> str:
        """`queued`, `running`, `completed`, `failed`, `cancelled` or `expired`, as it is now."""
        self._record(None)
        return self._status

    def _record(self, deadline: float | None) -> dict[str, Any]:
        answer = self._connection.ask("GET", self._path, self._name, deadline=deadline)
        data = Fields(answer.json(), self.host, "a job")
        self._note(data.text("status"))
        return data.data

    def cancel(self, deadline: float | None = None) -> str:
        """Ends the job, if it has not ended; gives the status it has then. A running one ends within a moment."""
        answer = self._connection.ask("DELETE", self._path, self._name, deadline=deadline)
        if answer.is_json and answer.body:
            self._note(Fields(answer.json(), self.host, "a job").text("status", self._status))
        return self._status

    def events(self) -> Iterator[Event]:
        """What the job said and says, from its beginning to its end. Nothing is printed."""
        return self._follow(0, None, None)

    # --- waiting ---

    def result(self, timeout: float | None = None) -> Any:
        """What the experiment returns; waits for it, at most `timeout` seconds.

        Raises:
            TimeoutError: it takes longer. The job goes on, and can be asked again.
            ServiceError: the job failed, was cancelled, or its result is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            raise self._late(timeout)
        try:
            if self._outcome is None:
                try:
                    held = self.wait(deadline)
                except DeadlineError:
                    raise self._late(timeout) from None
                except Exception as error:
                    if self._status not in ("failed", "cancelled", "expired"):
                        raise  # it may go well when it is asked again
                    if self._failed is not None:
                        self._failed(error)
                    self._outcome = None, error
                else:
                    self._outcome = self._read(held), None
            value, wrong = self._outcome
            if wrong is not None:
                raise wrong
            return value
        finally:
            self._lock.release()

    def _late(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(f"{self._name} is {self._status} after {timeout} s; it goes on, and can be asked again")

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(value) if error is None else future.set_exception(error)

        def wait() -> None:
            ended: tuple[Any, BaseException | None]
            try:
                ended = self.result(), None
            except BaseException as error:  # it is raised where it is awaited
                ended = None, error
            try:
                loop.call_soon_threadsafe(settle, *ended)
            except RuntimeError:  # the loop has ended: nobody waits any more
                return

        # A thread of its own, which no loop waits for when it ends: the job may take hours.
        threading.Thread(target=wait, name=f"job {self.id}", daemon=True).start()
        return future.__await__()

    def wait(self, deadline: float | None = None) -> bytes:
        """The result file, once there is one; prints what the job prints on the way."""
        progress = Progress(screen(), f"{self._name} on {self.host}")
        try:
            done = Fields(self.listen(deadline, progress), self.host, "the end of a job")
            match self._status:
                case "completed":
                    return self._download(done, deadline, progress)
                case "failed":
                    raise_from(failure(done.object("error", {})))
                case "cancelled":
                    raise JobCancelledError(f"{self._name} was cancelled before it ended")
                case _:
                    raise NotThereError(
                        f"{self.host} has the result of {self._name} no longer\n"
                        "  way out: run the experiment again; results are kept for a limited time"
                    )
        finally:
            progress.end()

    def listen(self, deadline: float | None, progress: Progress) -> dict[str, Any]:
        """Tells what the job says and prints that was not told yet, until it has ended; gives how it did."""
        if self._done is None:
            progress.say(self._status)
            with closing(self._follow(self._seen, deadline, progress)) as events:
                for event in events:
                    self._seen = event.id
                    self._tell(event, progress)
        assert self._done is not None, "events end with `done`"
        return self._done

    def _tell(self, event: Event, progress: Progress) -> None:
        data = Fields(event.data, self.host, f"an event `{shown(event.name, 40)}`")
        match event.name:
            case "queued":
                self._note("queued")
                self._say_place(event, progress)
            case "running":
                self._note("running")
                progress.say("running")
            case "progress":
                progress.say(f"running ({data.number('forwards')} forwards)" if "forwards" in event.data else "running")
            case "printed":
                progress.print(printable(data.text("text")))
            case "done":
                self._note(data.text("status"))
                if self._status in ("queued", "running"):
                    raise AnswerError(f"{self.host} says that {self._name} ended, and is {self._status}")
                self._done = event.data
        if self._on_event is not None:
            self._on_event(event.name, event.data)

    def _say_place(self, event: Event, progress: Progress) -> None:
        place = Fields(event.data, self.host, "an event `queued`").number("place", 0)
        progress.say(f"queued (place {place})" if place else "queued")

    def _follow(self, after: int, deadline: float | None, progress: Progress | None) -> Generator[Event, None, None]:
        """The events after one, over as many lines as it takes, up to `done`."""
        connection = self._connection
        pauses = Pauses(connection, progress.say if progress else None, deadline)
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(after)} if after else {})}
            with (
                pauses.mended(),
                connection.stream("GET", f"{self._path}/events", headers=headers, deadline=deadline) as response,
            ):
                if response.status_code in BROKEN | BUSY:
                    pauses.refused(response, connection.failed_body(response), self._name)
                elif response.status_code != 200:
                    connection.check(response, connection.failed_body(response), self._name)
                    raise AnswerError(f"{self.host} answers HTTP {response.status_code} where events were asked for")
                else:
                    for event in read_events(response.iter_raw(), self.host):
                        if deadline is not None and time.monotonic() > deadline:
                            raise DeadlineError
                        if event is None or event.id <= after:
                            pauses.alive()
                            if event is not None and event.name == "queued" and progress is not None:
                                self._say_place(event, progress)  # its place is told again when it has changed
                            continue
                        if event.id > after + 1:
                            break  # what lies between was lost, and is asked for again
                        pauses.heard()
                        after = event.id
                        yield event
                        if event.name == "done":
                            return
                    pauses.broken(f"the events of {self._name} end after number {after}, before its end")
            pauses.wait()

    def _download(self, done: Fields, deadline: float | None, progress: Progress) -> bytes:
        """The result file, of the size and with the hash that the service announced."""
        said = Fields(done.object("result"), self.host, "the result of a job")
        size, digest = said.number("bytes"), said.text("sha256")
        if size > free_memory("cpu"):
            raise ServiceError(
                f"the result of {self._name} has {size} bytes, and {free_memory('cpu')} bytes of memory are free here\n"
                "  way out: return less: narrow to the rows, positions and layers that you use"
            )
        for _ in range(2):  # what was damaged on the way is asked for once more
            held = self._whole(size, deadline, progress)
            if hashlib.sha256(held).hexdigest() == digest:
                return bytes(held)
        raise AnswerError(f"{self.host} sends a result of {self._name} that is not the one it announced (sha256)")

    def _whole(self, size: int, deadline: float | None, progress: Progress) -> bytearray:
        """All bytes of the result, over as many lines as it takes."""
        connection, held, tag = self._connection, bytearray(), ""
        pauses = Pauses(connection, progress.say, deadline)
        while True:
            headers = {"Accept": "application/octet-stream"}
            if held and tag:
                headers |= {"Range": f"bytes={len(held)}-", "If-Range": tag}
            with (
                pauses.mended(),
                connection.stream("GET", f"{self._path}/result", headers=headers, deadline=deadline) as response,
            ):
                if response.status_code in BROKEN | BUSY:
                    pauses.refused(response, connection.failed_body(response), self._name)
                elif response.status_code not in (200, 206):
                    connection.check(response, connection.failed_body(response), self._name)
                    raise AnswerError(f"{self.host} answers HTTP {response.status_code} where a result was asked for")
                else:
                    if response.status_code == 200:
                        held.clear()
                    elif not response.headers.get("content-range", "").startswith(f"bytes {len(held)}-"):
                        raise AnswerError(f"{self.host} sends another part of a result than the one asked for")
                    tag = response.headers.get("etag", "")
                    for piece in response.iter_raw():
                        held += piece
                        if len(held) > size:
                            raise AnswerError(f"{self.host} sends more than the {size} bytes that it announced")
                        if deadline is not None and time.monotonic() > deadline:
                            raise DeadlineError
                        pauses.heard()
                        progress.say(f"downloading {size / 2**20:.1f} MiB: {100 * len(held) // size} %")
                    if len(held) == size:
                        return held
                    pauses.broken(f"the result ends after {len(held)} of {size} bytes")
            pauses.wait()

    # --- showing ---

    @property
    def _path(self) -> str:
        return f"/v1/jobs/{self.id}"

    @property
    def _name(self) -> str:
        return f"job {self.id}"

    def _note(self, status: str) -> None:
        if status not in _STATES:
            raise AnswerError(f"{self.host} says that {self._name} is {shown(repr(status), 60)}")
        self._status = status

    def __repr__(self) -> str:
        return f"<JobHandle {self.id} on {self.host}: {self._status}>"

    def _repr_html_(self) -> str:
        rows = {"job": self.id, "service": self.host, "status": self._status}
        try:
            if self._outcome is None:
                data = Fields(self._record(time.monotonic() + 1.0), self.host, "a job")
                rows["status"] = self._status
                if self._status == "queued":
                    rows["place"] = str(data.number("place", 0))
        except (ServiceError, DeadlineError) as error:
            rows["last known; now"] = str(error).split("\n")[0]
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"


_HARMFUL = re.compile(r"\x1b(?!\[[0-9;]{0,32}m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\x80-\x9f]")


def printable(text: str) -> str:
    """What a job printed, with its colours, but without what else a terminal would obey."""
    return _HARMFUL.sub("\N{REPLACEMENT CHARACTER}", text)
