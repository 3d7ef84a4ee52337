"""What of the body of a backward pass runs when which gradient arrives, what before it, and what after.

Only what a gradient that is written depends on must run in the pass; it runs when the last of the gradients arrives
that it needs. All else runs after the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, definitions, operands, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.passes.in_place_writes import in_place, targets
from nnsight_compiler.passes.memory import Gradient, Memory, Name, Root, Roots

Rank = tuple[int, int, int]


class Arrivals:
    """The parts of one backward pass.

    before, after: what runs before and after it.
    pieces: for each value whose gradient is used, what runs when it arrives; in the order of the source.
    """

    def __init__(
        self, backward: ops.Backward, tracks: Mapping[Value, Value], rank: Callable[[Value], Rank], memory: Memory
    ) -> None:
        self.memory = memory
        self.tracks = tracks
        self.rank = rank
        self.grads: dict[str, tuple[Value, Op]] = {}
        self.body = list(self._flat(backward.body))
        self.makers = {value.name: number for number, op in enumerate(self.body) for value in _made(op)}
        self.assigned: dict[Value, Roots] = {}
        for op in walk(backward.body):
            if isinstance(op, ops.SetGrad):
                known = self.assigned.get(_value(op), frozenset())
                self.assigned[_value(op)] = known | memory.named(op.gradient)
        homes: dict[int, Value | None] = {}
        needed = self._needed()
        for number in sorted(needed):
            homes[number] = self._home(number, needed)
        for number, op in enumerate(self.body):
            if isinstance(op, ops.Grad):
                homes[number] = _value(op)
        found: dict[Value, list[Op]] = {value: [] for value in tracks}
        before: list[Op] = []
        after: list[Op] = []
        for number, op in enumerate(self.body):
            home = homes.get(number)
            (after if number not in homes else before if home is None else found[home]).append(op)
        self.before, self.after = tuple(before), tuple(after)
        self.pieces = [(value, tuple(part)) for value, part in found.items() if part]

    def _flat(self, region: Region) -> Iterator[Op]:
        """The ops of the body, with the gradients that conditions and loops in it read taken out of them."""
        for op in region.ops:
            if isinstance(op, ops.Grad):
                self.grads[op.result.name] = _value(op), op
                yield op
                continue
            moved: list[ops.Grad] = []
            new = op if isinstance(op, ops.Backward) else rewrite(op, region=_without(moved))
            for grad in moved:
                self.grads[grad.result.name] = _value(grad), grad
                yield grad
            yield new

    # --- what a write needs ---

    def _written(self, op: Op) -> dict[Value, Op]:
        """The values whose gradients an op, or anything in its regions, writes."""
        found: dict[Value, Op] = {}
        for each in (op, *(inner for part in regions(op) for inner in walk(part))):
            if isinstance(each, ops.SetGrad):
                found.setdefault(_value(each), each)
            elif not isinstance(each, (ops.Backward, ops.Grad)) and in_place(each, self.memory):
                for root in targets(each, self.memory):
                    if isinstance(root, Gradient) and root.value in self.grads:
                        found.setdefault(self.grads[root.value][0], each)
        return found

    def _touched(self, op: Op) -> set[Value]:
        """The values whose gradients an op looks at."""
        return {
            self.grads[value.name][0]
            for each in (op, *(inner for part in regions(op) for inner in walk(part)))
            for value in used(each)
            for root in self._named(value)
            if isinstance(root, Gradient) and root.value in self.grads
            for value in [Value(root.value)]
        }

    def _needs(self, number: int) -> Iterator[int]:
        """The earlier ops of the body that an op needs: for its values, and for the order of what both touch."""
        op = self.body[number]
        for each in (op, *(inner for part in regions(op) for inner in walk(part))):
            for value in used(each):
                if value.name in self.makers and self.makers[value.name] < number:
                    yield self.makers[value.name]
        written, touched = set(self._written(op)), self._touched(op)
        for earlier in range(number):
            other = self.body[earlier]
            if isinstance(other, ops.Grad):
                if _value(other) in written:
                    yield earlier
                continue
            wrote = set(self._written(other))
            if written & (wrote | self._touched(other)) or touched & wrote or self._conflict(other, op):
                yield earlier

    def _conflict(self, first: Op, second: Op) -> bool:
        """Whether the order of two ops matters for anything besides gradients."""
        if isinstance(first, ops.SetGrad) or isinstance(second, ops.SetGrad):
            return False
        memory = self.memory
        wrote, writes = self._own(first, memory.writes(first)), self._own(second, memory.writes(second))
        read, reads = self._own(first, memory.reads(first)), self._own(second, memory.reads(second))
        return memory.overlap(wrote, writes) or memory.overlap(wrote, reads) or memory.overlap(writes, read)

    def _named(self, operand: Operand) -> Roots:
        """What an operand may be or hold. A gradient that is read is a copy, or what was written to that same gradient,
        and never what was written to another one."""
        named = self.memory.named(operand)
        for root in tuple(named):
            if isinstance(root, Gradient) and root.value in self.grads:
                named |= self.assigned.get(self.grads[root.value][0], frozenset())
        return named

    def _own(self, op: Op, roots: Roots) -> list[Root]:
        """Those of the storages that an op may touch which are no gradients, and which its operands name."""
        found: list[Root] = [root for root in roots if not isinstance(root, Gradient)]
        host = isinstance(op, ops.Call) and self.memory.origins.known(op) is None
        if host or any(regions(op)) or self.memory.calls_closures(op):
            return found
        named = frozenset[Root]().union(*map(self._named, (*operands(op), *defined(op))))
        return [root for root in found if root in named or isinstance(root, Name)]

    def _needed(self) -> dict[int, set[int]]:
        """The ops that must run in the pass, each with those that it needs."""
        waiting = [number for number, op in enumerate(self.body) if self._written(op)]
        found: dict[int, set[int]] = {}
        while waiting:
            number = waiting.pop()
            if number not in found:
                found[number] = set(self._needs(number))
                waiting.extend(found[number])
        return found

    # --- when it runs ---

    def _home(self, number: int, needed: Mapping[int, set[int]]) -> Value | None:
        """The value at whose gradient's arrival an op runs; `None` where it needs no gradient."""
        op = self.body[number]
        arriving = self._arriving(number, needed, set())
        written = self._written(op)
        if not written:
            return min(arriving, key=self.rank, default=None)
        if len(written) > 1:
            (_, first), (_, second) = list(written.items())[:2]
            raise CompileError(
                [
                    Diagnostic(
                        op.span,
                        "this may write the gradients of several values, which arrive at different times",
                        "write each of them by a statement of its own",
                        ((first.span, "one is written here"), (second.span, "another here")),
                    )
                ]
            )
        ((home, write),) = written.items()
        for value, read in arriving.items():
            if self.rank(value) < self.rank(home):
                raise CompileError(
                    [
                        Diagnostic(
                            write.span,
                            f"this writes a gradient, but needs that of line {read.span.line}, which arrives only"
                            " later: a backward pass goes from the last value to the first",
                            "take the gradient that is needed in a backward pass of its own, before, with"
                            " `retain_graph=True`",
                            ((read.span, "this gradient arrives later"),),
                        )
                    ]
                )
        return home

    def _arriving(self, number: int, needed: Mapping[int, set[int]], seen: set[int]) -> dict[Value, Op]:
        """The values whose gradients an op needs, each with where it is read."""
        found: dict[Value, Op] = {}
        if number in seen:
            return found
        seen.add(number)
        op = self.body[number]
        if isinstance(op, ops.Grad):
            found[_value(op)] = op
        for each in needed.get(number, ()):
            for value, read in self._arriving(each, needed, seen).items():
                found.setdefault(value, read)
        return found


def _value(op: ops.Grad | ops.SetGrad) -> Value:
    assert isinstance(op.value, Value), "gradients are those of values"
    return op.value


def _made(op: Op) -> Iterator[Value]:
    yield from defined(op)
    for part in regions(op):
        yield from definitions(part)


def _without(moved: list[ops.Grad]) -> Callable[[Region], Region]:
    def inside(region: Region) -> Region:
        kept: list[Op] = []
        for op in region.ops:
            if isinstance(op, ops.Grad):
                moved.append(op)
            else:
                kept.append(op if isinstance(op, ops.Backward) else rewrite(op, region=inside))
        return region if tuple(kept) == region.ops else Region(region.parameters, tuple(kept))

    return inside
