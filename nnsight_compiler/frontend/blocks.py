"""Undecorated blocks: `with model.trace(…):`, or `with model.session():` around several traces, in a script, a notebook
cell, or a function."""

from __future__ import annotations

import dis
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import CO_OPTIMIZED
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import final

import libcst as cst

from nnsight_compiler.frontend.analysis import analyse_block
from nnsight_compiler.frontend.contexts import kind_of, trace_item
from nnsight_compiler.frontend.definitions import Definitions
from nnsight_compiler.frontend.functions import lower_node, refuse
from nnsight_compiler.frontend.scopes import Analysis
from nnsight_compiler.frontend.source import Source, changed_source, source_of
from nnsight_compiler.frontend.statements import Statements
from nnsight_compiler.frontend.syntax import Excerpt, Syntax, class_of
from nnsight_compiler.frontend.tokens import characters, statement_excerpt
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import (
    Argument,
    Cell,
    Handler,
    If,
    Item,
    Load,
    Parameter,
    Region,
    Return,
    Store,
    Try,
    Yield,
)
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import UNBOUND, Literal, Operand, Tuple


@final
@dataclass(frozen=True, slots=True)
class Block:
    """An undecorated block.

    program: its parameters are the model, the positional and the keyword arguments of the trace, then one for each of
        `reads`.
    reads: the names whose values it takes from the frame; unbound ones are left out of the call.
    first_body_line: the line of its first statement.
    same_line: that statement cannot be told from the header by its line, or further items of the `with` come first.
    """

    program: Program
    reads: tuple[str, ...]
    first_body_line: int
    same_line: bool


def lower_block(frame: FrameType) -> Block:
    """The block whose `with` a frame is entering just now.

    Raises:
        SourceNotFoundError: the frame's code has no source text.
        CompileError: the block uses what the language leaves out; every such place is named.
    """
    code = frame.f_code
    syntax, node, item = _with_statement(frame)
    if kind_of(node.items[item]) not in ("trace", "generate", "scan", "session"):
        span = syntax.span(node.items[item])
        way_out = "write the call in the `with` itself: `with model.trace(…):`"
        raise CompileError([Diagnostic(span, "this context does not show which model it traces", way_out)])
    complete = bool(code.co_flags & CO_OPTIMIZED)
    names: Container[str] = ()
    if complete:
        names = _local_names(code)
    elif frame.f_locals is not frame.f_globals:
        names = frozenset(frame.f_locals)
    owner = "" if code.co_name.startswith("<") else code.co_name
    return _lower(syntax.within(class_of(code.co_qualname)), node, item, names, complete, owner)


@final
@dataclass(frozen=True, slots=True)
class Lowered:
    """An experiment or a block of a file. `local`: a block in a function, whose names are those of the function."""

    program: Program
    local: bool = False


def lower_file(path: str | Path) -> list[Program]:
    """Every function that `intervene` decorates and every undecorated trace of a file, in the file's order. Nothing of
    the file is run."""
    found: list[Program] = []
    for each in lower_each(path):
        if isinstance(each, CompileError):
            raise each
        found.append(each.program)
    return found


def lower_each(path: str | Path) -> list[Lowered | CompileError]:
    """The experiments and blocks of a file, in the file's order; for one that cannot be lowered, its mistakes."""
    syntax = Syntax(Excerpt(Path(path).read_text(encoding="utf-8-sig"), str(path), 1))
    found = Definitions(syntax)
    lowered: list[tuple[int, Lowered | CompileError]] = []
    for each in found.experiments:
        lower = partial(lower_node, syntax.within(each.class_name), each.node, each.outside)
        lowered.append((syntax.span(each.node).line, _tried(lower)))
    for trace in found.traces:
        inner, complete = syntax.within(trace.class_name), trace.names is not None
        lower_one = partial(_lower, inner, trace.node, trace.item, trace.names or (), complete, trace.owner)
        lowered.append((syntax.span(trace.node).line, _tried(lower_one, complete)))
    return [each for _, each in sorted(lowered, key=lambda pair: pair[0])]


def _tried(lower: Callable[[], Program | Block], local: bool = False) -> Lowered | CompileError:
    try:
        made = lower()
    except CompileError as error:
        return error
    return Lowered(made.program if isinstance(made, Block) else made, local)


def _lower(syntax: Syntax, node: cst.With, item: int, frame: Container[str], complete: bool, owner: str) -> Block:
    """Lowers a block whose item number `item` opens the trace. For `frame` and `complete`, see `Scope`."""
    opened, span = node.items[item], syntax.span(node.items[item])
    call = opened.item
    assert isinstance(call, cst.Call), "the item opens a trace"
    assert isinstance(call.func, cst.Attribute), "the item opens a trace"
    traced = syntax.name(call.func.value.value) if isinstance(call.func.value, cst.Name) else ""
    analysis = analyse_block(syntax, node, item, frame, complete, traced)
    refuse(analysis)
    lowering = Statements(syntax, analysis)
    reads = [each.name for each in analysis.reads() if each.name != traced]
    model, args, kwargs = (lowering.fresh(_unlike(name, reads)) for name in ("model", "args", "kwargs"))
    given = {name: lowering.fresh(name) for name in reads}
    lowering.unsure.update(value.name for value in given.values())
    lowering.declare(analysis.root, {**given, traced: model}, span)
    kind = kind_of(opened)
    arguments = (Argument(args, star="*"), Argument(kwargs, star="**")) if kind != "session" else ()
    lowering.model_context(kind, model, arguments, opened, node.items[item + 1 :], node.body, span)
    exports = analysis.exports()
    if lowering.alive:
        values = tuple(_export(lowering, analysis, number, span) for number in range(len(exports)))
        lowering.builder.emit(Return(Tuple(values), span=span))
    program = Program(
        owner or "block",
        (*map(Parameter, (model, args, kwargs)), *(Parameter(value, optional=True) for value in given.values())),
        Region((), tuple(lowering.builder.ops)),
        kind="block",
        exports=tuple(variable.name for variable in exports),
        span=span,
    )
    same_line = isinstance(node.body, cst.SimpleStatementSuite) or item + 1 < len(node.items)
    return Block(program, tuple(reads), _first_line(syntax, node), same_line)


