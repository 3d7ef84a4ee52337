"""Reads the text form of programs, as the printer writes it, back to programs.

Comments are ignored, but for one that ends a line and says `# file:line`: it gives that op, and those after it, their
place in the source. The header may be indented; every region then counts from there.
"""

from __future__ import annotations

import ast
import re
from typing import Any, get_args

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.cursor import Cursor, Line, syntax_error
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.holes import expect_text, read_hole, read_signature
from nnsight_compiler.ir.ops import Handler, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.schema import alternatives, conforms, schema
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.syntax import ARITHMETIC, BINARY, BLOCKS, KEYWORDS, UNARY
from nnsight_compiler.ir.tokens import MAX_NESTING, BadTokenError, split
from nnsight_compiler.ir.values import Literal, Module, Operand, Value

_PLACE = re.compile(r"(?P<file>[^\s'\"]+|'.*'|\".*\"):(?P<line>[0-9]{1,9})")


def parse_program(text: str) -> Program:
    """The program that the text stands for. Raises `IRError` with line, column and reason where it is not IR."""
    return _Parser(_lines(text)).program()


def _lines(text: str) -> list[Line]:
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            tokens, comment = split(line)
        except BadTokenError as error:
            raise syntax_error(number, line, error.column, "no token starts here") from None
        if tokens:
            lines.append(Line(number, line, tuple(tokens), comment))
    return lines


