"""A program beside the source that it was made from, line by line."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import final

from nnsight_compiler.frontend.tokens import statement_end
from nnsight_compiler.ir.printer import program_lines
from nnsight_compiler.ir.program import Program

_STYLE = """
.nnsightc-program { overflow-x: auto; }
.nnsightc-program table { border-collapse: collapse; font-size: inherit; margin: 0; }
.nnsightc-program td, .nnsightc-program th { border: 0; padding: 0 0.8em 0 0; text-align: left; vertical-align: top;
  white-space: pre; font-family: monospace; line-height: 1.45; background: none; }
.nnsightc-program th { font-weight: normal; opacity: 0.65; padding-bottom: 0.3em; }
.nnsightc-program td.line { opacity: 0.5; text-align: right; user-select: none; }
.nnsightc-program td.ir { border-left: 1px solid rgba(128, 128, 128, 0.5); padding-left: 0.8em; }
.nnsightc-program td.again { opacity: 0.5; }
.nnsightc-program tr:hover td { background: rgba(128, 128, 128, 0.15); }
.nnsightc-program summary { cursor: pointer; opacity: 0.65; }
.nnsightc-program pre { margin: 0.3em 0 0.6em 1em; background: none; color: inherit; }
"""


@final
@dataclass(frozen=True, slots=True)
class _Row:
    """A line of source, with the lines of the program that come from it.

    again: the source line stood in an earlier row, or is no line of the function.
    """

    number: str
    source: str
    ir: str
    again: bool = False


def program_html(program: Program) -> str:
    """The source of a program's function, and the program, in two columns."""
    return _page(_table(program))


def stages_html(program: Program, stages: Sequence[tuple[str, Program]]) -> str:
    """A program after the passes beside its source, and below it what each pass that changed anything made."""
    folded, before = "", ""
    for name, stage in stages:
        text = "\n".join(line.text for line in program_lines(stage)[1:])
        if text != before:
            folded += f"<details><summary>after {escape(name)}</summary><pre>{escape(text)}</pre></details>"
        before = text
    return _page(_table(program) + folded)


def _page(content: str) -> str:
    return f'<div class="nnsightc-program"><style>{_STYLE}</style>{content}</div>'


def _table(program: Program) -> str:
    file = program.span.file
    rows = "".join(
        f'<tr><td class="line">{escape(each.number)}</td><td class="{"again" if each.again else "source"}">'
        f'{escape(each.source)}</td><td class="ir">{escape(each.ir)}</td></tr>'
        for each in _rows(program)
    )
    return f'<table><tr><th></th><th>{escape(Path(file).name)}</th><th class="ir">IR</th></tr>{rows}</table>'


def _rows(program: Program) -> Iterator[_Row]:
    file = program.span.file
    lines = linecache.getlines(file)
    own = _own_lines(program, lines)
    shown = own.start
    for (place, number), group in groupby(program_lines(program), key=lambda line: (line.file, line.number)):
        ir = "\n".join(line.text for line in group)
        if place != file or number not in own:
            where = str(number) if place == file else f"{Path(place).name}:{number}"
            yield _Row(where, linecache.getline(place, number).rstrip(), ir, again=True)
            continue
        for between in range(shown, number):
            yield _Row(str(between), lines[between - 1].rstrip(), "")
        yield _Row(str(number), lines[number - 1].rstrip(), ir, again=number < shown)
        shown = max(shown, number + 1)
    for after in range(shown, own.stop):
        yield _Row(str(after), lines[after - 1].rstrip(), "")


def _own_lines(program: Program, lines: Sequence[str]) -> range:
    """The numbers of the lines of a program's function, with its decorators; none where its file is not at hand."""
    first = program.span.line
    if not 0 < first <= len(lines):
        return range(0)
    end = statement_end(lines, first - 1)
    while first > 1 and lines[first - 2].lstrip().startswith("@"):
        first -= 1
    while end > first and not lines[end - 1].strip():
        end -= 1
    return range(first, end + 1)
