"""A service without models: an engine that does what a job's file says, and a queue that tells what it was asked.

A job is a safetensors file without tensors, whose document has a field more, "script", a list of steps:

    ["print", text]  ["sleep", seconds]  ["wait", name]  ["result", text]  ["large", bytes]  ["error", message]  ["die"]
    ["break"]  ["forward", count]
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnsight_compiler.service.durable import Staged
from nnsight_compiler.service.engine import Assignment, Content, Data, RefusedError, Send
from nnsight_compiler.service.records import NoSpaceError
from nnsight_compiler.service.store import Store


def safetensors(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file, made by hand."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def job(*steps: list[Any], **fields: Any) -> bytes:
    """A job's file; without steps, one that ends at once."""
    document = {
        "format": "nnsight-compiler-job",
        "version": 1,
        "model": "tiny",
        "blobs": {},
        "script": steps or [["result", "done"]],
        **fields,
    }
    return safetensors({"__metadata__": {"nnsight-compiler": json.dumps(document)}})


def upload(value: int = 0) -> bytes:
    """An upload: one tensor."""
    return safetensors({"tensor": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes([value]))


def script(content: Content) -> dict[str, Any]:
    """The document in a job's file."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    document: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["nnsight-compiler"])
    return document


class WatchedStore(Store):
    """The queue, and the names of the calls that it had. While `full`, its disk is."""

    def __init__(self, state: Path, max_queued: int = 100) -> None:
        self.calls: list[str] = []
        self.full = False
        super().__init__(state, max_queued=max_queued)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("_") and callable(found):
            super().__getattribute__("calls").append(name)
        return found

    def stage(self, data: Content, *, small: bool = True) -> Staged:
        if self.full:
            raise NoSpaceError("no space for a file")
        return super().stage(data, small=small)


@dataclass(frozen=True)
class Admission:
    group: str
    cost: Data


@dataclass(frozen=True)
class Outcome:
    id: str
    result: Content | None = None
    error: Data | None = None
    retry: bool = False


class ScriptedEngine:
    """Runs scripts. `gates` are what steps ["wait", name] wait for; `batches` holds the ids that ran together."""

    workers = 1

    def __init__(self, folder: Path, starts: bool = True) -> None:
        self.results = folder / "worker"
        self.results.mkdir(parents=True, exist_ok=True)
        self.batches: list[list[str]] = []
        self.cancelled: list[str] = []
        self.assignments: list[Assignment] = []
        self.stopped = False
        self.gates: dict[str, asyncio.Event] = {}
        self.loading = asyncio.Event()
        if starts:
            self.loading.set()
        self.failure: Exception | None = None
        self._running: dict[str, asyncio.Task[Outcome]] = {}

    async def start(self) -> None:
        await self.loading.wait()
        if self.failure is not None:
            raise self.failure

    async def stop(self) -> None:
        self.stopped = True

    async def describe(self) -> Sequence[Data]:
        tiny: Data = {"name": "tiny", "class": "GPT2LMHeadModel", "bytes": 12, "config": {"n_layer": 2}}
        modules = [{"path": "transformer", "class": "GPT2Model"}]
        return [
            tiny | {"modules": modules, "tokenizer": {"tokenizer.json": "e30="}},
            {"name": "openai-community/gpt2", "class": "GPT2LMHeadModel", "config": {}, "modules": []},
        ]

    async def admit(self, payload: Content, blobs: Mapping[str, Path], limits: Any) -> Admission:
        document = script(payload)
        if "refuse" in document:
            status, record = document["refuse"]
            raise RefusedError(status, record)
        return Admission(document.get("group", "a"), {"forwards": 1})

    async def run(self, batch: Sequence[Assignment], send: Send) -> AsyncIterator[Outcome]:
        self.batches.append([each.id for each in batch])
        self.assignments += batch
        for each in batch:
            self._running[each.id] = asyncio.create_task(self._perform(each, send))
        tasks = {self._running[each.id] for each in batch}
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in tasks:
                task.cancel()
            for each in batch:
                self._running.pop(each.id, None)

    async def _perform(self, job: Assignment, send: Send) -> Outcome:
        try:
            return await self._steps(job, send)
        except asyncio.CancelledError:
            if job.id in self.cancelled:
                return Outcome(job.id, error={"kind": "cancelled", "message": "it was cancelled"})
            raise

    async def _steps(self, job: Assignment, send: Send) -> Outcome:
        file = self.results / job.id
        for step, *rest in script(job.payload)["script"]:
            match step:
                case "print":
                    send(job.id, "printed", {"text": rest[0]})
                case "forward":
                    send(job.id, "progress", {"forwards": rest[0]})
                case "sleep":
                    await asyncio.sleep(rest[0])
                case "wait":
                    await self.gates.setdefault(rest[0], asyncio.Event()).wait()
                case "result":
                    file.write_text(rest[0])
                    return Outcome(job.id, file)
                case "large":
                    file.write_bytes(bytes(rest[0]))
                    return Outcome(job.id, file)
                case "error":
                    return Outcome(job.id, error={"kind": "ValueError", "message": rest[0]})
                case "die":
                    return Outcome(job.id, error={"kind": "died"}, retry=True)
                case "break":
                    raise RuntimeError("the engine itself is broken")
        raise AssertionError("a script ends with a result, an error, 'die' or 'break'")

    async def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        self._running[id].cancel()
