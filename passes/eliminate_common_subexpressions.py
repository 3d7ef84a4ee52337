"""Reads a site once, and computes a value once, where the second time would give the same.

    %a = read %model@h.3 output               %a = read %model@h.3 output
    %0 = %a * 2                               %0 = %a * 2
    %s = save %0                      ──▶     %s = save %0
    %b = read %model@h.3 output               %1 = %0 + 1
    %c = %b * 2                               …
    %1 = %c + 1

The first stands in the same region, or in one around it that runs in the same mode and at the same step: not across the
edge of a `with` (gradients may be off inside), of a closure, of the steps of a generation or of another forward.

Legal, where nothing in between, in the order of the source, changes what the second would see:

- A read of a site, if nothing replaces that site's value in between. An in-place write does not matter here, since both
  reads give the one live value.
- A global name, a cell: if nothing assigns it in between, and no host call might.
- A known pure call, an operator, an item, an attribute: if no storage that it looks at is written in between. Random
  calls, and calls that make iterators or containers, never.
- What is computed may be new storage: two results become one only if no one can tell. Either they are only computed
  with further (or saved, which copies), or nothing in the program writes them, compares them by identity, stores them
  in a container, returns them, or gives them to the model or to a host call.
- Items and attributes of objects from outside the program are left alone: they may run any code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used
from nnsight_compiler.ir.values import NONE, Literal, Module, Operand, Slice, Tuple, Value, map_operand
from nnsight_compiler.passes.behaviour import Behaviour, words
from nnsight_compiler.passes.memory import PLAIN, Fresh, Memory, Name, Outside, Root, Roots, Site

METADATA = frozenset(
    f"torch.Tensor.{name}"
    for name in words(
        "squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ detach_ requires_grad_ retain_grad "
        "share_memory_ resize_ resize_as_"
    )
)
"""Methods that change a tensor itself rather than its storage, so that two views of one storage can be told apart."""

_ANONYMOUS = Value("")


def eliminate_common_subexpressions(program: Program) -> Program:
    """The program with every value computed once; the program itself where nothing is computed twice."""
    elimination = _Elimination(program)
    body = elimination.region(program.body, {}, "", "")
    if not elimination.gone:
        return program
    return replace(program, body=_without_idle_lookups(program, body))


@final
@dataclass(frozen=True, slots=True)
class _Available:
    """A value that was computed, what it was computed from, and the site if it was read."""

    value: Value
    reads: Roots
    site: Roots = frozenset()


_Table = dict[object, _Available]


class _Elimination:
    def __init__(self, program: Program) -> None:
        self.memory = Memory.of(program)
        self.gone: dict[str, Value] = {}
        self.uses: dict[str, list[Op]] = {}
        self.tells_views_apart = False
        shown: set[Root] = set()
        for op in program.walk():
            for value in used(op):
                self.uses.setdefault(value.name, []).append(op)
            if isinstance(op, ops.Call) and op.target in METADATA:
                self.tells_views_apart = True
            shown |= self.shown_by(cast(AnyOp, op))
        self.shown = frozenset(shown)

    def shown_by(self, op: AnyOp) -> Roots:
        """The storages that may be told from equal ones by this op, or because of it."""
        match op:
            case ops.Return(value=value) | ops.Emit(value=value):
                return self.memory.reachable(value)
            case ops.Operator(operator="is" | "is not", operands=parts) if NONE not in parts:
                return self.all_reachable(parts)
            case ops.Grad(value=value) | ops.SetGrad(value=value) | ops.Gradients(inputs=value):
                return self.memory.reachable(value)  # each of two equal values has a gradient of its own
            case ops.Call(target="builtins.id"):
                return self.all_reachable(argument.value for argument in op.arguments)
            case _:
                return self.memory.writes(op)

    def all_reachable(self, parts: Iterable[Operand]) -> Roots:
        return frozenset[Root]().union(*map(self.memory.reachable, parts))

    # --- regions ---

    def region(self, region: Region, table: _Table, forward: str, rows: str) -> Region:
        """The region with repeated computations left out; `table` holds what is available, and grows."""
        left: list[Op] = []
        for op in region.ops:
            new = rewrite(op, operand=lambda value: self.gone.get(value.name, value))
            key = self.key(cast(AnyOp, op), cast(AnyOp, new), forward, rows)
            if key is not None:
                (value,) = defined(op)
                found = table.get(key)
                if found is not None and self.alike(cast(AnyOp, op), found.value, value):
                    self.gone[value.name] = found.value
                    continue
                site = self.memory.roots(value) if isinstance(op, ops.Read) else frozenset[Root]()
                table.setdefault(key, _Available(value, self.memory.reads(op), site))
            new = self.nested(cast(AnyOp, op), new, table, forward, rows)
            self.forget(cast(AnyOp, op), table)
            left.append(new)
        return region if tuple(left) == region.ops else replace(region, ops=tuple(left))

    def nested(self, op: AnyOp, new: Op, table: _Table, forward: str, rows: str) -> Op:
        match op:
            case ops.Closure() | ops.Steps() | ops.With():
                inherited: _Table = {}
            case ops.For() | ops.While() | ops.Try():
                # The region may run after it has itself changed what is available before it.
                inherited = dict(table)
                self.forget(op, inherited)
            case _:
                inherited = table
        match op:
            case ops.Forward(result=result):
                forward, rows = result.name, ""
            case ops.Invoke(result=result):
                rows = result.name
            case _:
                pass
        return rewrite(new, region=lambda region: self.region(region, dict(inherited), forward, rows))

    def forget(self, op: AnyOp, table: _Table) -> None:
        """Takes out what the op may have changed."""
        writes = self.memory.writes(op)
        if not writes:
            return
        replaced = self.replaced(op)
        for key, available in list(table.items()):
            if available.site:
                stale = any(_one_module(site, other) for site in available.site for other in replaced)
            else:
                stale = self.memory.overlap(writes, available.reads)
            if stale:
                del table[key]

    def replaced(self, op: AnyOp) -> set[Root]:
        """The sites whose value is replaced by the op, or by one inside it, rather than written in place."""
        match op:
            case ops.Write() | ops.Skip():
                return set(self.memory.writes(op))
            case ops.SetItem(object=base) | ops.SetAttribute(object=base) | ops.Delete(object=base):
                # An item of a tuple that a module returned.
                return set() if self.memory.origins.is_tensor(base) else set(self.memory.roots(base))
            case ops.Call() if self.memory.origins.known(op) is None or self.memory.calls_closures(op):
                return set(self.memory.writes(op))
            case _:
                return {root for region in regions(op) for inner in region.ops for root in self.replaced(_any(inner))}

    # --- what may be one ---

    def key(self, op: AnyOp, new: AnyOp, forward: str, rows: str) -> object | None:
        """What two ops that compute the same have in common; `None` for an op that is never left out."""
        origins = self.memory.origins
        match new:
            case ops.Read(module=Module()) if forward:
                return _named(new), forward, rows
            case ops.Global() | ops.Load():
                return _named(new)
            case ops.Attribute(object=base, name=name):
                return _named(new) if name in PLAIN or self.is_transparent(base) else None
            case ops.Item(object=base):
                return _named(new) if self.is_transparent(base) else None
            case ops.Operator(in_place=False):
                return _named(new)
            case ops.Call() if isinstance(op, ops.Call):
                known = origins.known(op)
                if known is None or known.random or known.behaviour not in (Behaviour.PURE, Behaviour.VIEW):
                    return None
                if not (known.scalar or known.target.startswith("torch.")) or self.memory.writes(op):
                    return None
                if self.memory.calls_closures(op):
                    return None
                arguments = tuple(
                    replace(argument, value=_renamed(argument.value, self.gone)) for argument in origins.arguments(op)
                )
                return known.target, arguments
            case _:
                return None

    def is_transparent(self, operand: Operand) -> bool:
        """Whether items and attributes of the operand are known to run no code: no part of it is from outside."""
        if isinstance(operand, Module) or self.memory.origins.is_tensor(operand):
            return True
        roots = self.memory.roots(operand)
        return bool(roots) and not any(isinstance(root, (Outside, Name)) for root in roots)

    def alike(self, op: AnyOp, first: Value, second: Value) -> bool:
        """Whether nobody can tell one result from two."""
        match op:
            case ops.Read() | ops.Global() | ops.Load():
                return True
            case ops.Attribute() | ops.Item(index=_):
                if not self.memory.roots(second):
                    return True
                held = isinstance(op, ops.Attribute) or _is_basic(op.index) or self.is_container(op.object)
                if held and not self.tells_views_apart:
                    return True
            case ops.Call() if (known := self.memory.origins.known(op)) is not None and known.scalar:
                return True
            case _:
                pass
        if self.is_only_computed_with(first) and self.is_only_computed_with(second):
            return True
        if isinstance(op, ops.Item) or self.tells_views_apart:
            return False
        return self.is_hidden(first) and self.is_hidden(second)

    def is_container(self, operand: Operand) -> bool:
        """Whether the operand is a container of the program's, whose items are objects and not views or copies."""
        definition = self.memory.origins.definition(operand)
        return isinstance(definition, ops.Build)

    def is_only_computed_with(self, value: Value) -> bool:
        """Whether every use reads the value's contents, keeps nothing, and gives back nothing of its storage."""
        return all(self.only_computes(cast(AnyOp, op), value) for op in self.uses.get(value.name, ()))

    def only_computes(self, op: AnyOp, value: Value) -> bool:
        match op:
            case ops.Operator(operator=operator, in_place=False):
                return operator not in ("is", "is not") and (
                    self.memory.origins.makes_tensor(op) or self.memory.origins.is_tensor(value)
                )
            case ops.Save(copy=copy):
                return copy
            case ops.Call():
                known = self.memory.origins.known(op)
                return known is not None and known.behaviour is Behaviour.PURE and known.target != "builtins.id"
            case _:
                return False

    def is_hidden(self, value: Value) -> bool:
        """Whether the new storage that the value may be is never written, compared, kept, returned or given away."""
        own = Fresh(value.name)
        return own not in self.shown and not self.memory.is_held(own) and not self.memory.entered(own)