def _unlike(name: str, names: Sequence[str]) -> str:
    """The name, lengthened where one of these is the same: callers may tell parameters by name."""
    while name in names:
        name += "_"
    return name


def _export(lowering: Statements, analysis: Analysis, number: int, span: Span) -> Operand:
    """What an exported variable holds at the end of a block. A cell that may be empty is tried."""
    variable = analysis.exports()[number]
    if not variable.cell:
        return lowering.held([variable])[0]
    emit, cell, name = lowering.builder.emit, lowering.cells[variable], variable.name
    if variable in analysis.surely_assigned and not variable.deleted:
        value = lowering.fresh(name)
        emit(Load(value, cell, name, span=span))
        return value
    found, tried, held, item, result = (lowering.fresh(hint) for hint in ("", name, "", "", name))
    emit(Cell(found, name, Tuple(()), span=span))
    body = Region((), (Load(tried, cell, name, span=span), Store(found, Tuple((tried,)), span=span)))
    emit(Try(body, (Handler(None, Region((lowering.fresh("exception"),))),), span=span))
    emit(Load(held, found, name, span=span))
    bound = Region((), (Item(item, held, Literal(0), span=span), Yield((item,), span=span)))
    emit(If((result,), held, bound, Region((), (Yield((UNBOUND,), span=span),)), span=span))
    return result


def _first_line(syntax: Syntax, node: cst.With) -> int:
    """The line of the first statement of a body that Python compiles to anything."""
    statements = [each for each in node.body.body if not isinstance(each, cst.Global | cst.Nonlocal)]
    for each in statements:
        if isinstance(each, cst.SimpleStatementLine) and isinstance(each.body[0], cst.Global | cst.Nonlocal):
            continue
        decorators = each.decorators if isinstance(each, cst.FunctionDef) else ()
        return min(syntax.span(part).line for part in (*decorators, each))
    return syntax.span(node.body).line


def _local_names(code: CodeType) -> frozenset[str]:
    """The names of a function's frame. Since Python 3.12 a comprehension's names are among them even where the function
    means a global by the same name: then the instructions tell."""
    names = frozenset(code.co_varnames + code.co_cellvars + code.co_freevars)
    doubtful = names & set(code.co_names)
    if not doubtful:
        return names
    return names - {
        each.argval
        for each in dis.get_instructions(code)
        if each.opname.endswith("_GLOBAL") and each.argval in doubtful
    }


def _with_statement(frame: FrameType) -> tuple[Syntax, cst.With, int]:
    """The `with` that a frame is entering, and the number of the item that it has come to."""
    source = source_of(frame.f_code, frame.f_globals, "the block")
    offset = source.offset(frame.f_code, frame.f_lasti)
    line = next(islice(source.code.co_positions(), offset // 2, None))[0] or frame.f_lineno
    for start in range(min(line, len(source.lines)) - 1, -1, -1):
        words = source.lines[start].split(None, 1)
        if not words or words[0].partition("(")[0] != "with":
            continue
        excerpt = statement_excerpt(source.lines, start, source.file)
        if start + excerpt.text.count("\n") + 1 < line:
            continue
        syntax = Syntax(excerpt)
        node = syntax.statements[0]
        if isinstance(node, cst.With):
            return syntax, node, _item_number(source, offset, syntax, node)
    raise changed_source(frame.f_code)


def _item_number(source: Source, offset: int, syntax: Syntax, node: cst.With) -> int:
    """Which item of a `with` its code has come to, at an instruction.

    Since Python 3.12 the instruction that enters an item has the item's position. Before, it has the whole statement's,
    and the instructions with that position are counted: as many as there are items, once for each copy of the code.
    """
    if len(node.items) == 1:
        return 0
    positions = list(source.code.co_positions())
    entering = positions[offset // 2]
    line, column = entering[0], entering[2]
    if line is None or column is None:
        return trace_item(node) or 0
    place = (line, characters(source.lines[line - 1], column))
    statement = syntax.span(node)
    if place != (statement.line, statement.column):
        ends = [syntax.span(item) for item in node.items]
        return next(number for number, end in enumerate(ends) if (end.end_line, end.end_column) > place)
    entered = [
        each.offset
        for each in dis.get_instructions(source.code)
        if each.opname == "BEFORE_WITH" and each.offset <= offset and positions[each.offset // 2] == entering
    ]
    return (len(entered) - 1) % len(node.items)