class _Parser:
    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.next = 0
        self.span = NOWHERE
        self.values: dict[str, Value] = {}

    def program(self) -> Program:
        if not self.lines:
            raise IRError("line 1, column 1: expected a program, found nothing")
        program = self.code(self.lines[0], 1)
        if self.next < len(self.lines):
            raise self.error(self.lines[self.next], "expected the end of the program: this line is not inside it")
        return program

    def code(self, line: Line, depth: int) -> Program:
        """A program whose header is this line. Its values are its own."""
        outer, self.values = self.values, {}
        header = self.header(line)
        span = self.span
        body = self.region((), line.indentation, depth)
        self.values = outer
        return Program(body=body, span=span, **header)

    def header(self, line: Line) -> dict[str, Any]:
        cursor = self.advance(line)
        kind = cursor.word()
        if not conforms(kind, schema(Program)["kind"]):
            cursor.fail("expected `experiment`, `block`, `function` or `stage`", back=1)
        name = cursor.name()
        parameters, defaults = read_signature(cursor)
        if any(default != Literal(...) for default in defaults):
            cursor.fail("a program's defaults are not part of it: write `=...`", back=1)
        fields: dict[str, Any] = {"kind": kind, "name": name, "parameters": parameters}
        if cursor.accept("for"):
            fields["target"] = cursor.text()
        for word, field in (("given", "given"), ("after", "passes"), ("exports", "exports")):
            if cursor.accept(word):
                fields[field] = cursor.listed(cursor.text)
                if cursor.at(",", ahead=-1):
                    cursor.fail("expected a text")
        cursor.end()
        return fields

    def advance(self, line: Line) -> Cursor:
        """A cursor on this line, which is taken; the line's comment gives the place of what follows."""
        self.next += 1
        found = _PLACE.fullmatch(line.comment)
        if found is not None:
            self.span = _span(found["file"], int(found["line"]))
        return Cursor(line, self.values)

    def error(self, line: Line, reason: str) -> IRError:
        return syntax_error(line.number, line.text, line.indentation, reason)

    def region(self, parameters: tuple[Value, ...], outer: int, depth: int) -> Region:
        """The lines that are indented by two more than the line that opened the region."""
        found: list[Op] = []
        while self.next < len(self.lines) and (line := self.lines[self.next]).indentation > outer:
            if line.indentation != outer + 2:
                raise self.error(line, f"expected {outer + 2} spaces of indentation, not {line.indentation}")
            if depth > MAX_NESTING:
                raise self.error(line, f"regions nested more than {MAX_NESTING} deep")
            found.append(self.op(line, depth))
        return Region(parameters, tuple(found))

    def op(self, line: Line, depth: int) -> Op:
        cursor = self.advance(line)
        span = self.span
        names, star = self.result_names(cursor)
        token = cursor.peek()
        form = KEYWORDS.get(token.text) if token is not None and token.kind == "name" else None
        kind: type[Op]
        if form is None:
            kind, fields = ops.Operator, self.operator(cursor)
        else:
            kind, fields = form.op, dict(form.fixed)
            for part in form.parts:
                if isinstance(part, str):
                    expect_text(cursor, part)
                else:
                    fields.update(read_hole(cursor, part))
        if "result" in fields:
            names = (fields["result"], *names)
        if kind is ops.Stage:
            fields["program"] = self.stage(line, depth)
        self.results(cursor, kind, names, fields)
        if star >= 0 and kind is not ops.Unpack:
            raise self.error(line, "only `unpack` has a starred result")
        if kind is ops.Unpack:
            fields["star"] = star
        cursor.end()
        for name, hint in schema(kind).items():
            choices = get_args(hint)
            if isinstance(fields.get(name), str) and name in ("port", "method") and fields[name] not in choices:
                raise self.error(line, f"`{fields[name]}` is none of {', '.join(choices)}")
        for label, name in BLOCKS.get(kind, ()):
            fields[name] = self.block(kind, label, name, fields.get(name, ()), line.indentation, depth)
        if kind is ops.At and not isinstance(fields["module"], Module):
            raise self.error(line, "expected a module, such as `%model@transformer.h.3`")
        if kind is ops.Forward:
            fields["stops"] = self.stops(line, fields["stops"], fields["body"])
        return kind(span=span, **fields)

    def stops(self, line: Line, site: tuple[Operand, str, int | None] | None, body: Region) -> bool:
        """Whether a forward stops after the last site of its body, which must be the one that its line names."""
        last = body.ops[-1] if body.ops else None
        if site is not None and not (isinstance(last, ops.At) and site == (last.module, last.port, last.call)):
            raise self.error(line, "the forward does not stop after its last site")
        return site is not None

    def stage(self, line: Line, depth: int) -> Program:
        """The program of a `stage`, which follows its line, indented by two more."""
        if self.next == len(self.lines) or self.lines[self.next].indentation != line.indentation + 2:
            raise self.error(line, "expected the program of this stage on the lines after it")
        if depth >= MAX_NESTING:
            raise self.error(line, f"regions nested more than {MAX_NESTING} deep")
        return self.code(self.lines[self.next], depth + 1)

    def result_names(self, cursor: Cursor) -> tuple[tuple[str, ...], int]:
        """`%a, *%b = `: the names of the results, and which is starred. Nothing where no `=` follows."""
        star = -1
        names: list[str] = []
        while True:
            if cursor.at("*"):
                if star >= 0:
                    cursor.fail("a second starred result")
                cursor.expect("*")
                star = len(names)
            token = cursor.peek()
            if token is None or token.kind != "value":
                break
            names.append(cursor.defined_name() if cursor.at(",", "=", ahead=1) else "")
            if names[-1] == "" or not cursor.accept(","):
                break
        if not cursor.accept("="):
            cursor.place = 0
            return (), -1
        return tuple(names), star

    def operator(self, cursor: Cursor) -> dict[str, Any]:
        for sign in UNARY:
            if cursor.accept(sign):
                return {"operator": sign, "operands": (cursor.operand(),)}
        token = cursor.peek()
        if token is not None and token.kind == "name" and not cursor.at("None", "True", "False", "inf", "nan", "slice"):
            cursor.fail(f"`{token.text}` is no op")
        left: Operand = cursor.operand()
        sign = cursor.take("an operator", "sign", "name").text
        if (sign, cursor.at("not"), cursor.at("in")) in (("is", True, False), ("not", False, True)):
            sign += f" {cursor.word()}"
        in_place = sign not in BINARY and sign[:-1] in ARITHMETIC and sign.endswith("=")
        if not in_place and sign not in BINARY:
            cursor.fail(f"`{sign}` is no operator", back=1)
        operands = (left, cursor.operand())
        return {"operator": sign[:-1] if in_place else sign, "operands": operands, "in_place": in_place}

    def results(self, cursor: Cursor, kind: type[Op], names: tuple[str, ...], fields: dict[str, Any]) -> None:
        """Reads the types of the results and defines them."""
        types = cursor.types(len(names)) if names else ()
        values = tuple(Value(name, type) for name, type in zip(names, types, strict=True))
        expected = schema(kind)
        if "results" in expected:
            fields["results"] = values
        elif len(values) != ("result" in expected):
            cursor.fail(f"{len(values)} results, where the op has {int('result' in expected)}")
        elif values:
            fields["result"] = values[0]
        self.values.update((value.name, value) for value in values)

    def block(
        self, kind: type[Op], label: str, name: str, parameters: tuple[Value, ...], indentation: int, depth: int
    ) -> Any:
        """The region that a label opens; what an op has where the label is left out."""
        if not label:
            return self.region(parameters, indentation, depth + 1)
        if label == "handle":
            return self.handlers(indentation, depth)
        region = self.labelled(label, indentation, depth)
        optional = type(None) in alternatives(schema(kind)[name])
        return Region() if region is None and not optional else region

    def labelled(self, label: str, indentation: int, depth: int) -> Region | None:
        if self.next == len(self.lines):
            return None
        line = self.lines[self.next]
        if line.indentation != indentation or line.tokens[0].text != label:
            return None
        cursor = self.advance(line)
        cursor.expect(label)
        parameters = cursor.definitions()
        cursor.end()
        return self.region(parameters, indentation, depth + 1)

    def handlers(self, indentation: int, depth: int) -> tuple[Handler, ...]:
        found: list[Handler] = []
        while True:
            types = self.labelled("except", indentation, depth)
            body = self.labelled("handle", indentation, depth)
            if body is None:
                if types is not None:
                    raise self.error(self.lines[self.next - 1], "`except` without a `handle` after it")
                return tuple(found)
            found.append(Handler(types, body))


def _span(file: str, line: int) -> Span:
    if file[0] in "'\"":
        try:
            file = str(ast.literal_eval(file))
        except (ValueError, SyntaxError):
            return NOWHERE
    return NOWHERE if (file, line) == (NOWHERE.file, NOWHERE.line) else Span(file, line)
