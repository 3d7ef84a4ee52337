"""Jobs that are sent to a service: results, events, broken lines at every byte, restarts, interrupts."""

from __future__ import annotations

import asyncio
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chosen import PROGRAMS
from scripted_service import Reply, Script, ScriptedService

from nnsight_compiler.remote.client import HttpBackend
from nnsight_compiler.remote.handles import JobHandle, OnEvent
from nnsight_compiler.remote.job import Job
from nnsight_compiler.remote.refusals import AnswerError, JobCancelledError

RESULT = bytes(range(256)) * 3
EVERY = 1 if PROGRAMS else 13
"""Of so many bytes of an answer, the line breaks at one."""


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with ScriptedService(Script(printed=("one\n", "two", " and three\n"), result=RESULT)) as started:
        yield started


def run(service: ScriptedService, on_event: OnEvent | None = None) -> bytes:
    return HttpBackend(service.url, service.key).send(b"a job", on_event)


def posted(service: ScriptedService) -> JobHandle:
    return HttpBackend(service.url, service.key).post(b"a job")


def test_a_job_gives_its_result_and_what_it_printed(
    service: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service) == RESULT
    assert capsys.readouterr().out == "one\ntwo and three\n"
    assert [job.payload for job in service.jobs.values()] == [b"a job"]


def test_a_quick_job_takes_one_round_trip(service: ScriptedService) -> None:
    service.script = Script(result=RESULT, inline=True)
    assert run(service) == RESULT
    assert [request.method for request in service.requests] == ["POST"]


def test_what_a_quick_job_printed_is_asked_for(service: ScriptedService, capsys: pytest.CaptureFixture[str]) -> None:
    service.script.inline = True
    assert run(service) == RESULT
    assert [request.path for request in service.requests] == ["/v1/jobs", "/v1/jobs/job0/events"]
    assert capsys.readouterr().out == "one\ntwo and three\n"


def test_a_large_result_of_a_quick_job_is_downloaded_by_itself(service: ScriptedService) -> None:
    service.script = Script(result=bytes(5 * 2**20), inline=True)
    service.cuts = [("GET .*/result", 3 * 2**20)]
    assert run(service) == service.script.result
    assert [request.headers.get("range", "")[:9] for request in service.requests][-2:] == ["", "bytes=314"]


def test_connections_are_used_again(service: ScriptedService) -> None:
    service.script = Script(result=RESULT, inline=True)
    backend = HttpBackend(service.url)
    assert [backend.send(b"a job") for _ in range(5)] == [RESULT] * 5
    assert service.connections == 1


