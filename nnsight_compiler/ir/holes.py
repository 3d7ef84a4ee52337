"""Reads ops by their templates: the text that stands in a template, and what fills its holes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from nnsight_compiler.ir.cursor import Cursor
from nnsight_compiler.ir.ops import Argument, Element, FormatPart, Parameter
from nnsight_compiler.ir.syntax import Hole
from nnsight_compiler.ir.tokens import read_text, split
from nnsight_compiler.ir.types import ANY
from nnsight_compiler.ir.values import Operand, Value


def expect_text(cursor: Cursor, text: str) -> None:
    """Takes the literal text of a template."""
    for expected in _template_tokens(text):
        cursor.expect(expected)


def read_hole(cursor: Cursor, hole: Hole) -> dict[str, Any]:
    """Reads a hole: its fields and what they hold."""
    held = _READ[hole.kind](cursor)
    return {hole.fields[0]: held} if len(hole.fields) == 1 else dict(zip(hole.fields, held, strict=True))


@cache
def _template_tokens(text: str) -> tuple[str, ...]:
    return tuple(token.text for token in split(text)[0])


def _base(cursor: Cursor) -> tuple[Operand | None, Operand | None]:
    """` from %base replaying ('transformer.h.0',)`, or nothing."""
    if not cursor.accept("from"):
        return None, None
    base = cursor.operand()
    cursor.expect("replaying")
    return base, cursor.operand()


def _call_number(cursor: Cursor) -> int | None:
    """` call 2`, or nothing."""
    return cursor.integer() if cursor.accept("call") else None


def _stops(cursor: Cursor) -> tuple[tuple[Operand, str, int | None] | None, tuple[Value, ...]]:
    """` stops after %model@h.3 output`: the module, the port and the call of the site, or nothing; and the
    parameters of a forward's body."""
    if not cursor.accept("stops"):
        return None, ()
    cursor.expect("after")
    return (cursor.operand(), cursor.word(), _call_number(cursor)), ()


def _arguments(cursor: Cursor) -> tuple[Argument, ...]:
    """`(%a, k=%b, *%c, **%d)`."""
    cursor.expect("(")
    arguments = cursor.listed(partial(_argument, cursor), ")")
    cursor.expect(")")
    return arguments


def _argument(cursor: Cursor) -> Argument:
    """One argument of a call."""
    if cursor.accept("**"):
        return Argument(cursor.operand(), star="**")
    if cursor.accept("*"):
        return Argument(cursor.operand(), star="*")
    keyword = None
    if cursor.at("=", ahead=1):
        keyword = cursor.name()
        cursor.expect("=")
    return Argument(cursor.operand(), keyword)


def _element(cursor: Cursor) -> Element:
    """One element of a list, set or tuple."""
    starred = cursor.accept("*")
    return Element(cursor.operand(), starred=starred)


def _entry(cursor: Cursor) -> Element:
    """One element of a dict."""
    if cursor.accept("**"):
        return Element(cursor.operand(), starred=True)
    key = cursor.operand()
    cursor.expect(":")
    return Element(cursor.operand(), key)


def _part(cursor: Cursor) -> str | FormatPart:
    """One part of an f-string."""
    if not cursor.accept("{"):
        return cursor.guarded(read_text, cursor.take("a string or `{`", "string"))
    value = cursor.operand()
    conversion = cursor.word() if cursor.accept("!") else ""
    specification = cursor.operand() if cursor.accept(":") else None
    cursor.expect("}")
    if conversion not in ("", "r", "s", "a"):
        cursor.fail(f"`!{conversion}` is no conversion")
    return FormatPart(value, conversion, specification)  # type: ignore[arg-type]  # just checked


def _relative(cursor: Cursor) -> tuple[int, str]:
    """The module of a relative import: its dots, and its name."""
    text = cursor.text()
    return len(text) - len(text.lstrip(".")), text.lstrip(".")


