"""Strings and f-strings."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

import libcst as cst

from nnsight_compiler.frontend.targets import Targets
from nnsight_compiler.ir.ops import Format, FormatPart
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Literal, Operand


class Strings(Targets):
    """Lowers string literals, and f-strings to `format`."""

    def string(self, node: cst.SimpleString, hint: str) -> Operand:
        return Literal(_evaluate(node.value))

    def concatenated(self, node: cst.ConcatenatedString, hint: str) -> Operand:
        parts: list[cst.SimpleString | cst.FormattedString] = []
        rest: cst.BaseExpression = node
        while isinstance(rest, cst.ConcatenatedString):
            assert isinstance(rest.left, cst.SimpleString | cst.FormattedString), "other strings are refused"
            parts.append(rest.left)
            rest = rest.right
        assert isinstance(rest, cst.SimpleString | cst.FormattedString), "other strings are refused"
        parts.append(rest)
        texts = [_evaluate(part.value) for part in parts if isinstance(part, cst.SimpleString)]
        if len(texts) == len(parts):
            joined = texts[0]
            for text in texts[1:]:
                joined = joined + text  # type: ignore[operator]  # Python's parser refuses bytes next to str
            return Literal(joined)
        return self.format(parts, self.span(node), hint)

    def formatted(self, node: cst.FormattedString, hint: str) -> Operand:
        return self.format([node], self.span(node), hint)

    def format(self, strings: Sequence[cst.SimpleString | cst.FormattedString], span: Span, hint: str) -> Operand:
        parts: list[str | FormatPart] = []
        for string in strings:
            if isinstance(string, cst.SimpleString):
                parts.append(str(_evaluate(string.value)))
            else:
                parts = self.format_parts(string.parts, string.start, parts, span)
        result = self.fresh(hint)
        self.builder.emit(Format(result, _joined(parts), span=span))
        return result

    def format_parts(
        self,
        contents: Sequence[cst.BaseFormattedStringContent],
        start: str,
        parts: list[str | FormatPart],
        span: Span,
    ) -> list[str | FormatPart]:
        """Adds the parts of an f-string to those before it. A value is formatted before the next one is evaluated, so
        where that may run code, what stands so far becomes one string."""
        for content in contents:
            if isinstance(content, cst.FormattedStringText):
                parts.append(_text(content.value, start))
                continue
            assert isinstance(content, cst.FormattedStringExpression), "an f-string holds text and fields"
            if not self.is_plain(content.expression) and any(isinstance(part, FormatPart) for part in parts):
                formatted = self.fresh()
                self.builder.emit(Format(formatted, _joined(parts), span=span))
                parts = [FormatPart(formatted)]
            if content.equal is not None:
                before, after = content.whitespace_before_expression, content.whitespace_after_expression
                pieces = (before, content.expression, after, content.equal)
                parts.append("".join(map(self.syntax.code, pieces)))
            value = self.expression(content.expression)
            specification: Operand | None = None
            if content.format_spec is not None:
                specification = self.specification(content.format_spec, start, span)
            conversion = content.conversion or ""
            if content.equal is not None and not conversion and specification is None:
                conversion = "r"
            assert conversion in ("", "r", "s", "a"), "Python's parser refuses any other conversion"
            parts.append(FormatPart(value, conversion, specification))  # type: ignore[arg-type]  # see above
        return parts

    def specification(self, contents: Sequence[cst.BaseFormattedStringContent], start: str, span: Span) -> Operand:
        parts = _joined(self.format_parts(contents, start, [], span))
        if not parts:
            return Literal("")
        if len(parts) == 1 and isinstance(parts[0], str):
            return Literal(parts[0])
        result = self.fresh()
        self.builder.emit(Format(result, parts, span=span))
        return result


def _evaluate(text: str) -> object:
    """The value of a string literal. Python has warned of its invalid escapes already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def _text(text: str, start: str) -> str:
    """The text between the fields of an f-string that opens with `start`."""
    text = text.replace("{{", "{").replace("}}", "}")
    quote = start.lstrip("fFrR")
    if "\\" not in text or "r" in start.lower():
        return text
    return str(_evaluate(f"{quote}{text}{quote}"))


def _joined(parts: Sequence[str | FormatPart]) -> tuple[str | FormatPart, ...]:
    """The parts with neighbouring texts joined and empty ones left out."""
    result: list[str | FormatPart] = []
    for part in parts:
        if isinstance(part, str) and result and isinstance(result[-1], str):
            result[-1] += part
        elif part != "":
            result.append(part)
    return tuple(result)
