"""The tokens of the text form: how names and literals are spelled, and how a line is split."""

from __future__ import annotations

import ast
import re
from typing import Literal as OneOf
from typing import NamedTuple

from nnsight_compiler.ir.values import UNBOUND, Literal, Operand, Unbound

MAX_NESTING = 100
"""How deep regions, and operands, may be nested: what reads programs from outside must not exhaust the stack."""

_ESCAPE = r"\\(?:[\\'\"nrt]|x[0-9a-f]{2})"
_WIDE = r"\\(?:u[0-9a-f]{4}|U[0-9a-f]{8})"
_STRING = rf"""'(?:[^'\\]|{_ESCAPE}|{_WIDE})*'|"(?:[^"\\]|{_ESCAPE}|{_WIDE})*\""""
_BYTES = rf"""b(?:'(?:[ -&(-\[\]-~]|{_ESCAPE})*'|"(?:[ !#-\[\]-~]|{_ESCAPE})*")"""
_REAL = r"(?:inf|nan|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
_NAME = r"[^\W\d]\w*"
_VALUE_NAME = r"\w+(?:\.[0-9]+)*"
_PATH = r"\w+(?:\.\w+)*"

_PLAIN_NAME = re.compile(_NAME)
_PLAIN_VALUE = re.compile(_VALUE_NAME)
_PLAIN_PATH = re.compile(_PATH)
_PLAIN_TEXT = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:=-?\w+(?:\.\w+)*)?", re.ASCII)

TokenKind = OneOf["value", "complex", "number", "string", "bytes", "name", "sign"]
_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<value> %(?:{_VALUE_NAME}|{_STRING})(?:@(?:{_PATH}|{_STRING}))? )
  | (?P<complex> \(-?{_REAL}[+-]{_REAL}j\) | -?{_REAL}j(?!\w) )
  | (?P<number> -?0x[0-9a-f]+ | -?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)? | -inf(?!\w) )
  | (?P<string> {_STRING} )
  | (?P<bytes> {_BYTES} )
  | (?P<name> {_NAME} )
  | (?P<sign> \.\.\. | \*\*= | //= | <<= | >>= | [-+*/%@&|^<>=!]=
            | \*\* | // | << | >> | [-+*/%@&|^<>=!~,:.?()\[\]{{}}] )
  | (?P<comment> \#.* )
  )""",
    re.VERBOSE | re.DOTALL,
)
_PARTS = re.compile(rf"%(?P<name>{_VALUE_NAME}|{_STRING})(?:@(?P<path>{_PATH}|{_STRING}))?")


class Token(NamedTuple):
    """A token: its kind, its text, and where it starts and ends in its line."""

    kind: TokenKind
    text: str
    start: int
    end: int


class BadTokenError(ValueError):
    """No token starts at this column (from 0)."""

    def __init__(self, column: int) -> None:
        self.column = column
        super().__init__(column)


def split(line: str) -> tuple[list[Token], str]:
    """The tokens of a line, and its comment without the `#`."""
    tokens: list[Token] = []
    place, line = 0, line.rstrip()
    while place < len(line):
        found = _TOKEN.match(line, place)
        if found is None:
            raise BadTokenError(place + len(line[place:]) - len(line[place:].lstrip()))
        kind = found.lastgroup
        if kind == "comment":
            return tokens, found["comment"][1:].strip()
        assert kind is not None
        tokens.append(Token(kind, found[kind], found.start(kind), found.end(kind)))  # type: ignore[arg-type]
        place = found.end()
    return tokens, ""


def spell_value(name: str) -> str:
    """`%h`; a name that is not plain is quoted."""
    return f"%{name if _PLAIN_VALUE.fullmatch(name) else repr(name)}"


def spell_module(name: str, path: str) -> str:
    """`%model@transformer.h.3`."""
    return f"{spell_value(name)}@{path if _PLAIN_PATH.fullmatch(path) else repr(path)}"


def spell_name(name: str) -> str:
    """An identifier as it is, anything else quoted."""
    return name if _PLAIN_NAME.fullmatch(name) else repr(name)


def spell_text(text: str) -> str:
    """A dotted name, or `name=value`, as it is; anything else quoted."""
    return text if _PLAIN_TEXT.fullmatch(text) else repr(text)


def spell_literal(literal: Literal | Unbound) -> str:
    """A literal as in Python; integers beyond 64 bits in hexadecimal, which Python reads at any length."""
    if isinstance(literal, Unbound):
        return "unbound"
    value = literal.value
    if value is Ellipsis:
        return "..."
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return hex(value)
    return repr(value)


def read_value(token: Token) -> tuple[str, str | None]:
    """The name in a value token, and the path if it is a module."""
    found = _PARTS.fullmatch(token.text)
    assert found is not None
    path = found["path"]
    return _unquote(found["name"]), None if path is None else _unquote(path)


def read_literal(token: Token) -> Operand | None:
    """The literal that a token spells, `None` where it spells none. Raises `ValueError` for an impossible one."""
    text = token.text
    match token.kind:
        case "number" if text.startswith(("0x", "-0x")):
            return Literal(int(text, 16))
        case "number" if set(text) & set(".en"):
            return Literal(float(text))
        case "number":
            return Literal(int(text))
        case "complex":
            return Literal(complex(text))
        case "string" | "bytes":
            return Literal(ast.literal_eval(text))
        case _:
            return _WORDS.get(text)


_WORDS: dict[str, Operand] = {
    "None": Literal(None),
    "True": Literal(True),
    "False": Literal(False),
    "...": Literal(...),
    "inf": Literal(float("inf")),
    "nan": Literal(float("nan")),
    "unbound": UNBOUND,
}


def _unquote(text: str) -> str:
    return str(ast.literal_eval(text)) if text[0] in "'\"" else text


def read_text(token: Token) -> str:
    """The text that a token stands for: a string's content, anything else as it is."""
    return _unquote(token.text) if token.kind == "string" else token.text