@pytest.mark.parametrize("asked", ["POST /v1/jobs", "GET .*/events", "GET .*/result"])
def test_the_line_may_break_at_every_byte(
    service: ScriptedService, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    backend = HttpBackend(service.url)
    backend.send(b"a job")
    capsys.readouterr()
    while not (lengths := [length for name, length in service.lengths if re.fullmatch(asked, name)]):
        time.sleep(0.01)  # it is noted when all is sent
    (length,) = lengths
    for cut in range(0, length, EVERY):
        jobs = len(service.jobs)
        service.cuts = [(asked, cut)]
        assert backend.send(b"a job") == RESULT, cut
        assert not service.cuts, "the answer was cut"
        assert capsys.readouterr().out == "one\ntwo and three\n", cut
        assert len(service.jobs) == jobs + 1, "it was sent twice, and is one job"


@pytest.mark.parametrize("cut", [0, 1, 50, 100])
def test_the_very_first_answer_may_be_lost(service: ScriptedService, cut: int) -> None:
    service.cuts = [("POST .*", cut)]
    assert run(service) == RESULT
    assert len(service.jobs) == 1
    assert [request.method for request in service.requests][:2] == ["POST", "POST"]


def test_a_download_goes_on_where_it_broke(service: ScriptedService) -> None:
    service.script.result = bytes(range(256)) * 4000
    service.cuts = [("GET .*/result", 400_000), ("GET .*/result", 300_000)]
    assert run(service) == service.script.result
    starts = [request.headers.get("range") for request in service.requests if request.path.endswith("/result")]
    assert starts[0] is None
    first, second = (int(str(start).removeprefix("bytes=").removesuffix("-")) for start in starts[1:])
    assert 399_000 < first < 400_000
    assert 698_000 < second < 700_000


def test_a_service_that_is_started_anew_is_waited_for(service: ScriptedService) -> None:
    service.script.hold = threading.Event()

    def restart() -> None:
        time.sleep(0.1)
        service.stop()
        time.sleep(0.2)
        service.restart()
        assert service.script.hold is not None
        service.script.hold.set()

    thread = threading.Thread(target=restart)
    thread.start()
    assert run(service) == RESULT
    thread.join()
    assert len(service.jobs) == 1


def test_a_handle_is_given_at_once(service: ScriptedService, capsys: pytest.CaptureFixture[str]) -> None:
    service.script.hold = threading.Event()
    handle = posted(service)
    assert isinstance(handle, JobHandle)
    assert handle.status() == "queued"
    with pytest.raises(TimeoutError, match=r"job job0 is running after 0\.1 s; it goes on"):
        handle.result(timeout=0.1)
    service.script.hold.set()
    assert handle.result() == RESULT
    assert handle.result() == RESULT
    assert handle.status() == "completed"
    assert capsys.readouterr().out == "one\ntwo and three\n"


def test_events_are_told_in_order_each_once(service: ScriptedService) -> None:
    service.script.others = (("token", {"ids": [5]}), ("token", {"ids": [7]}), ("progress", {"forwards": 2}))
    told: list[tuple[str, dict[str, Any]]] = []
    service.cuts = [("GET .*/events", 300), ("GET .*/events", 200)]
    run(service, on_event=lambda name, data: told.append((name, data)))
    assert told == next(iter(service.jobs.values())).events


def test_threads_share_a_backend(service: ScriptedService) -> None:
    service.script = Script(result=RESULT, inline=True)
    backend = HttpBackend(service.url)
    service.cuts = [("POST .*", 20 * number) for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(backend.send, [str(number).encode() for number in range(40)])) == [RESULT] * 40
    assert sorted(int(job.payload) for job in service.jobs.values()) == list(range(40))


def test_tokens_are_told_as_they_come(service: ScriptedService) -> None:
    service.script.others = (("token", {"function": 0, "ids": [5, 6]}), ("token", {"function": 1, "ids": [-7]}))
    service.cuts = [("GET .*/events", 400)]
    told: list[tuple[int, list[int]]] = []
    backend, nothing = HttpBackend(service.url), Job("tiny", {}, {}, [], {})
    assert backend.run(nothing, lambda number, ids: told.append((number, ids.tolist()))) == RESULT
    assert told == [(0, [5, 6]), (1, [-7])]
    assert backend.submit(nothing, lambda number, ids: told.append((number, ids.tolist()))).result() == RESULT
    assert told == [(0, [5, 6]), (1, [-7])] * 2


@pytest.mark.parametrize("data", [{"ids": [1]}, {"function": 0, "ids": ["a"]}, {"function": 0, "ids": [2**64]}])
def test_tokens_that_are_none(service: ScriptedService, data: dict[str, Any]) -> None:
    service.script.others = (("token", data),)
    with pytest.raises(AnswerError):
        HttpBackend(service.url).run(Job("tiny", {}, {}, [], {}), lambda *token: None)
    assert [job.cancelled for job in service.jobs.values()] == [1]


def test_busy_services_are_asked_again(service: ScriptedService) -> None:
    service.instead = [("POST .*", Reply.error(429, "the queue is full", "queue_full", Retry_After="0"))] * 3
    assert run(service) == RESULT
    assert len(service.jobs) == 1


def test_an_interrupt_cancels_the_job(service: ScriptedService) -> None:
    service.script = Script(others=(("token", {"ids": [1]}),), hold=threading.Event())

    def interrupt(name: str, data: dict[str, Any]) -> None:
        if name == "token":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        run(service, on_event=interrupt)
    assert [job.cancelled for job in service.jobs.values()] == [1]
    assert not hasattr(raised.value, "__notes__")


def test_an_interrupt_before_the_id_is_known_cancels_the_job(service: ScriptedService) -> None:
    def interrupted(request: Any) -> Reply:
        service.route(request)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
        time.sleep(0.3)
        return Reply(200, b"")

    service.instead = [("POST .*", interrupted)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background has none
    try:
        with pytest.raises(KeyboardInterrupt):
            run(service)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [job.cancelled for job in service.jobs.values()] == [1]


def test_an_interrupt_that_cannot_be_told_says_so(service: ScriptedService) -> None:
    def interrupt(name: str, data: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    service.instead = [("DELETE .*", Reply.error(500, "out of order"))]
    with pytest.raises(KeyboardInterrupt) as raised:
        run(service, on_event=interrupt)
    (note,) = raised.value.__notes__
    assert note.startswith("the job could not be cancelled, and may go on: http://127.0.0.1:")
    assert "failed over job job0 (HTTP 500): out of order" in note


def test_a_handle_can_be_awaited(service: ScriptedService) -> None:
    async def two() -> list[Any]:
        first, second = (posted(service) for _ in range(2))
        return await asyncio.gather(first, second)

    assert asyncio.run(two()) == [RESULT, RESULT]


def test_awaiting_in_vain_ends_with_the_loop(service: ScriptedService) -> None:
    service.script.hold = threading.Event()

    async def impatient() -> None:
        await asyncio.wait_for(posted(service), 0.05)

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    assert time.monotonic() - began < 2
    service.script.hold.set()


def test_a_handle_is_found_again_by_its_id_and_by_pickle(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.key = "secret-key"
    monkeypatch.setenv("NNSIGHT_HOST", service.url)
    monkeypatch.setenv("NNSIGHT_API_KEY", "secret-key")
    handle = posted(service)
    sent = pickle.dumps(handle)
    assert b"secret-key" not in sent
    assert pickle.loads(sent).result() == RESULT
    assert JobHandle.from_id(handle.id).result() == RESULT


def test_a_handle_shows_how_the_job_stands(service: ScriptedService) -> None:
    handle = posted(service)
    assert repr(handle) == f"<JobHandle job0 on {service.url}: queued>"
    assert "<td>job0</td>" in handle._repr_html_()
    handle.result()
    assert repr(handle) == f"<JobHandle job0 on {service.url}: completed>"
    assert "<td>completed</td>" in handle._repr_html_()


def test_events_can_be_gone_through_by_themselves(service: ScriptedService, capsys: pytest.CaptureFixture[str]) -> None:
    handle = posted(service)
    names = [event.name for event in handle.events()]
    assert names == ["queued", "running", "printed", "printed", "printed", "done"]
    assert capsys.readouterr().out == ""


def test_cancelling_ends_a_job(service: ScriptedService) -> None:
    service.script.hold = threading.Event()
    handle = posted(service)
    assert handle.cancel() == "cancelled"
    for _ in range(2):
        with pytest.raises(JobCancelledError, match="job job0 was cancelled before it ended"):
            handle.result()


def test_what_is_printed_moves_no_cursor(service: ScriptedService, capsys: pytest.CaptureFixture[str]) -> None:
    service.script.printed = ("\x1b[31mred\x1b[0m\tü\x1b]0;title\x07\x1b[2J\n",)
    run(service)
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\tü�]0;title��[2J\n"
