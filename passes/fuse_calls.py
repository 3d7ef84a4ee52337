"""Calls a module that treats every position by itself once, on the stack of all that it is called on.

    %0 = call %model@lm_head(%a)                  %0 = attr %torch.stack
    %1 = call %append(%0)                         %1 = call %0((%a, %b)) as torch.stack
    %2 = call %model@lm_head(%b)          ──▶     %2 = call %model@lm_head(%1)
    %3 = call %append(%2)                         %3 = item %2[0]
                                                  %4 = call %append(%3)
                                                  %5 = item %2[1]
                                                  %6 = call %append(%5)

Legal where

- the module is proved to treat positions apart and has no hooks, so that a dimension more is nothing to it (`modules`);
- the calls stand in one region of one forward, and their values have one dtype and one shape in every run: that of a
  site, or of the same part of one. Values of all tokens are left alone: all their results would be held at once;
- results are views of one tensor: those that are kept by themselves are copied, unless one container gets them all;
- what uses the result of an earlier call can wait for the last one, with what must stay behind it: it only computes, or
  fills a container, and no op in between reads what it writes, or writes what it, or the call, reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Argument, Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, rewrite, used
from nnsight_compiler.ir.types import Dimension, TensorType, Type
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Value
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.known_calls import MODULE_CALL
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.parts import Modules, Positionwise, Rely
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.selections import Numbers, selection

NAME = "fuse_calls"
_Shape = tuple[Hashable, ...]


def fuse_calls(
    program: Program, modules: Modules, arguments: Mapping[str, Any], remarks: Remarks, rely: Rely
) -> Program:
    """The program with calls of one module on several values as one; the program itself where there are none.

    Args:
        arguments: the values of the parameters in this call.
        rely: is told each expression over the parameters on whose value the result rests.
    """
    if any(isinstance(op, (ops.Backward, ops.Gradients)) for op in program.walk()):
        return program
    while True:
        fusion = _Fusion(program, modules, arguments, remarks)
        fused = fusion.run()
        if fused is program:
            return program
        for text, value in fusion.numbers.relied.items():
            rely(text, value)
        program = fused  # what the results are given to may be called once as well


@final
@dataclass(frozen=True, slots=True)
class _Call:
    """A plain call of a module in a forward, on a value of this shape."""

    op: ops.Call
    module: Module
    kind: Positionwise
    given: Value
    shape: _Shape


class _Fusion:
    def __init__(self, program: Program, modules: Modules, arguments: Mapping[str, Any], remarks: Remarks) -> None:
        self.program = program
        self.modules = modules
        self.remarks = remarks
        self.memory = Memory.of(program)
        self.layout = Layout(program)
        self.numbers = Numbers(program, self.memory, arguments)
        self.builder = Builder(value.name for value in program.values())
        self.stack: Value | None = None
        self.fused = False

    def run(self) -> Program:
        body = self._region(self.program.body)
        if not self.fused:
            return self.program
        if self.stack is not None:
            body = replace(body, ops=(ops.Import(self.stack, "torch", span=self.program.span), *body.ops))
        return replace(self.program, body=body)

    def _region(self, region: Region) -> Region:
        if not self.fused:  # one at a time, since the ops that are made are not in the analyses
            for calls in self._groups(region):
                made = self._together(region, calls)
                if made is not None:
                    self.fused = True
                    return replace(region, ops=tuple(made))
        made_inside = tuple(rewrite(op, region=self._region) for op in region.ops)
        return replace(region, ops=made_inside) if self.fused else region

    # --- which calls ---

    def _groups(self, region: Region) -> Iterator[list[_Call]]:
        found: dict[Hashable, list[_Call]] = {}
        for op in region.ops:
            call = self._call(op)
            if call is not None:
                found.setdefault((call.module, call.shape), []).append(call)
        yield from (calls for calls in found.values() if len(calls) > 1)

    def _call(self, op: Op) -> _Call | None:
        match op:
            case ops.Call(
                function=Module() as module, target=target, arguments=(Argument(Value() as given, None, ""),)
            ) if target == MODULE_CALL:
                pass
            case _:
                return None
        forward = self.layout.forward(op)
        if forward is None or forward.model != module.model or forward.method != "trace":
            return None
        kind = self.modules(forward, module.path)
        shape = self._shape(given)
        if not isinstance(kind, Positionwise) or shape is None or len(shape) > 2:
            return None
        if any("tokens" in str(size) for size in shape):
            return None
        return _Call(op, module, kind, given, shape) if self._dtype(given) == kind.dtype else None

    def _dtype(self, value: Operand) -> str | None:
        """The dtype of a value whose shape is known."""
        op = self.memory.origins.definition(value)
        match op:
            case ops.Read(result=Value(type=TensorType(dtype=dtype))):
                return dtype
            case ops.Item(object=base):
                return self._dtype(base)
            case ops.Call(target="torch.stack", arguments=(Argument(value=Tuple(parts=(first, *_))),)):
                return self._dtype(first)
            case ops.Call(function=Module() as module):
                forward = self.layout.forward(op)
                kind = self.modules(forward, module.path) if forward is not None else ""
                return kind.gives_dtype if isinstance(kind, Positionwise) else None
            case _:
                return None

    def _shape(self, value: Operand) -> _Shape | None:
        """What decides the shape of a value: equal answers mean equal shapes in every run. `None` where it is not
        known."""
        op = self.memory.origins.definition(value)
        match op:
            case ops.Read(rows=None, result=Value(type=TensorType(shape=tuple() as dimensions))):
                forward = self.layout.forward(op)
                assert forward is not None
                if any(each.axis is None and each.size is None for each in dimensions):
                    return None
                return tuple((forward.result.name, each.axis) if each.axis else each.size for each in dimensions)
            case ops.Item(object=base, index=index):
                shape = self._shape(base)
                parts = selection(index, len(shape), self.numbers) if shape else ""
                if isinstance(parts, str) or shape is None or parts.rest is not None:
                    return None
                kept = zip(parts.lead, shape, strict=False)
                lead = (size if part == Slice() else (size, part) for part, size in kept if isinstance(part, Slice))
                return (*lead, shape[-1])
            case ops.Call(target="torch.stack", arguments=(Argument(value=Tuple(parts=(first, *_) as stacked)),)):
                shape = self._shape(first)
                return (len(stacked), *shape) if shape and all(self._shape(each) == shape for each in stacked) else None
            case ops.Call(function=Module() as module, arguments=(Argument(given, None, ""),)):
                forward = self.layout.forward(op)
                shape = self._shape(given)
                kind = self.modules(forward, module.path) if forward is not None else ""
                return (*shape[:-1], kind.gives) if shape and isinstance(kind, Positionwise) else None
            case _:
                return None

    # --- as one ---

    def _together(self, region: Region, calls: list[_Call]) -> list[Op] | None:
        """The ops of a region with these calls as one, in the place of the last; `None` where what uses the others
        cannot wait for it."""
        places = {id(op): number for number, op in enumerate(region.ops)}
        first, last = places[id(calls[0].op)], places[id(calls[-1].op)]
        members = {id(call.op) for call in calls}
        late = {call.op.result.name for call in calls}
        waiting: list[Op] = []
        staying: list[Op] = []
        for op in region.ops[first : last + 1]:
            if id(op) in members:
                if any(value.name in late for value in used(op)):
                    return None  # one of the calls is on what another gave
                continue
            needs = {value.name for value in (*used(op), *_inside(op))} & late
            if needs or any(self.memory.conflict(each, op) for each in waiting):
                if not self._can_wait(op):
                    self._refuse(calls, op, "cannot wait for the last of the calls")
                    return None
                waiting.append(op)
                late |= {value.name for value in defined(op)}
                continue
            if isinstance(op, (ops.Stop, *ops.TERMINATORS)) or any(regions(op)):
                self._refuse(calls, op, "comes between")
                return None
            staying.append(op)
            earlier = (call for call in calls if places[id(call.op)] < places[id(op)])
            if any(self.memory.overlap(self.memory.writes(op), self.memory.roots(call.given)) for call in earlier):
                self._refuse(calls, op, "may write to what it is called on")
                return None
        path, count = calls[0].module.path, len(calls)
        self.remarks.fired(NAME, calls[0].op.span, f"`{path}` is called once on {count} values")
        return [*region.ops[:first], *staying, *self._one(calls), *waiting, *region.ops[last + 1 :]]

    def _can_wait(self, op: Op) -> bool:
        """Whether an op only computes, or fills a container."""
        match op:
            case ops.Attribute() | ops.Item() | ops.Operator(in_place=False) | ops.Save():
                return True
            case ops.Call(function=Module()):
                return op.target == MODULE_CALL
            case ops.Call():
                known = self.memory.origins.known(op)
                kinds = (Behaviour.PURE, Behaviour.VIEW, Behaviour.CONTAINER)
                return known is not None and known.behaviour in kinds and not known.random
            case _:
                return False

    def _refuse(self, calls: list[_Call], op: Op, why: str) -> None:
        path = calls[0].module.path
        self.remarks.refused(NAME, calls[0].op.span, f"`{path}` is called each time: line {op.span.line} {why}")

    def _one(self, calls: list[_Call]) -> Iterator[Op]:
        span = calls[-1].op.span
        given = self._stacked(calls)
        whole = calls[0].given.type
        if given is None:
            if self.stack is None:
                self.stack = self.builder.fresh("torch")
            method, given = self.builder.fresh(), self.builder.fresh(type=_with(whole, len(calls)))
            yield ops.Attribute(method, self.stack, "stack", span=span)
            parts = Tuple(tuple(call.given for call in calls))
            yield ops.Call(given, method, (Argument(parts),), "torch.stack", span=span)
        one = self.builder.fresh(type=_with(calls[0].op.result.type, len(calls)))
        yield ops.Call(one, calls[0].module, (Argument(given),), MODULE_CALL, span=span)
        holders = [self._holders(call.op.result, call.op) for call in calls]
        together = len(set(holders)) == 1 and all(map(self._is_held_whole, holders[0]))
        for number, call in enumerate(calls):
            result = call.op.result
            if together or not holders[number]:
                yield ops.Item(result, one, Literal(number), span=call.op.span)
                continue
            part = self.builder.fresh(type=result.type)  # kept by itself, it must not keep the others alive
            yield ops.Item(part, one, Literal(number), span=call.op.span)
            yield ops.Save(result, part, span=call.op.span)

    def _holders(self, value: Value, maker: Op) -> frozenset[str]:
        """What a value, or a view of it, is put into, by name; the empty name stands for what is no container."""
        found: set[str] = set()
        for op in self.layout.uses.get(value.name, []):
            known = self.memory.origins.known(op) if isinstance(op, ops.Call) else None
            if self.layout.forward(op) is not self.layout.forward(maker):
                found.add("")
            elif isinstance(op, ops.Call) and known is not None and known.behaviour is Behaviour.CONTAINER:
                receiver = self.memory.origins.arguments(op)[0].value
                found.add(receiver.name if isinstance(receiver, Value) else "")
            elif isinstance(op, ops.Item) or (known is not None and known.behaviour is Behaviour.VIEW):
                found |= self._holders(defined(op)[0], maker)
            elif isinstance(op, ops.Attribute):
                for call in self.layout.uses.get(op.result.name, []):
                    method = self.memory.origins.known(call) if isinstance(call, ops.Call) else None
                    if method is None:
                        found.add("")
                    elif method.behaviour is Behaviour.VIEW:
                        found |= self._holders(defined(call)[0], maker)
            elif not isinstance(op, (ops.Save, ops.Operator, ops.Write)) and known is None:
                plain = isinstance(op, ops.Call) and isinstance(op.function, Module)
                found |= set() if plain else {""}
        return frozenset(found)

    def _is_held_whole(self, holder: str) -> bool:
        """Whether a container gives nothing of what it holds away by itself."""
        return bool(holder) and not any(isinstance(op, ops.Item) for op in self.layout.uses.get(holder, []))

    def _stacked(self, calls: list[_Call]) -> Value | None:
        """The stack that the values of the calls are the parts of, in order."""
        bases: set[Value] = set()
        for number, call in enumerate(calls):
            match self.memory.origins.definition(call.given):
                case ops.Item(object=Value() as base, index=index) if index == Literal(number):
                    bases.add(base)
                case _:
                    return None
        base = bases.pop()
        shape = self._shape(base)
        return base if not bases and shape is not None and shape[0] == len(calls) else None


def _inside(op: Op) -> Iterator[Value]:
    for region in regions(op):
        for inner in region.ops:
            yield from used(inner)
            yield from _inside(inner)


def _with(known: Type, count: int) -> Type:
    if not isinstance(known, TensorType) or known.shape is None:
        return known
    return TensorType(known.dtype, (Dimension(count), *known.shape))
