"""The text of a lambda, told from others on its line."""

from __future__ import annotations

import tokenize
from collections.abc import Sequence
from types import CodeType

from nnsight_compiler.frontend.syntax import Excerpt
from nnsight_compiler.frontend.tokens import LAYOUT, characters, readable
from nnsight_compiler.ir.errors import SourceNotFoundError

_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_AFTER_A_LAMBDA = (*_CLOSING, ",", ";", ":", "=", "for", "async")
Position = tuple[int, int]
"""A line, counted from 1 in the file or from 0 in a list of lines, and a column in characters."""


def lambda_excerpt(code: CodeType, lines: Sequence[str], file: str) -> Excerpt:
    """The text of a lambda: found on its first line, told from others there by where its body begins.

    Where Python keeps no columns (an option; in 3.12 also for a body that is a constant), by what it compiles to.
    """
    start = code.co_firstlineno - 1
    body = _body_range(code, lines)
    found: list[Excerpt] = []
    for column in _lambda_columns(lines[start]):
        text = ["(" + lines[start][column:], *lines[start + 1 :]]
        moved = None if body is None else tuple(_moved(position, start, column - 1) for position in body)
        end = _lambda_end(text, moved)
        if end is not None:
            kept = text[: end[0]]
            kept[-1] = kept[-1][: end[1]]
            found.append(Excerpt("".join(kept) + ")", file, start + 1, column - 1))
    if len(found) > 1:
        found = [each for each in found if _compiles_to(each.text, code)][:1]
    if not found:
        raise SourceNotFoundError(
            f"{file}:{code.co_firstlineno}: which lambda on this line is meant cannot be told; "
            "write it as a function with a name"
        )
    return found[0]


def _compiles_to(text: str, code: CodeType) -> bool:
    """Whether a lambda's text gives the same instructions and constants."""
    codes = [each for each in compile(text, "", "eval").co_consts if isinstance(each, CodeType)]
    made = codes[-1] if codes else None  # its defaults come before it
    return made is not None and (made.co_code, made.co_names, made.co_varnames) == (
        code.co_code,
        code.co_names,
        code.co_varnames,
    ) and repr(made.co_consts) == repr(code.co_consts)  # fmt: skip


def _lambda_columns(line: str) -> list[int]:
    return [token.start[1] for token in readable([line]) if token.type == tokenize.NAME and token.string == "lambda"]


def _body_range(code: CodeType, lines: Sequence[str]) -> tuple[Position, Position] | None:
    """The first and the last position of a lambda's body, in lines from 0; `None` where Python keeps no columns."""
    first: list[Position] = []
    last: list[Position] = []
    for line, end_line, column, end_column in code.co_positions():
        if line is None or end_line is None or column is None or end_column is None:
            continue
        if (line, column) != (end_line, end_column):
            first.append((line - 1, characters(lines[line - 1], column)))
            last.append((end_line - 1, characters(lines[end_line - 1], end_column)))
    return (min(first), max(last)) if first else None


def _moved(position: Position, start: int, shift: int) -> Position:
    """A position in the file as one in the text that begins on line `start`, counted as tokens are: lines from 1."""
    line, column = position
    return line - start + 1, column - (shift if line == start else 0)


def _lambda_end(text: Sequence[str], body: tuple[Position, ...] | None) -> Position | None:
    """Where a lambda ends that stands after an opening parenthesis at the start of a text.

    Args:
        body: where its body begins and how far it reaches at least, both apart from parentheses. `None` where that is
            not known: then the lambda ends at the first thing that cannot belong to it, or with its line.

    Returns:
        `None` if the body of the lambda there does not begin where it should.
    """
    depth = colons = 0
    starts: set[Position] | None = None
    opening = False
    end: Position | None = None
    for token in readable(text):
        string = token.string
        if token.type == tokenize.NL and body is None and depth == 1 and end is not None:
            break
        if token.type in LAYOUT:
            continue
        if depth == 1 and end is not None:
            complete = not colons and string in _AFTER_A_LAMBDA if body is None else end >= body[1]
            if complete or string == ")":
                break
        depth += (string in _OPENING) - (string in _CLOSING)
        colons += depth == 1 and string == "lambda"
        colons -= depth == 1 and string == ":"
        if starts is None:
            if string == ":" and not colons:
                starts, opening = set(), True
            continue
        if opening:
            starts.add(token.start)
            opening = string == "("
        end = token.end
    if end is None or starts is None:
        return None
    return end if body is None or (body[0] in starts and end >= body[1]) else None
