"""What each value may be, and what each container may hold: roots grown to a fixpoint over all ops of a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import assert_never, cast, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import operands, regions
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall, words
from nnsight_compiler.passes.holdings import Holdings
from nnsight_compiler.passes.origins import Origins, is_tensor_index
from nnsight_compiler.passes.roots import (
    ANY_NAME,
    ANYTHING,
    NOTHING,
    Fresh,
    Gradient,
    Outside,
    Root,
    Roots,
    Site,
    Weight,
    holder_of,
    is_outside,
)

PLAIN = frozenset(words("shape ndim dtype device layout itemsize nbytes requires_grad is_leaf is_cuda __name__"))
"""Attributes whose value has no storage."""


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where an op stands, and where the terminators around it lead."""

    forward: str = ""
    closure: str = ""
    yields: tuple[tuple[Value | None, ...], ...] = ()
    continues: tuple[tuple[Value | None, ...], ...] = ()
    breaks: tuple[tuple[Value | None, ...], ...] = ()


class PointsTo:
    """The fixpoint for one program.

    holdings: what the storages hold.
    models: the name of the model that each forward runs.
    """

    def __init__(self, program: Program, origins: Origins, copies: bool) -> None:
        self.origins = origins
        self.copies = copies
        self.holdings = Holdings()
        self.models: dict[str, str] = {}
        self._roots: dict[str, set[Root]] = {}
        self._returned: dict[Root, set[Root]] = {}
        # One op object may stand at several places: what loops unroll to shares what did not change.
        self._places: dict[int, set[str]] = {}
        self._sites: dict[int, Roots] = {}
        self._changed = True
        for parameter in program.parameters:
            self._roots[parameter.value.name] = {Outside(parameter.value.name)}
        while self._changed or self.holdings.grown:
            self._changed = self.holdings.grown = False
            self._block(program.body, _Place())

    def roots(self, operand: Operand) -> Roots:
        """The storages that an operand may be, or be a view of; empty for plain scalars."""
        match operand:
            case Value(name=name):
                return frozenset(self._roots.get(name, ()))
            case Module(model=model, path=path):
                return frozenset({Weight(model.name, path)})
            case Tuple(parts=parts):
                return NOTHING.union(*map(self.roots, parts))
            case Slice(lower=lower, upper=upper, step=step):
                return self.roots(lower) | self.roots(upper) | self.roots(step)
            case Literal() | Unbound():
                return NOTHING

    def reachable(self, operand: Operand) -> Roots:
        """The operand's roots and, for what may be a container or an object, all that they hold."""
        if self.origins.is_tensor(operand):
            return self.holdings.spread(self.roots(operand))
        return self.holdings.reach(self.roots(operand))

    def named(self, operand: Operand) -> Roots:
        """What is reachable without asking what a site may be besides itself."""
        found: set[Root] = set()
        waiting = list(self.roots(operand))
        while waiting:
            root = waiting.pop()
            if root not in found:
                found.add(root)
                if not isinstance(root, (Site, Gradient)) and not self.origins.is_tensor(operand):
                    waiting.extend(self.holdings.held.get(holder_of(root), ()))
        return frozenset(found)

    def _add(self, value: Value, roots: Iterable[Root]) -> None:
        found = self._roots.setdefault(value.name, set())
        before = len(found)
        found.update(roots)
        self._changed |= len(found) > before

    def _returns(self, closure: str, value: Operand) -> None:
        found = self._returned.setdefault(Fresh(closure), set())
        before = len(found)
        found |= self.roots(value)
        self._changed |= len(found) > before

    def _put(self, holders: Iterable[Root], held: Iterable[Root]) -> None:
        """Values that the program puts into a container, an object or a name."""
        holders = set(holders)
        to_sites = any(isinstance(root, Site) for root in holders)
        if self.copies and not to_sites and any(is_outside(root) for root in holders):
            held = {root for root in held if not isinstance(root, Site)}
        self.holdings.hold(holders, held)

    def parts(self, operand: Operand) -> set[Root]:
        """The roots of an item, an attribute, a view or an element of the operand."""
        found = set(self.roots(operand))
        if not self.origins.is_tensor(operand):
            held = self.holdings.held
            for root in tuple(found):
                if not isinstance(root, Site):
                    found |= held.get(holder_of(root), NOTHING)
        return found

    def called(self, op: Op) -> set[Root]:
        """The closures that a call, or another op that may call, can reach."""
        if not self.origins.closures:
            return set()
        reached = NOTHING.union(*map(self.reachable, operands(op)))
        return {root for root in reached if root in self.origins.closures}

    def sites(self, op: ops.Read | ops.Write | ops.Skip) -> Roots:
        """The sites that an op of this program reads or writes: one, unless it stands at several places."""
        found = self._sites.get(id(op))
        if found is None:
            path = op.module.path if isinstance(op.module, Module) else str(op.module)
            port = "skip" if isinstance(op, ops.Skip) else op.port
            rows = op.rows.name if isinstance(op.rows, Value) else ""
            found = frozenset(Site(path, port, op.call, forward, rows) for forward in self._places[id(op)])
            self._sites[id(op)] = found
        return found

    def _block(self, region: Region, place: _Place) -> None:
        for op in region.ops:
            places = self._places.setdefault(id(op), set())
            if place.forward not in places:
                places.add(place.forward)
                self._sites.pop(id(op), None)
            self._visit(cast(AnyOp, op), place)

    def _assign(
        self, targets: tuple[tuple[Value | None, ...], ...], values: Iterable[Operand], *, skip: int = 0
    ) -> None:
        sources = list(values)[skip:]
        for each in targets:
            for value, source in zip(each, sources, strict=False):
                if value is not None:
                    self._add(value, self.roots(source))

    def _visit(self, op: AnyOp, place: _Place) -> None:
        match op:  # the most frequent first
            case ops.Attribute(result=result, object=base, name=name):
                if isinstance(base, Module):
                    path = f"{base.path}.{name}".strip(".")
                    self._add(result, {Weight(base.model.name, path)})
                elif isinstance(self.origins.definition(base), ops.Build):
                    self._add(result, self.roots(base))  # a method: what is in its container, it reaches by that
                elif name not in PLAIN:
                    self._add(result, self.parts(base))
            case ops.Item(result=result, object=base):
                self._add(result, self.parts(base))
            case ops.Call():
                self._call(op)
            case ops.Read(result=result):
                self._add(result, self.sites(op))
            case ops.Operator():
                self._operator(op)
            case ops.At(body=body) | ops.AtGradient(body=body) | ops.Applied(body=body):
                self._block(body, place)
            case ops.Global(result=result, name=name, scope=scope):
                self._add(result, {Outside(f"{scope} {name}"), *self.holdings.of(ANY_NAME)})
            case ops.SetGlobal(value=value):
                self._put({ANY_NAME, ANYTHING}, self.roots(value))
            case ops.Cell(result=result, initial=initial):
                self._add(result, {Fresh(result.name)})
                self.holdings.hold({Fresh(result.name)}, self.roots(initial))
            case ops.Load(result=result, cell=cell):
                for root in self.roots(cell):
                    self._add(result, self.holdings.of(root))
            case ops.Store(cell=cell, value=value):
                self.holdings.hold(self.roots(cell), self.roots(value))
            case ops.Bound(result=result, value=value):
                self._add(result, self.roots(value))
            case ops.Import(result=result):
                self._add(result, {Outside(result.name)})
            case ops.SetAttribute(object=base, value=value):
                self._put(self.roots(base), self.roots(value))
            case ops.SetItem(object=base, index=index, value=value):
                if not self.origins.is_tensor(base) and not (
                    self.origins.is_from_model(base) and is_tensor_index(index)
                ):
                    self._put(self.roots(base), self.parts(value) if isinstance(index, Slice) else self.roots(value))
            case ops.Build(result=result, elements=elements):
                self._add(result, {Fresh(result.name)})
                for element in elements:
                    inside = self.parts(element.value) if element.starred else self.roots(element.value)
                    self.holdings.hold({Fresh(result.name)}, inside)
            case ops.Unpack(results=results, value=value):
                for result in results:
                    self._add(result, self.parts(value))
                if op.star >= 0:
                    self._add(results[op.star], {Fresh(results[op.star].name)})
                    self.holdings.hold({Fresh(results[op.star].name)}, self.parts(value))
            case ops.Closure(result=result, defaults=defaults, body=body):
                own = {Fresh(result.name)}
                self._add(result, own)
                optional = [parameter.value for parameter in op.parameters if parameter.optional]
                for parameter, default in zip(optional, defaults, strict=False):
                    self._add(parameter, self.roots(default))
                self.holdings.hold(own, NOTHING.union(*map(self.roots, _captured(body))))
                self._block(body, _Place(place.forward, result.name))
            case ops.Stage(result=result):
                self._add(result, {Outside(result.name)})
            case ops.If(results=results, then=then, orelse=orelse):
                self._block(then, replace(place, yields=(results,)))
                self._block(orelse, replace(place, yields=(results,)))
            case ops.For(results=results, iterable=iterable, initial=initial, body=body, orelse=orelse):
                item, *carried = body.parameters
                self._add(item, self.parts(iterable))
                continues = (tuple(carried), orelse.parameters if orelse is not None else results)
                self._assign(continues, initial)
                self._block(body, replace(place, yields=(), continues=continues, breaks=(results,)))
                if orelse is not None:
                    self._block(orelse, replace(place, yields=(results,)))
            case ops.While(results=results, initial=initial, condition=condition, body=body, orelse=orelse):
                again = (condition.parameters,)
                self._assign(again, initial)
                after = orelse.parameters if orelse is not None else results
                self._block(condition, replace(place, yields=((None, *body.parameters), (None, *after))))
                self._block(body, replace(place, yields=(), continues=again, breaks=(results,)))
                if orelse is not None:
                    self._block(orelse, replace(place, yields=(results,)))
            case ops.Try(handlers=handlers):
                for handler in handlers:
                    for parameter in handler.body.parameters:
                        self._add(parameter, {ANYTHING})
                for region in regions(op):
                    self._block(region, replace(place, yields=()))
            case ops.With(result=result, context=context, body=body):
                self._add(result, self.parts(context))
                self._block(body, place)
            case ops.Yield(values=values):
                self._assign(place.yields, values)
            case ops.Continue(values=values):
                self._assign(place.continues, values)
            case ops.Break(values=values):
                self._assign(place.breaks, values)
            case ops.Emit(value=value):
                self._returns(place.closure, value)
            case ops.Return(value=value):
                if place.closure:
                    self._returns(place.closure, value)
            case ops.Forward(result=result, model=model, arguments=arguments, body=body):
                self._add(result, {Fresh(result.name)})
                self.models[result.name] = next((value.name for value in values_in(model)), "")
                for argument in () if self.copies else arguments:
                    self.holdings.enter(result.name, self.reachable(argument.value))
                self._block(body, replace(place, forward=result.name))
            case ops.Session(result=result, body=body):
                self._add(result, {Fresh(result.name)})
                self._block(body, place)
            case ops.Postponed(body=body) | ops.Strands(body=body) | ops.Strand(body=body):
                self._block(body, place)
            case ops.Invoke(result=result, body=body):
                self._add(result, {Fresh(result.name)})  # the batch is a copy of what its invokes are given
                self._block(body, place)
            case ops.Steps(body=body):
                self._block(body, replace(place, yields=()))
            case ops.Write(value=value) | ops.Skip(value=value):
                self.holdings.enter(place.forward, self.reachable(value))
            case ops.Save(result=result, value=value, copy=copy):
                self._save(result, value, copy)
            case ops.Backward(body=body):
                self._block(body, place)
            case ops.Grad(result=result, value=value):
                self._add(result, {Gradient(result.name)})
            case ops.SetGrad(gradient=gradient):
                self.holdings.hold({Gradient("")}, self.reachable(gradient))
            case ops.Gradients(result=result):
                self._add(result, {Fresh(result.name)})
            case ops.Edit(results=results):
                for result in results:
                    self._add(result, {Outside(result.name)})
            case ops.Captured(result=result):
                self._add(result, {Outside(result.name)})
            case ops.Prefix(result=result):
                self._add(result, {Fresh(result.name)})
            case ops.Cache(result=result):
                self._add(result, {Fresh(result.name)})  # what is recorded are copies
            case (
                ops.Record() | ops.Release() | ops.Format() | ops.FromEnd() | ops.Delete() | ops.Raise() | ops.Stop()
                | ops.Require() | ops.Track()
            ):  # fmt: skip
                pass
            case _:
                assert_never(op)

    def _operator(self, op: ops.Operator) -> None:
        if op.operator in ("not", "is", "is not", "in", "not in"):
            return
        given = [self.roots(part) for part in op.operands]
        if not any(given) and not op.in_place:
            return
        own = {Fresh(op.result.name)}
        self._add(op.result, own)
        if op.in_place or (op.operator == "+" and len(given) == 1):  # `+value` of a tensor is the tensor
            self._add(op.result, given[0])
        if not self.origins.makes_tensor(op):
            inside = set().union(*map(self.parts, op.operands))
            self.holdings.hold(own, inside)
            if op.in_place:
                self.holdings.hold({root for root in given[0] if not isinstance(root, Site)}, inside)

    def _call(self, op: ops.Call) -> None:
        known = self.origins.known(op)
        given = [(op.function, self.roots(op.function))]
        given += [(argument.value, self.roots(argument.value)) for argument in op.arguments]
        own = {Fresh(op.result.name)}
        called = self.called(op)
        for root in called:
            closure = self.origins.closures[root]
            for parameter in closure.parameters:
                self._add(
                    parameter.value, NOTHING.union(*(self.reachable(argument.value) for argument in op.arguments))
                )
                if parameter.kind.startswith("var_"):
                    self._add(parameter.value, {Fresh(parameter.value.name)})
                if known is None and root not in self.roots(op.function):
                    self._add(parameter.value, {ANYTHING})
            self._add(op.result, self._returned.get(root, ()))
            self.holdings.hold(own, self._returned.get(root, ()))
        if isinstance(op.function, Module):
            self._add(op.result, own | self.roots(op.function))
            for argument in op.arguments:
                self._add(op.result, self.parts(argument.value))
        elif known is not None:
            self._known_call(op, known)
        elif called and called == {root for root in self.roots(op.function)}:
            self._add(op.result, own)
        else:
            reached = NOTHING.union(*(self.holdings.reach(roots) for _, roots in given))
            self.holdings.hold({ANYTHING, ANY_NAME}, reached)
            self._add(op.result, {Outside(op.result.name), *reached, *self.holdings.of(ANYTHING)})

    def _known_call(self, op: ops.Call, known: KnownCall) -> None:
        own = {Fresh(op.result.name)}
        if not known.scalar:
            self._add(op.result, own)
        for argument in self.origins.at(op, known.aliases):
            parts = self.parts(argument.value)
            self._add(op.result, parts)
            if not known.leaf:
                self.holdings.hold(own, parts)
        if known.behaviour is Behaviour.CONTAINER:
            stored: set[Root] = set()
            for argument in op.arguments:
                stored |= self.parts(argument.value)
            self._put(NOTHING.union(*(self.roots(part.value) for part in self.origins.at(op, known.mutates))), stored)

    def _save(self, result: Value, value: Operand, copy: bool) -> None:
        self._add(result, {Fresh(result.name)})
        if not copy:
            self._add(result, self.roots(value))
        elif not self.origins.is_tensor(value) and not self.origins.is_from_model(value):
            # A container that is saved goes on being filled; what is in it was saved when it was put in.
            self._add(result, {root for root in self.roots(value) if isinstance(root, Fresh)})


def _captured(body: Region) -> Iterator[Value]:
    """The values that a closure's body mentions; its own are harmless among them."""
    for op in body.ops:
        for operand in operands(op):
            yield from values_in(operand)
        for region in regions(op):
            yield from _captured(region)
