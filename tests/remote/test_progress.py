"""The line that says where a job is: on a terminal, in a notebook, or nowhere."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_service import Reply, Script, ScriptedService

from nnsight_compiler.remote import progress
from nnsight_compiler.remote.client import HttpBackend
from nnsight_compiler.remote.progress import Notebook, Progress, Terminal, screen


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tty]:
    """Makes a terminal that shows both what is printed and the line. To be called in the test: until then, the streams
    are those of pytest."""

    def make() -> Tty:
        stream = Tty()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return make


def visible(stream: io.StringIO) -> list[str]:
    """The lines of a terminal at the end, and in between each line that was shown for a while."""
    return [part for part in stream.getvalue().replace("\r\x1b[2K", "\n").split("\n") if part]


def test_a_job_from_the_queue_to_its_end(at_once: None, at_terminal: Callable[[], Tty]) -> None:
    terminal = at_terminal()
    script = Script(printed=("one\n", "two", " and three\n"), others=(("progress", {"forwards": 2}),), result=b"x")
    script.hold = threading.Event()
    with ScriptedService(script) as service:
        handle = HttpBackend(service.url).post(b"a job")
        name = f"job job0 on {service.url}"
        until = time.monotonic() + 10
        while visible(terminal)[-1:] != [f"{name}: running (2 forwards)"] and time.monotonic() < until:
            with pytest.raises(TimeoutError):
                handle.result(timeout=0.2)
        assert visible(terminal)[-1] == f"{name}: running (2 forwards)"
        script.hold.set()
        handle.result()
    shown = visible(terminal)
    assert [line for line in shown if not line.startswith(name)] == ["one", "two and three"]
    assert {line.removeprefix(f"{name}: ") for line in shown if line.startswith(name)} <= {
        "queued", "running", "running (2 forwards)", "downloading 0.0 MiB: 100 %",
    }  # fmt: skip
    assert terminal.getvalue().endswith("\r\x1b[2K"), "the line is gone"


def test_the_place_in_the_queue_is_told_again_when_it_has_changed(
    at_once: None, at_terminal: Callable[[], Tty]
) -> None:
    def places() -> Iterator[bytes]:
        for place in (3, 2, 1):
            yield f'id: 1\nevent: queued\ndata: {{"place": {place}}}\n\n'.encode()
            time.sleep(0.05)

    terminal = at_terminal()
    with ScriptedService(Script(result=b"x")) as service:
        service.instead = [("GET .*/events", Reply(200, places(), {"content-type": "text/event-stream"}))]
        HttpBackend(service.url).send(b"a job")
        shown = [line.removeprefix(f"job job0 on {service.url}: ") for line in visible(terminal)]
    assert [line for line in shown if line.startswith("queued (")] == [f"queued (place {n})" for n in (3, 2, 1)]


def test_waiting_says_why(at_once: None, at_terminal: Callable[[], Tty]) -> None:
    terminal = at_terminal()
    with ScriptedService(Script(result=b"x")) as service:
        service.instead = [("POST .*", Reply.error(429, "the queue is full", Retry_After="1"))]
        HttpBackend(service.url).send(b"a job")
        assert f"a job on {service.url}: the service is busy: trying again in 1 s" in visible(terminal)


def test_what_is_quick_shows_nothing(at_terminal: Callable[[], Tty]) -> None:
    terminal = at_terminal()
    with ScriptedService(Script(printed=("one\n",), result=b"x")) as service:
        HttpBackend(service.url).send(b"a job")
    assert terminal.getvalue() == "one\n"


def test_the_line_comes_by_itself_after_a_while(
    at_terminal: Callable[[], Tty], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = at_terminal()
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    line = Progress(screen(), "job 1")
    line.say("running")
    assert terminal.getvalue() == ""
    time.sleep(0.2)
    assert visible(terminal) == ["job 1: running"]
    line.end()
    assert terminal.getvalue() == "\r\x1b[2Kjob 1: running\r\x1b[2K"
    line = Progress(screen(), "job 2")
    line.say("running")
    line.end()
    time.sleep(0.1)
    assert "job 2" not in terminal.getvalue()


def test_where_nobody_looks_nothing_is_shown(monkeypatch: pytest.MonkeyPatch, at_terminal: Callable[[], Tty]) -> None:
    at_terminal()
    assert isinstance(screen(), Terminal)
    monkeypatch.setenv("NNSIGHT_PROGRESS", "0")
    assert screen() is None
    monkeypatch.delenv("NNSIGHT_PROGRESS")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert screen() is None
    monkeypatch.setattr(sys, "stderr", None)
    assert screen() is None


def test_a_service_cannot_write_on_the_terminal(at_once: None, at_terminal: Callable[[], Tty]) -> None:
    terminal = at_terminal()
    line = Progress(Terminal(terminal), "job\x1b[2J")
    line.say("queued\nand \x07" + "long " * 100)
    time.sleep(0.05)
    assert visible(terminal)[0].startswith("job�[2J: queued and �long long")
    assert len(visible(terminal)[0]) < 110
    line.end()


def test_in_a_notebook_an_output_changes_in_place(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            outputs[-1] = data["text/plain"]

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        outputs.append(data["text/plain"])
        return Handle()

    python: Any = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", python)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))  # type: ignore[arg-type]
    shown = screen()
    assert isinstance(shown, Notebook)
    line = Progress(shown, "job 1")
    line.say("queued (place 2)")
    time.sleep(0.05)
    assert outputs == ["job 1: queued (place 2)"]
    line.say("running")
    assert outputs == ["job 1: running"]
    line.end()
    assert outputs == [""]
