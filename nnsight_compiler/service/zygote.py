"""The process that holds a model and does nothing but fork: `python -m nnsight_compiler.service.zygote`.

It imports and loads once, in one thread, since a pool of threads does not survive a fork. Each fork shares the weights
with it, is ready within milliseconds, and dies with it; it dies with the front end. On a device that cannot be used in
a forked process, the same program loads the model and runs jobs itself.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from json import dumps
from typing import Any, final

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.service.engine import EngineError
from nnsight_compiler.service.frames import Channel
from nnsight_compiler.service.runner import Runner
from nnsight_compiler.service.sandbox import die_with_parent
from nnsight_compiler.service.worker import WorkerSettings, serve

_CHANNEL = 3
"""The only descriptor of a forked process besides the standard ones."""


def main(descriptor: int, parent: int) -> None:
    """Loads what the first message names; then forks, or runs jobs, until the front end closes its end."""
    die_with_parent(parent)
    channel = Channel(socket.socket(fileno=descriptor))
    frame = channel.receive()
    assert frame is not None
    settings: Any = frame.header
    gc.disable()  # what is imported and loaded stays: to look through it again and again costs a fifth of a start
    try:
        runner = _factory(settings["runner"])(settings["source"], settings["options"], settings["weights"])
        card, files = runner.describe()
        if settings["forks"] and (threads := len(os.listdir("/proc/self/task"))) > 1:
            raise EngineError(f"loading it left {threads} threads running, which no fork would have")
    except Exception as error:  # whatever it is: it is told, and this process ends
        if not isinstance(error, ExperimentError):
            traceback.print_exc()
        channel.send({"is": "failed", "message": f"{type(error).__name__}: {error}"[:4000]})
        return
    known = {**card, "tokenizer": {name: b64encode(content).decode() for name, content in files.items()}}
    channel.send({"is": "loaded"}, dumps(known).encode())
    gc.enable()
    worker = WorkerSettings.of(settings["worker"])
    if settings["forks"]:
        _Zygote(channel, runner, worker).serve()
    else:
        serve(channel, runner, worker)


def _factory(name: str) -> Callable[[str, Any, bool], Runner]:
    """What makes a runner, named as `module:function`."""
    module, _, function = name.partition(":")
    made: Callable[[str, Any, bool], Runner] = getattr(importlib.import_module(module), function)
    return made


@final
class _Zygote:
    def __init__(self, channel: Channel, runner: Runner, settings: WorkerSettings) -> None:
        self.channel, self.runner, self.settings = channel, runner, settings
        self.children: set[int] = set()

    def serve(self) -> None:
        """Forks when it is told to, and tells of each process that ended."""
        gc.collect()
        gc.freeze()  # the collector would write to pages that forks share
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with suppress(EOFError):
            while True:
                ready, _, _ = select.select([self.channel.end.fileno(), woken], [], [])
                if woken in ready:
                    os.read(woken, 4096)
                    self.reap()
                while (frame := self.channel.receive(wait=False)) is not None:
                    self.fork(frame.descriptors[0])
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        for child in self.children:
            os.waitpid(child, 0)

    def reap(self) -> None:
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self.children.discard(process)
            self.channel.send({"is": "died", "pid": process, "code": os.waitstatus_to_exitcode(status)})

    def fork(self, descriptor: int) -> None:
        """Forks a process that serves this end of a channel."""
        parent = os.getpid()
        try:
            process = os.fork()
        except OSError as error:  # the front end sees that the channel is closed
            print(f"no process can be forked: {error.strerror}", file=sys.stderr)
            process = -1
        if process:
            os.close(descriptor)
            self.children |= {process} - {-1}
            return
        code = 1
        try:
            die_with_parent(parent)
            self.live(descriptor)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def live(self, descriptor: int) -> None:
        """What the fork does."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.channel.end.detach()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(descriptor, _CHANNEL)
        os.closerange(_CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
        serve(Channel(socket.socket(fileno=_CHANNEL)), self.runner, self.settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
