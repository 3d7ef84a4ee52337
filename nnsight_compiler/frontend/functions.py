"""Whole functions to programs."""

from __future__ import annotations

import inspect
from collections.abc import Container
from types import FunctionType

import libcst as cst

from nnsight_compiler.frontend.analysis import analyse_function
from nnsight_compiler.frontend.definitions import Definitions
from nnsight_compiler.frontend.scopes import Analysis
from nnsight_compiler.frontend.source import changed_source, excerpt_of
from nnsight_compiler.frontend.statements import Statements
from nnsight_compiler.frontend.syntax import Excerpt, FunctionNode, Syntax, class_of
from nnsight_compiler.frontend.trees import parameters_of
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Parameter, Region, Return
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span


def lower_function(function: FunctionType) -> Program:
    """The program of a function, from its source. Nothing of it is run.

    Raises:
        SourceNotFoundError: the function has no source text.
        CompileError: it uses what the language leaves out; every such place is named.
    """
    inner = inspect.unwrap(function)
    code = inner.__code__
    syntax = Syntax(excerpt_of(inner)).within(class_of(inner.__qualname__))
    match syntax.statements[0]:
        case cst.FunctionDef() as node if node.name.value == code.co_name:
            return lower_node(syntax, node, code.co_freevars)
        case cst.SimpleStatementLine(body=[cst.Expr(value=cst.Lambda() as anonymous)]):
            return lower_node(syntax, anonymous, code.co_freevars)
        case _:
            raise changed_source(code)


def lower_source(text: str, file: str = "<source>", name: str | None = None, first_line: int = 1) -> Program:
    """The program of the one function in a text, or of the one named: `function`, `Class.method`, `outer.inner`.

    Args:
        first_line: the number of the text's first line, for the spans.
    """
    syntax = Syntax(Excerpt(text, file, first_line))
    found = [each for each in Definitions(syntax).functions if name is None or each.path == name]
    outermost = [each for each in found if name is not None or each.depth == 0]
    if len(outermost) == 1:
        definition = outermost[0]
        return lower_node(syntax.within(definition.class_name), definition.node, definition.outside)
    if name is None:
        reason = f"one function is needed here, and there are {len(outermost)}"
        way_out = "say which one is meant by its name" if outermost else "give the text of a whole function"
    else:
        reason, way_out = f"there is no function {name!r} here", "give its name as it is written: `f`, `Class.method`"
    raise CompileError([Diagnostic(Span(file, first_line, 0, first_line, 1), reason, way_out)])


def lower_node(syntax: Syntax, node: FunctionNode, outside: Container[str]) -> Program:
    """The program of a parsed function. `outside`: the names that belong to functions around it."""
    analysis = analyse_function(syntax, node, outside)
    refuse(analysis)
    span = syntax.span(node.name if isinstance(node, cst.FunctionDef) else node)
    lowering = Statements(syntax, analysis)
    declared = list(parameters_of(node.params))
    names = [syntax.name(each.node.name.value) for each in declared]
    values = [lowering.fresh(name) for name in names]
    lowering.declare(analysis.root, dict(zip(names, values, strict=True)), span)
    if isinstance(node, cst.Lambda):
        lowering.builder.emit(Return(lowering.expression(node.body), span=syntax.span(node.body)))
    else:
        lowering.suite(node.body)
    parameters = tuple(
        Parameter(value, each.kind, each.node.default is not None) for value, each in zip(values, declared, strict=True)
    )
    name = node.name.value if isinstance(node, cst.FunctionDef) else "<lambda>"
    return Program(name, parameters, Region((), tuple(lowering.builder.ops)), span=span)


def refuse(analysis: Analysis) -> None:
    """Raises what the analysis found to be unsupported."""
    if analysis.diagnostics:
        raise CompileError(sorted(analysis.diagnostics, key=lambda each: (each.span.line, each.span.column)))
