"""What a program is sure to take, before it runs: memory for one value, bytes that it gives back, rounds, forwards.

%x = call %zeros(1000000000000) as torch.zeros    makes 3.6 TiB at demo.py:12, and 4 GiB are allowed
return %x                                    ──▶  gives back 3.6 TiB at demo.py:13, and 256 MiB are allowed

The program is run on tensors without data, as in `infer`, at the size of this call. Of a loop whose rounds can be
counted the first rounds are run one by one; what they add to containers, to tensors that grow, and to the number of
forwards, the rest is taken to add as well, each as the last did. Nothing is told of what only a run can say: sizes that
rest on values, loops that end when a value says so, branches. So what is found is a lower bound, but for two things: a
single value that is too large is told wherever it stands, since the run that reaches it must fail; and a generation
counts for as many steps as it is allowed, though it may end early.

Nothing is changed, so that no program is refused that would have run within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final
from typing import Literal as OneOf

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.ir.values import Module, Operand, Tuple, Value
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall, words
from nnsight_compiler.passes.bounded import length_of
from nnsight_compiler.passes.infer import computed
from nnsight_compiler.passes.meta_run import Leaving, MetaRun
from nnsight_compiler.passes.meta_values import Loop, Restart, Size, Source
from nnsight_compiler.passes.shapes import Extent, Extents, Surroundings
from nnsight_compiler.passes.sites import forwards
from nnsight_compiler.passes.stand_ins import UNKNOWN, Method, inside, is_container
from nnsight_compiler.passes.value_sizes import bytes_of_call, bytes_of_operator, held_bytes, listed_bytes, tensor_bytes

ONE_BY_ONE = 64
"""Rounds up to which a loop is run round by round."""
ALL_ROUNDS = 4_000
"""How many rounds are run in all; of loops that come after, nothing is told."""
A_FEW = 3
"""How many rounds of a longer loop are run, to see what each adds."""
SECONDS_A_ROUND = 20e-9
"""What a round of a loop takes at least: Python's own loop without a body."""
NUMBER = 2**20
"""Bytes of the largest whole number: Python computes with larger ones for minutes, and cannot be interrupted."""

_PADDING = frozenset(words("zfill ljust rjust center"))

What = OneOf["memory", "result", "forwards", "seconds"]


@final
@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be taken: bytes of memory, bytes of the result, forwards, seconds."""

    memory: int
    result: int
    forwards: int
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Excess:
    """An op that is sure to take more than it may: what of, how much, and how much it may."""

    what: What
    op: Op
    taken: int
    allowed: float


@final
@dataclass(slots=True)
class Footprint:
    """What a program takes at least.

    forwards: runs of the model, by the name of each forward; of a generation, as many as it may take.
    result: bytes of what the program returns, and of what it adds to containers that it was given.
    largest: bytes of the largest single value. open: why not all can be told, with the op.
    """

    forwards: dict[str, int] = field(default_factory=dict)
    result: int = 0
    largest: int = 0
    open: dict[str, Op] = field(default_factory=dict)
    excesses: list[Excess] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Runs of the model."""
        return sum(self.forwards.values())


def footprint(program: Program, surroundings: Surroundings, extents: Extents, bounds: Bounds) -> Footprint:
    """What a specialised program takes for this call, and where that is more than it may."""
    found = {op.result.name: extents(op) for op in forwards(program.body)}
    found |= {op.result.name: extents(op) for op in walk(program.body) if isinstance(op, ops.Invoke)}
    sizes = {name: _size(extent) for name, extent in found.items() if extent is not None and extent.exact}
    opaque: set[str] = set()
    source = Source(program)
    while True:
        run = _Footprint(source, surroundings, sizes, opaque, bounds)
        try:
            with computed():
                run.run()
        except Restart:
            continue
        return run.finish()


def _size(extent: Extent) -> Size:
    assert extent.rows is not None
    assert extent.tokens is not None
    return Size(extent.sites, extent.rows, extent.tokens, extent.varies)


@final
@dataclass(frozen=True, slots=True)
class _Seen:
    """What there is after a round of a loop: containers and their bytes, the forwards and rounds so far, the bytes of
    what the loop carries."""

    containers: dict[int, tuple[Any, int]]
    forwards: dict[str, int]
    rounds: int
    carried: list[int]


