"""The configuration of nginx in the examples, as it stands but for places and times, before a service with TLS."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from executing_service import ThreadEngine, executing_service

from nnsight_compiler import LanguageModel, intervene
from nnsight_compiler.models import tiny_folder

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "service" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
KEY = "nns_a_key_that_stands_in_no_log"
TOO_LARGE = (
    f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1048577\r\n\r\n".encode()
)
PROMPT = "The Eiffel Tower is in the city of"

pytestmark = pytest.mark.skipif(
    NGINX is None or shutil.which("openssl") is None, reason="nginx or openssl is not installed"
)


@dataclass
class Proxy:
    """A service behind nginx. `folder` has the logs."""

    url: str
    port: int
    engine: ThreadEngine
    folder: Path
    context: ssl.SSLContext

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("localhost", self.port), timeout=20)
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, verify=self.context, headers={"Authorization": f"Bearer {KEY}"}, timeout=20
        )


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with executing_service(folder / "state") as (url, engine):
        written = folder / "nginx.conf"
        written.write_text(configuration(folder, port, url), encoding="utf-8")
        command = [str(NGINX), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(written)]
        subprocess.run([*command, "-t"], check=True, capture_output=True, text=True)
        running = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.PIPE)
        try:
            wait_for(port)
            context = ssl.create_default_context(cafile=str(certificate))
            yield Proxy(f"https://localhost:{port}", port, engine, folder, context)
        finally:
            running.terminate()
            assert running.wait(20) == 0
            assert running.stderr is not None
            running.stderr.close()


def configuration(folder: Path, port: int, service: str) -> str:
    """The example, with the places of this test and shorter patience."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for before, after in (
        ("127.0.0.1:8473", service.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("models.example.org", "localhost"),
        ("/etc/nginx/certificate.pem", str(folder / "certificate.pem")),
        ("/etc/nginx/key.pem", str(folder / "key.pem")),
        ("/var/log/nginx", str(folder)),
        ("client_header_timeout 10s", "client_header_timeout 1s"),
        ("client_body_timeout 20s", "client_body_timeout 1s"),
        ("client_max_body_size 64m", "client_max_body_size 1m"),
    ):
        assert before in text
        text = text.replace(f" {before};", f" {after};").replace(f"{before}/", f"{after}/")
        assert f"{before};" not in text
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""  # the folder is its maker's alone
    return f"{user}pid {folder}/pid;\n{text.replace('http {', 'http {' + chr(10) + own, 1)}"


def wait_for(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "nginx does not listen"
            time.sleep(0.02)


def seconds_until_closed(line: socket.socket) -> float:
    began = time.monotonic()
    try:
        while line.recv(4096):
            pass
    except ConnectionError:  # it is reset
        pass
    return time.monotonic() - began


@intervene
def steered(model, prompt, vector):
    with model.trace(prompt):
        model.layers[1].output[:, -1] += vector
        logits = model.lm_head.output[0, -1]
    print("steered")
    return logits


def test_an_experiment_over_tls(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.folder / "certificate.pem"))
    monkeypatch.setenv("NNSIGHT_HOST", proxy.url)
    monkeypatch.setenv("NNSIGHT_API_KEY", KEY)
    vector = torch.linspace(-1, 1, 128)
    found = steered(LanguageModel("tiny", remote=True), PROMPT, vector)

    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder()).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tiny_folder())(PROMPT, return_tensors="pt")

    def add(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, -1] += vector
        return changed

    with torch.no_grad(), plain.transformer.h[1].register_forward_hook(add):
        torch.testing.assert_close(found, plain(**tokens).logits[0, -1])
    assert capsys.readouterr().out == "steered\n"


def test_events_come_as_they_happen(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.folder / "certificate.pem"))
    proxy.engine.hold = threading.Event()
    try:
        handle = steered(
            LanguageModel("tiny", remote=proxy.url), PROMPT, torch.zeros(128), remote=proxy.url, blocking=False
        )
        with proxy.client() as client, client.stream("GET", f"/v1/jobs/{handle.id}/events") as answer:
            lines = answer.iter_lines()
            names = []
            for line in lines:
                if line.startswith("event: "):
                    names.append(line.removeprefix("event: "))
                    if names[-1] == "running":  # the job is held, so that this came while the answer goes on
                        proxy.engine.hold.set()
        assert names == ["queued", "running", "printed", "done"]
    finally:
        proxy.engine.hold.set()
        proxy.engine.hold = None


def test_a_body_that_is_too_large_is_refused_unread(proxy: Proxy) -> None:
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1048577\r\n\r\n"
    )
    with proxy.connect() as line:
        line.sendall(head.encode())
        assert line.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_chunks_that_becomes_too_large_is_refused(proxy: Proxy) -> None:
    with proxy.client() as client:
        try:
            answer = client.post("/v1/jobs", content=iter([bytes(2**16)] * 64))
        except httpx.WriteError:  # it is refused while it is being sent
            return
    assert answer.status_code == 413


@pytest.mark.parametrize("begun", [b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_headers_that_never_end_are_closed(proxy: Proxy, begun: bytes) -> None:
    with proxy.connect() as line:
        line.sendall(begun)
        assert 0.3 < seconds_until_closed(line) < 10


def test_headers_that_drip_are_closed(proxy: Proxy) -> None:
    with proxy.connect() as line:
        line.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        began = time.monotonic()
        try:
            while time.monotonic() < began + 10:
                line.sendall(b"a")
                time.sleep(0.1)
        except (ConnectionError, ssl.SSLError):
            return
        pytest.fail("it is still open")


def test_a_line_without_a_handshake_is_closed(proxy: Proxy) -> None:
    with socket.create_connection(("localhost", proxy.port), timeout=20) as line:
        assert 0.3 < seconds_until_closed(line) < 10


def test_a_body_that_stands_still_is_given_up(proxy: Proxy) -> None:
    with proxy.connect() as line:
        line.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        assert seconds_until_closed(line) < 10


def test_metrics_are_not_for_clients(proxy: Proxy) -> None:
    with proxy.client() as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/metrics").status_code == 403


def test_no_key_is_logged(proxy: Proxy) -> None:
    """After all that went before: requests that were answered, and some that were refused."""
    with proxy.client() as client:
        assert client.get("/v1/models?key=in-a-query").status_code == 200
    with proxy.connect() as line:
        line.sendall(TOO_LARGE)
        line.recv(4096)
    requests = (proxy.folder / "nnsight.log").read_text(encoding="utf-8")
    assert '"GET /v1/models" 200' in requests
    assert "in-a-query" not in requests
    errors = (proxy.folder / "error.log").read_text(encoding="utf-8")
    assert "too large body" in errors
    assert KEY not in requests + errors
