"""One line that says where a job is, on a terminal or in a notebook, and is gone when the job has ended."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Protocol, final

from nnsight_compiler.remote.refusals import shown

FIRST_SECONDS = 0.4
"""What is quicker is never shown."""
_WIDEST = 100


class Screen(Protocol):
    """Where a line can be shown, and taken away."""

    def show(self, line: str) -> None:
        """Shows a line in the place of the one before."""

    def clear(self) -> None:
        """Takes it away."""


@final
class Progress:
    """The line of one job: `job 3f2a on http://…: queued (place 2)`, `running`, and what is waited for."""

    def __init__(self, screen: Screen | None, name: str) -> None:
        self._screen, self.name = screen, name
        self._said, self._on_screen = "", ""
        self._may_show = False
        self._timer: threading.Timer | None = None
        self._inside_line = False
        self._lock = threading.Lock()

    def say(self, what: str) -> None:
        """Shows what the job is at, unless the job is quick."""
        if self._screen is None:
            return
        with self._lock:
            self._said = what
            if self._timer is None:
                self._timer = threading.Timer(FIRST_SECONDS, self._begin)
                self._timer.daemon = True
                self._timer.start()
            self._show()

    def print(self, text: str) -> None:
        """Writes what the job printed to the standard output, where the line does not stand in its way."""
        with self._lock:
            self._hide()
            sys.stdout.write(text)
            sys.stdout.flush()
            self._inside_line = not text.endswith("\n") if text else self._inside_line
            self._show()

    def end(self) -> None:
        """Takes the line away for good."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._hide()
            self._may_show, self._said = False, ""

    def _begin(self) -> None:
        with self._lock:
            self._may_show = bool(self._said)
            self._show()

    def _show(self) -> None:
        if self._screen is None or not self._may_show or self._inside_line:
            return
        line = shown(f"{self.name}: {self._said}", _WIDEST).replace("\n", " ")
        if line != self._on_screen:
            self._screen.show(line)
            self._on_screen = line

    def _hide(self) -> None:
        if self._screen is not None and self._on_screen:
            self._screen.clear()
            self._on_screen = ""


def screen() -> Screen | None:
    """Where progress is shown here: in a notebook, on a terminal, or nowhere."""
    if os.environ.get("NNSIGHT_PROGRESS") == "0":
        return None
    kernel = _notebook()
    if kernel is not None:
        return kernel
    return Terminal(sys.stderr) if sys.stderr is not None and sys.stderr.isatty() else None


@final
class Terminal:
    """The last line of a terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def show(self, line: str) -> None:
        """Shows a line in the place of the one before."""
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()

    def clear(self) -> None:
        """Takes it away."""
        self._stream.write("\r\x1b[2K")
        self._stream.flush()


@final
class Notebook:
    """An output of a notebook's cell, which is changed in place."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None

    def show(self, line: str) -> None:
        """Shows a line in the place of the one before."""
        text = {"text/plain": line}
        if self._handle is None:
            self._handle = self._display(text, raw=True, display_id=True)
        else:
            self._handle.update(text, raw=True)

    def clear(self) -> None:
        """Takes it away."""
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)


def _notebook() -> Notebook | None:
    """The cell that runs now, where Python runs in a notebook."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return Notebook(display)