@final
class _Footprint(MetaRun):
    """One run that measures what it makes."""

    def __init__(
        self,
        source: Source,
        surroundings: Surroundings,
        sizes: Mapping[str, Size],
        opaque: set[str],
        bounds: Bounds,
    ) -> None:
        super().__init__(source, surroundings, sizes, opaque)
        self.bounds = bounds
        self.found = Footprint()
        self.current: Op | None = None
        self.returns: Op | None = None
        self.counting = True
        self.run_rounds = 0
        self.rounds = 0  # those that the program has at least
        self.longest: tuple[int, Op | None] = (0, None)
        self.added: dict[int, tuple[Any, int]] = {}  # bytes in containers besides what is in them here
        self.given: dict[int, int] = {}

    def run(self) -> None:
        super().run()
        for _, made in self.memo.values():
            if isinstance(made, (list, dict)) and id(made) in self.given:
                self.found.result += max(0, held_bytes([made], self.added) - self.given[id(made)])

    def finish(self) -> Footprint:
        total = self.found.total
        if total > self.bounds.forwards:
            op = max(forwards(self.source.program.body), key=lambda each: self.found.forwards.get(each.result.name, 0))
            self.found.excesses.append(Excess("forwards", op, total, self.bounds.forwards))
        if self.found.result > self.bounds.result:
            ends = self.returns or self.source.program.body.ops[-1]
            self.found.excesses.append(Excess("result", ends, self.found.result, self.bounds.result))
        seconds = self.rounds * SECONDS_A_ROUND
        _, longest = self.longest
        if longest is not None and seconds > self.bounds.seconds:
            self.found.excesses.append(Excess("seconds", longest, math.ceil(seconds), self.bounds.seconds))
        return self.found

    def outside(self, value: Any) -> Any:
        made = super().outside(value)
        for each in inside(made):
            if isinstance(each, (list, dict)):
                self.given.setdefault(id(each), held_bytes([each], self.added))
        return made

    # --- bytes ---

    def made(self, size: int, op: Op | None = None, number: bool = False) -> bool:
        """Notes that an op makes a value of so many bytes, or a whole number; whether these are more than there may
        be."""
        op = self.current if op is None else op
        allowed = min(self.bounds.memory, NUMBER) if number else self.bounds.memory
        self.found.largest = max(self.found.largest, size)
        if size <= allowed or op is None:
            return False
        if not any(each.what == "memory" and each.op.span == op.span for each in self.found.excesses):
            self.found.excesses.append(Excess("memory", op, size, allowed))
        return True

    def define(self, value: Value, held: Any) -> None:
        for each in held if type(held) in (tuple, list) else (held,):
            if isinstance(each, torch.Tensor) and self.made(each.untyped_storage().nbytes()):
                held = UNKNOWN
                break
        super().define(value, held)

    # --- ops ---

    def _op(self, op: Op) -> tuple[Leaving, tuple[Any, ...]] | None:
        outer, self.current = self.current, op
        if isinstance(op, ops.Return) and self.counting:
            self.found.result, self.returns = held_bytes([self.raw(op.value)], self.added), op
        if isinstance(op, ops.Save):
            self.made(tensor_bytes(self.value(op.value)))
        left = super()._op(op)
        self.current = outer
        return left

    def raw(self, operand: Operand) -> Any:
        """The stand-in of an operand, though what it holds may not be all that it holds."""
        match operand:
            case Value(name=name):
                return self.values.get(name, UNKNOWN)
            case Tuple(parts=operands):
                return tuple(map(self.raw, operands))
            case _:
                return self.value(operand)

    def _operator(self, op: ops.Operator) -> None:
        if len(op.operands) == 2:
            first, second = map(self.value, op.operands)
            size, number = bytes_of_operator(op.operator, first, second)
            if self.made(size, number=number):
                self.define(op.result, UNKNOWN)
                return
        super()._operator(op)

    def _build(self, op: ops.Build) -> Any:
        starred = [self.value(element.value) for element in op.elements if element.starred]
        if any(self.made(listed_bytes(each)) for each in starred):
            return UNKNOWN
        made = super()._build(op)
        self.hold(made, *(element.value for element in op.elements))
        return made

    def _set_item(self, op: ops.SetItem) -> None:
        self.hold(self.raw(op.object), op.value)
        super()._set_item(op)

    def hold(self, container: Any, *operands: Operand) -> None:
        """Notes what a container is given of which not all is followed: it counts with what it held when it was."""
        lost = [held for held in map(self.raw, operands) if id(held) in self.lost and is_container(held)]
        if lost and is_container(container):
            so_far = self.added.get(id(container), (None, 0))[1]
            self.added[id(container)] = container, so_far + held_bytes(lost, self.added)

    def _attribute(self, op: ops.Attribute) -> Any:
        held = None if isinstance(op.object, Module) else self.value(op.object)
        if isinstance(held, (str, bytes)) and op.name in _PADDING:
            return Method(held, op.name)
        return super()._attribute(op)

    def _call(self, op: ops.Call) -> Any:
        function = self.value(op.function)
        if isinstance(function, Method) and isinstance(function.receiver, (str, bytes)) and function.name in _PADDING:
            wide = self.value(op.arguments[0].value) if op.arguments else None
            if type(wide) is int and self.made(wide):
                return UNKNOWN
        return super()._call(op)

    def _known_call(
        self, op: ops.Call, known: KnownCall, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if self.made(bytes_of_call(known.target, args)):
            return UNKNOWN
        if known.behaviour is Behaviour.CONTAINER and isinstance(function, Method):
            self.hold(function.receiver, *(argument.value for argument in op.arguments))
        return super()._known_call(op, known, function, args, kwargs)

    # --- forwards and loops ---

    def _forward_body(self, op: ops.Forward) -> tuple[Leaving, tuple[Any, ...]] | None:
        if self.counting and self.sure:
            count = self._steps_of(op) if op.method == "generate" else 1
            name = op.result.name
            self.found.forwards[name] = self.found.forwards.get(name, 0) + count
        elif self.counting:
            self.found.open.setdefault("whether it runs is known only when the program does", op)
        return super()._forward_body(op)

    def _steps_of(self, op: ops.Forward) -> int:
        """How many steps a generation is allowed, where it says so."""
        given = self._arguments(ops.Call(op.result, op.model, op.arguments, span=op.span))
        steps = None if given is None else given[1].get("max_new_tokens")
        if type(steps) is not int:
            self.found.open.setdefault("how many steps a generation takes is known only when it runs", op)
        return max(1, steps) if type(steps) is int else 1

    def _loop(self, op: ops.For | ops.While) -> None:
        if not self.counting:
            return super()._loop(op)
        entries = self._counted(op)
        if entries is None:
            if any(isinstance(each, ops.Forward) for part in regions(op) for each in walk(part)):
                self.found.open.setdefault("how often a loop runs is known only when it does", op)
        elif isinstance(op, ops.For) and self._one_by_one(op, entries):
            return None
        with self.not_counted():
            return super()._loop(op)

    def _counted(self, op: ops.For | ops.While) -> Sequence[Any] | None:
        """The entries of a loop, each of which is sure to have a round; `None` where that cannot be told."""
        leaving = (ops.Break, ops.Return, ops.Raise)
        if isinstance(op, ops.While) or any(isinstance(each, leaving) for each in walk(op.body)):
            return None
        held = self.value(op.iterable)
        if isinstance(held, range):
            return held if length_of(held) < 2**62 else range(2**62)
        return held if type(held) in (list, tuple) and not any(id(each) in self.lost for each in held) else None

    def _one_by_one(self, op: ops.For, entries: Sequence[Any]) -> bool:
        """Runs the first rounds of a loop, and counts those that are left; whether all of it was run."""
        count = len(entries)
        first = entries[: count if count <= ONE_BY_ONE else A_FEW]
        if self.sure and count >= self.longest[0]:
            self.longest = count, op
        carried: tuple[Any, ...] | None = tuple(map(self.value, op.initial))
        seen: list[_Seen] = []
        for entry in first:
            if self.run_rounds >= ALL_ROUNDS or carried is None:
                return False
            self.run_rounds += 1
            self.rounds += self.sure
            carried = self._round(op, entry, carried)
            if len(first) < count:
                seen.append(self._seen(carried))
        if carried is None:
            return False
        if len(first) == count:
            if op.orelse is not None:
                self._bind(op.orelse.parameters, carried)
                _, carried = self._region(op.orelse)
            self.define_all(op.results, carried)
            return True
        self._extend(op, count - len(first), seen[-2], seen[-1])
        return False

    def _round(self, op: ops.For, entry: Any, carried: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """One round: the carried values after it; `None` where it is not sure that another follows."""
        loop = Loop()
        self.loops.append(loop)
        self._bind(op.body.parameters, (entry, *carried))
        how, _ = self._region(op.body)
        self.loops.pop()
        if how == "end" and not carried:
            return ()
        ends = [values for values in loop.continued if len(values) == len(carried)]
        return self.join_all(ends) if ends else None

    def _seen(self, carried: tuple[Any, ...] | None) -> _Seen:
        alive = [each for each in (*self.values.values(), *self.cells.values()) if isinstance(each, (list, dict))]
        containers = {id(each): (each, held_bytes([each], self.added)) for each in alive}
        return _Seen(containers, dict(self.found.forwards), self.rounds, [tensor_bytes(each) for each in carried or ()])

    def _extend(self, op: ops.For, more: int, before: _Seen, last: _Seen) -> None:
        """Has each of the rounds that are left add what the last one did."""
        for identity, (container, size) in last.containers.items():
            grown = size - before.containers.get(identity, (None, size))[1]
            if grown > 0:
                so_far = self.added.get(identity, (None, 0))[1]
                self.added[identity] = container, so_far + more * grown
                self.made(size + more * grown, op)
        for name, count in last.forwards.items():
            self.found.forwards[name] = count + more * (count - before.forwards.get(name, 0))
        self.rounds = last.rounds + more * (last.rounds - before.rounds)
        for earlier, later in zip(before.carried, last.carried, strict=True):
            if later > earlier:
                self.made(later + more * (later - earlier), op)

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Rounds that are run for what is known after them, and not for what they take."""
        outer, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = outer
