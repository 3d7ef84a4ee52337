"""What a program of a file must be, besides well formed: as the front end makes it, and made of names that Python has.

The verifier of the IR has checked its structure; these are the rules that matter because someone else wrote it.
"""

from __future__ import annotations

import keyword
import unicodedata
from typing import Any

from nnsight_compiler.files.document import refuse
from nnsight_compiler.files.vocabulary import allowed_attribute
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import FileError, IRError
from nnsight_compiler.ir.ops import Op, Parameter
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import from_json
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.runtime.names import signature_name

COMPILERS_OWN = frozenset(
    {"At", "Stage", "Cache", "Record", "Applied", "Captured", "Prefix", "Release", "Strands", "Strand"}
)
"""Ops that stand in specialised programs only."""

MAX_LINE, MAX_COLUMN = 2**24, 2**16


def program_from_json(data: object, where: str) -> Program:
    """The program of a file, well formed."""
    try:
        return from_json(data)  # type: ignore[arg-type]  # it checks what it is given
    except IRError as error:
        raise FileError(f"at {where}: {error}") from None
    except RecursionError:
        raise FileError(f"at {where}: it is nested too deeply") from None


def check_program(
    program: Program, where: str, experiment: bool = False, edit: bool = False, block: bool = False
) -> None:
    """Refuses a program that the front end cannot have made. `experiment`, `edit`, `block`: what it may be."""
    kinds = ("edit",) if edit else ("experiment", "function", "stage", *(("block",) if block else ()))
    if program.kind not in kinds:
        refuse(where, f"a file holds experiments, functions and edits, each in its place, not a {program.kind}")
    if edit:
        _check_edit(program, where)
    if program.target or program.given or program.passes or (program.exports and program.kind != "block"):
        refuse(where, "it is specialised already, and a file holds programs as they were written")
    if not _is_name(program.name) and program.name != "<lambda>":
        refuse(where, f"{program.name!r:.80} is no name of a function")
    _check_span(program.span, where)
    _check_parameters(program.parameters, where, experiment)
    for number, op in enumerate(program.walk()):
        at = f"{where}, op {number} ({type(op).__name__})"
        _check_span(op.span, at)
        _check_op(op, at, experiment)


def _check_edit(program: Program, where: str) -> None:
    """An edit takes a tracer and a model, and reads the names that it needs before anything else."""
    if [parameter.kind for parameter in program.parameters] != ["positional_or_keyword"] * 2:
        refuse(where, "an edit takes a tracer and a model")
    leading = True
    for op in program.body.ops:
        leading = leading and isinstance(op, ops.Global)
        for inner in (op, *(each for region in regions(op) for each in walk(region))):
            named = isinstance(inner, (ops.Global, ops.SetGlobal))
            if isinstance(inner, (ops.Return, ops.Save, ops.Edit)) or (named and not leading):
                refuse(where, f"no edit has the op {type(inner).__name__} there")


def _check_op(op: Op, where: str, experiment: bool) -> None:
    match op:
        case _ if type(op).__name__ in COMPILERS_OWN:
            refuse(where, "only the compiler makes such ops, and a file holds programs as they were written")
        case ops.Save(copy=False):
            refuse(where, "a value that is kept without a copy is only known to the compiler")
        case ops.Global(name=name, scope=scope) | ops.SetGlobal(name=name, scope=scope):
            if not _is_name(name) or (name.startswith("__") and name.endswith("__")):
                refuse(where, f"{name!r:.80} is no name that a file may read or set")
            if scope == "free" and not experiment:
                refuse(where, "a helper in a file has globals only")
        case ops.Attribute(name=name) | ops.SetAttribute(name=name) | ops.Delete(name=str() as name):
            if not _is_name(name) or not allowed_attribute(_as_python_reads(name)):
                refuse(where, f"no file may ask for the attribute {name!r:.80}")
            if not isinstance(op, ops.Attribute) and name.startswith("__"):
                refuse(where, f"no file may change the attribute {name!r:.80}")
        case ops.Import(module=module, name=name):
            if not all(map(_is_name, module.split("."))) and module:
                refuse(where, f"{module!r:.80} is no name of a module")
            if name is not None and (not _is_name(name) or name.startswith("__")):
                refuse(where, f"no file may import the name {name!r:.80}")
        case ops.Call(target=target):
            if target is not None:
                refuse(where, "only the compiler says which known call a call is")
            _check_arguments(op.arguments, where)
        case (
            ops.Forward(arguments=arguments)
            | ops.Session(arguments=arguments)
            | ops.Invoke(arguments=arguments)
            | ops.Backward(arguments=arguments)
        ):
            _check_arguments(arguments, where)
        case ops.Edit(arguments=arguments):
            _check_arguments(arguments, where)
        case ops.Closure(parameters=parameters, name=name):
            if not (_is_name(name) or name in ("<lambda>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")):
                refuse(where, f"{name!r:.80} is no name of a function")
            if not op.generator:
                _check_parameters(parameters, where, False)
        case ops.Cell(name=name) | ops.Load(name=name) | ops.Bound(name=name):
            if not _is_name(name):
                refuse(where, f"{name!r:.80} is no name of a variable")


def _check_arguments(arguments: tuple[ops.Argument, ...], where: str) -> None:
    for argument in arguments:
        if argument.keyword is not None and not _is_name(argument.keyword):
            refuse(where, f"{argument.keyword!r:.80} is no keyword")


def _check_parameters(parameters: tuple[Parameter, ...], where: str, exact: bool) -> None:
    names = [parameter.value.name if exact else signature_name(parameter.value) for parameter in parameters]
    for name in names:
        if not _is_name(name):
            refuse(where, f"{name!r:.80} is no name of a parameter")
    if len(set(map(_as_python_reads, names))) != len(names):
        refuse(where, "two parameters have one name")


def _check_span(span: Span, where: str) -> None:
    lines, columns = (span.line, span.end_line), (span.column, span.end_column)
    if max(lines) > MAX_LINE or max(columns) > MAX_COLUMN:
        refuse(where, f"no file has a place {span}")
    if (span.end_line or span.end_column) and (span.end_line, span.end_column) < (span.line, span.column):
        refuse(where, f"the place {span} ends before it begins")
    try:
        span.file.encode()
    except UnicodeEncodeError:
        refuse(where, "the name of its source file holds half of a surrogate pair")
    if "\0" in span.file:
        refuse(where, "the name of its source file holds a null character")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(_as_python_reads(name))


def _as_python_reads(name: str) -> str:
    """A name as it is in source text, where letters that only look different are one."""
    return unicodedata.normalize("NFKC", name)
