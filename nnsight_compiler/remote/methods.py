"""Calls of methods that run the model become calls of functions, which are split as helpers are.

    class Study:                                        %f = global Study_norm
        def norm(self, model): …trace…         ──▶      %r = call %f(%study, %model)
    study.norm(model)

Only what the class itself defines as a plain function counts: what runs is then what Python would run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import CellType, FunctionType
from typing import NamedTuple

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.ops import Argument, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite, used
from nnsight_compiler.ir.values import Value
from nnsight_compiler.remote.kinds import Instance, Local, program_of
from nnsight_compiler.remote.sides import Sides


class _Method(NamedTuple):
    """A method that a program calls: its function, the object that it is of, and the name by which it is read."""

    function: FunctionType
    owner: Value | None
    name: str


def methods_as_functions(
    sides: Sides, globals_: Mapping[str, object], closure: Mapping[str, CellType]
) -> tuple[Program, Mapping[str, CellType]]:
    """The program with its methods that run the model as functions, and the closure that has these."""
    program = sides.program
    taken = {op.name for op in program.walk() if isinstance(op, (ops.Global, ops.SetGlobal))} | set(closure)
    found: dict[str, _Method] = {}
    cells: dict[str, CellType] = {}
    for op in program.walk():
        if not isinstance(op, ops.Attribute) or not isinstance(op.object, Value):
            continue
        function, bound = _method(_held(sides, op.object, globals_, closure), op.name)
        if function is None or not _runs_model(function) or not _is_only_called(program, op.result):
            continue
        name = function.__qualname__.rpartition("<locals>.")[2].replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        cells[name] = CellType(function)
        found[op.result.name] = _Method(function, op.object if bound else None, name)

    def change(op: Op) -> Op:
        op = rewrite(op, region=region)
        match op:
            case ops.Attribute(result=Value(name=name)) if name in found:
                return ops.Global(op.result, found[name].name, "free", span=op.span)
            case ops.Call(function=Value(name=name)) if name in found:
                owner = found[name].owner
                return op if owner is None else replace(op, arguments=(Argument(owner), *op.arguments))
        return op

    def region(held: Region) -> Region:
        return Region(held.parameters, tuple(map(change, held.ops)))

    if not found:
        return program, closure
    return replace(program, body=region(program.body)), {**closure, **cells}


def _held(sides: Sides, value: Value, globals_: Mapping[str, object], closure: Mapping[str, CellType]) -> object:
    """The client's object, or the class, that a value is known to be."""
    kind, maker = sides.kind(value), sides.made.get(value.name)
    if isinstance(kind, (Local, Instance)):
        return kind.held
    if not isinstance(maker, ops.Global):
        return None
    try:
        held = globals_.get(maker.name) if maker.scope == "global" else closure[maker.name].cell_contents
    except (KeyError, ValueError):
        return None
    return held if isinstance(held, type) else None


def _method(held: object, name: str) -> tuple[FunctionType | None, bool]:
    """The function that a method of an object or a class is, and whether it is given the object."""
    kind = held if isinstance(held, type) else type(held)
    own = getattr(held, "__dict__", {})
    special = any("__getattribute__" in vars(base) for base in kind.__mro__[:-1])
    if held is None or special or (not isinstance(held, type) and name in own):
        return None, False
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, staticmethod):
        return (found.__func__, False) if isinstance(found.__func__, FunctionType) else (None, False)
    return (found, not isinstance(held, type)) if isinstance(found, FunctionType) else (None, False)


def _runs_model(function: FunctionType) -> bool:
    """Whether a function has traces of its own."""
    if hasattr(function, "__wrapped__"):
        return False
    try:
        program = program_of(function)
    except ExperimentError:  # it runs as Python does it
        return False
    return any(isinstance(op, (ops.Forward, ops.Session)) for op in program.walk())


def _is_only_called(program: Program, value: Value) -> bool:
    users = [op for op in program.walk() if value in used(op)]
    return bool(users) and all(
        isinstance(op, ops.Call) and op.function == value and all(a.value != value for a in op.arguments)
        for op in users
    )
