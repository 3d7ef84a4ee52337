"""The service is killed while jobs wait and run, and while others are being sent: what it acknowledged is done, once.

NNSIGHT_COMPILER_KILLS=20 python -m pytest tests/service/test_killed_service.py      kills it that often
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from running_service import events
from service_stand_ins import job

KILLS = int(os.environ.get("NNSIGHT_COMPILER_KILLS", "0"))
SERVER = Path(__file__).parent.parent / "support" / "scripted_server.py"
CLIENTS, JOBS = 4, 50
"""How many send at once, and how many jobs each."""

PATIENCE = 300
"""Seconds for one answer: a busy machine takes long to start a service, which may be killed again by then."""


class Killed:
    """A service that is killed and started anew at the same port, as often as is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(SERVER), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def end(self) -> None:
        """Whatever has happened, nothing is left."""
        if self.process.poll() is None:
            self.kill()

    def _wait(self) -> int:
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait(20)


class Sender(threading.Thread):
    """Sends jobs, each until it is acknowledged, over as many lines as that takes. Then follows each to its end."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__()
        self._url, self._number = f"http://127.0.0.1:{port}", number
        self.acknowledged: dict[str, set[str]] = {}
        self.results: dict[str, bytes] = {}
        self.seen: dict[str, list[int]] = {}

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            for each in range(JOBS):
                name = f"{self._number}.{each}"
                body = job(["print", name], ["sleep", 0.005], ["result", name])
                answer = self._insist(client, "POST", "/v1/jobs", body, {"Idempotency-Key": name})
                self.acknowledged.setdefault(name, set()).add(answer.json()["id"])
            for name, (id,) in self.acknowledged.items():
                again = self._insist(client, "POST", "/v1/jobs", self._body(name), {"Idempotency-Key": name})
                self.acknowledged[name].add(again.json()["id"])
                while True:
                    found = self._insist(client, "GET", f"/v1/jobs/{id}/result?wait=5")
                    if found.status_code == 200:
                        break
                self.results[name] = found.content
                told = events(self._insist(client, "GET", f"/v1/jobs/{id}/events").text)
                self.seen[name] = [number for number, _, _ in told]
                assert [event for _, event, _ in told].count("done") == 1

    def _body(self, name: str) -> bytes:
        return job(["print", name], ["sleep", 0.005], ["result", name])

    def _insist(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        began = time.monotonic()
        while True:
            try:
                answer = client.request(method, path, content=content, headers=headers)
                if answer.status_code != 503:
                    return answer
            except httpx.TransportError:
                pass
            time.sleep(0.02)
            assert time.monotonic() - began < PATIENCE, "the service is gone for too long"


@pytest.mark.skipif(not KILLS, reason="NNSIGHT_COMPILER_KILLS says how often the service is killed")
def test_what_was_acknowledged_is_done_once_however_often_the_service_is_killed(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service = Killed(tmp_path)
    request.addfinalizer(service.end)
    senders = [Sender(service.port, number) for number in range(CLIENTS)]
    for sender in senders:
        sender.start()
    for _ in range(KILLS):
        time.sleep(0.3)
        service.kill()
        service.start()
    for sender in senders:
        sender.join()
    for sender in senders:
        assert len(sender.results) == JOBS
        for name, result in sender.results.items():
            assert result == name.encode()
            assert len(sender.acknowledged[name]) == 1, "sent twice with one key, and queued twice"
            assert sender.seen[name] == list(range(1, len(sender.seen[name]) + 1))
    counts = httpx.get(f"http://127.0.0.1:{service.port}/metrics").text
    assert f'nnsight_jobs{{state="completed"}} {CLIENTS * JOBS:.1f}' in counts
    assert service.stop() == 0
