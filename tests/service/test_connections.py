"""Real sockets: slow, half-open, oversized and vanishing clients, and others that notice nothing of them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from running_service import ALICE
from service_stand_ins import ScriptedEngine, WatchedStore, job

from nnsight_compiler.service.app import app
from nnsight_compiler.service.connections import Patience
from nnsight_compiler.service.keys import Keys
from nnsight_compiler.service.server import Server
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store_thread import StoreThread

PATIENCE = Patience(header_seconds=0.4, reader_seconds=1.0, header_bytes=2000, connections=40)
MEBIBYTE = 1 << 20


class Served:
    """A service on a socket, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.thread = StoreThread()
        self.store, self.keys = self.thread.run(WatchedStore, folder / "state"), self.thread.run(Keys, folder / "keys")
        self.key = self.thread.run(self.keys.add, ALICE)
        self.engine = ScriptedEngine(folder)
        settings = Settings(state=folder / "state", free_disk=0, drain=0.2, body_patience=0.4, heartbeat=0.1)
        made = app(self.store, self.keys, self.engine, settings, self.thread)
        self.incoming = settings.incoming
        ready = threading.Event()
        self.server = Server(made, PATIENCE, ready.set)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.runner = threading.Thread(target=self.server.run, args=([self.socket],))
        self.runner.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self.server.should_exit = True
        self.runner.join(10)
        assert not self.runner.is_alive()
        self.thread.run(self.keys.close)
        self.thread.run(self.store.close)
        self.thread.close()

    def jobs(self) -> int:
        """How many jobs were ever queued."""
        return sum(self.thread.run(self.store.counts).values())

    def head(self, *headers: str, request: str = "POST /v1/jobs") -> bytes:
        """The header of a request that carries the key."""
        lines = (f"{request} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.key}", *headers, "", "")
        return "\r\n".join(lines).encode()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def client(self) -> httpx.Client:
        url = f"http://127.0.0.1:{self.port}"
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {self.key}"}, verify=False)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.stop()


def rest(line: socket.socket) -> tuple[bytes, float]:
    """What comes until the other side closes, and how long that took."""
    began = time.monotonic()
    held = b""
    try:
        while piece := line.recv(65536):
            held += piece
    except ConnectionResetError:
        held += b"<reset>"
    return held, time.monotonic() - began


def answered(held: bytes) -> tuple[int, str]:
    """The status of an answer, and the code of its error."""
    head, _, body = held.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "begun",
    [b"", b"\r\n", b"GET /healthz HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: "],
    ids=["nothing", "empty line", "first line", "half a header"],
)
def test_a_header_that_does_not_come_is_not_waited_for(served: Served, begun: bytes) -> None:
    with served.connect() as line:
        line.sendall(begun)
        held, seconds = rest(line)
    assert answered(held) == (408, "too_slow")
    assert 0.3 < seconds < 1.5


