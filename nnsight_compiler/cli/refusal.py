"""What the command line refuses, and how it shows an exception of the user's own code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import typer

from nnsight_compiler.ir.errors import ExperimentError

OWN_FOLDERS = tuple(str((Path(__file__).parent.parent / folder).resolve()) for folder in (".", "passes", "runtime"))


class RefusalError(ExperimentError):
    """A command that cannot be carried out as given: why, in a line, and a way out."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"error: {reason}\n  way out: {way_out}")


def unknown(kind: str, name: str, known: Iterable[str], none: str) -> RefusalError:
    """A refusal of a name that does not exist: it lists those that do, the nearest first. `none` is the way out where
    there are none at all."""
    names = list(dict.fromkeys(known))
    near = get_close_matches(name, names)
    listed = ", ".join([*near, *(other for other in names if other not in near)])
    return RefusalError(f"there is no {kind} '{name}'", f"choose one of: {listed}" if names else none)


@contextmanager
def user_code() -> Iterator[None]:
    """Around code of the user's: shows an exception with the user's own lines, without the frames of this package and
    of libraries, and exits with 1. Our own errors name their lines themselves."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        shown = [frame for frame in frames if not _is_library(frame.filename)] or frames[-1:]
        text = ["Traceback (the lines of your code, most recent call last):\n", *traceback.format_list(shown)]
        text += traceback.format_exception_only(error)
        print("".join(text), end="", file=sys.stderr)
        raise typer.Exit(1) from None


def _is_library(file: str) -> bool:
    """Whether a frame is not the user's: this package, an installed package, the standard library, or no file."""
    path = Path(file)
    if file.startswith("<") or "site-packages" in path.parts:
        return True
    resolved = str(path.resolve())
    standard = str(Path(traceback.__file__).parent.resolve())
    return any(resolved.startswith(folder + "/") for folder in (*OWN_FOLDERS, standard))
