"""One line to one service: requests that may be repeated, answers of bounded size, and patience where a line breaks.

Every request of the protocol means the same when it is made twice (a job carries an idempotency key), so a request
whose answer did not arrive is made again, until the patience is at its end.
"""

from __future__ import annotations

import math
import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, final
from urllib.parse import urlsplit

import httpx

from nnsight_compiler.remote.answers import parsed
from nnsight_compiler.remote.refusals import AnswerError, BusyError, ServiceError, UnreachableError, refusal, shown

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""How long a service may say nothing while it answers. It sends a sign of life every 10 seconds."""
PATIENCE_SECONDS = 60.0
"""How long a broken line is tried again, from when it broke: a service that is started anew is back by then."""
FIRST_SECONDS = 10.0
"""The same, of a service that has never answered. One to which there is no connection at all is not tried again."""
ANSWER_SECONDS = 300.0
"""How long an answer that is JSON may take, from its first byte to its last."""
BUSY_SECONDS = 300.0
"""How long a client waits because the service has no room, from when it first said so."""
MAX_ANSWER = 64 * 2**20
"""Bytes of an answer that is JSON: the modules of the largest models take a few megabytes."""

BROKEN = frozenset({502, 504})
"""What a proxy says while the service behind it is started anew."""
BUSY = frozenset({429, 503})


class DeadlineError(TimeoutError):
    """A deadline of ours has passed, as told from a `TimeoutError` that a job raised."""


class InsecureKeyWarning(UserWarning):
    """An API key goes over a line that others can read."""


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What a service answered: a status that is no failure, headers, and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    is_whole: bool = True

    @property
    def is_json(self) -> bool:
        """Whether the body says that it is JSON."""
        return self.headers.get("content-type", "").partition(";")[0].strip() == "application/json"

    def json(self) -> dict[str, Any]:
        """The body as a JSON object."""
        return parsed(self.body, self.url)


@final
class Connection:
    """Requests to one service with one API key, over connections that are kept open.

    Args:
        url: where the service is, as `credentials.address` gives it.
        key: sent with every request, to this service alone; it stands in no error and no `repr`.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url, self._key = url, key
        host = urlsplit(url).hostname or ""
        near = host in ("localhost", "::1") or host.startswith("127.")
        secure = url.startswith("https:")
        if key is not None and not secure and not near:
            warnings.warn(
                f"the API key for {url} goes over a line that is not encrypted; use https, or a tunnel to localhost",
                InsecureKeyWarning,
                stacklevel=4,
            )
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "nnsight-compiler"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(
            verify=httpx.create_ssl_context() if secure else False,  # to read certificates takes 30 ms
            trust_env=not near,  # a proxy leads elsewhere than to this machine
            limits=httpx.Limits(max_keepalive_connections=8, keepalive_expiry=60.0),
        )
        self.close = weakref.finalize(self, self._client.close)
        """Ends the connections; so does the end of this object, and of Python."""
        self.answered = False
        """Whether the service has answered before: one that has is worth waiting for."""

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def ask(
        self,
        method: str,
        path: str,
        asked: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = MAX_ANSWER,
        in_parts: bool = False,
        deadline: float | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> Answer:
        """One request and its answer, whatever it takes.

        Args:
            asked: what it is about, as errors name it.
            limit: bytes that the answer may have.
            in_parts: whether an answer that says it has more is left unread, since it can be had in parts.
            deadline: of `time.monotonic`; none waits as long as patience goes.

        Raises:
            ServiceError: the service refuses, is not there, or answers with something else.
        """
        pauses = Pauses(self, notice, deadline)
        while True:
            with pauses.mended(), self.stream(method, path, content, headers, deadline) as response:
                if in_parts and response.status_code == 200 and _declared(response) > limit:
                    return Answer(200, response.headers, b"", self.url, is_whole=False)
                body = self._body(response, limit, deadline)
                if response.status_code not in BROKEN | BUSY:
                    self.check(response, body, asked)
                    return Answer(response.status_code, response.headers, body, self.url)
                pauses.refused(response, body, asked)
            pauses.wait()

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read.

        Raises:
            httpx.TransportError: the line is broken.
        """
        left = math.inf if deadline is None else max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(min(SILENCE_SECONDS, left), connect=min(CONNECT_SECONDS, left))
        request = httpx.Request(
            method,
            _parsed(self.url + path),
            headers={**self._headers, **(headers or {})},
            content=content,
            extensions={"timeout": timeout.as_dict()},
        )
        response = self._client.send(request, stream=True)
        try:
            self.answered = True
            if response.headers.get("content-encoding", "identity") != "identity":
                raise AnswerError(f"{self.url} answers in an encoding that was not asked for")
            yield response
        finally:
            response.close()

    def check(self, response: httpx.Response, body: bytes, asked: str) -> None:
        """Raises the error that an answer stands for, if it stands for one."""
        if response.status_code >= 300 and response.status_code != 304:
            is_json = response.headers.get("content-type", "").startswith("application/json")
            said: object = None
            if is_json:
                try:
                    said = parsed(body, self.url)
                except AnswerError:
                    said = None  # the status says enough
            raise refusal(response.status_code, said, self.url, self._key, asked)

    def failed_body(self, response: httpx.Response) -> bytes:
        """The body of an answer that is a failure: what is said in more than a megabyte is not read."""
        return self._body(response, 2**20, None)

    def _body(self, response: httpx.Response, limit: int, deadline: float | None) -> bytes:
        held, until = bytearray(), time.monotonic() + ANSWER_SECONDS
        for piece in response.iter_raw():
            held += piece
            if len(held) > limit:
                raise AnswerError(f"{self.url} answers with more than {limit} bytes where that many are the most")
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineError(f"{self.url} did not answer in time")
            if time.monotonic() > until:
                raise AnswerError(f"{self.url} has not come to the end of an answer in {ANSWER_SECONDS:.0f} s")
        return bytes(held)


@final
class Pauses:
    """Pauses between attempts: short at first, then longer, and no more of them once the patience is at its end."""

    def __init__(
        self,
        connection: Connection,
        notice: Callable[[str], None] | None = None,
        deadline: float | None = None,
    ) -> None:
        self._connection = connection
        self._notice, self._deadline = notice, deadline
        self.heard()

    def alive(self) -> None:
        """The service gives a sign of life: patience begins anew."""
        self._until: float | None = None
        self._busy_until: float | None = None

    def heard(self) -> None:
        """Something new was heard of the service: so do the pauses."""
        self.alive()
        self._attempts = 0
        self._pause = 0.0

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Around an attempt: a line that breaks is a reason to pause, where it is worth waiting for."""
        try:
            yield
        except httpx.TransportError as error:
            self.broken(_why(error), not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout))
        except httpx.HTTPError as error:
            raise AnswerError(f"{self._connection.url} does not speak HTTP as it should: {_why(error)}") from error
        except httpx.InvalidURL as error:
            raise ServiceError(f"{self._connection.url} is no address: {shown(error, 200)}") from error

    def broken(self, why: str, connected: bool = True) -> None:
        """The line broke, or there never was one."""
        url, now = self._connection.url, time.monotonic()
        answered = self._connection.answered
        patience = PATIENCE_SECONDS if answered else min(PATIENCE_SECONDS, FIRST_SECONDS)
        if self._until is None:
            self._until = now + patience
        if not answered and (not connected or now >= self._until):
            way_out = "check the address; `nnsightc serve MODEL` starts a service on this machine"
            if "CERTIFICATE" in why:
                way_out = "check the address; a certificate authority of your own is named by SSL_CERT_FILE"
            raise UnreachableError(f"no service answers at {url}: {why}\n  way out: {way_out}")
        if now >= self._until:
            raise UnreachableError(
                f"the line to {url} is broken, and stayed so for {patience:.0f} s: {why}\n"
                "  way out: try again when the service is back; a job that it took goes on without you"
            )
        self._pause = min(0.05 * 2**self._attempts, 5.0) * random.uniform(0.75, 1.25) if self._attempts else 0.0
        self._attempts += 1
        self._say("the line broke: trying again")

    def refused(self, response: httpx.Response, body: bytes, asked: str) -> None:
        """The service, or a proxy before it, says that it cannot answer now."""
        if response.status_code in BROKEN:
            self.broken(f"HTTP status {response.status_code}")
            return
        pause = _retry_after(response.headers.get("retry-after"))
        pause = min(0.5 * 2**self._attempts, 10.0) if pause is None else max(pause, 0.05)
        self._attempts += 1
        self._until, now = None, time.monotonic()  # the line is good
        if self._busy_until is None:
            self._busy_until = now + BUSY_SECONDS
        if now + pause > self._busy_until:
            try:
                self._connection.check(response, body, asked)
            except BusyError as error:
                raise BusyError(f"{error} (it asks for {pause:.0f} s)") from None
        self._pause = pause
        self._say(f"the service is busy: trying again in {pause:.0f} s" if pause >= 1 else "the service is busy")

    def wait(self) -> None:
        """Until the next attempt."""
        if self._deadline is not None and time.monotonic() + self._pause >= self._deadline:
            raise DeadlineError(f"{self._connection.url} did not answer in time")
        if self._pause:
            time.sleep(self._pause)

    def _say(self, what: str) -> None:
        if self._notice is not None and self._pause >= 0.1:
            self._notice(what)


_parsed = lru_cache(64)(httpx.URL)  # to read an address takes longer than to send a small request


def _declared(response: httpx.Response) -> int:
    text = response.headers.get("content-length", "")
    return int(text) if text.isdigit() and len(text) <= 18 else 0


def _retry_after(text: str | None) -> float | None:
    """Seconds, from a header that gives seconds or a date."""
    if text is None:
        return None
    if text.isdigit() and len(text) < 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _why(error: Exception) -> str:
    return shown(error, 200) or type(error).__name__
