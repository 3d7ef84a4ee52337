"""Removes saves that nothing uses, and then all that only they needed, up to whole forwards.

    forward %f0 = trace %model(%clean)                    forward %f0 = trace %model(%clean)
      %h = read %model@h.3 output                           %2 = read %model@lm_head output
      %0 = item %h[:, -1]                       ──▶         %logits = save %2
      %dead = save %0                                     return %logits
      %2 = read %model@lm_head output
      %logits = save %2
    forward %f1 = trace %model(%corrupt)
      %3 = read %model@h.5 output
    return %logits

Legal, since what goes changes nothing that stays:

- An op that writes memory, prints, draws random numbers or runs host code stays; so do writes and skips of the model,
  and every op that one that stays needs. A list, set or dict goes with the ops that fill it if nothing else uses it.
- A computation goes with what it served, and if a value of the model went into it: the model is not run for `h[:, 99]`
  of a read that nothing uses, nor `torch.zeros(n)` for a dead save. Any other that nothing used in the first place
  stays, as `int(text)` and `table[name]` may raise in Python. Within `try`, everything that might raise stays.
- A loop over a value from outside, or a `while`, stays, be it empty: the iterable may be changed by being read.
- A forward goes if nothing in it stays and its tracer is not used. The model is taken to compute the same whether or
  not it ran before (it is in eval mode); `keep_forwards` keeps forwards. A generation that may sample always stays.
- An invoke stays as long as its forward: its rows are part of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, assert_never

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, operands, rewrite, used
from nnsight_compiler.ir.values import Literal, Module, Operand, Unbound, values_in
from nnsight_compiler.passes.known_calls import CHANGES_MODULES, Behaviour
from nnsight_compiler.passes.looked_on import looked_on
from nnsight_compiler.passes.memory import Memory, Outside
from nnsight_compiler.passes.op_tree import Node, OpTree
from nnsight_compiler.passes.unused_containers import EMPTY, fillings_of_unused

_Part = TypeVar("_Part")


def eliminate_dead_saves(program: Program, *, keep_forwards: bool = False) -> Program:
    """The program without dead saves and what only they needed; the program itself where nothing is dead."""
    result = _Elimination(program, keep_forwards).run()
    return program if result == program else result


class _Elimination:
    """What stays of one program.

    kept: the ops that stay; `waiting`: those inside a closure that stay if the closure does.
    live: the values that what stays uses; `positions`: the same of those that regions hand over, by op and number.
    """

    def __init__(self, program: Program, keep_forwards: bool) -> None:
        self.program = program
        self.keep_forwards = keep_forwards
        self.memory = Memory.of(program)
        self.tree = OpTree(program)
        self.kept: set[Node] = set()
        self.waiting: dict[Node, list[Node]] = {}
        self.live: set[str] = set()
        self.positions: set[tuple[Node, int]] = set()

    # --- what stays ---

    def run(self) -> Program:
        fillings = fillings_of_unused(self.tree)
        for node in self.tree.nodes:
            if node not in fillings and self.must_stay(node):
                self.keep(node)
        return replace(self.program, body=replace(self.program.body, ops=tuple(self.sweep(self.tree.top))))

    def keep(self, node: Node) -> None:
        """The op stays: so do the ops around it, and what it needs."""
        waiting = [node]
        while waiting:
            each = waiting.pop()
            around = each.parent
            while around is not None and not isinstance(around.op, ops.Closure):
                around = around.parent
            if around is not None and around not in self.kept:
                self.waiting.setdefault(around, []).append(each)
                continue
            if each in self.kept:
                continue
            self.kept.add(each)
            if each.parent is not None:
                waiting.append(each.parent)
            self.needed(each, waiting)

    def needed(self, node: Node, waiting: list[Node]) -> None:
        op = node.op
        match op:
            case ops.If(condition=condition):
                self.use(condition, waiting)
            case ops.For(iterable=iterable):
                self.use(iterable, waiting)
            case ops.While():
                for jump in node.jumps:
                    if isinstance(jump.op, ops.Yield) and jump.op in op.condition.ops:
                        self.use(jump.op.values[0], waiting)
            case ops.Yield() if node.parent is not None and isinstance(node.parent.op, ops.Try):
                self.use_all(op, waiting)  # the exceptions that an `except` names
            case ops.Yield() | ops.Continue() | ops.Break():
                pass
            case ops.Forward():
                self.use_all(op, waiting)
                waiting += [child for child in node.descend() if isinstance(child.op, (ops.Invoke, ops.Stop))]
            case _:
                self.use_all(op, waiting)
        waiting += self.waiting.pop(node, ())
        if isinstance(op, (ops.If, ops.For, ops.While)):
            # A region that had a terminator keeps it, with the values that are left.
            waiting += node.jumps
        elif isinstance(op, ops.Try):
            waiting += [child for child in node.children if isinstance(child.op, ops.Yield)]

    def use_all(self, op: Op, waiting: list[Node]) -> None:
        for operand in operands(op):
            self.use(operand, waiting)

    def use(self, operand: Operand, waiting: list[Node]) -> None:
        for value in values_in(operand):
            if value.name in self.live or value.name not in self.tree.makers:
                continue
            self.live.add(value.name)
            node, index = self.tree.makers[value.name]
            waiting.append(node)
            if isinstance(node.op, ops.Cell):
                waiting += self.tree.stores.get(value.name, [])
            if index >= 0 and isinstance(node.op, (ops.If, ops.For, ops.While)):
                self.carry(node, index, waiting)

    def carry(self, node: Node, index: int, waiting: list[Node]) -> None:
        """One of the values that a region hands over is used: all that may become it is."""
        if (node, index) in self.positions:
            return
        self.positions.add((node, index))
        if isinstance(node.op, (ops.For, ops.While)):
            self.use(node.op.initial[index], waiting)
        for jump in node.jumps:
            values = _handed_over(jump.op)
            if isinstance(node.op, ops.While) and jump.op in node.op.condition.ops:
                values = values[1:]
            self.use(values[index], waiting)

    def must_stay(self, node: Node) -> bool:
        """Whether the op has an effect of its own, or might raise where Python would."""
        op = node.op
        match op:
            case ops.Store(cell=cell):
                return not isinstance(self.memory.origins.definition(cell), ops.Cell)  # a stage is given its cells
            case ops.FromEnd() | ops.Global() | ops.Cell() | ops.Closure() | ops.Read() | ops.Grad():
                return False
            case ops.Save() | ops.Cache() | ops.Edit() | ops.Applied() | ops.Captured():
                return False
            case (
                ops.Stage()
                | ops.Session()
                | ops.Postponed()
                | ops.Strands()
                | ops.Strand()
                | ops.Invoke()
                | ops.Stop()
                | ops.Steps()
                | ops.If()
                | ops.Try()
                | ops.At()
                | ops.Yield()
            ):
                return False
            case ops.Gradients() | ops.Require() | ops.Track() | ops.AtGradient():
                return True
            case ops.Bound(value=value) if isinstance(value, Unbound) or isinstance(
                self.memory.origins.definition(value), ops.Global
            ):
                return True  # a name that stands for nothing
            case ops.Attribute() | ops.Load() | ops.Bound() | ops.Item() | ops.Format() | ops.Unpack():
                return self.might_matter(node)
            case ops.Build(elements=elements, kind=kind):
                plain = all(
                    not element.starred
                    and (kind in ("tuple", "list") or isinstance(element.key or element.value, Literal))
                    for element in elements
                )
                return not plain and self.might_matter(node)
            case ops.Operator(operator=operator):
                return operator not in ("is", "is not") and self.might_matter(node)
            case ops.Call():
                return self.call_must_stay(node, op)
            case ops.Forward(method=method, arguments=arguments):
                sampling = method == "generate" and not any(
                    argument.keyword == "do_sample" and argument.value == Literal(False) for argument in arguments
                )
                return self.keep_forwards or sampling or looked_on(op) is not None
            case ops.For(iterable=iterable):
                reached = self.memory.reachable(iterable)
                return any(isinstance(root, Outside) or root in self.memory.origins.iterators for root in reached)
            case ops.Continue() | ops.Break():
                # The last op of a loop's body goes with the loop; any other decides how the loop runs.
                return node.loop() is not node.parent
            case ops.With(context=context):
                call = self.memory.origins.definition(context)
                known = self.memory.origins.known(call) if isinstance(call, ops.Call) else None
                return known is None or known.behaviour is not Behaviour.PURE
            case ops.SetGlobal() | ops.Import() | ops.SetAttribute() | ops.SetItem() | ops.Delete() | ops.While():
                return True
            case ops.Record() | ops.Prefix() | ops.Release():
                return True
            case ops.Emit() | ops.Return() | ops.Raise() | ops.Write() | ops.Skip() | ops.Backward() | ops.SetGrad():
                return True
            case _:
                assert_never(op)

    def might_matter(self, node: Node) -> bool:
        """Whether a computation writes something, or might raise where that must be seen."""
        if self.memory.writes(node.op):
            return True
        if node.guarded:
            return True
        served = any(value.name in self.tree.uses for value in defined(node.op))
        hangs = any(value.name in self.tree.from_model for value in used(node.op))
        model = any(isinstance(operand, Module) for operand in operands(node.op))
        return not (served or hangs or model)

    def call_must_stay(self, node: Node, op: ops.Call) -> bool:
        known = self.memory.origins.known(op)
        if known is None and not isinstance(op.function, Module):
            return True
        if known is not None:
            if known.random or known.behaviour in (Behaviour.HARMLESS, Behaviour.CONTAINER):
                return True
            receiver = self.memory.origins.arguments(op)[:1]
            if known.target in CHANGES_MODULES and not any(
                self.memory.origins.is_tensor(part.value) or self.memory.origins.is_from_model(part.value)
                for part in receiver
            ):
                return True
            if known.target in EMPTY and not op.arguments:
                return False
        if self.memory.calls_closures(op):
            return True
        return self.might_matter(node)

    # --- building what is left ---

    def sweep(self, nodes: Sequence[Node]) -> Iterator[Op]:
        for node in nodes:
            if node in self.kept:
                yield self.rebuilt(node)

    def rebuilt(self, node: Node) -> Op:
        op = node.op
        children = iter(node.children)

        def swept(region: Region) -> Region:
            own = [next(children) for _ in region.ops]
            left = tuple(self.sweep(own))
            return region if left == region.ops else replace(region, ops=left)

        new = rewrite(op, region=swept)
        match new:
            case ops.If(results=results):
                return _same(new, replace(new, results=self.left(node, results)))
            case ops.For(results=results, initial=initial, body=body, orelse=orelse):
                item, *carried = body.parameters
                return _same(
                    new,
                    replace(
                        new,
                        results=self.left(node, results),
                        initial=self.left(node, initial),
                        body=replace(body, parameters=(item, *self.left(node, tuple(carried)))),
                        orelse=self.narrowed(node, orelse),
                    ),
                )
            case ops.While(results=results, initial=initial, condition=condition, body=body, orelse=orelse):
                return _same(
                    new,
                    replace(
                        new,
                        results=self.left(node, results),
                        initial=self.left(node, initial),
                        condition=replace(condition, parameters=self.left(node, condition.parameters)),
                        body=replace(body, parameters=self.left(node, body.parameters)),
                        orelse=self.narrowed(node, orelse),
                    ),
                )
            case ops.Continue(values=values) | ops.Break(values=values):
                return replace(new, values=self.left(node.loop(), values))
            case ops.Yield(values=values) if node.parent is not None:
                owner = node.parent
                if isinstance(owner.op, ops.While) and op in owner.op.condition.ops:
                    return replace(new, values=(values[0], *self.left(owner, values[1:])))
                if isinstance(owner.op, (ops.If, ops.For, ops.While)):
                    return replace(new, values=self.left(owner, values))
                return new
            case _:
                return new

    def narrowed(self, node: Node, region: Region | None) -> Region | None:
        return None if region is None else replace(region, parameters=self.left(node, region.parameters))

    def left(self, node: Node, parts: tuple[_Part, ...]) -> tuple[_Part, ...]:
        return tuple(part for index, part in enumerate(parts) if (node, index) in self.positions)


def _same(old: Op, new: Op) -> Op:
    return old if old == new else new


def _handed_over(op: AnyOp) -> tuple[Operand, ...]:
    assert isinstance(op, (ops.Yield, ops.Continue, ops.Break))
    return op.values
