"""Finds names that do not exist: of variables, in modules, of tensors; and calls that lack arguments.

    %0 = global torch
    %1 = attr %0.sofmax              refused: the module `torch` has no `sofmax`; did you mean softmax?

The program itself is returned. Python would raise at the same line, but only when it comes to it, which may be hours
later. So this belongs to a check before the run, and not to compiling: what stands before such a line still happens.

A mistake is reported only where it is sure: not under a condition or in a `try`, which may be there for the very name;
not of a name that the program's own file binds somewhere; of a tensor only where the value is known to be one.
"""

from __future__ import annotations

import builtins
import difflib
import inspect
import symtable
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Operand, Value

_UNKNOWN: Any = object()
"""What an operand is where that is not known."""

_KINDS = {
    "positional_only": inspect.Parameter.POSITIONAL_ONLY,
    "positional_or_keyword": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "var_positional": inspect.Parameter.VAR_POSITIONAL,
    "keyword_only": inspect.Parameter.KEYWORD_ONLY,
    "var_keyword": inspect.Parameter.VAR_KEYWORD,
}


def check_names(program: Program, globals_: Mapping[str, Any], bound: Collection[str] | None) -> Program:
    """The program itself.

    Args:
        bound: the names that the program's file binds; `None` where its text is not to be had.

    Raises:
        CompileError: with every name that does not exist, and every call that lacks arguments.
    """
    wrong = list(_Names(globals_, bound).region(program.body))
    if wrong:
        raise CompileError(wrong)
    return program


def bound_names(text: str) -> frozenset[str] | None:
    """The names that a module binds at its top level, or anywhere as a global; `None` without a text of Python's."""
    try:
        top = symtable.symtable(text, "<names>", "exec") if text else None
    except SyntaxError:
        return None
    return None if top is None else frozenset(_bound(top, top=True))


def _bound(table: symtable.SymbolTable, top: bool = False) -> Iterator[str]:
    for symbol in table.get_symbols():
        binds = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
        if binds and (top or symbol.is_declared_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _bound(child)


class _Names:
    """Follows what globals, modules and functions of the program are, and looks for what they lack."""

    def __init__(self, globals_: Mapping[str, Any], bound: Collection[str] | None) -> None:
        self.globals = globals_
        self.bound = bound
        self.objects: dict[Value, Any] = {}

    def region(self, region: Region) -> Iterator[Diagnostic]:
        for op in region.ops:
            yield from self.op(op)
            if not isinstance(op, (ops.If, ops.Try)):
                for part in regions(op):
                    yield from self.region(part)

    def op(self, op: Op) -> Iterator[Diagnostic]:
        match op:
            case ops.Global(result=result, name=name, scope="global"):
                yield from self._global(op, result, name)
            case ops.Import(result=result, module=module, name=None, level=0, leaf=leaf):
                self.objects[result] = sys.modules.get(module if leaf else module.partition(".")[0], _UNKNOWN)
            case ops.Attribute(result=result, object=held, name=name):
                yield from self._attribute(op, result, held, name)
            case ops.Closure(result=result, parameters=parameters, generator=False):
                self.objects[result] = _signature(parameters)
            case ops.Call(function=function):
                yield from self._call(op, self._object(function))

    def _object(self, operand: Operand) -> Any:
        return self.objects.get(operand, _UNKNOWN) if isinstance(operand, Value) else _UNKNOWN

    def _global(self, op: Op, result: Value, name: str) -> Iterator[Diagnostic]:
        if name in self.globals or hasattr(builtins, name):
            self.objects[result] = self.globals[name] if name in self.globals else getattr(builtins, name)
        elif self.bound is not None and name not in self.bound:
            near = _nearest(name, [*self.globals, *self.bound, *dir(builtins)])
            yield Diagnostic(op.span, f"the name `{name}` is not defined", near or "define or import it")

    def _attribute(self, op: Op, result: Value, held: Operand, name: str) -> Iterator[Diagnostic]:
        value = self._object(held)
        if isinstance(value, ModuleType):
            if hasattr(value, name):
                self.objects[result] = getattr(value, name)
            else:
                way_out = _nearest(name, dir(value)) or f"`dir({value.__name__})` lists what it has"
                yield Diagnostic(op.span, f"the module `{value.__name__}` has no `{name}`", way_out)
        elif isinstance(held, Value) and isinstance(held.type, TensorType) and not hasattr(torch.Tensor, name):
            way_out = _nearest(name, dir(torch.Tensor)) or "`dir(torch.Tensor)` lists what it has"
            yield Diagnostic(op.span, f"a tensor has no `{name}`", way_out)

    def _call(self, op: ops.Call, function: Any) -> Iterator[Diagnostic]:
        if isinstance(function, FunctionType) and not hasattr(function, "__wrapped__"):
            name, signature = f"`{function.__name__}`", inspect.signature(function)
        elif isinstance(function, inspect.Signature):
            name, signature = "this function", function
        else:
            return
        if any(argument.star for argument in op.arguments):
            return
        given = [argument for argument in op.arguments if argument.keyword is None]
        named = {argument.keyword: argument for argument in op.arguments if argument.keyword is not None}
        try:
            signature.bind(*given, **named)
        except TypeError as error:
            yield Diagnostic(op.span, f"{name} cannot be called like this: {error}", f"its parameters: {signature}")


def _signature(parameters: tuple[ops.Parameter, ...]) -> inspect.Signature:
    made = []
    for each in parameters:
        default = ... if each.optional else inspect.Parameter.empty
        made.append(inspect.Parameter(each.value.name.partition(".")[0], _KINDS[each.kind], default=default))
    return inspect.Signature(made)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [each for each in known if not each.startswith("__")], n=3)
    return f"did you mean {', '.join(f'`{each}`' for each in near)}?" if near else ""
