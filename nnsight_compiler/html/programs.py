"""A program beside the source that it was made from, line by line."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
.nnsightc-program th { font-weight: normal; opacity: 0.65; padding-bottom: 0.3em;
  white-space: normal; max-width: 60em; }
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
    """Lines of source, and the lines of the program that come from the first of them.

    again: that line stood in an earlier row, or is no line of the function.
    """

    numbers: Sequence[str]
    source: Sequence[str]
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
    known = [f"for {program.target}"] if program.target else []
    for word, texts in (("given", program.given), ("after", program.passes)):
        known += [f"{word} {', '.join(texts)}"] if texts else []
    rows = "".join(
        f'<tr><td class="line">{_lines(row.numbers)}</td><td class="{"again" if row.again else "source"}">'
        f'{_lines(row.source)}</td><td class="ir">{escape(row.ir)}</td></tr>'
        for row in _rows(replace(program, target="", given=(), passes=()))
    )
    titles = f"<th></th><th>{escape(Path(program.span.file).name)}</th>"
    return f'<table><tr>{titles}<th class="ir">{escape(" ".join(["IR", *known]))}</th></tr>{rows}</table>'


def _lines(texts: Sequence[str]) -> str:
    return escape("\n".join(texts))


def _rows(program: Program) -> list[_Row]:
    """The rows of a program's table. Lines that nothing comes from join the row of the line before them."""
    rows: list[_Row] = []
    for row in _single_rows(program):
        if rows and not row.ir and not rows[-1].again:
            above = rows.pop()
            row = replace(above, numbers=(*above.numbers, *row.numbers), source=(*above.source, *row.source))
        rows.append(row)
    return rows


def _single_rows(program: Program) -> Iterator[_Row]:
    file = program.span.file
    lines = linecache.getlines(file)
    own = _own_lines(program, lines)
    shown = own.start
    for (place, number), group in groupby(program_lines(program), key=lambda line: (line.file, line.number)):
        ir = "\n".join(line.text for line in group)
        inside = place == file and number in own
        for between in range(shown, number if inside else shown):
            yield _Row((str(between),), (lines[between - 1].rstrip(),), "")
        where = str(number) if place == file else f"{Path(place).name}:{number}"
        again = not inside or number < shown
        yield _Row((where,), (linecache.getline(place, number).rstrip(),), ir, again)
        shown = max(shown, number + 1) if inside else shown
    for after in range(shown, own.stop):
        yield _Row((str(after),), (lines[after - 1].rstrip(),), "")


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
