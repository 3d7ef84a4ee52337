"""The one tree of errors that users see, and the diagnostics that compile errors are made of."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from nnsight_compiler.ir.span import Span


@final
@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake: where, what is wrong, a way out, and other places that take part in it (each with a remark)."""

    span: Span
    reason: str
    way_out: str = ""
    related: tuple[tuple[Span, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.span}: {self.reason}", *excerpt(self.span)]
        for span, remark in self.related:
            lines += [f"  {span}: {remark}", *excerpt(span)]
        if self.way_out:
            lines.append(f"  way out: {self.way_out}")
        return "\n".join(lines)


def excerpt(span: Span) -> list[str]:
    """The source line and a row of carets under the stretch meant; nothing where the source is not to be had."""
    text = linecache.getline(span.file, span.line).rstrip("\n")
    if not text:
        return []
    end = span.end_column if span.end_line == span.line else len(text)
    carets = "^" * max(1, end - span.column)
    indent = "".join("\t" if character == "\t" else " " for character in text[: span.column])
    return [f"    {text}", f"    {indent}{carets}"]


class ExperimentError(Exception):
    """Anything that went wrong in an experiment: the root of every error that this package raises."""


class CompileError(ExperimentError):
    """A program that cannot be compiled. Holds every mistake that was found, each as a `Diagnostic`."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(map(str, self.diagnostics)))


def joined(error: CompileError, check: Callable[[], object]) -> CompileError:
    """The error with the mistakes that a further check finds, in the order of the source."""
    try:
        check()
    except CompileError as other:
        found = {each: None for each in (*error.diagnostics, *other.diagnostics)}
        return CompileError(sorted(found, key=lambda each: (each.span.file, each.span.line, each.span.column)))
    return error


class SourceNotFoundError(ExperimentError):
    """No source text can be found for a function or a block."""


class RunError(ExperimentError):
    """A run that did not go as the plan says: a read or write that did not fire, a write that does not fit its site."""


class LimitError(RunError):
    """A run that would have run the model more often than it may."""


class IRError(ExperimentError):
    """IR that is not well formed: text that does not parse, a damaged file, a program that fails the verifier."""


class ModelError(ExperimentError):
    """A model that cannot be loaded, or that lacks what was asked for."""


class FileError(ExperimentError):
    """An experiment file that cannot be written, read or run. Where lines of the experiment are the reason, each is a
    `Diagnostic`."""

    def __init__(self, reason: str, diagnostics: Sequence[Diagnostic] = ()) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join([reason, *map(str, self.diagnostics)]))
