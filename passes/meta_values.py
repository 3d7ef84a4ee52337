"""What one run without data knows of the values of a program, and what it has lost sight of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import Diagnostic
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes.meta_torch import Mistake
from nnsight_compiler.passes.origins import Origins
from nnsight_compiler.passes.shapes import Sites, Surroundings
from nnsight_compiler.passes.stand_ins import INTEGER, UNKNOWN, inside, is_container, same, stand_in

Shape = tuple[torch.dtype, tuple[int, ...]]
"""What is kept of a tensor."""

Site = tuple[str, str, str, int, str]
"""A forward, a module, a port, a call, and the invoke whose rows are meant."""


@final
@dataclass(frozen=True, slots=True)
class Size:
    """The size of one forward in a run."""

    sites: Sites
    rows: int
    tokens: int
    varies: frozenset[str]


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A mistake of the program's, and the value and dimension whose axis its text names."""

    diagnostic: Diagnostic
    value: str | None
    dimension: int | None


@dataclass(slots=True)
class Loop:
    """A loop that is being run: the values with which rounds ended, and whether the rest of a round may be left out."""

    continued: list[tuple[Any, ...]] = field(default_factory=list)
    broken: list[tuple[Any, ...]] = field(default_factory=list)
    left: bool = False


class Restart(Exception):  # noqa: N818  # control flow, not an error
    """What a forward's sites hold is not known after all."""


class Source:
    """The program, and what its ops say by themselves.

    targets: the names on the wire of its calls; names: the ops that read names from outside; both by result.
    assigned: names from outside that it assigns. origins: what is known of its calls.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.origins = Origins(program)
        self.targets: dict[str, str | None] = {}
        self.names: dict[str, ops.Global] = {}
        self.assigned: set[str] = set()
        for op in program.walk():
            match op:
                case ops.Call(result=result, target=target):
                    self.targets[result.name] = target
                case ops.Global(result=result):
                    self.names[result.name] = op
                case ops.SetGlobal(name=name):
                    self.assigned.add(name)


class MetaValues:
    """The values of one run.

    shapes: for each value that was a tensor whenever it was made, its dtype and sizes; `None` for others.
    mistakes: what was found.
    """

    def __init__(self, source: Source, surroundings: Surroundings, sizes: Mapping[str, Size], opaque: set[str]) -> None:
        self.source = source
        self.surroundings = surroundings
        self.sizes = sizes
        self.opaque = opaque
        self.shapes: dict[str, Shape | None] = {}
        self.mistakes: list[Found] = []
        self.values: dict[str, Any] = {}
        self.cells: dict[str, Any] = {}
        self.memo: dict[int, Any] = {}
        self.lost: dict[int, Any] = {}
        self.peers: dict[int, list[Any]] = {}
        self.kept: list[Any] = []
        self.merged: list[torch.Tensor] = []  # what some value that is not known may be
        self.sites: dict[Site, Any] = {}
        self.live: dict[int, tuple[Any, Site]] = {}
        self.forward: tuple[str, Size | None] | None = None
        self.loops: list[Loop] = []
        self.harmless: set[str] = set()
        self.unsure = 0
        self.left = False
        self.blind = False
        self.hosted = False
        self.version = 0

    def value(self, operand: Operand) -> Any:
        """The stand-in of an operand; what was lost is not known."""
        match operand:
            case Value(name=name):
                held = self.values.get(name, UNKNOWN)
                return UNKNOWN if id(held) in self.lost else held
            case Literal(value=value):
                return value
            case Tuple(parts=operands):
                return tuple(map(self.value, operands))
            case Slice(lower=lower, upper=upper, step=step):
                return slice(self.value(lower), self.value(upper), self.value(step))
            case Module() | Unbound():
                return UNKNOWN

    def define(self, value: Value, held: Any) -> None:
        self.values[value.name] = UNKNOWN if self.blind or id(held) in self.lost else held
        self.record(value)

    def define_all(self, results: tuple[Value, ...], values: tuple[Any, ...]) -> None:
        for number, result in enumerate(results):
            self.define(result, values[number] if number < len(values) else UNKNOWN)

    def record(self, value: Value) -> None:
        held = self.values[value.name]
        shape = (held.dtype, tuple(held.shape)) if isinstance(held, torch.Tensor) else None
        known = self.shapes.setdefault(value.name, shape)
        if known != shape:
            self.shapes[value.name] = None

    def outside(self, value: Any) -> Any:
        return stand_in(value, self.memo)

    def lose(self, *values: Any) -> None:
        """Has these values, what they hold, and what they may be the same as, not known any more."""
        self.forget([each for value in values for each in inside(value)])

    def lose_containers(self, *values: Any) -> None:
        """The same for containers alone: which tensors they hold is not known any more, but what those are is."""
        self.forget([each for value in values for each in inside(value) if is_container(each)])

    def forget(self, waiting: list[Any]) -> None:
        while waiting:
            held = waiting.pop()
            if (is_container(held) or isinstance(held, torch.Tensor)) and id(held) not in self.lost:
                self.lost[id(held)] = held
                self.version += 1
                waiting.extend(self.peers.get(id(held), ()))

    def join(self, first: Any, second: Any) -> Any:
        """What is known of a value that is the one or the other."""
        if first is second:
            return first
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and same(first, second):
            joined = first.detach()
            for each in (first, second):
                self.peers.setdefault(id(joined), []).append(each)
                self.peers.setdefault(id(each), []).append(joined)
            self.kept.extend((first, second, joined))  # lest others take their identities
            return joined
        if type(first) is tuple and type(second) is tuple and len(first) == len(second):
            return tuple(map(self.join, first, second))
        if same(first, second):
            return first
        if all(each is INTEGER or type(each) is int for each in (first, second)):
            return INTEGER
        self.lose_containers(first, second)
        self.merged.extend(each for each in inside((first, second)) if isinstance(each, torch.Tensor))
        return UNKNOWN

    def join_all(self, values: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        joined = values[0]
        for each in values[1:]:
            joined = tuple(map(self.join, joined, each))
        return joined

    @property
    def sure(self) -> bool:
        return not (self.unsure or self.left or self.blind or any(loop.left for loop in self.loops))

    @contextmanager
    def maybe(self, maybe: bool = True) -> Iterator[None]:
        """A part of the program that may not run."""
        self.unsure += maybe
        try:
            yield
        finally:
            self.unsure -= maybe

    def report(self, op: Op, mistake: Mistake, operand: Operand | None = None) -> None:
        if self.sure and not any(found.diagnostic.span == op.span for found in self.mistakes):
            name = operand.name if isinstance(operand, Value) else None
            diagnostic = Diagnostic(op.span, mistake.reason, mistake.way_out)
            self.mistakes.append(Found(diagnostic, name, mistake.dimension))

    def attempt(self, op: Op, compute: Callable[[], Any], operand: Operand | None = None) -> Any:
        if self.blind:
            return UNKNOWN
        try:
            return compute()
        except Mistake as mistake:
            self.report(op, mistake, operand)
            return UNKNOWN

    def store(self, name: str, held: Any, always: bool = False) -> None:
        before = self.cells.get(name, UNKNOWN)
        if name in self.cells and (always or not self.sure):
            held = self.join(before, held)
        if name in self.cells and not same(before, held):
            self.version += 1
        self.cells[name] = held
