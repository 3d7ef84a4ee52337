"""What a generation makes anew at each step: what a site gives, and what is made of it.

    %h = read %model@h.1 output             anew: each step has its own
    %0 = item %h[:, 3]                      the first step's: a position of the prompt
    %1 = %h * %strength                     anew, as %h is
    %2 = call len(%words)                   the same at every step

Asked about code outside of loops over steps, which stands for the first step.
"""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.memory import Fresh, Memory, Site
from nnsight_compiler.passes.positions import Positions


class StepVariation:
    """What varies in one generation.

    body: the ops outside of loops over steps, at any depth, in the order of the source.
    parents: the op in whose region an op stands, by identity; `closed`: those that stand in a condition or a loop.
    makers: the op that makes a value.
    again: the values that are made anew at each step.
    """

    def __init__(self, forward: ops.Forward, memory: Memory) -> None:
        self.memory = memory
        self.body: list[Op] = []
        self.parents: dict[int, Op] = {}
        self.closed: set[int] = set()
        self._collect(forward.body, None, False)
        self.makers: dict[str, Op] = {}
        for op in self.body:
            for value in (*defined(op), *(value for part in regions(op) for value in part.parameters)):
                self.makers[value.name] = op
        self.positions = Positions(self.makers)
        self.again: set[str] = set()
        self._vary()

    def _collect(self, region: Region, parent: Op | None, closed: bool) -> None:
        for op in region.ops:
            self.body.append(op)
            if parent is not None:
                self.parents[id(op)] = parent
            if closed:
                self.closed.add(id(op))
            if not isinstance(op, (ops.Steps, ops.Closure)):
                for part in regions(op):
                    self._collect(part, op, closed or not isinstance(op, ops.With))

    def _vary(self) -> None:
        """Finds the values that are made anew: what a site gives, and what is made of it."""
        changed: set[object] = set()
        before = -1
        while before != len(self.again) + len(changed):
            before = len(self.again) + len(changed)
            for op in self.body:
                if isinstance(op, ops.Steps) or self.is_of_first(op):
                    continue
                touched = {root for root in self.memory.reads(op) if not isinstance(root, Site)}
                loop = isinstance(op, (ops.For, ops.While)) and any(
                    each.name in self.again for part in regions(op) for inner in walk(part) for each in used(inner)
                )
                if not (loop or touched & changed or self.varies(op)):
                    continue
                if isinstance(op, ops.Yield) and id(op) in self.parents:
                    op = self.parents[id(op)]  # what a condition gives is as new as what one of its sides does
                self.again.update(value.name for value in defined(op))
                if isinstance(op, (ops.For, ops.While)):
                    self.again.update(value.name for part in regions(op) for value in part.parameters)
                own = {root for root in self.memory.writes(op) if not isinstance(root, Site)}
                changed |= own
                self.again.update(root.value for root in own if isinstance(root, Fresh) and root.value in self.makers)

    def varies(self, op: Op) -> bool:
        """Whether what an op gives, or does, differs from step to step."""
        return self._anew(op) or any(value.name in self.again for value in self.uses(op))

    def _anew(self, op: Op) -> bool:
        """Whether an op gives something else each time for the same operands."""
        if isinstance(op, ops.Read):
            return op.port != "result"
        if not isinstance(op, ops.Call):
            return False
        known = self.memory.origins.known(op)
        return known.random if known is not None else True

    def is_of_first(self, op: Op) -> bool:
        """Whether an op reads at a position of the prompt."""
        return isinstance(op, ops.Item) and self.positions.of(op) == "prompt"

    def uses(self, op: Op) -> Iterator[Value]:
        """The values that an op mentions, inside of a closure too."""
        yield from used(op)
        if isinstance(op, ops.Closure):
            for inner in walk(op.body):
                yield from used(inner)

    def results_anew(self, op: ops.If) -> list[int]:
        """Which results of a condition are made anew."""
        inside = id(op) in self.closed
        return [number for number, value in enumerate(op.results) if inside or value.name in self.again]
