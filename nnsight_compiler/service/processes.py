"""The front end's side of the processes of one model: how they come to be, what they are told, how they end."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import loads
from typing import Any, final

from nnsight_compiler.service.engine import Data, EngineError
from nnsight_compiler.service.frames import Frame, FrameError, Line
from nnsight_compiler.service.interrupts import SIGNAL
from nnsight_compiler.service.worker import WorkerSettings

PROGRAM = ("-P", "-m", "nnsight_compiler.service.zygote")
"""What Python is started with."""

BIRTH_SECONDS = 60.0
"""A forked process that does not say within this time that it is there does not come."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What keeps libraries from starting pools of threads while they are imported; no pool survives a fork."""

_LEAVE_SECONDS = 5.0
_FATE_SECONDS = 0.5


@final
@dataclass(frozen=True, slots=True)
class Served:
    """A model that is served.

    name: what clients call it. source, options: what the runner is given, for a language model its folder or name and
    options for loading. forks: whether its processes are forked from one that has loaded it; a model on an accelerator
    cannot be used in a fork. runner: what makes the runner, as `module:function`.
    """

    name: str
    source: str
    options: Mapping[str, object] = field(default_factory=dict)
    forks: bool = True
    runner: str = "nnsight_compiler.service.execution:load"

    @classmethod
    def language_model(
        cls, name: str, source: str | None = None, dtype: str | None = None, device: str | None = None
    ) -> Served:
        """A language model.

        Args:
            source: a name or a folder as `LanguageModel` takes it, where clients call it something else.
            dtype: of its weights, by torch's name; as in its files otherwise.
            device: `cuda`, `cuda:1`, `auto`; the CPU otherwise.
        """
        given = {"dtype": dtype, "device_map": device}
        options = {option: value for option, value in given.items() if value is not None}
        return cls(name, source or name, options, forks=device in (None, "cpu"))


