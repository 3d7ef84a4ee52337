"""What is known of the values and the ops of one program while it is looked at, and of the functions that it calls.

A function of the user's is looked into, for what it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

from nnsight_compiler.experiment import Experiment
from nnsight_compiler.files.vocabulary import HostName, KnownName, Space
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions
from nnsight_compiler.ir.values import Operand, Value, values_in
from nnsight_compiler.remote.kinds import (
    BELONGING,
    CARRIED,
    DATA,
    LOCAL,
    MODULES,
    OF_MODEL,
    Called,
    Closed,
    Handle,
    Helper,
    Instance,
    Kind,
    Local,
    Method,
    PlainClass,
    Side,
    captured,
    joined,
    kind_of,
    program_of,
    surroundings,
    together,
)


@dataclass(slots=True)
class Findings:
    """What is known of the values and the ops of one program. It only ever grows, until nothing changes.

    given: what each parameter is, by its name. names: what each name from outside is, by name and scope.
    refused: the ops that no file may have, with why. helpers: what functions of the user's do, once looked at.
    waiting: the closures of which it is not known yet what they are given.
    """

    program: Program
    globals_: Mapping[str, Any]
    closure: Mapping[str, CellType]
    given: Mapping[str, Kind]
    kinds: dict[str, Kind] = field(default_factory=dict)
    sides: dict[int, Side] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    made: dict[str, Op] = field(default_factory=dict)
    closures: dict[str, ops.Closure] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    names: dict[tuple[str, str], Kind] = field(default_factory=dict)
    escaping: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    helpers: dict[Called, tuple[Side, Kind]] = field(default_factory=dict)
    changed: bool = True

    def run(self) -> None:
        """Finds all that can be known."""
        raise NotImplementedError

    def enter(self, closure: ops.Closure, live: bool) -> None:
        """Goes through the ops of a closure."""
        raise NotImplementedError

    def model(self) -> Any:
        """A model that the program mentions, where it does."""
        return next((kind.held._root for kind in self.kinds.values() if isinstance(kind, Handle)), None)

    # --- values ---

    def kind(self, operand: Operand) -> Kind:
        if isinstance(operand, Value):
            return self.kinds.get(operand.name, DATA)
        found = [self.kind(value) for value in values_in(operand)]
        return self.holding(found)

    def holding(self, kinds: Iterable[Kind]) -> Kind:
        """What something is that holds these."""
        found = list(kinds)
        if any(isinstance(kind, (Local, HostName, PlainClass, Space)) or self.is_clients(kind) for kind in found):
            return LOCAL
        if any(isinstance(kind, (*OF_MODEL, Helper, Closed, KnownName, Method)) for kind in found):
            return MODULES
        return next((kind for kind in (BELONGING, CARRIED) if kind in found), DATA)

    def element(self, kind: Kind) -> Kind:
        return MODULES if isinstance(kind, OF_MODEL) else LOCAL if isinstance(kind, Local) else self.holding([kind])

    def is_clients(self, kind: Kind) -> bool:
        """Whether a value is a function that needs the client."""
        match kind:
            case Closed(name=name):
                return self.content(self.closures[name].body) in (Side.CLIENT, Side.BOTH)
            case Helper(held=held):
                return self.helper(held)[0] in (Side.CLIENT, Side.BOTH)
            case Method():
                return self.method_of(kind)[0] in (Side.CLIENT, Side.BOTH)
        return False

    def put(self, value: Value, kind: Kind) -> None:
        old = self.kinds.get(value.name)
        new = joined(old, kind)
        if new != old:
            self.kinds[value.name] = new
            self.changed = True

    def set(self, op: Op, side: Side, reason: str = "") -> None:
        """Notes the side of an op, and why, where the op itself is the reason. What is known only grows."""
        old = self.sides.get(id(op), Side.EITHER)
        if side.value > old.value:
            self.sides[id(op)] = side
            self.changed = True
        if reason:
            self.reasons.setdefault(id(op), reason)

    def clients(self, op: Op, reason: str = "") -> None:
        self.set(op, Side.CLIENT, reason)
        for value in defined(op):
            self.put(value, LOCAL)

    def content(self, region: Region) -> Side:
        return together(self.sides.get(id(op), Side.EITHER) for op in region.ops)

    def returned(self, body: Region) -> Kind:
        """What a function returns."""
        kind: Kind | None = None
        for op in _of_function(body):
            if isinstance(op, ops.Return):
                kind = joined(kind, self.kind(op.value))
        return DATA if kind is None else kind

    # --- functions of the user's ---

    def side_of(self, kind: Kind) -> Side:
        match kind:
            case Closed(name=name):
                return self.content(self.closures[name].body)
            case Helper(held=held):
                return self.helper(held)[0]
            case Method():
                return self.method_of(kind)[0]
        return Side.EITHER

    def method_of(self, called: Method, arguments: tuple[ops.Argument, ...] | None = None) -> tuple[Side, Kind]:
        """The side of what a method does, and what it returns."""
        try:
            program_of(called.held)
        except ExperimentError:  # it runs as Python does it
            return Side.CLIENT, LOCAL
        return self.helper(called.held, arguments, None if called.static else called.owner)

    def helper(
        self,
        function: FunctionType | Experiment,
        arguments: tuple[ops.Argument, ...] | None = None,
        receiver: Instance | None = None,
    ) -> tuple[Side, Kind]:
        """The side of what a function of the user's does, and what it returns. Without arguments, any may be given.
        A method is given its receiver first."""
        program = program_of(function)
        given = self.given_to(function, [] if arguments is None else [arguments], receiver)
        called = Called(function, tuple(given.items()))
        if called not in self.helpers:
            self.helpers[called] = Side.EITHER, DATA  # while it is looked at: it may call itself
            inner, cells = surroundings(function)
            finder = type(self)(program, inner.__globals__, cells, given, helpers=self.helpers)
            finder.run()
            kind = finder.returned(program.body)
            side = finder.content(program.body)
            if not captured(function):  # it cannot be put into a job as it is
                side = together((side, Side.CLIENT))
            self.helpers[called] = side, LOCAL if isinstance(kind, Closed) else kind
        return self.helpers[called]

    def given_to(
        self,
        function: FunctionType | Experiment,
        calls: Iterable[tuple[ops.Argument, ...]],
        receiver: Instance | None = None,
    ) -> dict[str, Kind]:
        """What the parameters of a function of the user's are in these calls."""
        program = program_of(function)
        parameters = program.parameters
        found: dict[str, Kind] = {}
        if receiver is not None and parameters:
            found[parameters[0].value.name] = receiver
            parameters = parameters[1:]
        for arguments in calls:
            for name, kind in self.bound(parameters, arguments).items():
                found[name] = joined(found.get(name), kind)
        defaults = inspect.signature(surroundings(function)[0]).parameters
        for parameter in program.parameters:
            name = parameter.value.name
            if parameter.optional and name in defaults:
                found[name] = joined(found.get(name), kind_of(defaults[name].default))
        return {each.value.name: found.get(each.value.name, DATA) for each in program.parameters}

    def bound(self, parameters: tuple[ops.Parameter, ...], arguments: tuple[ops.Argument, ...]) -> dict[str, Kind]:
        """What the parameters of a function are in a call, as far as the arguments say."""
        found: dict[str, Kind] = {}
        places = iter([each for each in parameters if each.kind in ("positional_only", "positional_or_keyword")])
        named = {each.value.name.partition(".")[0]: each.value.name for each in parameters}
        starred = any(argument.star for argument in arguments)
        for argument in arguments:
            kind = self.kind(argument.value)
            if starred:
                for each in parameters:
                    found[each.value.name] = joined(found.get(each.value.name), self.element(kind))
            elif argument.keyword is not None:
                if argument.keyword in named:
                    found[named[argument.keyword]] = kind
            elif (place := next(places, None)) is not None:
                found[place.value.name] = kind
        return {name: LOCAL if isinstance(kind, Closed) else kind for name, kind in found.items()}


def _of_function(region: Region) -> Iterator[Op]:
    """The ops of a function, without those of functions inside it."""
    for op in region.ops:
        yield op
        if not isinstance(op, ops.Closure):
            for inner in regions(op):
                yield from _of_function(inner)
