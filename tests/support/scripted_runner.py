"""A runner for the service's processes whose jobs are JSON: a list of things to do, one after the other.

It needs no model, so that what the processes do can be tested by itself. `tests/service/test_local_engine.py` sends the
jobs; a worker imports this module.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nnsight_compiler.service.engine import Admission, Data, JobLimits, RefusedError, record
from nnsight_compiler.service.runner import Blobs, Task


def load(source: str, options: Mapping[str, object], weights: bool) -> Scripted:
    if source == "broken":
        raise ValueError("this model is broken")
    if source == "dies":
        os._exit(7)
    time.sleep(float(str(options.get("seconds", 0))))
    return Scripted(source, weights)


class Scripted:
    def __init__(self, source: str, weights: bool) -> None:
        self.source, self.weights = source, weights
        self.kept: list[bytearray] = []
        self.threads = 0

    def describe(self) -> tuple[Data, Mapping[str, bytes]]:
        return {"source": self.source}, {"words.txt": b"\x00\xff"}

    def begin(self, threads: int) -> None:
        self.threads = threads

    def admit(self, payload: bytes, blobs: Blobs, limits: JobLimits) -> Admission:
        steps = json.loads(payload)
        for name, *arguments in steps:
            if name == "refuse":
                raise RefusedError(422, record("refused", arguments[0]))
            if name.startswith("check "):
                getattr(self, name.removeprefix("check "))(*arguments)
        cost: Data = {"steps": len(steps), "forwards": limits.forwards, "weights": self.weights}
        return Admission("all", cost)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes | Exception]]:
        first = json.loads(tasks[0].payload())
        if first[:1] == [["together"]]:
            yield from self.together(tasks)
            return
        for task in tasks:
            answer: object = None
            task.begin()
            if json.loads(task.payload()) == [["break"]]:
                raise RuntimeError("the runner is broken")
            try:
                for name, *arguments in json.loads(task.payload()):
                    answer = self.event(task, *arguments) if name == "event" else getattr(self, name)(*arguments)
                    if name == "blob":
                        answer = task.blobs(arguments[0]).decode()
                done: bytes | Exception = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            except Exception as error:
                done = error
            yield task, done

    def together(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes | Exception]]:
        """As if all were rows of one forward: what one does happens while all are in progress."""
        for task in tasks:
            task.begin()
        steps = [[step for step in json.loads(task.payload()) if step != ["together"]] for task in tasks]
        if any(step == ["apart"] for each in steps for step in each):
            for task in tasks:
                task.wait()
            for task in tasks:
                task.begin()
                self.sleep(0.1)
                yield task, b"apart"
            return
        for each in steps:
            for name, *arguments in each:
                getattr(self, name)(*arguments)
        for task in tasks:
            yield task, b"together"

    def record(self, error: BaseException) -> Data:
        lines = [
            {"file": f.filename, "line": f.lineno, "text": f.line} for f in traceback.extract_tb(error.__traceback__)
        ]
        told = record(type(error).__name__, str(error))
        return {**told, "where": lines[-1:]}

    # --- what jobs can do ---

    def say(self, text: str) -> str:
        return text

    def blob(self, name: str) -> None:
        pass

    def event(self, task: Task, name: str, data: Data) -> None:
        task.send(name, data)

    def print(self, text: str, stream: str = "stdout", end: str = "\n") -> None:
        print(text, file=getattr(sys, stream), end=end)

    def sleep(self, seconds: float) -> None:
        """Pure Python, in small steps."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.001)

    def hang(self, seconds: float) -> None:
        """One operation in C, during which no handler runs."""
        sum(range(int(seconds * 1e8)))

    def stubborn(self, seconds: float) -> None:
        """Takes being interrupted for an error of its own, and goes on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self.sleep(seconds)
            except BaseException:
                continue

    def die(self, number: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    def leave(self, code: int) -> None:
        os._exit(code)

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def allocate(self, size: int) -> int:
        return len(bytearray(size))

    def keep(self, size: int) -> None:
        self.kept.append(bytearray(size))

    def bytes(self, size: int) -> bytes:
        return b"x" * size

    def process(self) -> int:
        return os.getpid()

    def parent(self) -> int:
        return os.getppid()

    def descriptors(self) -> list[str]:
        """Where each open descriptor leads, but the one by which this is found out."""
        found = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
        return [found[number].partition(":")[0] for number in sorted(found)]

    def thread(self) -> str:
        threads: list[str] = []
        thread = threading.Thread(target=lambda: threads.append("ran"))
        thread.start()
        thread.join()
        return threads[0]

    def attempt(self, what: str, path: str = "") -> str:
        """Does what a sandbox denies; gives how that went."""
        try:
            self.forbidden(what, path)
        except OSError as error:
            return type(error).__name__
        return "done"

    def forbidden(self, what: str, path: str) -> None:
        match what:
            case "socket":
                socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
            case "unix socket":
                socket.socket(socket.AF_UNIX).connect(path)
            case "exec":
                os.execv("/bin/true", ["true"])
            case "fork":
                if os.fork() == 0:
                    os._exit(0)
            case "spawn":
                os.posix_spawn("/bin/true", ["true"], {})
            case "write":
                Path(path).write_text("x")
            case "append":
                Path(path).open("a").close()
            case "truncate":
                os.truncate(path, 0)
            case "remove":
                os.remove(path)
            case "rename":
                os.rename(path, path + ".other")
            case "folder":
                os.mkdir(path + ".folder")
            case "mode":
                os.chmod(path, 0o777)
            case "link":
                os.link(path, path + ".link")
            case "read":
                Path(path).read_text()
            case "list":
                os.listdir(path)
            case "kill":
                os.kill(os.getppid(), 0)
            case "memory file":
                os.memfd_create("x")
            case "pidfd":
                os.pidfd_open(os.getppid())
            case "look into":
                Path(f"/proc/{os.getppid()}/environ").read_bytes()
            case unknown:
                raise ValueError(unknown)