def _carry(cursor: Cursor) -> tuple[tuple[Value, ...], tuple[Operand, ...]]:
    """` carry %h.1 = %h, %i.1 = 0`: the parameters of a loop's region and what they are at first."""
    pairs = cursor.listed(partial(_carried_pair, cursor), ":") if cursor.accept("carry") else ()
    for value, _ in pairs:
        cursor.values[value.name] = value
    return tuple(value for value, _ in pairs), tuple(operand for _, operand in pairs)


def _carried_pair(cursor: Cursor) -> tuple[Value, Operand]:
    value = Value(cursor.defined_name(), cursor.type() if cursor.accept(":") else ANY)
    cursor.expect("=")
    return value, cursor.operand()


def _loop(cursor: Cursor) -> tuple[tuple[Value, ...], Operand, tuple[Operand, ...]]:
    """`%item in %iterable carry …`."""
    item = cursor.definition()
    cursor.expect("in")
    iterable = cursor.operand()
    carried, initial = _carry(cursor)
    return (item, *carried), iterable, initial


def read_signature(cursor: Cursor) -> tuple[tuple[Parameter, ...], tuple[Operand, ...]]:
    """Parameters as Python writes them, and the defaults of those that have one."""
    parameters: list[Parameter] = []
    defaults: list[Operand] = []
    kind = "positional_or_keyword"
    cursor.expect("(")
    while not cursor.accept(")"):
        if cursor.accept("/"):
            parameters = [replace(parameter, kind="positional_only") for parameter in parameters]
        elif cursor.at("*") and cursor.at(",", ahead=1):
            cursor.place += 1
            kind = "keyword_only"
        elif cursor.accept("*"):
            parameters.append(Parameter(cursor.definition(), "var_positional"))
            kind = "keyword_only"
        elif cursor.accept("**"):
            parameters.append(Parameter(cursor.definition(), "var_keyword"))
        else:
            value = cursor.definition()
            optional = cursor.accept("=")
            if optional:
                defaults.append(cursor.operand())
            parameters.append(Parameter(value, kind, optional))  # type: ignore[arg-type]  # one of two words
        if not cursor.at(")"):
            cursor.expect(",")
    return tuple(parameters), tuple(defaults)


_READ: dict[str, Callable[[Cursor], Any]] = {
    "after": lambda cursor: cursor.integer() if cursor.accept("after") else 0,
    "arguments": _arguments,
    "as": lambda cursor: cursor.text() if cursor.accept("as") else None,
    "base": _base,
    "bounds": Cursor.bounds,
    "call": _call_number,
    "carry": _carry,
    "cause": lambda cursor: cursor.operand() if cursor.accept("from") else None,
    "define": Cursor.defined_name,
    "elements": lambda cursor: cursor.listed(partial(_element, cursor), ")", "]", "}"),
    "entries": lambda cursor: cursor.listed(partial(_entry, cursor), "}"),
    "in": lambda cursor: cursor.operand() if cursor.accept("in") else None,
    "index": Cursor.index,
    "item": lambda cursor: (cursor.definition(),),
    "leaf": lambda cursor: cursor.integer() if cursor.accept("leaf") else None,
    "loop": _loop,
    "maybe": lambda cursor: None if cursor.peek() is None or cursor.at("from") else cursor.operand(),
    "name": Cursor.name,
    "operand": Cursor.operand,
    "operands": lambda cursor: cursor.listed(cursor.operand, ":"),
    "owner": Cursor.operand,
    "parts": lambda cursor: cursor.listed(partial(_part, cursor), ":"),
    "rows": lambda cursor: cursor.operand() if cursor.accept("of") else None,
    "step": lambda cursor: cursor.operand() if cursor.accept("step") else None,
    "stops": _stops,
    "relative": _relative,
    "signature": read_signature,
    "sparing": lambda cursor: cursor.listed(cursor.operand, ":") if cursor.accept("sparing") else (),
    "text": Cursor.text,
    "word": Cursor.word,
}
"""How the fields of a hole are read, by the kind of the hole (written in `printer`)."""
