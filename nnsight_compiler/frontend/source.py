"""Where the source text of functions and frames is found: files, notebook cells, `python -c`."""

from __future__ import annotations

import linecache
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FunctionType

from nnsight_compiler.frontend.syntax import Excerpt
from nnsight_compiler.ir.errors import SourceNotFoundError

_LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_AFTER_A_LAMBDA = (*_CLOSING, ",", ";", ":", "=", "for", "async")
Position = tuple[int, int]
"""A line, counted from 1 in the file or from 0 in a list of lines, and a column in characters."""


def excerpt_of(function: FunctionType) -> Excerpt:
    """The source of one function, and no more than that."""
    code = function.__code__
    lines = lines_of(code, function.__globals__, f"the function {function.__name__}")
    start = code.co_firstlineno - 1
    if code.co_name == "<lambda>":
        return _lambda_excerpt(code, lines)
    words = lines[start].split(None, 1)
    if not words or not (words[0].startswith("@") or words[0] in ("def", "async")):
        raise changed_source(code)
    return statement_excerpt(lines, start, code.co_filename)


def lines_of(code: CodeType, namespace: Mapping[str, object], what: str) -> Sequence[str]:
    """The lines of the file that the code was compiled from.

    Raises:
        SourceNotFoundError: it was compiled from a string or typed at a bare prompt.
    """
    file = code.co_filename
    linecache.checkcache(file)
    lines: Sequence[str] = linecache.getlines(file, dict(namespace))
    if not lines and file == "<string>":
        lines = _command_line(code)
    if not lines:
        raise SourceNotFoundError(
            f"the source of {what} cannot be found: it comes from {file!r}, such as exec() or a bare Python prompt, "
            "which keeps no text. Write it in a file or a notebook, or give its text: intervene.from_source(text)"
        )
    if code.co_firstlineno > len(lines):
        raise changed_source(code)
    return lines


def changed_source(code: CodeType) -> SourceNotFoundError:
    """The error for a file that no longer holds the code that was compiled from it."""
    return SourceNotFoundError(
        f"{code.co_filename}:{code.co_firstlineno} no longer holds {code.co_name!r}: the file has changed since it was "
        "imported. Import it again, or give its text: intervene.from_source(text)"
    )


def _command_line(code: CodeType) -> Sequence[str]:
    """The text of `python -c`, if that is what the code was compiled from: Python before 3.13 does not keep it."""
    arguments = sys.orig_argv
    if "-c" not in arguments[:-1]:
        return ()
    text = arguments[arguments.index("-c") + 1]
    return text.splitlines(keepends=True) if code in _code_objects(text) else ()


@lru_cache(maxsize=4)
def _code_objects(text: str) -> frozenset[CodeType]:
    """Every code object that a text compiles to."""
    try:
        waiting = [compile(text, "<string>", "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return frozenset()
    found: set[CodeType] = set()
    while waiting:
        code = waiting.pop()
        found.add(code)
        waiting.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(found)


def statement_excerpt(lines: Sequence[str], start: int, file: str) -> Excerpt:
    """The statement that begins on a line (counted from 0), with its decorators and its body."""
    return Excerpt("".join(lines[start : statement_end(lines, start)]), file, start + 1)


def statement_end(lines: Sequence[str], start: int) -> int:
    """The line after a statement. Reads no further than needed to see that it has ended."""
    depth = end = 0
    decorated = False
    fresh = True
    for token in _readable(lines[start:]):
        if token.type == tokenize.INDENT:
            depth += token.start[0] > 1
        elif token.type == tokenize.DEDENT:
            depth -= 1
        elif token.type == tokenize.NEWLINE:
            end, fresh = token.start[0], True
        elif token.type not in _LAYOUT and fresh:
            if end and depth <= 0 and not decorated:
                break
            decorated, fresh = token.string == "@", False
    return start + max(end, 1)


def _tokens(lines: Sequence[str]) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(iter([*lines, ""]).__next__)


def _lambda_excerpt(code: CodeType, lines: Sequence[str]) -> Excerpt:
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
            found.append(Excerpt("".join(kept) + ")", code.co_filename, start + 1, column - 1))
    if len(found) > 1:
        found = [each for each in found if _compiles_to(each.text, code)][:1]
    if not found:
        raise SourceNotFoundError(
            f"{code.co_filename}:{code.co_firstlineno}: which lambda on this line is meant cannot be told; "
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
    return [token.start[1] for token in _readable([line]) if token.type == tokenize.NAME and token.string == "lambda"]


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


def characters(line: str, size: int) -> int:
    """How many characters the first bytes of a line are."""
    return len(line.encode()[:size].decode(errors="ignore"))


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
    for token in _readable(text):
        string = token.string
        if token.type == tokenize.NL and body is None and depth == 1 and end is not None:
            break
        if token.type in _LAYOUT:
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


def _readable(text: Sequence[str]) -> Iterator[tokenize.TokenInfo]:
    """The tokens up to the end, or up to where the text is no longer well formed: it is cut out of a longer one."""
    tokens = _tokens(text)
    while True:
        try:
            yield next(tokens)
        except (StopIteration, tokenize.TokenError, IndentationError):
            return
