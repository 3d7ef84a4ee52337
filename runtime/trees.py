"""Python syntax trees: where their nodes stand in the user's source, and in which order they are evaluated."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeVar

from nnsight_compiler.ir.ops import (
    AnyOp,
    Argument,
    Attribute,
    Break,
    Build,
    Call,
    Cell,
    Continue,
    Delete,
    Emit,
    For,
    Format,
    FormatPart,
    If,
    Item,
    Operator,
    Raise,
    Return,
    SetAttribute,
    SetGlobal,
    SetItem,
    Store,
    Unpack,
    While,
    With,
    Yield,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Operand, Slice, Tuple, Value

ANode = TypeVar("ANode", bound=ast.AST)

BINARY: dict[str, type[ast.operator]] = {
    "+": ast.Add,
    "-": ast.Sub,
    "*": ast.Mult,
    "@": ast.MatMult,
    "/": ast.Div,
    "//": ast.FloorDiv,
    "%": ast.Mod,
    "**": ast.Pow,
    "<<": ast.LShift,
    ">>": ast.RShift,
    "&": ast.BitAnd,
    "|": ast.BitOr,
    "^": ast.BitXor,
}
UNARY: dict[str, type[ast.unaryop]] = {"-": ast.USub, "+": ast.UAdd, "~": ast.Invert, "not": ast.Not}
COMPARISON: dict[str, type[ast.cmpop]] = {
    "==": ast.Eq,
    "!=": ast.NotEq,
    "<": ast.Lt,
    "<=": ast.LtE,
    ">": ast.Gt,
    ">=": ast.GtE,
    "is": ast.Is,
    "is not": ast.IsNot,
    "in": ast.In,
    "not in": ast.NotIn,
}
LONGEST_DISPLAY = 15
"""Up to so many pairs, CPython evaluates all of a display's parts before it builds anything from them."""


def locate(node: ANode, span: Span) -> ANode:
    """Gives a position to every part of a tree that has none yet; returns the tree."""
    line, column, end_line, end_column = _position(span)
    waiting: list[ast.AST] = [node]
    while waiting:
        part = waiting.pop()
        if "lineno" in part._attributes:
            if hasattr(part, "lineno"):
                continue
            vars(part).update(lineno=line, col_offset=column, end_lineno=end_line, end_col_offset=end_column)
        waiting.extend(ast.iter_child_nodes(part))
    return node


@lru_cache(4096)
def _position(span: Span) -> tuple[int, int, int, int]:
    """Line, column, end line and end column in Python's terms: columns in bytes, the end never before the start."""
    line = max(1, span.line)
    end_line = max(line, span.end_line)
    column = _bytes(span.file, line, span.column)
    end_column = _bytes(span.file, end_line, span.end_column)
    if end_line == line:
        end_column = max(column, end_column)
    return line, column, end_line, end_column


def _bytes(file: str, line: int, column: int) -> int:
    text = linecache.getline(file, line)
    return column if text.isascii() else len(text[:column].encode())


def function(name: str, arguments: ast.arguments, body: list[ast.stmt]) -> ast.FunctionDef:
    """A `def`, in the form of the running Python."""
    node = ast.FunctionDef(name=name, args=arguments, body=body or [ast.Pass()], decorator_list=[])
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node


def plain_arguments(names: list[str]) -> ast.arguments:
    """Parameters that are passed by position."""
    return ast.arguments(
        posonlyargs=[], args=[ast.arg(name) for name in names], vararg=None, kwonlyargs=[], kw_defaults=[], kwarg=None,
        defaults=[],
    )  # fmt: skip


def load(name: str) -> ast.Name:
    """A name that is read."""
    return ast.Name(name, ast.Load())


def call(name: str, *arguments: ast.expr) -> ast.Call:
    """`name(arguments)`."""
    return ast.Call(func=load(name), args=list(arguments), keywords=[])


def place(target: ast.expr) -> str:
    """A text that two expressions share if they stand for the same variable."""
    match target:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return f"{name}.{attribute}"
        case _:
            return ast.unparse(target)


def reads(expression: ast.AST, places: set[str]) -> bool:
    """Whether an expression mentions one of these variables."""
    return any(isinstance(part, ast.expr) and _known_place(part) in places for part in ast.walk(expression))


def _known_place(part: ast.expr) -> str | None:
    return place(part) if isinstance(part, ast.Name | ast.Attribute | ast.Subscript) else None


def evaluated(op: AnyOp) -> list[Value]:
    """The operands in whose place an expression may stand, in the order in which Python would evaluate them.

    The list ends before the first operand that Python evaluates only after it has begun to carry out the op: in
    `f(*a, b())` the iteration over `a` comes before the call of `b`, while the IR calls `b` first.
    """
    return [value for operand in _operands(op) for value in _inside(operand)]


def _inside(operand: Operand) -> Iterator[Value]:
    match operand:
        case Value():
            yield operand
        case Slice(lower=lower, upper=upper, step=step):
            for part in (lower, upper, step):
                yield from _inside(part)
        case Tuple(parts=parts):
            for part in parts:
                yield from _inside(part)
        case _:
            return


def _operands(op: AnyOp) -> Iterator[Operand]:
    match op:
        case SetGlobal(value=value) | Unpack(value=value) | Emit(value=value) | Return(value=value):
            yield value
        case Store(value=value) | Cell(initial=value) | Attribute(object=value) | With(context=value):
            yield value
        case If(condition=value):
            yield value
        case SetAttribute():
            yield op.value
            yield op.object
        case Item():
            yield op.object
            yield op.index
        case SetItem():
            yield op.value
            yield op.object
            yield op.index
        case Delete():
            yield op.object
            if op.index is not None:
                yield op.index
        case Build(kind=kind, elements=elements):
            if len(elements) > LONGEST_DISPLAY and kind in ("set", "dict"):
                return
            for element in elements:
                if element.key is not None:
                    yield element.key
                yield element.value
                if element.starred:
                    return
        case Format(parts=parts):
            for part in parts:
                if isinstance(part, FormatPart):
                    yield part.value
                    if part.specification is not None:
                        yield part.specification
                    return
        case Operator(operands=operands):
            yield from operands
        case Call():
            yield op.function
            for argument in in_call_order(op.arguments):
                yield argument.value
                if argument.star:
                    return
        case For(iterable=value):
            yield value
        case While(initial=values) | Yield(values=values) | Break(values=values) | Continue(values=values):
            yield from values
        case Raise(exception=exception, cause=cause):
            if exception is not None:
                yield exception
            if cause is not None:
                yield cause
        case _:
            return


def in_call_order(arguments: tuple[Argument, ...]) -> list[Argument]:
    """Arguments as Python evaluates them: positional and `*` ones before keywords and `**` ones."""
    return sorted(arguments, key=lambda argument: argument.keyword is not None or argument.star == "**")
