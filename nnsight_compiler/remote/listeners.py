"""Functions that are called with tokens stay where they are: the program that is sent has numbers in their place.

    with model.generate(prompt, on_token=show):     ──▶     with model.generate(prompt, on_token=_listener_0):

and `_listener_0` is a `Listener`, which has the tokens sent back as they come. What is done to them happens here,
beside the run: nothing that `show` changes reaches it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import CellType
from typing import Any, NamedTuple

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite, used, walk
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.runtime.tokens import Listener

KEYWORD = "on_token"
OnToken = Callable[[int, torch.Tensor], object]
"""Takes the number of a listener, and the ids of the tokens of one step, `[rows]`."""
_CONTAINERS = (list, dict, set, deque, torch.Tensor)
"""What their methods do is done where they are: they come back changed."""
_MOST = 256


class Kept(NamedTuple):
    """A program without the functions that stay here.

    values: of its parameters: those that brought nothing but such a function are `None`.
    closure: with a name for each listener. functions: what these stand for, by their numbers.
    """

    program: Program
    values: Mapping[str, Any]
    closure: Mapping[str, CellType]
    functions: tuple[Callable[[torch.Tensor], Any], ...]


def keep_listeners(
    program: Program, values: Mapping[str, Any], globals_: Mapping[str, Any], closure: Mapping[str, CellType]
) -> Kept:
    """The program with a listener for each function that its generations are given as `on_token=`, where that is one of
    the caller's: not where the program itself makes it, or takes it from a list that is sent.

    Args:
        values: of the parameters, by name.
    """
    functions: list[Any] = []
    if program.kind == "block":
        values = _of_block(program, values, functions)
    found = [_held(each.value, program, values, globals_, closure) for each in _given(program)]
    stay = tuple(_stays(each) for each in found)
    if not any(stay):
        return Kept(program, values, closure, tuple(functions))
    first = len(functions)
    functions += [each for each, stays in zip(found, stay, strict=True) if stays]
    made, unused = _rewritten(program, stay, first)
    left = {name: None if name in unused else value for name, value in values.items()}
    cells = {_name(number): _cell(number) for number in range(first, len(functions))}
    return Kept(made, left, {**closure, **cells}, tuple(functions))


def _of_block(program: Program, values: Mapping[str, Any], functions: list[Any]) -> Mapping[str, Any]:
    """The values of a block, whose trace is given all that it is called with as a tuple and a dict."""
    keyword = program.parameters[2].value.name
    function = values[keyword].get(KEYWORD)
    if not _stays(function):
        return values
    functions.append(function)
    return {**values, keyword: {**values[keyword], KEYWORD: _listener(0)}}


def _given(program: Program) -> list[Argument]:
    return [
        argument
        for op in walk(program.body)
        if isinstance(op, ops.Forward) and op.method == "generate"
        for argument in op.arguments
        if argument.keyword == KEYWORD
    ]


def _stays(function: Any) -> bool:
    return callable(function) and not isinstance(function, Listener)


def _held(
    operand: Operand,
    program: Program,
    values: Mapping[str, Any],
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
) -> Any:
    """What an operand is before anything runs; `None` where only the run can tell."""
    if not isinstance(operand, Value):
        return None
    if operand.name in values:
        return values[operand.name]
    match _maker(program, operand):
        case ops.Global(name=name, scope=scope) if _is_set(program, name, scope):
            return None
        case ops.Global(name=name, scope="global"):
            return globals_.get(name)
        case ops.Global(name=name) if name in closure:
            try:
                return closure[name].cell_contents
            except ValueError:  # it is not assigned yet
                return None
        case ops.Bound(value=value):
            return _held(value, program, values, globals_, closure)
        case ops.Attribute(object=base, name=name):
            owner = _held(base, program, values, globals_, closure)
            return None if owner is None or isinstance(owner, _CONTAINERS) else getattr(owner, name, None)
    return None


def _maker(program: Program, value: Value) -> Op | None:
    return next((op for op in walk(program.body) if value in _results(op)), None)


def _results(op: Op) -> tuple[Value, ...]:
    return (op.result,) if isinstance(op, (ops.Global, ops.Bound, ops.Attribute)) else ()


def _is_set(program: Program, name: str, scope: str) -> bool:
    return any(isinstance(op, ops.SetGlobal) and (op.name, op.scope) == (name, scope) for op in walk(program.body))


def _name(number: int) -> str:
    """The name of a listener's cell, which no name of the user's is."""
    return f"_listener_{number}"


@cache
def _listener(number: int) -> Listener:
    return Listener(number)


@cache
def _cell(number: int) -> CellType:
    return CellType(_listener(number))


_made: OrderedDict[tuple[int, tuple[bool, ...], int], tuple[Program, Program, frozenset[str]]] = OrderedDict()
"""What programs became, and what they were, so that each has an identity of its own: others go by it."""


def _rewritten(program: Program, stay: tuple[bool, ...], first: int) -> tuple[Program, frozenset[str]]:
    """The program with listeners from a number on, and the parameters that it no longer uses."""
    key = id(program.body), stay, first
    if key not in _made:
        body = _Listening(program, stay, first).body()
        before, after = ({value.name for op in walk(each) for value in used(op)} for each in (program.body, body))
        _made[key] = program, replace(program, body=body), frozenset(before - after)
        while len(_made) > _MOST:
            _made.popitem(last=False)
    return _made[key][1:]


class _Listening:
    def __init__(self, program: Program, stay: Sequence[bool], first: int) -> None:
        self.program, self.number = program, first
        self.stay = iter(stay)
        self.builder = Builder(value.name for value in program.values())
        self.before: set[str] = set()

    def body(self) -> Region:
        made = self.region(self.program.body)
        while True:  # what was looked up for the functions alone
            needed = {value.name for op in walk(made) for value in used(op)}
            dead = {each.name for op in walk(made) for each in _results(op)} & self.before - needed
            if not dead:
                return made
            made = _without(made, dead)

    def region(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            if isinstance(op, ops.Forward) and op.method == "generate":
                op = replace(op, arguments=tuple(self.argument(each, made, op) for each in op.arguments))
            made.append(rewrite(op, region=self.region))
        return Region(region.parameters, tuple(made))

    def argument(self, argument: Argument, made: list[Op], forward: ops.Forward) -> Argument:
        if argument.keyword != KEYWORD or not next(self.stay):
            return argument
        result = self.builder.fresh(KEYWORD)
        made.append(ops.Global(result, _name(self.number), "free", span=forward.span))
        self.number += 1
        operand: Operand = argument.value
        while isinstance(operand, Value):
            self.before.add(operand.name)
            match _maker(self.program, operand):
                case ops.Attribute(object=base) | ops.Bound(value=base):
                    operand = base
                case _:
                    break
        return replace(argument, value=result)


def _without(region: Region, dead: set[str]) -> Region:
    left = (op for op in region.ops if not any(each.name in dead for each in _results(op)))
    return Region(region.parameters, tuple(rewrite(op, region=lambda inner: _without(inner, dead)) for op in left))
