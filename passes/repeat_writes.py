"""Has what a generation writes outside of all loops over steps happen at every step.

    forward %t = generate %model(%prompt)                forward %t = generate %model(%prompt)
      %h = read %model@h.1 output                          %h = read %model@h.1 output
      %0 = %h * %strength                                  %0 = %h * %strength
      write %model@h.1 output = %0                         write %model@h.1 output = %0
      %logits = read %model@lm_head output       ──▶       %logits = read %model@lm_head output
                                                           repeat %step in %t[1:]
                                                             %h.1 = read %model@h.1 output
                                                             %1 = %h.1 * %strength
                                                             write %model@h.1 output = %1

Outside of loops over steps, code stands for the first step, and what it writes to the model for every step: the copy
recomputes what the writes need, and nothing else. Reads, saves, prints and appends happen once. What no site has a part
in is not computed again, unless it draws random numbers or runs code that is not known.

An index, or a bound of a slice, that is not negative and counts tokens means a position of the prompt, which only the
first step has: such a write is not repeated, and what was read there is the first step's (`passes/positions.py`). Where
only the run knows the index, the run decides (`from_end`).

Legal, since it is what such a program means, by definition; so the pass is not optional.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, definitions, regions, rewrite, used, walk
from nnsight_compiler.ir.types import ANY
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Operand, Value, values_in
from nnsight_compiler.passes.in_place_writes import changed_operands, in_place, targets
from nnsight_compiler.passes.infer import at_later_steps
from nnsight_compiler.passes.memory import Memory, Site
from nnsight_compiler.passes.step_variation import StepVariation

WAY_OUT = "say at which steps it happens: `with tracer.iter[0]:` for the prompt, `for step in tracer.iter[:]:` for all"


def repeat_writes(program: Program) -> Program:
    """The program whose generations write at every step what they write outside of loops over steps.

    Raises:
        CompileError: it cannot be told which step an index means.
    """
    if not any(isinstance(op, ops.Forward) and op.method == "generate" for op in program.walk()):
        return program
    memory = Memory.of(program, copies=True)
    builder = Builder(value.name for value in program.values())

    def change(op: Op) -> Op:
        if isinstance(op, ops.Forward) and op.method == "generate":
            return _Repetition(op, memory, builder).run()
        return rewrite(op, region=inside)

    def inside(region: Region) -> Region:
        return Region(region.parameters, tuple(map(change, region.ops)))

    return replace(program, body=inside(program.body))


class _Repetition:
    """Makes the later steps of one generation.

    code: its ops outside of loops over steps, and what of it is made anew at each step.
    wanted: the ops that are repeated, by identity.
    """

    def __init__(self, forward: ops.Forward, memory: Memory, builder: Builder) -> None:
        self.forward, self.memory, self.builder = forward, memory, builder
        self.code = StepVariation(forward, memory)
        self.positions = self.code.positions
        self.wanted: set[int] = set()

    def run(self) -> ops.Forward:
        writes = [op for op in self.code.body if self._is_repeated(op)]
        if not writes:
            return self.forward
        waiting = list(writes)
        while waiting:
            waiting += self._needs(waiting.pop())
        groups: list[tuple[list[Op], list[Op]]] = [([], [])]
        for op in self.forward.body.ops:
            if any(isinstance(each, ops.Steps) for each in walk(Region((), (op,)))):
                groups.append(([op], []))  # at a site, the order of the source holds: what stands before stays before
            else:
                groups[-1][0].append(op)
                groups[-1][1].append(op)
        copies = [self._part(group) for _, group in groups]
        copies[0] = (*self._own_cells(), *copies[0])
        body = Region((), tuple(op for copy in copies for op in copy))
        reads = {op.result.name for op in walk(body) if isinstance(op, ops.Read)}
        fresh = {
            value.name: self.builder.fresh(value.name, at_later_steps(value.type) if value.name in reads else ANY)
            for value in definitions(body)
        }
        made: list[Op] = []
        for (originals, _), copy in zip(groups, copies, strict=True):
            made += originals
            if copy:
                region = Region((self.builder.fresh("step"),), _renamed(Region((), copy), fresh).ops)
                result = self.forward.result
                made.append(ops.Steps(result, Literal(1), NONE, region, False, span=copy[0].span))
        return replace(self.forward, body=Region((), tuple(made)))

    # --- which writes are repeated ---

    def _is_repeated(self, op: Op) -> bool:
        if isinstance(op, (ops.Write, ops.Skip)):
            return True
        if any(True for _ in regions(op)) or not in_place(op, self.memory):
            return False
        if not any(isinstance(root, Site) for root in targets(op, self.memory)):
            return False
        if not any(value.name in self.code.again for value in self._changed(op)):
            return False
        return not self._writes_prompt(op)

    def _writes_prompt(self, op: Op) -> bool:
        """Whether an op writes to a position of the prompt, which later steps do not have."""
        if isinstance(op, ops.SetItem):
            return self.positions.of(op) == "prompt" or self._is_at_prompt(op.object)
        changed = changed_operands(op, self.memory) if in_place(op, self.memory) else []
        return bool(changed) and all(map(self._is_at_prompt, changed))

    def _is_at_prompt(self, operand: Operand) -> bool:
        """Whether a value is a view of a position of the prompt."""
        match self.code.makers.get(operand.name) if isinstance(operand, Value) else None:
            case ops.Item() as item:
                return self.code.is_of_first(item) or self._is_at_prompt(item.object)
            case ops.Operator(in_place=True, operands=(base, *_)):
                return self._is_at_prompt(base)
            case _:
                return False

    def _changed(self, op: Op) -> Iterator[Value]:
        """The values that an op changes in place, and that a site holds."""
        changed = {root for root in targets(op, self.memory) if isinstance(root, Site)}
        for operand in changed_operands(op, self.memory):
            if changed & self.memory.roots(operand):
                yield from values_in(operand)

    # --- what they need ---

    def _needs(self, op: Op) -> list[Op]:
        """Has an op be repeated; what it needs besides."""
        if id(op) in self.wanted:
            return []
        self.wanted.add(id(op))
        found: list[Op] = []
        parent = self.code.parents.get(id(op))
        if parent is not None:
            found.append(parent)
            if isinstance(parent, (ops.For, ops.While)):
                found += [each for part in regions(parent) for each in part.ops if isinstance(each, ops.TERMINATORS)]
        for value in self.code.uses(op):
            found += self._made(value, op)
        if isinstance(op, ops.If) and self.code.results_anew(op):
            found += [part.ops[-1] for part in regions(op) if part.ops]
        number = next(number for number, each in enumerate(self.code.body) if each is op)
        reads = {root for root in self.memory.reads(op) if not isinstance(root, Site)}
        for earlier in self.code.body[:number]:
            plain = not any(True for _ in regions(earlier))
            if (
                plain
                and reads & self.memory.writes(earlier)
                and self.code.varies(earlier)
                and not self._writes_prompt(earlier)
            ):
                found.append(earlier)
        return found

    def _made(self, value: Value, user: Op) -> list[Op]:
        """The op that makes a value anew; none where it is the first step's, or from outside."""
        maker = self.code.makers.get(value.name)
        if maker is None or isinstance(maker, ops.Steps):
            return []
        if value.name in self.code.again:
            return [maker]
        if id(maker) not in self.code.closed:
            return []
        if self.code.is_of_first(maker):
            self._refuse(
                user.span,
                "this uses what was read at a position of the prompt under a condition, at later steps too",
                ((maker.span, "it is read here"),),
            )
        return [maker]

    def _refuse(self, span: Span, reason: str, related: tuple[tuple[Span, str], ...] = ()) -> NoReturn:
        raise CompileError([Diagnostic(span, reason, WAY_OUT, related)])

    # --- the copy ---

    def _own_cells(self) -> Iterator[ops.Cell]:
        """Boxes for variables that the repeated part assigns: the program's own keep what the first step put there."""
        seen: set[str] = set()
        for op in self.code.body:
            if id(op) not in self.wanted or not isinstance(op, (ops.Store, ops.Load)) or not isinstance(op.cell, Value):
                continue
            name = op.cell.name
            if name not in seen and name not in self.code.makers and isinstance(op, ops.Store):
                yield ops.Cell(op.cell, name.partition(".")[0], UNBOUND, span=op.span)
            seen.add(name)

    def _part(self, part: Sequence[Op]) -> tuple[Op, ...]:
        """The ops that are repeated."""
        made: list[Op] = []
        joint = self._joint(part)
        for op in part:
            if id(op) not in self.wanted or id(op) in joint:
                continue
            chosen = self._chosen_at_run(op)
            if chosen is not None:
                made += self._guarded(op, chosen)
            elif isinstance(op, ops.Invoke):  # it brings its rows once; the accesses inside say whose they mean
                made += self._part(op.body.ops)
            elif any(True for _ in regions(op)) and not isinstance(op, ops.Closure):
                made.append(self._filtered(op))
            else:
                made.append(op)
        return tuple(made)

    def _filtered(self, op: Op) -> Op:
        if not isinstance(op, ops.If):
            return rewrite(op, region=lambda inner: Region(inner.parameters, self._part(inner.ops)))
        kept = self.code.results_anew(op)
        sides = []
        for side in (op.then, op.orelse):
            inside = list(self._part(side.ops))
            last = side.ops[-1] if side.ops else None
            if inside and inside[-1] is last and isinstance(last, ops.Yield):
                inside.pop()
            if isinstance(last, ops.Yield) or not isinstance(last, ops.TERMINATORS):
                values = last.values if isinstance(last, ops.Yield) else ()
                inside.append(ops.Yield(tuple(values[number] for number in kept), span=op.span))
            sides.append(Region((), tuple(inside)))
        return replace(op, results=tuple(op.results[number] for number in kept), then=sides[0], orelse=sides[1])

    # --- indices that only the run knows ---

    def _chosen_at_run(self, op: Op) -> Operand | None:
        """The index by which the run tells whether an op means a position of the prompt."""
        if isinstance(op, (ops.Item, ops.SetItem)):
            return self.positions.at_run(op)
        if in_place(op, self.memory):
            for value in self._changed(op):
                for first in self._through(value)[:1]:
                    assert isinstance(first, ops.Item)
                    return self.positions.at_run(first)
        return None

    def _through(self, value: Value) -> list[Op]:
        """How a value comes from an item with such an index: that item first, and the views of it after."""
        maker = self.code.makers.get(value.name)
        match maker:
            case ops.Item() if self.positions.at_run(maker) is not None:
                return [maker]
            case ops.Item(object=Value() as base) | ops.Attribute(object=Value() as base):
                found = self._through(base)
                return [*found, maker] if found else []
            case ops.Operator(in_place=True, operands=(Value() as base, *_)):
                found = self._through(base)
                return [*found, maker] if found else []
        return []

    def _joint(self, part: Sequence[Op]) -> set[int]:
        """In `h[:, i] += v`: the operator, which goes with the assignment of its result."""
        found = set()
        for op in part:
            if isinstance(op, ops.SetItem) and isinstance(op.value, Value) and self.positions.at_run(op) is not None:
                maker = self.code.makers.get(op.value.name)
                if isinstance(maker, ops.Operator) and maker.in_place and self._through(op.value):
                    found.add(id(maker))
        return found

    def _guarded(self, op: Op, index: Operand) -> list[Op]:
        """An op under the condition that its index counts from the end."""
        test = self.builder.fresh()
        asked = ops.FromEnd(test, index, span=op.span)
        if id(op) in self.code.closed:
            self._refuse(
                op.span, "at which position this is, only the run knows, and it stands in a condition or a loop"
            )
        if isinstance(op, ops.Item):
            inside = self.builder.fresh(op.result.name, op.result.type)
            then = Region((), (replace(op, result=inside), ops.Yield((inside,), span=op.span)))
            first = Value(f"{FIRST}{op.result.name}", op.result.type)
            orelse = Region((), (ops.Yield((first,), span=op.span),))
            return [asked, ops.If((op.result,), test, then, orelse, span=op.span)]
        through: list[Op] = []
        for value in used(op):
            through += [each for each in self._through(value) if each not in through]
        if isinstance(op, ops.Call):
            method = self.code.makers.get(op.function.name) if isinstance(op.function, Value) else None
            through += [method] if isinstance(method, ops.Attribute) and method not in through else []
        users = {value.name for each in self.code.body if each is not op for value in used(each)}
        if any(value.name in users for value in defined(op)):
            self._refuse(op.span, "at which position this is, only the run knows, and its result is used further")
        renamed = {
            value.name: self.builder.fresh(value.name, value.type) for each in through for value in defined(each)
        }
        inner = _renamed(Region((), (*through, op)), renamed)
        return [asked, ops.If((), test, inner, Region(), span=op.span)]


FIRST = "first step: "
"""Marks the name of a value that is the first step's, while the copy of the same name is made."""


def _renamed(region: Region, fresh: dict[str, Value]) -> Region:
    """The region with other names for what it defines."""

    def use(value: Value) -> Operand:
        if value.name.startswith(FIRST):
            return Value(value.name.removeprefix(FIRST), value.type)
        return fresh.get(value.name, value)

    def change(op: Op) -> Op:
        return rewrite(op, operand=use, region=inside, result=lambda value: fresh.get(value.name, value))

    def inside(part: Region) -> Region:
        parameters = tuple(fresh.get(value.name, value) for value in part.parameters)
        return Region(parameters, tuple(map(change, part.ops)))

    return inside(region)
