"""What a Python file declares: its imports, functions, classes and plain constants. The rest of it is not run."""

from __future__ import annotations

import ast
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from nnsight_compiler.ir.errors import Diagnostic
from nnsight_compiler.ir.span import Span

_PURE = frozenset({"range", "list", "tuple", "dict", "set", "frozenset", "len", "sorted", "min", "max", "sum"})
"""Builtins that a constant may be made with."""

_PLAIN = (
    ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Name, ast.Attribute, ast.UnaryOp, ast.BinOp,
    ast.Subscript, ast.Slice, ast.Starred, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip
"""What the values of constants are made of, besides calls of `_PURE`."""


@final
@dataclass(slots=True)
class Declarations:
    """The names of a file, with the values that its declarations give them.

    names: what is known without running the file.
    bound: every name that some statement of the file binds at its top level, known or not.
    mistakes: declarations that raise, such as imports of what is not installed.
    """

    names: dict[str, Any]
    bound: set[str]
    mistakes: list[Diagnostic] = field(default_factory=list)


def declared(file: Path) -> Declarations:
    """Executes the imports and definitions of a file, and nothing else of it."""
    tree = ast.parse(file.read_bytes(), filename=str(file))
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    # As when Python runs a file: its folder comes first, and the module is found by its name.
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[file.stem] = module
    often = Counter(_bound(tree))
    found = Declarations(vars(module), set(often))
    future = [each for each in tree.body if isinstance(each, ast.ImportFrom) and each.module == "__future__"]
    for statement in tree.body:
        if not _declares(statement, often):
            continue
        code = ast.Module([*future, statement], type_ignores=[])
        try:
            exec(compile(code, str(file), "exec", dont_inherit=True), found.names)
        except NameError as error:
            if error.name not in often:  # else it is bound by a statement that was not run
                found.mistakes.append(_mistake(file, statement, error))
        except Exception as error:
            found.mistakes.append(_mistake(file, statement, error))
    return found


def _declares(statement: ast.stmt, often: Counter[str]) -> bool:
    """Whether a statement only imports, defines, or names a constant once and for all."""
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return _is_plain(value) and all(often[name] == 1 for name in _bound(statement))
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=finalbody):
            parts = [*body, *orelse, *finalbody, *(each for handler in handlers for each in handler.body)]
            return all(isinstance(each, ast.Pass) or _is_import(each, often) for each in parts)
    return False


def _is_import(statement: ast.stmt, often: Counter[str]) -> bool:
    """Whether a statement in a `try` imports, or names what stands in for an import that failed."""
    match statement:
        case ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(value=value):
            return _is_plain(value)
    return False


def _is_plain(value: ast.expr) -> bool:
    """Whether computing a value runs no code of the user's."""
    for node in ast.walk(value):
        match node:
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _PURE:
                pass
            case _ if not isinstance(node, _PLAIN):
                return False
    return True


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that the code of a module binds, each as often as a statement does; with what functions declare
    `global`."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
            yield from (each for inner in ast.walk(node) if isinstance(inner, ast.Global) for each in inner.names)
            return
        case ast.ExceptHandler(name=str(name)):
            yield name
        case ast.Lambda():
            return
    for inner in ast.iter_child_nodes(node):
        yield from _bound(inner)


def _mistake(file: Path, statement: ast.stmt, error: Exception) -> Diagnostic:
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    end = statement.end_lineno or statement.lineno
    span = Span(str(file), statement.lineno, statement.col_offset, end, statement.end_col_offset or 0)
    way_out = "install it, or correct the name" if isinstance(error, ImportError) else "correct it; Python runs it too"
    return Diagnostic(span, f"this cannot be executed: {text}", way_out)
