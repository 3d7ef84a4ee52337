"""Stretches of source text, found by its tokens alone: it may be cut out of a longer one."""

from __future__ import annotations

import tokenize
from collections.abc import Iterator, Sequence

from nnsight_compiler.frontend.syntax import Excerpt

LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)


def statement_excerpt(lines: Sequence[str], start: int, file: str) -> Excerpt:
    """The statement that begins on a line (counted from 0), with its decorators and its body."""
    return Excerpt("".join(lines[start : statement_end(lines, start)]), file, start + 1)


def statement_end(lines: Sequence[str], start: int) -> int:
    """The line after a statement. Reads no further than needed to see that it has ended."""
    depth = end = 0
    decorated = False
    fresh = True
    for token in readable(lines[start:]):
        if token.type == tokenize.INDENT:
            depth += token.start[0] > 1
        elif token.type == tokenize.DEDENT:
            depth -= 1
        elif token.type == tokenize.NEWLINE:
            end, fresh = token.start[0], True
        elif token.type not in LAYOUT and fresh:
            if end and depth <= 0 and not decorated:
                break
            decorated, fresh = token.string == "@", False
    return start + max(end, 1)


def readable(text: Sequence[str]) -> Iterator[tokenize.TokenInfo]:
    """The tokens up to the end, or up to where the text is no longer well formed."""
    tokens = tokenize.generate_tokens(iter([*text, ""]).__next__)
    while True:
        try:
            yield next(tokens)
        except (StopIteration, tokenize.TokenError, IndentationError):
            return


def characters(line: str, size: int) -> int:
    """How many characters the first bytes of a line are."""
    return len(line.encode()[:size].decode(errors="ignore"))
