"""Moves what needs no live value, but the client, out of forwards; refuses what needs both.

    with model.trace(prompt):                             layer = settings.layer
        h = model.layers[settings.layer].output    ──▶    with model.trace(prompt):
                                                              h = model.layers[layer].output

Legal, since such code runs before the model in any case; it moves only if nothing that stays behind, and stood before
it, has an effect of its own. Sessions that hold code of the client's are taken apart: their forwards are jobs each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used, walk
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.known_calls import ALL, known_method
from nnsight_compiler.remote.kinds import Local
from nnsight_compiler.remote.sides import Side, Sides

WAY_OUT = "move it after the `with`, where its values are there, or use known calls"
_OF_FORWARD = (
    ops.Read, ops.Write, ops.Skip, ops.Save, ops.Stop, ops.Invoke, ops.Steps, ops.Backward,
    ops.Break, ops.Continue, ops.Return, ops.Raise,
)  # fmt: skip


def move_ahead(program: Program, sides: Sides) -> Program:
    """The program with nothing in its forwards that the client alone can run.

    Raises:
        CompileError: code of the client's needs a live value. Every such place is told.
    """
    mover = _Mover(sides)
    body = mover.region(program.body)
    if mover.problems:
        raise CompileError(mover.problems)
    return replace(program, body=body)


class _Mover:
    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self.problems: list[Diagnostic] = []
        self.moved = 0

    def region(self, region: Region) -> Region:
        return replace(region, ops=tuple(made for op in region.ops for made in self.op(op)))

    def op(self, op: Op) -> Iterator[Op]:
        match op:
            case ops.Session(body=body):
                moved = self.moved
                body = self.region(body)
                if self.moved == moved and not any(self.sides.side(each) is Side.CLIENT for each in walk(body)):
                    yield replace(op, body=body)
                    return
                if any(op.result in used(each) for each in self.sides.program.walk()):
                    reason = "a session with code in it that runs on the client is taken apart, and is no value"
                    self.problems.append(Diagnostic(op.span, reason, "take the `as` off, and what uses it"))
                yield from body.ops
            case ops.Forward():
                parted = _Body(self.sides, op)
                left = parted.left(op.body, False)
                self.problems += parted.problems(left)
                self.moved += len(parted.ahead)
                yield from parted.ahead
                yield replace(op, body=left)
            case _:
                yield rewrite(op, region=self.region)


class _Body:
    """The body of a forward, while it is parted.

    needed: the ops that the client alone can run, and those that these need. ahead: those of them that move.
    live: the values of what stays. acted: the first op that stays and has an effect of its own.
    """

    def __init__(self, sides: Sides, forward: ops.Forward) -> None:
        self.sides = sides
        self.forward = forward
        self.needed = self._needed()
        self.live = {forward.result.name}
        self.ahead: list[Op] = []
        self.acted: Op | None = None

    def left(self, region: Region, closed: bool) -> Region:
        """What stays of a region. From one that may run never, or more than once (`closed`), only what looks at an
        attribute moves, which is known to be there."""
        rest: list[Op] = []
        self.live.update(value.name for value in region.parameters)
        for op in region.ops:
            if id(op) in self.needed and self.moves(op, closed):
                self.ahead.append(op)
                continue
            rest.append(self.parted(op, closed or not isinstance(op, (ops.Invoke, ops.With))))
            if self.acts(op) and self.acted is None:
                self.acted = op
            self.live.update(value.name for value in defined(op))
        return Region(region.parameters, tuple(rest))

    def parted(self, op: Op, closed: bool) -> Op:
        if isinstance(op, ops.Closure):
            return op
        return rewrite(op, region=lambda held: self.left(held, closed))

    def moves(self, op: Op, closed: bool) -> bool:
        """Whether an op can stand ahead of the forward."""
        if _touches(op, self.live):
            return False
        if closed:
            match op:
                case ops.Attribute(object=owner, name=name):
                    kind = self.sides.kind(owner)
                    return isinstance(kind, Local) and name in getattr(kind.held, "__dict__", {})
            return isinstance(op, ops.Global)
        return self.acted is None or not self.acts(op)

    def problems(self, left: Region) -> Iterator[Diagnostic]:
        """What stays, and only the client can run."""
        for op in walk(left):
            if self.sides.side(op) is not Side.CLIENT or id(op) not in self.sides.reasons:
                continue
            related = [(self.forward.span, "the forward")]
            reason = "needs a live value inside a remote forward, but runs on the client"
            if self.acted is not None and not _touches(op, self.live):
                reason = "stands inside a remote forward, behind what must come before it, but runs on the client"
                related.append((self.acted.span, "this comes before it"))
            yield Diagnostic(op.span, f"{self.sides.reasons[id(op)]} {reason}", WAY_OUT, tuple(related))

    def _needed(self) -> set[int]:
        found: set[int] = set()
        names: set[str] = set()
        for op in reversed(list(walk(self.forward.body))):
            clients = self.sides.side(op) is Side.CLIENT or any(
                isinstance(self.sides.kind(value), Local) for value in used(op)
            )
            if clients or any(value.name in names for value in defined(op)):
                found.add(id(op))
                names.update(value.name for inner in walk(Region((), (op,))) for value in used(inner))
        return found

    def acts(self, op: Op) -> bool:
        """Whether an op has, or may have, an effect that others can see."""
        match op:
            case ops.Call():
                target = self.sides.target(op)
                row = None if target is None else ALL.get(target) or known_method(target.rpartition(".")[2])
                return row is None or row.behaviour not in (Behaviour.PURE, Behaviour.VIEW) or row.random
            case ops.SetItem(object=Value(name=name)) | ops.SetAttribute(object=Value(name=name)):
                return name not in self.live
            case ops.Operator(in_place=True, operands=(Value(name=name), _)):
                return name not in self.live
            case ops.Operator(in_place=True) | ops.Delete() | ops.SetGlobal() | ops.Store() | ops.Import():
                return True
        return any(self.acts(each) for region in regions(op) for each in region.ops)


def _touches(op: Op, live: set[str]) -> bool:
    """Whether an op takes part in the forward, or uses what it gives."""
    return any(
        isinstance(each, _OF_FORWARD) or any(value.name in live for value in used(each))
        for each in walk(Region((), (op,)))
    )
