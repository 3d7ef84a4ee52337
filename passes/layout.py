"""Where the ops of a program stand, and what uses their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used
from nnsight_compiler.ir.values import Operand, Value, values_in


@final
class Layout:
    """The places of one program's ops.

    uses: the ops that use each value, by its name, in the order of the source.
    """

    def __init__(self, program: Program) -> None:
        self.uses: dict[str, list[Op]] = {}
        self._order: dict[int, int] = {}
        self._paths: dict[int, tuple[int, ...]] = {}
        self._forwards: dict[int, ops.Forward] = {}
        self._around: dict[int, tuple[tuple[Op | None, Region], ...]] = {}
        self._defined: dict[str, tuple[int, tuple[int, ...]]] = {}
        for parameter in program.parameters:
            self._defined[parameter.value.name] = -1, ()
        self._visit(program.body, (), None, ((None, program.body),))

    def _visit(
        self,
        region: Region,
        path: tuple[int, ...],
        forward: ops.Forward | None,
        owners: tuple[tuple[Op | None, Region], ...],
    ) -> None:
        for value in region.parameters:
            self._defined[value.name] = len(self._order) - 1, path
        for op in region.ops:
            number = self._order[id(op)] = len(self._order)
            self._paths[id(op)] = path
            self._around[id(op)] = owners
            if forward is not None:
                self._forwards[id(op)] = forward
            for value in used(op):
                self.uses.setdefault(value.name, []).append(op)
            for value in defined(op):
                self._defined[value.name] = number, path
            around = op if isinstance(op, ops.Forward) else forward
            for place, inner in enumerate(regions(op)):
                self._visit(inner, (*path, number, place), around, (*owners, (op, inner)))

    def forward(self, op: Op) -> ops.Forward | None:
        """The forward around an op."""
        return self._forwards.get(id(op))

    def around(self, op: Op) -> tuple[tuple[Op | None, Region], ...]:
        """The regions that an op stands in, outermost first, each with its op; the program has none."""
        return self._around[id(op)]

    def sure(self, first: Op, then: Op, entered: Callable[[Op], bool]) -> bool:
        """Whether an op runs wherever an earlier one did, unless something raises.

        Args:
            entered: whether the body of an op is sure to run.
        """
        start, way = self._around[id(first)], self._around[id(then)]
        common = sum(1 for one, other in zip(start, way, strict=False) if one[1] is other[1])
        begin = start[common][0] if len(start) > common else first
        for level in range(common - 1, len(way)):
            inner = way[level + 1][0] if level + 1 < len(way) else None
            listed = way[level][1].ops
            last = _index(listed, then if inner is None else inner)
            if any(map(_leaves, listed[_index(listed, begin) + 1 if begin is not None else 0 : last])):
                return False
            if inner is not None and not entered(inner):
                return False
            begin = None
        return True

    def alone(self, op: Op, other: Op) -> bool:
        """Whether two ops stand in one region."""
        return self._paths[id(op)] == self._paths[id(other)]

    def place(self, op: Op) -> int:
        """The number of an op, in the order of the source."""
        return self._order[id(op)]

    def before(self, op: Op, other: Op) -> bool:
        """Whether an op comes before another in the source."""
        return self._order[id(op)] < self._order[id(other)]

    def missing(self, operand: Operand, place: Op) -> Value | None:
        """A value that an operand mentions and that is not there yet where an op stands."""
        number, path = self._order[id(place)], self._paths[id(place)]
        for value in values_in(operand):
            made, around = self._defined[value.name]
            if made >= number or path[: len(around)] != around:
                return value
        return None


def _index(listed: tuple[Op, ...], op: Op) -> int:
    return next(number for number, each in enumerate(listed) if each is op)


def _leaves(op: Op, loop: bool = False) -> bool:
    """Whether an op may leave the region that it stands in."""
    match op:
        case ops.Return() | ops.Raise():
            return True
        case ops.Break() | ops.Continue():
            return not loop
        case ops.Closure():
            return False
    within = loop or isinstance(op, (ops.For, ops.While))
    return any(_leaves(each, within) for region in regions(op) for each in region.ops)
