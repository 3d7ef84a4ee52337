"""Where in the user's source a thing was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of source text.

    Lines count from 1, as editors and tracebacks do. Columns count characters from 0; `end_column` is exclusive.
    """

    file: str
    line: int
    column: int = 0
    end_line: int = 0
    end_column: int = 0

    def __str__(self) -> str:
        """`file:line:column`, the column counted from 1 as editors show it."""
        return f"{self.file}:{self.line}:{self.column + 1}"


NOWHERE = Span("<unknown>", 0)
"""The span of what no source line stands for: programs that were built by hand."""
