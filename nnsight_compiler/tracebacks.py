"""Tracebacks as users want them: their own lines, and the model's where it is the model that failed.

A frame that gives the error that it handles another traceback, and raises it again with a bare `raise`, is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType


def trimmed(error: BaseException) -> TracebackType | None:
    """The traceback of an error without the compiler's frames.

    Where code of the user's failed at a site, the frames of the model that led there are left out as well.
    """
    held = list(_frames(error.__traceback__))
    while held and _is_ours(held[-1]):
        held.pop()
    ours = [number for number, each in enumerate(held) if _is_ours(each)]
    if ours and _module(held[ours[-1] + 1]).partition(".")[0] != "torch":  # else it is the model that failed
        held = held[: ours[0]] + held[ours[-1] + 1 :]
    found: TracebackType | None = None
    for each in reversed(held):
        if not _is_ours(each):
            found = TracebackType(found, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return found


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _module(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__", ""))


def _is_ours(traceback: TracebackType) -> bool:
    """Whether a frame is the compiler's own. The experiments of the demo are a user's."""
    package, _, rest = _module(traceback).partition(".")
    return package == "nnsight_compiler" and not rest.startswith("demo")
