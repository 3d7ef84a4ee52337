"""Splits an experiment between the client, which has the user's code, and a worker, which has the model.

    split = split_program(program, globals, closure, {"model": model, "prompts": prompts})
    split is None                    nothing needs the client: the experiment is one job
    split.function(run)(model, prompts)

The client's part is a Python function with the user's names, cells and lines; it calls `run(segment, values)` for each
part that needs the model, in the order of the source. Code of the client's that needs a live value inside a forward
is refused before anything runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any, final

from nnsight_compiler.files.vocabulary import HostName
from nnsight_compiler.ir.program import Program
from nnsight_compiler.remote.ahead import move_ahead
from nnsight_compiler.remote.cutting import Cutter
from nnsight_compiler.remote.kinds import Called, Kind, Local, kind_of, program_of, surroundings
from nnsight_compiler.remote.methods import methods_as_functions
from nnsight_compiler.remote.segments import Outlined, Run
from nnsight_compiler.remote.sides import Sides, find_sides
from nnsight_compiler.runtime.functions import generate_function


@final
@dataclass(frozen=True, slots=True)
class Crossing:
    """One segment: the lines of its ops, and the names of what it takes and gives."""

    function: str
    lines: tuple[int, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Split:
    """A program whose parts run on two sides.

    program: the client's, which takes `called` before the parameters of the program that was split.
    called: segments, and functions of the user's that have segments of their own.
    helpers: the splits of these functions.
    """

    program: Program
    globals: dict[str, Any]
    closure: Mapping[str, CellType]
    defaults: Mapping[str, object]
    called: tuple[Outlined | Called, ...]
    helpers: Mapping[Called, Split]

    @property
    def segments(self) -> tuple[Outlined, ...]:
        """All segments, those of functions that it calls included."""
        splits = (self, *(each for each in self.helpers.values() if each is not self))
        return tuple(each for split in splits for each in split.called if isinstance(each, Outlined))

    def function(self, run: Run) -> Callable[..., Any]:
        """The client's function, with the signature of the one that was split. It calls `run` for each segment."""
        return self._bound(run, {})

    def _bound(self, run: Run, made: dict[Called, Callable[..., Any]]) -> Callable[..., Any]:
        function = generate_function(self.program, self.globals, self.closure, self.defaults)
        called: list[Callable[..., Any]] = []
        for each in self.called:
            if isinstance(each, Outlined):
                called.append(functools.partial(each.called, run))
                continue
            if each not in made:
                made[each] = _Later(made, each)  # while it is made: it may call itself
                made[each] = self.helpers[each]._bound(run, made)
            called.append(made[each])
        return functools.partial(function, *called)

    def describe(self) -> list[Crossing]:
        """What crosses, segment by segment."""
        found = []
        for each in self.segments:
            lines = sorted({span.line for span in each.spans if span.line})
            found.append(Crossing(each.program.name, tuple(lines), each.takes, each.gives))
        return found


@final
@dataclass(frozen=True, slots=True)
class _Later:
    """A function that calls itself, or that another one which it calls does."""

    made: Mapping[Called, Callable[..., Any]]
    called: Called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.made[self.called](*args, **kwargs)


def split_program(
    program: Program,
    globals_: dict[str, Any],
    closure: Mapping[str, CellType],
    arguments: Mapping[str, Any],
    defaults: Mapping[str, object] | None = None,
) -> Split | None:
    """The two parts of a program for these arguments; `None` where nothing of it needs the client.

    Args:
        program: an experiment as it was written.
        arguments: the values of all its parameters, by name.
        defaults: the defaults of its optional parameters.

    Raises:
        CompileError: code of the client's needs a live value inside a forward.
    """
    given = {name: kind_of(value) for name, value in arguments.items()}
    sides = find_sides(program, globals_, closure, given)
    if sides.whole and not any(isinstance(kind, (Local, HostName)) for kind in given.values()):
        return None
    helpers: dict[Called, Split] = {}
    return _split(sides, globals_, closure, given, defaults or {}, helpers)


def _split(
    sides: Sides,
    globals_: dict[str, Any],
    closure: Mapping[str, CellType],
    given: Mapping[str, Kind],
    defaults: Mapping[str, object],
    helpers: dict[Called, Split],
) -> Split:
    named, closure = methods_as_functions(sides, globals_, closure)
    if named is not sides.program:
        sides = find_sides(named, globals_, closure, given)
    moved = move_ahead(sides.program, sides)
    sides = find_sides(moved, globals_, closure, given)
    cutter = Cutter(sides, globals_, closure)
    made = cutter.run()
    called = tuple(cutter.called.values())
    split = Split(made, globals_, closure, defaults, called, helpers)
    for each in called:
        if isinstance(each, Called) and each not in helpers:
            helpers[each] = split  # until it is split: it may call itself
            helpers[each] = _of_helper(each, helpers)
    return split


def _of_helper(called: Called, helpers: dict[Called, Split]) -> Split:
    """The split of a function for what a program gives it."""
    function, cells = surroundings(called.held)
    signature = inspect.signature(function).parameters
    defaults = {
        name: parameter.default for name, parameter in signature.items() if parameter.default is not parameter.empty
    }
    given = dict(called.given)
    found = find_sides(program_of(called.held), function.__globals__, cells, given)
    return _split(found, function.__globals__, cells, given, defaults, helpers)


__all__ = ["Crossing", "Split", "split_program"]
