"""Places every op of a forward at the earliest site where all that it needs exists.

    forward %f0 = trace %model(%corrupt)                 forward %f0 = trace %model(%corrupt)
      %logits = read %model@lm_head output                 at %model@h.3 output
      %0 = item %logits[:, -1]                               %1 = read %model@h.3 output
      %1 = read %model@h.3 output                    ──▶     set_item %1[:, %position] = %source
      set_item %1[:, %position] = %source                  at %model@lm_head output
    return %0                                                %logits = read %model@lm_head output
                                                             %0 = item %logits[:, -1]
                                                             %kept = save %0
                                                         return %kept

Legal, since ops keep every order that matters: what an op uses comes before it; accesses to the same storage of the
program's, and effects, keep their order in the source; accesses to one site keep it within that site, and sites are
ordered by the model. A value of the model that is used after its site is copied there, at the place
in the source order where it is used, so that it is what it was: the model, or a later write, may change the original.
What needs no site runs before the forward. A write that needs a value of a later site is refused with the cycle.

Conditions and `with` contexts whose bodies touch several sites are split, one piece a site.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used
from nnsight_compiler.ir.values import UNBOUND, Literal, Module, Operand, Value
from nnsight_compiler.passes.entries import BEFORE, Entry, Frame
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.outliving import Outliving
from nnsight_compiler.passes.pauses import pausing
from nnsight_compiler.passes.sites import RESULT, Orders, forwards

ENTERED_AGAIN = frozenset(
    f"torch.{name}" for name in ("no_grad", "enable_grad", "inference_mode", "autocast", "amp.autocast")
)
"""Contexts that mean the same around several parts as around the whole."""


def place(program: Program, orders: Orders) -> Program:
    """The program with the body of each forward as a sequence of `at` regions.

    Raises:
        CompileError: an op needs what does not exist yet at the site where it must run.
    """
    return Placement(program, orders).run()


class Placement:
    def __init__(self, program: Program, orders: Orders) -> None:
        self.program = program
        self.orders = orders
        self.memory = Memory.of(program, copies=True)
        self.pausing = pausing(program)
        self.builder = Builder(value.name for value in program.values())
        self.homes: dict[str, str] = {}
        self.leaving: dict[str, Value] = {}
        for forward in forwards(program.body):
            for value in definitions(forward.body):
                self.homes[value.name] = forward.result.name
        self.used_outside = set(self._used_outside(program.body, ""))
        self.uses = Counter(value.name for op in program.walk() for value in used(op))

    def run(self) -> Program:
        body = self._region(self.program.body)
        return replace(self.program, body=self._renamed(body, "") if self.leaving else body)

    def _used_outside(self, region: Region, home: str) -> Iterator[str]:
        """The values of forwards that are used outside of their own."""
        for op in region.ops:
            for value in used(op):
                if self.homes.get(value.name, home) != home:
                    yield value.name
            inner = op.result.name if isinstance(op, ops.Forward) else home
            for part in regions(op):
                yield from self._used_outside(part, inner)

    def _region(self, region: Region) -> Region:
        made: list[Op] = []
        for op in region.ops:
            if isinstance(op, ops.Forward):
                before, forward = _Pieces(self, op).run()
                made += [*before, forward]
            else:
                made.append(rewrite(op, region=self._region))
        return Region(region.parameters, tuple(made))

    def enters_again(self, owner: ops.With) -> bool:
        """Whether a context may be entered several times, each time for a part of what it covers."""
        made = (op for op in self.program.walk() if any(value == owner.context for value in defined(op)))
        return any(isinstance(op, ops.Call) and op.target in ENTERED_AGAIN for op in made)

    def _renamed(self, region: Region, home: str) -> Region:
        """The region, taking the copies of values that left other forwards."""

        def change(value: Value) -> Operand:
            kept = self.leaving.get(value.name)
            return value if kept is None or self.homes.get(value.name) == home else kept

        def changed(op: Op) -> Op:
            inner = op.result.name if isinstance(op, ops.Forward) else home
            return rewrite(op, operand=change, region=lambda part: self._renamed(part, inner))

        return Region(region.parameters, tuple(map(changed, region.ops)))


class _Pieces(Outliving):
    """Puts the placed entries of a forward together again: one region a site, with the conditions around its ops."""

    def run(self) -> tuple[list[Op], ops.Forward]:
        self._flatten(self.forward.body.ops, ())
        self._depend()
        for entry in self.entries:
            if entry.follows is None:
                self._time(entry)
        for entry in self.entries:
            if entry.follows is not None:
                entry.step, entry.time = entry.follows.step, entry.follows.time
        self._check_stops()
        self._copy()
        self._require_inputs()
        if self.forward.method == "generate":
            self._name_steps()
        slots: dict[int, list[Entry]] = defaultdict(list)
        for entry in sorted(self.entries, key=lambda each: (each.closes, each.order)):
            slots[entry.time].append(entry)
        self._note_uses()
        before = self._gather(slots.pop(BEFORE, []), 0)
        made: list[Op] = [replace(invoke, body=Region((), ())) for invoke in self.invokes]
        for time in sorted(slots):
            entries = slots[time]
            site = self.places[time]
            assert isinstance(self.forward.model, Value)
            body = Region((), tuple(self._gather(entries, 0)))
            module = Module(self.forward.model, site.path)
            made.append(ops.At(module, site.port, site.call, body, span=entries[0].op.span))
        return before, replace(self.forward, body=Region((), tuple(made)))

    def _require_inputs(self) -> None:
        """Refuses an invoke whose input is there only while the forward runs."""
        for invoke in self.invokes:
            for value in used(invoke):
                maker = self.makers.get(value.name)
                if maker is None or maker.time == BEFORE:
                    continue
                late = maker
                while late.pin is None:  # some need of what runs at a site runs there too
                    late = next(need for need in late.needs if need.time == maker.time)
                reason = "this invoke is given a value that only the forward which it is a part of can give"
                if not self.memory.live(value):
                    reason = (
                        "what this invoke is given would have to be computed before the forward, but effects keep their"
                        f" order, and line {late.op.span.line} comes first"
                    )
                way_out = "compute it before the `with` of the trace"
                related = ((late.op.span, "this runs within the forward"),)
                raise CompileError([Diagnostic(invoke.span, reason, way_out, related)])

    def _name_steps(self) -> None:
        """Has what happens once say at which step."""
        once: dict[float, Frame] = {}
        for entry in self.entries:
            if entry.steps is None and entry.time not in (BEFORE, RESULT):
                if entry.step not in once:
                    step = int(entry.step)
                    parameter = self.placement.builder.fresh("step")
                    steps = ops.Steps(
                        self.forward.result,
                        Literal(step),
                        Literal(step + 1),
                        Region((parameter,)),
                        span=entry.op.span,
                    )
                    once[entry.step] = Frame(steps)
                entry.frames = (once[entry.step], *entry.frames)

    def _steps(self, owner: ops.Steps, piece: list[Entry], depth: int) -> ops.Steps:
        (parameter,) = owner.body.parameters
        number = self.placement.builder.fresh(parameter.name)
        body = substitute(Region((), tuple(self._gather(piece, depth + 1))), {parameter: number})
        return replace(owner, body=Region((number,), body.ops))

    def _note_uses(self) -> None:
        self.users: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            for value in self._uses(entry):
                self.users[entry.changes.get(value.name, value).name].append(entry)
            for frame in entry.frames:
                for value in frame.uses:
                    self.users[value.name].append(entry)

    def _gather(self, entries: list[Entry], depth: int) -> list[Op]:
        """The ops of one site, in order, with the conditions and contexts around them."""
        made: list[Op] = []
        index = 0
        while index < len(entries):
            entry = entries[index]
            owner = self._owner(entry, depth)
            if owner is None:
                made.append(self._final(entry))
                index += 1
                continue
            end = index
            while end < len(entries) and self._owner(entries[end], depth) is owner:
                end += 1
            piece = entries[index:end]
            match owner:
                case ops.If():
                    made.append(self._condition(owner, piece, depth))
                case ops.With():
                    made.append(self._with(owner, piece, depth))
                case ops.Steps():
                    made.append(self._steps(owner, piece, depth))
            index = end
        return made

    @staticmethod
    def _owner(entry: Entry, depth: int) -> ops.If | ops.With | ops.Steps | None:
        if len(entry.frames) > depth:
            return entry.frames[depth].op
        if entry.merge:
            assert isinstance(entry.op, ops.If)
            return entry.op
        return None

    @staticmethod
    def _final(entry: Entry) -> Op:
        if not entry.changes:
            return entry.op
        changes: Callable[[Value], Operand] = lambda value: entry.changes.get(value.name, value)  # noqa: E731

        def inside(region: Region) -> Region:
            return Region(region.parameters, tuple(rewrite(op, operand=changes, region=inside) for op in region.ops))

        return rewrite(entry.op, operand=changes, region=inside)

    def _with(self, owner: ops.With, piece: list[Entry], depth: int) -> ops.With:
        result = owner.result
        inside = {id(entry) for entry in piece}
        others = [
            entry
            for entry in self.entries
            if id(entry) not in inside and any(frame.op is owner for frame in entry.frames)
        ]
        if others and not self.placement.enters_again(owner):
            first, other = sorted((piece[0], others[0]), key=lambda entry: entry.time)
            raise CompileError(
                [
                    Diagnostic(
                        owner.span,
                        "this context would have to be entered several times: what it covers happens at different times"
                        " of the forward",
                        "put it around the whole trace, or around what happens at one module",
                        ((first.op.span, "this is first"), (other.op.span, "this is later")),
                    )
                ]
            )
        if any(entry.time < piece[0].time for entry in others):
            result = self.placement.builder.fresh(owner.result.name)
        return replace(owner, result=result, body=Region((), tuple(self._gather(piece, depth + 1))))

    def _condition(self, owner: ops.If, piece: list[Entry], depth: int) -> ops.If:
        merge = next(
            (entry for entry in piece if entry.merge and entry.op is owner and len(entry.frames) == depth), None
        )
        inside = {id(entry) for entry in piece}
        results: list[Value] = list(owner.results) if merge is not None else []
        branches: list[Region] = []
        leaks: list[list[Value]] = []
        for branch in (0, 1):
            entries = [entry for entry in piece if entry is not merge and entry.frames[depth].branch == branch]
            body = Region((), tuple(self._gather(entries, depth + 1)))
            leaking = [
                value
                for op in body.ops
                for value in defined(op)
                if value.name in self.placement.used_outside
                or value in self.placement.leaving.values()
                or any(id(user) not in inside for user in self.users[value.name])
            ]
            leaks.append(leaking)
            branches.append(body)
        made: list[Region] = []
        for branch, body in enumerate(branches):
            renamed = {value: self.placement.builder.fresh(value.name) for value in leaks[branch]}
            body = _with_new_names(body, renamed)
            if body.ops and isinstance(body.ops[-1], ops.TERMINATORS):
                made.append(body)
                continue
            yielded: list[Operand] = []
            if merge is not None:
                source = (owner.then, owner.orelse)[branch]
                last = source.ops[-1] if source.ops else None
                values: tuple[Operand, ...] = (UNBOUND,) * len(owner.results)
                if isinstance(last, ops.Yield):
                    values = tuple(_used_operand(each, merge.changes, renamed) for each in last.values)
                yielded.extend(values)
            for side in (0, 1):
                yielded.extend(renamed[value] if side == branch else UNBOUND for value in leaks[side])
            made.append(Region(body.parameters, (*body.ops, ops.Yield(tuple(yielded), span=owner.span))))
        results.extend(value for side in leaks for value in side)
        return replace(owner, results=tuple(results), then=made[0], orelse=made[1])


def _used_operand(operand: Operand, changes: dict[str, Value], renamed: dict[Value, Value]) -> Operand:
    """An operand of a branch's `yield`, with the copies and the new names of that branch."""
    from nnsight_compiler.ir.values import map_operand

    return map_operand(
        operand, lambda value: renamed.get(changes.get(value.name, value), changes.get(value.name, value))
    )


def _with_new_names(region: Region, renamed: dict[Value, Value]) -> Region:
    if not renamed:
        return region
    uses = substitute(region, dict(renamed))
    return Region(
        uses.parameters,
        tuple(rewrite(op, result=lambda value: renamed.get(value, value)) for op in uses.ops),
    )
