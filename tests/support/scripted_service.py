"""A service for tests of the client: the protocol as documented, in memory, whose lines break wherever a test says."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Reply:
    status: int
    body: bytes | Iterable[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, status: int, data: object, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(data).encode(), {"content-type": "application/json", **named})

    @classmethod
    def error(cls, status: int, message: str, code: str = "", **headers: str) -> Reply:
        said = {"code": code, "message": message, "where": None, "op": None}
        return cls.json(status, {"error": said}, **headers)


@dataclass
class Job:
    id: str
    payload: bytes
    events: list[tuple[str, dict[str, Any]]]
    result: bytes
    status: str = "queued"
    cancelled: int = 0


@dataclass
class Script:
    """What becomes of the jobs that are sent. Events are told as fast as they are read, but for those after `hold`."""

    printed: tuple[str, ...] = ()
    others: tuple[tuple[str, dict[str, Any]], ...] = ()
    result: bytes = b"the result"
    error: dict[str, Any] | None = None
    hold: threading.Event | None = None
    inline: bool = False


class ScriptedService:
    """Answers on a port of its own, in threads. Use as a context manager."""

    def __init__(self, script: Script | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.script = script or Script()
        self.jobs: dict[str, Job] = {}
        self.keys: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.key: str | None = None
        self.cuts: list[tuple[str, int | None]] = []
        """For each answer to requests that match `METHOD path` (a pattern), after how many bytes the line breaks."""
        self.instead: list[tuple[str, Reply | Callable[[Request], Reply]]] = []
        """Answers to give, once each, instead of the right one."""
        self.lengths: list[tuple[str, int]] = []
        """How long each answer was, head included."""
        self.models: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._server: socketserver.ThreadingTCPServer | None = None
        self.url = ""

    def __enter__(self) -> ScriptedService:
        self._start(0)
        return self

    def _start(self, port: int) -> None:
        service = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                service.connections += 1
                service._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

            def get_request(self) -> tuple[socket.socket, Any]:
                line, address = super().get_request()
                return (service.tls.wrap_socket(line, server_side=True) if service.tls else line), address

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that is gone is no error here."""

        self._open: set[socket.socket] = set()
        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """As a server that is killed: it listens no more, and all lines break."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for line in list(self._open):
            line.close() if line.fileno() < 0 else _break(line)

    def restart(self) -> None:
        """Listens on the same port again; jobs are kept."""
        self._start(self.port)

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- HTTP ---

    def _serve(self, line: socket.socket) -> None:
        self._open.add(line)
        line.settimeout(10.0)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = line.makefile("rb")
        try:
            while (request := _read(stream)) is not None:
                self.requests.append(request)
                if not self._answer(line, request):
                    return
        except OSError:
            return
        finally:
            self._open.discard(line)
            stream.close()
            line.close()

    def _answer(self, line: socket.socket, request: Request) -> bool:
        """Answers; whether the line is still good."""
        name = f"{request.method} {request.path}"
        with self._lock:
            reply = self._taken(self.instead, name)
            cut = self._taken(self.cuts, name)
        if reply is None:
            reply = self.route(request)
        elif callable(reply):
            reply = reply(request)
        whole = isinstance(reply.body, bytes)
        headers = dict(reply.headers)
        if whole:
            headers.setdefault("content-length", str(len(reply.body)))
        else:
            headers.setdefault("connection", "close")
        head = f"HTTP/1.1 {reply.status} Reason\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items()) + "\r\n"
        body = [reply.body] if whole else reply.body
        if request.method == "HEAD":
            body = []
        sent = 0
        for piece in (head.encode(), *body) if whole else _chain(head.encode(), body):
            if cut is not None and sent + len(piece) >= cut:
                line.sendall(piece[: cut - sent])
                return False
            line.sendall(piece)
            sent += len(piece)
        self.lengths.append((name, sent))
        return whole and headers.get("connection") != "close"

    @staticmethod
    def _taken(waiting: list[tuple[str, Any]], name: str) -> Any:
        for index, (pattern, value) in enumerate(waiting):
            if re.fullmatch(pattern, name):
                del waiting[index]
                return value
        return None

    # --- the protocol ---

    def route(self, request: Request) -> Reply:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return Reply.error(401, "no such key", "unauthorized")
        method, parts = request.method, request.path.strip("/").split("/")
        match method, parts:
            case "POST", ["v1", "jobs"]:
                return self._submit(request)
            case "GET" | "DELETE", ["v1", "jobs", id, *rest]:
                job = self.jobs.get(id)
                if job is None:
                    return Reply.error(404, "no such job", "not_found")
                return self._job(job, method, rest, request)
            case "HEAD", ["v1", "blobs", name]:
                return Reply(200 if name in self.blobs else 404)
            case "PUT", ["v1", "blobs", name]:
                if hashlib.sha256(request.body).hexdigest() != name:
                    return Reply.error(400, "the hash is another", "hash_mismatch")
                known = name in self.blobs
                self.blobs[name] = request.body
                return Reply.json(200 if known else 201, {"sha256": name})
            case "GET", ["v1", "models"]:
                return Reply.json(200, {"models": [each["card"] for each in self.models.values()]})
            case "GET", ["v1", "models", *rest]:
                name = unquote("/".join(rest))
                for end, part in (("/modules", "modules"), ("/tokenizer", "tokenizer"), ("", "model")):
                    plain = name.removesuffix(end)
                    if name.endswith(end) and plain in self.models:
                        return Reply.json(200, self.models[plain][part])
                return Reply.error(404, f"no model {name}", "not_found")
        return Reply.error(404, "no such address", "not_found")

    def _submit(self, request: Request) -> Reply:
        key = request.headers["idempotency-key"]
        with self._lock:
            known = key in self.keys
            if not known:
                id = f"job{len(self.jobs)}"
                script = self.script
                done: dict[str, Any] = {"status": "completed", "error": None, "result": described(script.result)}
                if script.error is not None:
                    done = {"status": "failed", "error": script.error, "result": None}
                printed = [("printed", {"text": text}) for text in script.printed]
                begin: list[tuple[str, dict[str, Any]]] = [("queued", {"place": 0}), ("running", {})]
                self.jobs[id] = Job(id, request.body, [*begin, *printed, *script.others, ("done", done)], script.result)
                self.keys[key] = id
            job = self.jobs[self.keys[key]]
        if self.script.inline and "wait" in request.query:
            tag = described(job.result)["sha256"]
            said = sum(name in ("printed", "token") for name, _ in job.events)
            headers = {"etag": f'"{tag}"', "nnsight-job": job.id, "nnsight-events": str(said)}
            return Reply(200, job.result, {"content-type": "application/octet-stream", **headers})
        return Reply.json(200 if known else 202, {"id": job.id, "status": job.status, "place": 0, "cost": {}})

    def _job(self, job: Job, method: str, rest: list[str], request: Request) -> Reply:
        if method == "DELETE":
            job.cancelled += 1
            job.status = "cancelled"
            job.events[-1] = ("done", {"status": "cancelled", "error": None, "result": None})
            if self.script.hold is not None:
                self.script.hold.set()
            return Reply.json(202, self._record(job))
        if rest == ["events"]:
            return Reply(200, self._events(job, int(request.headers.get("last-event-id", "0"))),
                         {"content-type": "text/event-stream"})  # fmt: skip
        if rest == ["result"]:
            return ranged(job.result, request)
        return Reply.json(200, self._record(job))

    def _record(self, job: Job) -> dict[str, Any]:
        return {"id": job.id, "status": job.status, "place": 0, "model": "tiny", "error": None, "cost": {}}

    def _events(self, job: Job, after: int) -> Iterator[bytes]:
        for number, (name, _) in enumerate(list(job.events), 1):
            if name == "done" and self.script.hold is not None:
                while not self.script.hold.wait(0.05):
                    yield b": alive\n\n"
            name, data = job.events[number - 1]
            if number > after:
                if name == "done":
                    job.status = data["status"]
                yield f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()


def described(result: bytes) -> dict[str, Any]:
    return {"bytes": len(result), "sha256": hashlib.sha256(result).hexdigest(), "expires": time.time() + 3600}


def ranged(whole: bytes, request: Request) -> Reply:
    """A body, or what comes after the byte that is asked for."""
    tag = f'"{hashlib.sha256(whole).hexdigest()}"'
    headers = {"content-type": "application/octet-stream", "etag": tag}
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if asked and request.headers.get("if-range") == tag:
        start = int(asked[1])
        return Reply(206, whole[start:], {**headers, "content-range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"})
    return Reply(200, whole, headers)


def _read(stream: Any) -> Request | None:
    first = stream.readline()
    if not first:
        return None
    method, target, _ = first.decode().split()
    headers: dict[str, str] = {}
    while (text := stream.readline().decode().strip()) != "":
        name, _, value = text.partition(":")
        headers[name.strip().lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return Request(method, parts.path, query, headers, body)


def _chain(head: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _break(line: socket.socket) -> None:
    try:
        line.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
