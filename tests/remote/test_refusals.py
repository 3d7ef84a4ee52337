"""What a user reads where a service refuses, is not there, or answers with nonsense: each text whole."""

from __future__ import annotations

import json
import linecache
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_service import Reply, Request, Script, ScriptedService

from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.remote import client, connection, handles
from nnsight_compiler.remote.client import HttpBackend
from nnsight_compiler.remote.connection import Connection, InsecureKeyWarning
from nnsight_compiler.remote.errors import RemoteError
from nnsight_compiler.remote.refusals import (
    AnswerError,
    BusyError,
    JobRefusedError,
    KeyRefusedError,
    NotThereError,
    ServiceError,
    UnreachableError,
)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with ScriptedService(Script(result=b"the result")) as started:
        yield started


def run(service: ScriptedService) -> bytes:
    return HttpBackend(service.url, service.key).send(b"a job")


REFUSALS: list[tuple[Reply, type[ServiceError], str]] = [
    (
        Reply.error(403, "the key may only look"),
        KeyRefusedError,
        "URL does not allow this with your API key: the key may only look\n"
        "  way out: ask whoever runs the service, or log in with another key",
    ),
    (
        Reply.error(400, "the body is no job: at code: expected an object"),
        ServiceError,
        "URL cannot read this job: the body is no job: at code: expected an object\n"
        "  way out: it may be of another version than this package; update the older of the two",
    ),
    (
        Reply.error(413, "the body is larger than the 1000 bytes that are allowed"),
        JobRefusedError,
        "URL does not take this job, which is too large: the body is larger than the 1000 bytes that are allowed\n"
        "  way out: send or return less: narrow to the rows, positions and layers that you use, or use shorter data",
    ),
    (
        Reply.error(422, "this service has no model 'gpt3'; it has: tiny"),
        JobRefusedError,
        "URL refuses this job: this service has no model 'gpt3'; it has: tiny",
    ),
    (
        Reply.json(422, {"error": {"code": "x", "message": "10 TB", "where": None, "op": "%3 = call torch.empty(%2)"}}),
        JobRefusedError,
        "URL refuses this job: 10 TB (in `%3 = call torch.empty(%2)`)",
    ),
    (
        Reply.error(409, "the key was used for another job"),
        ServiceError,
        "URL cannot do this with this job as it is now: the key was used for another job",
    ),
    (
        Reply.error(500, "the service failed at this request; its log says how"),
        ServiceError,
        "URL failed over this job (HTTP 500): the service failed at this request; its log says how\n"
        "  way out: try again later",
    ),
    (
        Reply(500, b"<html>", {"content-type": "text/html"}),
        ServiceError,
        "URL failed over this job (HTTP 500): HTTP status 500\n  way out: try again later",
    ),
    (
        Reply(302, b"", {"location": "http://elsewhere.example/"}),
        ServiceError,
        "URL sends requests on to another address, where an API key would not be safe (HTTP 302)\n"
        "  way out: name the address that it leads to",
    ),
    (
        Reply.error(404, "no such address"),
        NotThereError,
        "URL does not know this job: no such address",
    ),
]


@pytest.mark.parametrize(("reply", "kind", "text"), REFUSALS, ids=[str(reply.status) for reply, *_ in REFUSALS])
def test_a_refusal_says_why_and_what_to_do(
    service: ScriptedService, reply: Reply, kind: type[ServiceError], text: str
) -> None:
    service.instead = [("POST .*", reply)]
    with pytest.raises(kind) as raised:
        run(service)
    assert str(raised.value).replace(service.url, "URL") == text
    assert len(service.requests) == 1


def test_a_refusal_points_to_the_line(service: ScriptedService, tmp_path: Path) -> None:
    file = tmp_path / "demo.py"
    file.write_text("with model.trace(prompt):\n    x = torch.empty(10**12)\n")
    linecache.clearcache()
    said = {"code": "too_large", "message": "4 TB at once", "where": f"{file}:2:9", "op": "%3 = call torch.empty(%2)"}
    service.instead = [("POST .*", Reply.json(413, {"error": said}))]
    with pytest.raises(JobRefusedError) as raised:
        run(service)
    assert str(raised.value).replace(service.url, "URL") == (
        "URL does not take this job, which is too large\n"
        f"{file}:2:9: 4 TB at once (in `%3 = call torch.empty(%2)`)\n"
        "        x = torch.empty(10**12)\n"
        "            ^\n"
        "  way out: send or return less: narrow to the rows, positions and layers that you use, or use shorter data"
    )
    assert raised.value.code == "too_large"


