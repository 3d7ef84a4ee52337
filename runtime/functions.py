"""Python functions from generated syntax trees: with the user's file name, globals and cells."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.names import Names, signature_name
from nnsight_compiler.runtime.statements import Statements
from nnsight_compiler.runtime.trees import function, load, locate, plain_arguments


def link(
    statements: Statements,
    functions: Sequence[ast.FunctionDef],
    globals_: dict[str, Any],
    closure: Mapping[str, CellType] | None,
    span: Span,
) -> list[FunctionType]:
    """Makes functions of these definitions, in their order.

    Their globals are `globals_` itself, to which nothing is added, and their free variables are the very cells of
    `closure`, so that both are read anew at every run and raise Python's own errors. What the code needs besides is in
    cells of its own.
    """
    names = [made.name for made in functions]
    results = ast.Return(value=ast.Tuple(elts=[*map(load, names)], ctx=ast.Load()))
    inner = function("linked", plain_arguments(list(statements.constants)), [*statements.prelude, *functions, results])
    free: list[ast.stmt] = [
        ast.Assign(targets=[ast.Name(name, ast.Store())], value=ast.Constant(None)) for name in sorted(statements.free)
    ]
    outer = function("outside", plain_arguments([]), [*free, inner])
    tree = locate(ast.Module(body=[outer], type_ignores=[]), span)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the user's own compilation has given them
        code = compile(tree, span.file, "exec", dont_inherit=True)
    made = _titled(_nested(_nested(code, "outside"), "linked"), statements.titles, "")
    cells = tuple((closure or {})[name] for name in made.co_freevars)
    return list(FunctionType(made, globals_, made.co_name, None, cells)(*statements.constants.values()))


def _nested(code: CodeType, name: str) -> CodeType:
    return next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)


def _titled(code: CodeType, titles: Mapping[str, str], around: str) -> CodeType:
    """The code with every function in it under the name that users know it by. One without a title is not shown."""
    title = titles.get(code.co_name)
    qualified = around if title is None else f"{around}.<locals>.{title}" if around else title
    parts = tuple(_titled(part, titles, qualified) if isinstance(part, CodeType) else part for part in code.co_consts)
    if title is None:
        return code.replace(co_consts=parts)
    return code.replace(co_consts=parts, co_name=title, co_qualname=qualified)


def generate_function(
    program: Program,
    globals_: dict[str, Any],
    closure: Mapping[str, CellType] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> FunctionType:
    """The Python function of a program that runs no model. Its text is in `__source__`.

    globals_: the globals of the user's function, read and written in place.
    closure: the cells of its free variables, by name.
    defaults: the defaults of its optional parameters, by name.
    """
    names = Names(program)
    statements = Statements(program, names)
    made = statements.define(names.fresh(program.name), program.name, program.parameters, program.body, program.span)
    (result,) = link(statements, [made], globals_, closure, program.span)
    give_defaults(result, program, defaults or {})
    result.__source__ = ast.unparse(made)  # type: ignore[attr-defined]  # functions take attributes
    return result


def give_defaults(made: FunctionType, program: Program, defaults: Mapping[str, object]) -> None:
    """Gives a function the defaults of a program's optional parameters."""
    optional = {
        signature_name(parameter.value): parameter.kind for parameter in program.parameters if parameter.optional
    }
    made.__defaults__ = tuple(defaults[name] for name, kind in optional.items() if kind != "keyword_only") or None
    made.__kwdefaults__ = {name: defaults[name] for name, kind in optional.items() if kind == "keyword_only"} or None
