"""Source text parsed with libcst: nodes, the spans that they cover, and names as Python's compiler sees them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import final

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.span import Span

FunctionNode = cst.FunctionDef | cst.Lambda
_WRAPPER = "if True:\n"


@final
@dataclass(frozen=True, slots=True)
class Excerpt:
    """A stretch of a file: whole lines, or an expression that starts at `first_column` of the first line."""

    text: str
    file: str
    first_line: int
    first_column: int = 0


@final
class Syntax:
    """A parsed excerpt.

    Indented text is parsed under an `if True:` of its own instead of being dedented, which would change docstrings that
    have a line at the left margin.
    """

    def __init__(self, excerpt: Excerpt) -> None:
        self.file = excerpt.file
        self._prefix = ""
        indented = not excerpt.first_column and excerpt.text[:1] in (" ", "\t")
        text = _WRAPPER + excerpt.text if indented else excerpt.text
        self._line_offset = excerpt.first_line - (2 if indented else 1)
        self._column_offset = excerpt.first_column
        try:
            module = cst.parse_module(text)
        except cst.ParserSyntaxError as error:
            raise CompileError([self._syntax_error(text, error)]) from None
        self.module = MetadataWrapper(module, unsafe_skip_copy=True)
        self._ranges = self.module.resolve(PositionProvider)
        self.statements: Sequence[cst.BaseStatement | cst.BaseSmallStatement] = module.body
        if indented:
            outer = module.body[0]
            assert isinstance(outer, cst.If), "the wrapper is the first statement"
            self.statements = outer.body.body

    def within(self, class_name: str) -> Syntax:
        """The same text, for code that stands in a class of this name."""
        other = copy(self)
        other._prefix = class_name.lstrip("_")
        return other

    def span(self, node: cst.CSTNode) -> Span:
        """Where the node stands in the user's file."""
        covered: CodeRange = self._ranges[node]
        start, end = covered.start, covered.end
        return Span(
            self.file,
            start.line + self._line_offset,
            start.column + (self._column_offset if start.line == 1 else 0),
            end.line + self._line_offset,
            end.column + (self._column_offset if end.line == 1 else 0),
        )

    def name(self, name: str) -> str:
        """The name as Python compiles it: `__x` in a class `C` is `_C__x`."""
        if self._prefix and name.startswith("__") and not name.endswith("__") and "." not in name:
            return f"_{self._prefix}{name}"
        return name

    def code(self, node: cst.CSTNode) -> str:
        """The text of the node."""
        return self.module.module.code_for_node(node)

    def _syntax_error(self, text: str, error: cst.ParserSyntaxError) -> Diagnostic:
        """Python's own words for the mistake, which are better than a parser generator's; the parser's where Python
        would accept the text."""
        reason, line, column = error.message, error.raw_line, error.raw_column
        try:
            compile(text, self.file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as own:
            if isinstance(own, SyntaxError) and own.lineno is not None:
                reason, line, column = own.msg, own.lineno, max(0, (own.offset or 1) - 1)
        column += self._column_offset if line == 1 else 0
        line += self._line_offset
        return Diagnostic(Span(self.file, line, column, line, column + 1), f"this is not valid Python: {reason}")


def class_of(qualified_name: str) -> str:
    """The class whose body a function's code stands in, from its qualified name; empty where there is none.

    `Outer.method.<locals>.inner` stands in `Outer`: a name followed by `<locals>` is a function, any other a class.
    """
    parts = qualified_name.split(".")[:-1]
    while parts:
        if parts[-1] != "<locals>":
            return parts[-1]
        del parts[-2:]
    return ""