def test_mistakes_that_name_their_lines_are_not_named_twice(service: ScriptedService) -> None:
    said = {"code": "x", "message": "demo.py:2:9: no such module\n  way out: h", "where": "demo.py:2:9", "op": None}
    service.instead = [("POST .*", Reply.json(422, {"error": said}))]
    with pytest.raises(JobRefusedError) as raised:
        run(service)
    assert str(raised.value) == f"{service.url} refuses this job:\ndemo.py:2:9: no such module\n  way out: h"


def test_a_key_that_is_missing_or_wrong(service: ScriptedService) -> None:
    service.key = "right"
    with pytest.raises(KeyRefusedError) as raised:
        HttpBackend(service.url).send(b"a job")
    assert str(raised.value) == (
        f"{service.url} wants an API key, and none is known here\n"
        f"  way out: run `nnsightc login {service.url}`, or set NNSIGHT_API_KEY"
    )
    with pytest.raises(KeyRefusedError) as raised:
        HttpBackend(service.url, wrong := "wrong" + "-key").send(b"a job")
    assert str(raised.value) == (
        f"{service.url} does not accept the API key: no such key\n"
        f"  way out: run `nnsightc login {service.url}` with one that is valid, or set NNSIGHT_API_KEY"
    )
    told = (
        "".join(traceback.format_exception(raised.value)) + repr(raised.value) + repr(HttpBackend(service.url, wrong))
    )
    assert wrong not in told


def test_a_key_is_not_sent_in_the_clear_without_a_word() -> None:
    with pytest.warns(InsecureKeyWarning, match="the API key for http://10.0.0.1 goes over a line that is not encrypt"):
        Connection("http://10.0.0.1", "key")
    for url in ("http://127.0.0.1:1", "http://localhost:1", "https://10.0.0.1"):
        Connection(url, "key")


def test_a_service_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnreachableError) as raised:
        HttpBackend(url).send(b"a job")
    assert str(raised.value) == (
        f"no service answers at {url}: [Errno 111] Connection refused\n"
        "  way out: check the address; `nnsightc serve MODEL` starts a service on this machine"
    )


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine which nobody knows, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs openssl")
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    options = {
        "-newkey": "ec", "-pkeyopt": "ec_paramgen_curve:P-256", "-days": "2", "-subj": "/CN=test",
        "-addext": "subjectAltName=IP:127.0.0.1", "-keyout": str(file), "-out": str(file.with_name("public.pem")),
    }  # fmt: skip
    given = [word for option in options.items() for word in option]
    subprocess.run(["openssl", "req", "-x509", "-nodes", *given], check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_name("public.pem").read_text())
    return file


def test_a_certificate_that_nobody_vouches_for(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with ScriptedService(Script(result=b"the result"), tls) as service:
        with pytest.raises(UnreachableError) as raised:
            HttpBackend(service.url, "key").send(b"a job")
        lines = str(raised.value).splitlines()
        assert lines[0].startswith(f"no service answers at {service.url}: [SSL: CERTIFICATE_VERIFY_FAILED]")
        assert lines[1] == "  way out: check the address; a certificate authority of your own is named by SSL_CERT_FILE"
        assert service.requests == [], "the key was not sent"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("public.pem")))
        assert HttpBackend(service.url, "key").send(b"a job") == b"the result"


def test_a_line_that_stays_broken(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.2)
    service.cuts = [("GET .*/events", 90)] * 100
    began = time.monotonic()
    with pytest.raises(UnreachableError) as raised:
        run(service)
    assert re.fullmatch(
        "the line to http://127.0.0.1:[0-9]+ is broken, and stayed so for 0 s: .*\n"
        "  way out: try again when the service is back; a job that it took goes on without you",
        str(raised.value),
    )
    assert 0.2 <= time.monotonic() - began < 2
    assert len(service.requests) < 10, "pauses grow"


