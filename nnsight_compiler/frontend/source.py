"""Where the source text of functions and frames is found: files, notebook cells, `python -c`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from types import CodeType, FunctionType
from typing import final

from nnsight_compiler.frontend.cells import cell_name, cell_of, named
from nnsight_compiler.frontend.codes import alike, codes_of, instructions
from nnsight_compiler.frontend.lambdas import lambda_excerpt
from nnsight_compiler.frontend.syntax import Excerpt
from nnsight_compiler.frontend.tokens import statement_excerpt
from nnsight_compiler.ir.errors import SourceNotFoundError
from nnsight_compiler.ir.lines import lines_of


@final
@dataclass(frozen=True, slots=True)
class Source:
    """The lines of a file, and a code object that has their positions.

    file: its name; of a cell of a notebook, the cell's number.
    code: does what the code that was asked for does. It is another one where the file has the text elsewhere: lines
        were added above it since it was imported, or IPython's autoreload compiled it by itself.
    """

    file: str
    lines: Sequence[str]
    code: CodeType

    def offset(self, code: CodeType, offset: int) -> int:
        """The offset in `self.code` of an instruction of the code that was asked for."""
        if code is self.code:
            return offset
        number = [each.offset for each in instructions(code)].index(offset)
        return instructions(self.code)[number].offset


def source_of(code: CodeType, namespace: Mapping[str, object], what: str) -> Source:
    """The file that code was compiled from, and where it stands there.

    Raises:
        SourceNotFoundError: it was compiled from a string or typed at a bare prompt.
    """
    file = code.co_filename
    lines: Sequence[str] = lines_of(file, namespace)
    if not lines and file == "<string>":
        lines = _command_line(code)
    if lines:
        return Source(named(file, lines), lines, _placed(code, lines))
    cell = cell_of(code)
    if cell is None:
        raise SourceNotFoundError(
            f"the source of {what} cannot be found: it comes from {file!r}, such as exec() or a bare Python prompt, "
            "which keeps no text. Write it in a file or a notebook, or give its text: intervene.from_source(text)"
        )
    return Source(*cell)


def _placed(code: CodeType, lines: Sequence[str]) -> CodeType:
    """The code with the positions of these lines: the same one, or that of the same function elsewhere in the file.

    Raises:
        SourceNotFoundError: it does not stand there any more.
    """
    if code.co_flags & CO_OPTIMIZED:
        known = codes_of("".join(lines), code)
        if code not in known:
            same = [each for each in known if alike(each, code)]
            if same:
                return min(same, key=lambda each: abs(each.co_firstlineno - code.co_firstlineno))
    if code.co_firstlineno > len(lines):
        raise changed_source(code)
    return code


def changed_source(code: CodeType) -> SourceNotFoundError:
    """The error for a file that no longer holds the code that was compiled from it."""
    return SourceNotFoundError(
        f"{cell_name(code.co_filename)}:{code.co_firstlineno} no longer holds {code.co_name!r}: the file has changed "
        "since it was imported. Import it again, or give its text: intervene.from_source(text)"
    )


def _command_line(code: CodeType) -> Sequence[str]:
    """The text of `python -c`, if that is what the code was compiled from: Python before 3.13 does not keep it."""
    arguments = sys.orig_argv
    if "-c" not in arguments[:-1]:
        return ()
    text = arguments[arguments.index("-c") + 1]
    return text.splitlines(keepends=True) if code in codes_of(text, code) else ()


def excerpt_of(function: FunctionType) -> Excerpt:
    """The source of one function, and no more than that."""
    source = source_of(function.__code__, function.__globals__, f"the function {function.__name__}")
    code, lines, file = source.code, source.lines, source.file
    start = code.co_firstlineno - 1
    if code.co_name == "<lambda>":
        return lambda_excerpt(code, lines, file)
    words = lines[start].split(None, 1)
    if not words or not (words[0].startswith("@") or words[0] in ("def", "async")):
        raise changed_source(code)
    return statement_excerpt(lines, start, file)