def test_a_header_that_trickles_is_not_waited_for(served: Served) -> None:
    with served.connect() as line:
        began = time.monotonic()
        line.sendall(b"GET /healthz HTTP/1.1\r\n")
        with suppress(OSError):
            while time.monotonic() - began < 3:
                line.sendall(b"X-More: 1\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 1.5


def test_a_second_request_on_a_line_has_the_same_patience(served: Served) -> None:
    with served.connect() as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
        line.sendall(b"\r\n")
        held, seconds = rest(line)
    assert answered(held) == (408, "too_slow")
    assert 0.3 < seconds < 1.5


def test_a_header_that_is_too_long_is_refused(served: Served) -> None:
    for request in (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 3000 + b"\r\n\r\n",
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 400 + b"\r\n",
    ):
        with served.connect() as line:
            line.sendall(request)
            assert answered(rest(line)[0]) == (431, "header_too_large")


@pytest.mark.parametrize("request_", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_request_is_refused_in_json(served: Served, request_: bytes) -> None:
    with served.connect() as line:
        line.sendall(request_)
        assert answered(rest(line)[0]) == (400, "bad_request")


@pytest.mark.parametrize(
    "header", ["Content-Length: x", "Content-Length: -1", "Content-Length: 5\r\nContent-Length: 6"]
)
def test_a_length_that_is_none_is_refused(served: Served, header: str) -> None:
    with served.connect() as line:
        line.sendall(served.head(header) + b"hello")
        assert answered(rest(line)[0]) == (400, "bad_request")


def test_a_body_without_a_length_is_refused(served: Served) -> None:
    with served.connect() as line:
        line.sendall(served.head("Connection: close"))
        assert answered(rest(line)[0]) == (411, "length_required")


def test_a_body_that_does_not_come_is_not_waited_for(served: Served) -> None:
    with served.connect() as line:
        line.sendall(served.head("Content-Length: 1000") + b'{"model"')
        held, seconds = rest(line)
    assert answered(held) == (408, "too_slow")
    assert seconds < 1.5
    assert not list(served.incoming.iterdir())
    assert served.jobs() == 0


def test_a_body_that_breaks_off_is_no_job(served: Served) -> None:
    body = job()
    with served.connect() as line:
        line.sendall(served.head(f"Content-Length: {len(body) + 1}") + body)
        time.sleep(0.1)
    time.sleep(0.1)
    assert not list(served.incoming.iterdir())
    assert served.jobs() == 0


def test_a_declared_body_over_the_limit_is_refused_unread(served: Served) -> None:
    with served.client() as asked:
        answer = asked.post("/v1/jobs", content=b"x" * (3 * MEBIBYTE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert answer.json()["error"]["message"] == (
            "the body is larger than the 1048576 bytes that are allowed: send large tensors once, with PUT /v1/blobs"
        )
    with served.connect() as line:
        line.sendall(served.head(f"Content-Length: {10**15}", "Expect: 100-continue"))
        assert answered(rest(line)[0]) == (413, "too_large")  # and no 100 before it


def test_a_body_in_chunks_over_the_limit_is_refused_with_bounded_memory(served: Served) -> None:
    process = psutil.Process()
    piece = b"x" * MEBIBYTE
    before = process.memory_info().rss
    with served.connect() as line:
        line.sendall(served.head("Transfer-Encoding: chunked"))
        sent = 0
        with suppress(OSError):
            for _ in range(400):
                line.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                sent += 1
        assert sent < 50
    assert process.memory_info().rss - before < 16 * MEBIBYTE
    assert not list(served.incoming.iterdir())


def test_a_body_in_chunks_is_a_job(served: Served) -> None:
    def pieces() -> Iterator[bytes]:
        body = job()
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    with served.client() as asked:
        assert asked.post("/v1/jobs?wait=5", content=pieces()).content == b"done"


def test_without_a_key_a_body_is_not_read(served: Served) -> None:
    with served.connect() as line:
        line.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        held, seconds = rest(line)
    assert answered(held) == (401, "unauthorized")
    assert seconds < 0.3


def test_a_client_that_takes_nothing_of_its_result_is_given_up(served: Served) -> None:
    size = 30 * MEBIBYTE
    with served.client() as asked:
        id = asked.post("/v1/jobs", content=job(["large", size])).json()["id"]
        assert asked.get(f"/v1/jobs/{id}?wait=5").json()["status"] == "completed"
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(10)
        line.connect(("127.0.0.1", served.port))
        line.sendall(served.head(request=f"GET /v1/jobs/{id}/result"))
        time.sleep(2.0)
        held, _ = rest(line)
        assert len(held) < size // 2


def test_the_end_of_an_event_stream_does_not_wait_for_a_client_that_is_gone(served: Served) -> None:
    with served.client() as asked:
        id = asked.post("/v1/jobs", content=job(["wait", "go"], ["result", "x"])).json()["id"]
        with served.connect() as line:
            line.sendall(served.head(request=f"GET /v1/jobs/{id}/events"))
            held = b""
            while b"event: queued" not in held:
                held += line.recv(65536)
            assert len(served.server.server_state.tasks) == 1
        deadline = time.monotonic() + 2
        while served.server.server_state.tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not served.server.server_state.tasks
        assert asked.get(f"/v1/jobs/{id}").json()["status"] == "running"


def test_too_many_connections_are_refused_and_the_others_stay(served: Served) -> None:
    with served.client() as asked:
        assert asked.get("/healthz").status_code == 200
        lines = [served.connect() for _ in range(PATIENCE.connections + 5)]
        try:
            held = [rest(line)[0] for line in lines[-5:]]
            assert [answered(each) for each in held] == [(503, "too_many_connections")] * 5
            assert all(b"Retry-After: 1\r\n" in each for each in held)
            assert asked.get("/healthz").status_code == 200
        finally:
            for line in lines:
                line.close()


def test_slow_clients_do_not_slow_others(served: Served) -> None:
    lines = [served.connect() for _ in range(30)]
    with served.client() as asked:
        for line in lines:
            line.sendall(served.head("Content-Length: 9999") + b"{")
        began = time.monotonic()
        for _ in range(10):
            assert asked.post("/v1/jobs?wait=5", content=job()).content == b"done"
        assert time.monotonic() - began < 4  # one after the other, the slow ones take 12 s
    for line in lines:
        assert answered(rest(line)[0]) == (408, "too_slow")
        line.close()


def test_a_stop_ends_streams_and_gives_back_what_runs(tmp_path: Path) -> None:
    served = Served(tmp_path)
    with served.client() as asked:
        id = asked.post("/v1/jobs", content=job(["wait", "go"], ["result", "x"])).json()["id"]
        with asked.stream("GET", f"/v1/jobs/{id}/events") as answer:
            pieces = answer.iter_bytes()
            assert b"event: queued" in next(pieces)
            began = time.monotonic()
            served.server.should_exit = True
            served.runner.join(10)
            assert time.monotonic() - began < 2
            assert b"done" not in b"".join(pieces)
    assert served.thread.run(served.store.job, id, ALICE).status == "queued"
    assert served.engine.stopped
    served.stop()


def test_a_service_whose_engine_does_not_start_ends(tmp_path: Path) -> None:
    thread = StoreThread()
    engine = ScriptedEngine(tmp_path, starts=False)
    engine.failure = RuntimeError("no weights")
    engine.loading = asyncio.Event()
    engine.loading.set()
    store = thread.run(WatchedStore, tmp_path / "state")
    made = app(store, ALICE, engine, Settings(state=tmp_path / "state"), thread)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Server(made, PATIENCE, lambda: None).run([listener])
    assert made.state.front.failure is engine.failure
    thread.run(store.close)
    thread.close()