def _any(op: Op) -> AnyOp:
    return cast(AnyOp, op)


def _named(op: Op) -> Op:
    """The op without the names of its results, for comparison."""
    return rewrite(op, result=lambda value: _ANONYMOUS)


def _renamed(operand: Operand, gone: dict[str, Value]) -> Operand:
    return map_operand(operand, lambda value: gone.get(value.name, value))


def _one_module(first: Root, second: Root) -> bool:
    """Whether two sites belong to one module in one forward, whatever their port, call and rows."""
    return (
        isinstance(first, Site)
        and isinstance(second, Site)
        and (first.module, first.forward) == (second.module, second.forward)
    )


def _is_basic(index: Operand) -> bool:
    """Whether a tensor gives a view for this index, not a copy."""
    match index:
        case Literal():
            return not isinstance(index.value, bool)
        case Slice():
            return True
        case Tuple(parts=parts):
            return all(map(_is_basic, parts))
        case _:
            return False


def _without_idle_lookups(before: Program, body: Region) -> Region:
    """The region without globals and attributes that lost their last use: callees of calls that were left out."""
    had_uses = {value.name for op in before.walk() for value in used(op)}
    while True:
        program = replace(before, body=body)
        has_uses = {value.name for op in program.walk() for value in used(op)}
        idle = had_uses - has_uses

        def swept(region: Region, idle: set[str] = idle) -> Region:
            left = tuple(
                rewrite(op, region=swept)
                for op in region.ops
                if not (isinstance(op, (ops.Global, ops.Attribute)) and op.result.name in idle)
            )
            return region if left == region.ops else replace(region, ops=left)

        new = swept(body)
        if new == body:
            return body
        body = new