@final
class Process:
    """A process that runs or checks jobs. `reusable` while it is idle."""

    def __init__(self, line: Line, number: int, handle: int, confined: list[str]) -> None:
        self.line, self.number, self.confined = line, number, confined
        self.reusable = True
        self._handle = handle

    @classmethod
    async def met(cls, line: Line) -> Process:
        """The process at the other end, when it is ready."""
        try:
            async with asyncio.timeout(BIRTH_SECONDS):
                frame = await line.receive()
            if frame.header.get("is") == "failed":
                raise EngineError(frame.text("message"))
            number, confined = frame.header.get("pid"), frame.header.get("confined")
            if not isinstance(number, int) or not isinstance(confined, list) or len(frame.descriptors) != 1:
                raise FrameError("a process that says nothing of itself")
        except (EOFError, FrameError, TimeoutError) as error:
            line.close()
            raise EngineError(f"a worker process could not begin ({error or type(error).__name__})") from error
        except BaseException:
            line.close()
            raise
        return cls(line, number, frame.descriptors[0], confined)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        if self._handle < 0:
            return False
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """Has it look at what it was told."""
        self._signal(SIGNAL)

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it at once, and lets go of it."""
        if self._handle < 0:
            return
        self.kill()
        self.line.close()
        os.close(self._handle)
        self._handle = -1

    def _signal(self, number: signal.Signals) -> None:
        if self._handle < 0:
            return
        try:
            signal.pidfd_send_signal(self._handle, number)
        except ProcessLookupError:  # it has ended
            return


@final
class Family:
    """The processes of one model. The first holds it and forks the others, or each is started and loads it anew."""

    def __init__(self, served: Served, settings: WorkerSettings) -> None:
        self.served, self._settings = served, settings
        self.description: Data = {}
        self._line: Line | None = None  # to the one that forks
        self._spare: Process | None = None  # started to be described, and not used yet
        self._started: list[asyncio.subprocess.Process] = []
        self._watch: asyncio.Task[None] | None = None
        self._fates: dict[int, asyncio.Future[int]] = {}
        self._lock = asyncio.Lock()
        self._stopped = False

    async def start(self) -> None:
        """Loads the model.

        Raises:
            EngineError: it cannot be loaded.
        """
        line = await self._launch(checks=False)
        if self.served.forks:
            self._line = line
            self._watch = asyncio.create_task(self._listen(line))
        else:
            self._spare = await Process.met(line)

    async def born(self, checks: bool) -> Process:
        """A new process that is ready to run jobs, or to check them; the one that forks is started anew if it has died.

        Raises:
            EngineError: there can be none.
        """
        if not self.served.forks:
            spare = None if checks else self._spare
            if spare is not None:
                self._spare = None
                return spare
            return await Process.met(await self._launch(checks))
        async with self._lock:
            if self._line is None:
                await self.start()
        assert self._line is not None
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise EngineError(f"there can be no more processes: {error.strerror}") from error
        with theirs:
            line = Line(ours)
            try:
                await self._line.send({"do": "fork"}, descriptors=[theirs.fileno()])
            except EOFError:
                line.close()
                raise EngineError(f"the process that holds {self.served.name} has died") from None
        process = await Process.met(line)
        self._fates[process.number] = asyncio.get_running_loop().create_future()
        return process

    async def bury(self, process: Process) -> str:
        """Ends a process and says how it had ended."""
        process.close()
        fate = self._fates.get(process.number)
        if fate is None:
            return "it ended"
        try:
            async with asyncio.timeout(_FATE_SECONDS):
                code = await asyncio.shield(fate)
        except TimeoutError:
            return "it ended"
        return _fate(code)

    def forget(self, process: Process) -> None:
        """Ends a process, however it stands."""
        process.close()
        self._fates.pop(process.number, None)

    async def stop(self) -> None:
        """Ends all processes, and waits until they have ended."""
        self._stopped = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._spare is not None:
            self._spare.close()
        if self._line is not None:
            self._line.close()
            self._line = None
        for program in self._started:
            try:
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await program.wait()
            except TimeoutError:
                program.kill()
                await program.wait()
        self._started.clear()

    async def _launch(self, checks: bool) -> Line:
        """Starts the program, and waits until it has loaded the model; for checks, without its weights."""
        if self._stopped:
            raise EngineError("the engine is stopped")
        self._started = [program for program in self._started if program.returncode is None]
        ours, theirs = socket.socketpair()
        with theirs:
            program = await asyncio.create_subprocess_exec(
                sys.executable,
                *PROGRAM,
                str(theirs.fileno()),
                str(os.getpid()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | _ONE_THREAD,
            )
        self._started.append(program)
        line = Line(ours)
        served = self.served
        asked: Data = {
            "runner": served.runner,
            "source": served.source,
            "options": dict(served.options),
            "weights": not checks,
            "forks": served.forks,
            "worker": self._settings.as_data(),
        }
        try:
            await line.send(asked)
            loaded = await line.receive()
            if loaded.header.get("is") != "loaded":
                raise EngineError(f"{served.name} cannot be served: {loaded.text('message')}")
        except EOFError:
            line.close()
            code = await program.wait()
            raise EngineError(
                f"{served.name} cannot be served: while it was loaded, the process {_did(code)}"
            ) from None
        except BaseException:
            line.close()
            raise
        self.description = {"name": served.name, **_object(loaded)}
        return line

    async def _listen(self, line: Line) -> None:
        """Hears from the process that forks of the others' deaths, and of its own."""
        try:
            while True:
                frame = await line.receive()
                self._note(frame.header)
        except (EOFError, FrameError):
            pass
        line.close()
        if self._line is line:
            self._line = None

    def _note(self, told: Mapping[str, Any]) -> None:
        fate = self._fates.get(int(told["pid"]))
        if fate is not None and not fate.done():
            fate.set_result(int(told["code"]))


def _object(frame: Frame) -> Data:
    known = loads(frame.body)
    if not isinstance(known, dict):
        raise FrameError("a description that is no object")
    return known


def _did(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _fate(code: int) -> str:
    return f"it {_did(code)}"
