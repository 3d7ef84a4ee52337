"""Reads the pieces of one line of the text form: words and signs, names, types, and operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar, final

from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.syntax import LONG_DTYPES
from nnsight_compiler.ir.tokens import MAX_NESTING, Token, read_literal, read_text, read_value
from nnsight_compiler.ir.types import ANY, Dimension, ModuleType, TensorType, Type
from nnsight_compiler.ir.values import NONE, Module, Operand, Slice, Tuple, Value

Read = TypeVar("Read")


@final
@dataclass(frozen=True, slots=True)
class Line:
    """A line that holds more than a comment."""

    number: int
    text: str
    tokens: tuple[Token, ...]
    comment: str

    @property
    def indentation(self) -> int:
        return self.tokens[0].start


def syntax_error(number: int, text: str, column: int, reason: str) -> IRError:
    """The error for a mistake in a line, which it quotes. Lines and columns count from 1 in the message."""
    caret = "".join("\t" if character == "\t" else " " for character in text[:column]) + "^"
    return IRError(f"line {number}, column {column + 1}: {reason}\n    {text}\n    {caret}")


@dataclass(slots=True)
class Cursor:
    """A place in a line. `values` holds every value defined so far, by name."""

    line: Line
    values: dict[str, Value]
    place: int = 0
    depth: int = field(default=0, init=False)

    # --- tokens ---

    def peek(self, ahead: int = 0) -> Token | None:
        """The next token, or one after it; `None` at the end of the line."""
        place = self.place + ahead
        return self.line.tokens[place] if place < len(self.line.tokens) else None

    def at(self, *texts: str, ahead: int = 0) -> bool:
        """Whether the next token is one of these words or signs."""
        token = self.peek(ahead)
        return token is not None and token.kind in ("name", "sign") and token.text in texts

    def accept(self, text: str) -> bool:
        """Takes the next token if it is this word or sign."""
        found = self.at(text)
        self.place += found
        return found

    def expect(self, text: str) -> None:
        """Takes this word or sign, or fails."""
        if not self.accept(text):
            self.fail(f"expected `{text}`{self._found()}")

    def take(self, what: str, *kinds: str) -> Token:
        """Takes a token of one of these kinds (any, if none are given), or fails saying what was expected."""
        token = self.peek()
        if token is None or (kinds and token.kind not in kinds):
            self.fail(f"expected {what}{self._found()}")
        self.place += 1
        return token

    def end(self) -> None:
        """Fails unless the line has ended."""
        if self.peek() is not None:
            self.fail("expected the end of the line" + self._found())

    def fail(self, reason: str, back: int = 0) -> NoReturn:
        """Raises an error at the next token, or at one before it."""
        token = self.peek(-back)
        column = self.line.tokens[-1].end if token is None else token.start
        raise syntax_error(self.line.number, self.line.text, column, reason)

    def _found(self) -> str:
        token = self.peek()
        return " before the end of the line" if token is None else f", not `{token.text}`"

    def listed(self, read: Callable[[], Read], *closers: str) -> tuple[Read, ...]:
        """Reads parts with commas between them, up to a closing sign, which is left, or to the end of the line."""
        parts: list[Read] = []
        while self.peek() is not None and not self.at(*closers):
            parts.append(read())
            if not self.accept(","):
                break
        return tuple(parts)

    def guarded(self, read: Callable[[Token], Read], token: Token) -> Read:
        """What a token spells; fails where it spells nothing possible, such as an integer of too many digits."""
        try:
            return read(token)
        except (ValueError, SyntaxError, OverflowError):
            self.fail(f"`{token.text[:40]}` spells nothing", back=1)

    # --- names, values, types ---

    def name(self) -> str:
        """An identifier or a quoted name."""
        return self.guarded(read_text, self.take("a name", "name", "string"))

    def word(self) -> str:
        """A plain word."""
        return self.take("a word", "name").text

    def text(self) -> str:
        """A text without spaces and commas, or a quoted one: what stands together is one text."""
        token = self.take("a text")
        text = self.guarded(read_text, token)
        while (follower := self.peek()) is not None and follower.start == token.end and follower.text != ",":
            self.place += 1
            token = follower
            text += self.guarded(read_text, token)
        return text

    def defined_name(self) -> str:
        """`%h`, where a value is defined."""
        name, path = self.guarded(read_value, self.take("a value", "value"))
        if path is not None:
            self.fail("a module cannot be defined", back=1)
        return name

    def definition(self) -> Value:
        """`%h: type`, where the parameter of a region is defined."""
        value = Value(self.defined_name(), self.type() if self.accept(":") else ANY)
        self.values[value.name] = value
        return value

    def definitions(self) -> tuple[Value, ...]:
        """`%h: type, %i`."""
        return self.listed(self.definition)

    def types(self, count: int) -> tuple[Type, ...]:
        """The types at the end of a line, one for each result; `any` where they are left out."""
        if not self.accept(":"):
            return (ANY,) * count
        types = self.listed(self.type)
        if len(types) != count:
            self.fail(f"{len(types)} types for {count} results")
        return types

    def type(self) -> Type:
        """`any`, `module GPT2Block`, `f32[rows=1, tokens=7, 768]`."""
        token = self.take("a type", "name", "string")
        if token.text == "any":
            return ANY
        if token.text == "module":
            return ModuleType(self.name())
        dtype = None if token.text == "tensor" else self.guarded(read_text, token)
        if dtype is not None and token.kind == "name":
            dtype = LONG_DTYPES.get(dtype, dtype)
        if not self.accept("["):
            return TensorType(dtype)
        shape = self.listed(self.dimension, "]")
        self.expect("]")
        return TensorType(dtype, shape)

    def dimension(self) -> Dimension:
        """`768`, `rows=1`, `tokens`, `?`."""
        if self.accept("?"):
            return Dimension()
        token = self.peek()
        if token is not None and token.kind == "number":
            return Dimension(self.integer())
        axis = self.name()
        return Dimension(self.integer() if self.accept("=") else None, axis)

    def integer(self) -> int:
        """A whole number."""
        literal = self.guarded(read_literal, self.take("a whole number", "number"))
        value = getattr(literal, "value", None)
        if not isinstance(value, int):
            self.fail("expected a whole number", back=1)
        return value

    # --- operands ---

    def operand(self) -> Operand:
        """A value, a module, a literal, a tuple or a slice."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            self.fail(f"operands nested more than {MAX_NESTING} deep")
        try:
            return self._operand()
        finally:
            self.depth -= 1

    def _operand(self) -> Operand:
        if self.accept("("):
            parts = self.listed(self.operand, ")")
            if len(parts) == 1 and not self.at(",", ahead=-1):
                self.fail("expected `,`: a tuple of one part ends in a comma")
            self.expect(")")
            return Tuple(parts)
        if self.at("slice"):
            self.place += 1
            self.expect("(")
            bounds = self.index_part()
            if not isinstance(bounds, Slice):
                self.fail("expected `:`")
            self.expect(")")
            return bounds
        token = self.take("an operand")
        if token.kind == "value":
            name, path = self.guarded(read_value, token)
            if name not in self.values:
                self.fail(f"`%{name}` is not defined before this line", back=1)
            return self.values[name] if path is None else Module(self.values[name], path)
        literal = self.guarded(read_literal, token)
        if literal is None:
            self.fail(f"expected an operand, not `{token.text}`", back=1)
        return literal

    def index_part(self) -> Operand:
        """An operand or, where a colon stands, a slice."""
        lower = NONE if self.at(":") else self.operand()
        if not self.accept(":"):
            return lower
        ends = (":", ",", "]", ")")
        upper = NONE if self.at(*ends) else self.operand()
        step = NONE if not self.accept(":") or self.at(*ends) else self.operand()
        return Slice(lower, upper, step)

    def index(self) -> Operand:
        """What stands between the brackets of an item: a tuple if there is a comma."""
        parts = self.listed(self.index_part, "]")
        if len(parts) == 1 and not self.at(",", ahead=-1):
            return parts[0]
        if not parts:
            self.fail("expected an index")
        return Tuple(parts)

    def bounds(self) -> tuple[Operand, Operand]:
        """`start:stop`."""
        part = self.index_part()
        if not isinstance(part, Slice) or part.step != NONE:
            self.fail("expected `start:stop`")
        return part.lower, part.upper