def test_a_service_that_stays_busy(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", 5.0)
    service.instead = [("POST .*", Reply.error(429, "the queue is full", "queue_full", Retry_After="600"))]
    with pytest.raises(BusyError) as raised:
        run(service)
    assert str(raised.value) == (
        f"{service.url} does nothing about this job now: the queue is full\n"
        "  way out: try again later (it asks for 600 s)"
    )
    assert len(service.requests) == 1


def test_what_was_heard_in_between_is_no_waiting(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of events that goes on for longer than a client waits for room, breaks, and finds none at first."""
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.5)
    service.script.hold = threading.Event()
    busy = Reply.error(429, "256 requests of ada are being answered", "too_many_requests", Retry_After="0")
    service.instead = [("GET .*/events", service.route), ("GET .*/events", busy)]
    service.cuts = [("GET .*/events", 400)]  # with a sign of life every 50 ms: after more than a second
    later = threading.Timer(2.5, service.script.hold.set)
    later.start()
    try:
        assert run(service) == b"the result"
    finally:
        later.cancel()
    asked = [each.path for each in service.requests]
    assert sum(path.endswith("/events") for path in asked) == 3


def test_a_service_that_is_busy_with_other_requests(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.5)
    service.instead = [("GET .*", Reply.error(429, "256 requests of ada are being answered", Retry_After="600"))]
    with pytest.raises(BusyError) as raised:
        run(service)
    assert str(raised.value) == (
        f"{service.url} does nothing about job job0 now: 256 requests of ada are being answered\n"
        "  way out: try again later (it asks for 600 s)"
    )


def test_a_service_that_is_not_ready_is_waited_for(service: ScriptedService) -> None:
    service.instead = [("POST .*", Reply.error(503, "the models are being loaded", "not_ready", Retry_After="0"))]
    assert run(service) == b"the result"


def test_a_proxy_before_a_service_that_is_started_anew(service: ScriptedService) -> None:
    service.instead = [(f"{method} .*", Reply(502, b"Bad Gateway")) for method in ("POST", "GET", "GET")]
    assert run(service) == b"the result"


def test_a_failed_job_raises_what_it_raised(service: ScriptedService) -> None:
    place = {"file": "demo.py", "line": 12, "text": "h / 0"}
    service.script.error = {
        "kind": "ZeroDivisionError", "module": "builtins", "message": "division by zero",
        "arguments": ["division by zero"], "notes": ["in step 3"], "where": [place],
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError, match="division by zero") as raised:
        run(service)
    assert raised.value.__notes__ == ["in step 3", "at the service, demo.py:12: h / 0"]
    assert [job.cancelled for job in service.jobs.values()] == [0]


def test_a_job_that_timed_out_by_itself_is_no_late_answer(service: ScriptedService) -> None:
    service.script.error = {"kind": "TimeoutError", "module": "builtins", "message": "mine", "where": [], "notes": []}
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"^mine$"):
            HttpBackend(service.url).post(b"a job").result(timeout=5)


@pytest.mark.parametrize(
    "record",
    [
        None,
        7,
        "text",
        {},
        {"kind": 7, "module": [], "message": {}, "where": 3, "notes": 4, "arguments": 5},
        {"kind": "SystemExit", "module": "builtins", "message": "out", "where": [3, None, {}], "notes": [None]},
        {"kind": "CompileError", "module": "nnsight_compiler.ir.errors", "message": "\x1b[2J", "where": [{"line": []}]},
        {"kind": "KeyError", "module": "builtins", "arguments": [[]], "message": "x" * 10**6},
    ],
    ids=repr,
)
def test_whatever_a_service_says_of_an_error_is_an_error(service: ScriptedService, record: Any) -> None:
    service.script.error = {} if record is None else record
    with pytest.raises(Exception) as raised:
        run(service)
    assert isinstance(raised.value, (RemoteError, KeyError)) or type(raised.value).__name__ == "CompileError"
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 200_000


def test_a_result_that_is_gone(service: ScriptedService) -> None:
    service.instead = [("GET .*/result", Reply.error(410, "the result is no longer kept; send the job again"))]
    with pytest.raises(NotThereError) as raised:
        run(service)
    assert str(raised.value) == (
        f"{service.url} has the result of job job0 no longer: the result is no longer kept; send the job again\n"
        "  way out: run the experiment again; results are kept for a limited time"
    )


def test_a_job_that_is_not_there(service: ScriptedService) -> None:
    handle = HttpBackend(service.url).post(b"a job")
    service.jobs.clear()
    for ask in (handle.status, handle.cancel, handle.record, handle.result, lambda: list(handle.events())):
        with pytest.raises(NotThereError, match="does not know job job0: no such job"):
            ask()
    assert "no such job" in handle._repr_html_()


# --- services that are broken, or hostile ---


def event(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n\n").encode()


def done(**result: Any) -> bytes:
    return event(
        "id: 1", "event: done", "data: " + json.dumps({"status": "completed", "error": None, "result": result})
    )


STREAM = {"content-type": "text/event-stream"}
OCTETS = {"content-type": "application/octet-stream"}

NONSENSE: list[tuple[str, Reply, str]] = [
    ("POST .*", Reply(202, b"{", {"content-type": "application/json"}), "answers with something that cannot be read: "),
    ("POST .*", Reply(202, b"\xff", {"content-type": "application/json"}), "answers with something that is no text"),
    ("POST .*", Reply.json(202, [1]), "answers with JSON that is no object"),
    ("POST .*", Reply.json(202, {"id": 7}), "answers with the answer to a job whose 'id' is no text"),
    ("POST .*", Reply.json(202, {"id": "../../x"}), "names a job '../../x'"),
    ("POST .*", Reply(202, b"[" * 10**5, {"content-type": "application/json"}), "the document is nested too deeply"),
    ("POST .*", Reply(202, b'{"id": NaN}', {"content-type": "application/json"}), "NaN is no number of JSON"),
    ("POST .*", Reply(202, b'{"id": "a", "id": "b"}', {"content-type": "application/json"}), "stands twice"),
    ("POST .*", Reply(202, b'{"id": ' + b"9" * 999 + b"}", {"content-type": "application/json"}), "has 999 digits"),
    (
        "POST .*",
        Reply(200, b"other", {**OCTETS, "nnsight-job": "a", "nnsight-events": "0", "etag": '"0"'}),
        "sends a result that is not the one it announced (sha256)",
    ),
    ("POST .*", Reply(200, b"x", OCTETS), "names a job ''"),
    ("POST .*", Reply(200, b"x", {**OCTETS, "content-encoding": "gzip"}), "in an encoding that was not asked for"),
    ("GET .*/events", Reply(204), "answers HTTP 204 where events were asked for"),
    ("GET .*/events", Reply(200, b"what\n\n", STREAM), "sends b'what', which is no line of an event stream"),
    ("GET .*/events", Reply(200, event("event: done", "data: {}"), STREAM), "sends an event without a number"),
    ("GET .*/events", Reply(200, event("id: -1", "data: {}"), STREAM), "numbers an event b'-1'"),
    ("GET .*/events", Reply(200, event("id: 1", "data: [}"), STREAM), "answers with something that cannot be read"),
    (
        "GET .*/events",
        Reply(200, event("id: 1", "event: printed", 'data: {"text": 3}'), STREAM),
        "answers with an event `printed` whose 'text' is no text",
    ),
    (
        "GET .*/events",
        Reply(200, event("id: 1", "event: done", 'data: {"status": "dead"}'), STREAM),
        "says that job job0 is 'dead'",
    ),
    (
        "GET .*/events",
        Reply(200, event("id: 1", "event: done", 'data: {"status": "running"}'), STREAM),
        "says that job job0 ended, and is running",
    ),
    ("GET .*/events", Reply(200, done(bytes="7", sha256=""), STREAM), "the result of a job whose 'bytes' is no whole"),
    ("GET .*/events", Reply(200, done(bytes=-1, sha256=""), STREAM), "whose 'bytes' is out of range"),
    ("GET .*/events", Reply(200, done(bytes=2**61, sha256=""), STREAM), "bytes of memory are free here"),
    ("GET .*/events", Reply(200, done(bytes=3, sha256=""), STREAM), "sends more than the 3 bytes that it announced"),
    ("GET .*/events", Reply(200, done(bytes=10, sha256=""), STREAM), "that is not the one it announced (sha256)"),
    ("GET .*/result", Reply(206, b"x", {**OCTETS, "content-range": "bytes 5-5/6"}), "sends another part of a result"),
    ("GET .*/result", Reply(204), "answers HTTP 204 where a result was asked for"),
]


@pytest.mark.parametrize(("asked", "reply", "text"), NONSENSE, ids=[text[:40] for *_, text in NONSENSE])
def test_nonsense_is_an_error_and_nothing_else(service: ScriptedService, asked: str, reply: Reply, text: str) -> None:
    service.instead = [(asked, reply)]
    with pytest.raises(ServiceError) as raised:
        run(service)
    assert text in str(raised.value)
    assert isinstance(raised.value, AnswerError) or "memory" in text


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


@pytest.mark.parametrize(
    ("asked", "piece", "kind", "text"),
    [
        ("POST .*", b" " * 2**16, "application/json", "answers with more than 4194304 bytes"),
        ("GET .*/events", b"x" * 2**16, "text/event-stream", "sends a line of more than 4194304 bytes"),
        ("GET .*/events", b"data: " + b"x" * 2**16 + b"\n", "text/event-stream", "an event of more than 4194304 bytes"),
        ("GET .*/result", b"x" * 2**16, "application/octet-stream", "sends more than the 10 bytes that it announced"),
    ],
)
def test_answers_without_an_end_are_left(
    service: ScriptedService, asked: str, piece: bytes, kind: str, text: str
) -> None:
    service.instead = [(asked, Reply(200, endless(piece), {"content-type": kind}))]
    with pytest.raises(AnswerError) as raised:
        run(service)
    assert text in str(raised.value)


def test_a_service_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.2)
    with ScriptedService() as service:
        silent = threading.Event()

        def wait(request: Request) -> Reply:
            silent.wait(5)
            return Reply(200)

        service.instead = [("GET .*", wait)] * 50
        with pytest.raises(UnreachableError, match=r"the line to .* is broken, and stayed so"):
            run(service)
        silent.set()


def test_an_answer_that_drips_is_left(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    def drops() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.02)
            yield b" "

    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.1)
    service.instead = [("POST .*", Reply(202, drops(), {"content-type": "application/json"}))]
    with pytest.raises(AnswerError, match="has not come to the end of an answer in 0 s"):
        run(service)


SCRAPS: list[Callable[[], bytes]] = [
    lambda: b"",
    lambda: b"SSH-2.0-OpenSSH_9.6\r\n",
    lambda: b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
    lambda: b"HTTP/1.1 99999 OK\r\n\r\n",
    lambda: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 10**5 + b"\r\n",
    lambda: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
]


@pytest.mark.parametrize("scrap", SCRAPS)
def test_what_does_not_speak_http(scrap: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                with line:
                    line.recv(2**16)
                    line.sendall(scrap())

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServiceError) as raised:
            HttpBackend(url).send(b"a job")
        assert url in str(raised.value)
        listener.shutdown(socket.SHUT_RDWR)


def test_the_bounds_are_what_the_page_says() -> None:
    assert (client.MAX_INLINE, connection.MAX_ANSWER, client.BLOB_BYTES) == (2**22, 2**26, 2**16)
    assert handles.checked_id("a" * 64, "") == "a" * 64


def test_what_does_not_compile_is_refused_as_it_is_here(service: ScriptedService) -> None:
    service.instead = [("POST .*", Reply.error(422, "demo.py:3:5: no such module", code="CompileError"))]
    with pytest.raises(CompileError, match=r"refuses this job: demo\.py:3:5: no such module") as caught:
        HttpBackend(service.url).send(b"a job")
    assert isinstance(caught.value, JobRefusedError)
