"""One run of a specialised program on stand-ins, which follows its control flow as far as that is known.

What surely runs is told from what may not: a branch under an unknown condition, the body of a `try`, a loop that may
have no rounds, and what stands after a conditional `return`. Mistakes are found in the former alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from typing import Literal as OneOf

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.meta_operators import truth
from nnsight_compiler.passes.meta_ops import MetaOps
from nnsight_compiler.passes.meta_values import Loop
from nnsight_compiler.passes.stand_ins import UNKNOWN, same

GRAD_MODES = ("torch.no_grad", "torch.enable_grad", "torch.inference_mode", "torch.set_grad_enabled")
_ROUNDS = 4

Leaving = OneOf["yield", "leave", "end"]
"""How a region ended: by a `yield`, by leaving it, or at its end."""


def _parameters(region: Region) -> Iterator[str]:
    """The names of the parameters of a region, and of those inside it."""
    yield from (value.name for value in region.parameters)
    for op in region.ops:
        for inner in regions(op):
            yield from _parameters(inner)


def only_first(steps: ops.Steps) -> bool:
    """Whether these steps are the first of a generation alone."""
    return (steps.start, steps.stop) == (Literal(0), Literal(1))


class MetaRun(MetaOps):
    """A whole run."""

    def run(self) -> None:
        for parameter in self.source.program.parameters:
            name = parameter.value.name
            known = name in self.surroundings.arguments
            self.values[name] = self.outside(self.surroundings.arguments[name]) if known else UNKNOWN
            self.record(parameter.value)
        self._region(self.source.program.body)

    def _region(self, region: Region) -> tuple[Leaving, tuple[Any, ...]]:
        for op in region.ops:
            found = self._op(op)
            if found is not None:
                return found
        return "end", ()

    def _op(self, op: Op) -> tuple[Leaving, tuple[Any, ...]] | None:
        """Runs one op; says how control leaves the region, where it does."""
        match op:
            case ops.Yield(values=values):
                return "yield", tuple(map(self.value, values))
            case ops.Continue(values=values) if self.loops:
                self.loops[-1].continued.append(tuple(map(self.value, values)))
                return "leave", ()
            case ops.Break(values=values) if self.loops:
                self.loops[-1].broken.append(tuple(map(self.value, values)))
                return "leave", ()
            case ops.Return() | ops.Raise() | ops.Continue() | ops.Break():
                return "leave", ()
            case ops.If():
                return self._if(op)
            case ops.For() | ops.While():
                self._loop(op)
            case ops.Try():
                self._try_statement(op)
            case ops.With():
                return self._with(op)
            case ops.Forward():
                return self._forward_body(op)
            case ops.Invoke() | ops.Session():
                self.define(op.result, UNKNOWN)
                how, values = self._region(op.body)
                return (how, values) if how == "leave" else None
            case ops.Backward():
                how, values = self._region(op.body)
                return (how, values) if how == "leave" else None
            case ops.Steps():
                self._steps(op)
            case ops.Closure():
                self._closure(op)
            case _:
                if any(True for _ in regions(op)):
                    self._lose_changed(op)
                self.simple(op)
        return None

    def _if(self, op: ops.If) -> tuple[Leaving, tuple[Any, ...]] | None:
        known = truth(self.value(op.condition))
        if known is not None and not self.blind:
            how, values = self._region(op.then if known else op.orelse)
            if how == "leave":
                return how, values
            self.define_all(op.results, values)
            return None
        self._lose_changed(op)
        with self.maybe():
            ended = [self._region(op.then), self._region(op.orelse)]
        going_on = [values for how, values in ended if how != "leave"]
        if len(going_on) < 2:
            # Whether what follows still runs is not known: it may have been left for good, or for this round.
            if self.loops:
                self.loops[-1].left = True
            if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
                self.left = True
        if not going_on:
            return "leave", ()
        self.define_all(op.results, self.join_all(going_on))
        return None

    def _try_statement(self, op: ops.Try) -> None:
        self._lose_changed(op)
        with self.maybe():
            for part in regions(op):
                self._region(part)
        if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
            self.left = True

    def _with(self, op: ops.With) -> tuple[Leaving, tuple[Any, ...]] | None:
        known = isinstance(op.context, Value) and self.source.targets.get(op.context.name) in GRAD_MODES
        if not known:
            self.host(self.value(op.context))
        self.define(op.result, UNKNOWN)
        before = self.blind
        self.blind |= not known  # such as autocast, under which results have other dtypes
        how, values = self._region(op.body)
        self.blind = before
        return (how, values) if how == "leave" else None

    def _forward_body(self, op: ops.Forward) -> tuple[Leaving, tuple[Any, ...]] | None:
        outer, name = self.forward, op.result.name
        self.define(op.result, UNKNOWN)
        self.forward = name, None if name in self.opaque else self.sizes.get(name)
        how, values = self._region(op.body)
        self.forward = outer
        return (how, values) if how == "leave" else None

    def _steps(self, op: ops.Steps) -> None:
        """Steps of a generation. The first is as large as the prompt; of what later ones make, no size is known."""
        if only_first(op):
            self._bind(op.body.parameters, (0,))
            self._region(op.body)
            return
        self._lose_changed(op)
        outer, self.sites = self.sites, {}
        with self.maybe():
            self._bind(op.body.parameters, (UNKNOWN,))
            self._region(op.body)
        self.sites = outer
        inside = list(walk(op.body))
        for each in inside:
            for value in defined(each):
                self.values[value.name] = UNKNOWN
            if isinstance(each, ops.Store) and isinstance(each.cell, Value):
                self.store(each.cell.name, UNKNOWN, always=True)

    def _loop(self, op: ops.For | ops.While) -> None:
        self._lose_changed(op)
        initial = tuple(map(self.value, op.initial))
        runs, each = self.entries(self.value(op.iterable)) if isinstance(op, ops.For) else (False, ())
        carried, loop = initial, Loop()
        for number in range(_ROUNDS):
            before, loop = self.version, Loop()
            last = number == _ROUNDS - 1
            if last:
                self.lose_containers(*carried)
                carried = tuple(UNKNOWN for _ in carried)
            self.loops.append(loop)
            with self.maybe(number > 0 or not runs):
                if isinstance(op, ops.While):
                    self._bind(op.condition.parameters, carried)
                    how, tested = self._region(op.condition)
                    carried_in = tested[1:] if how == "yield" else carried
                    self._bind(op.body.parameters, carried_in)
                else:
                    self._bind(op.body.parameters, (each, *carried))
                self._region(op.body)
            self.loops.pop()
            after = [carried, *loop.continued]
            joined = self.join_all([values for values in after if len(values) == len(carried)])
            if all(map(same, joined, carried)) and self.version == before:
                break
            carried = joined
        self._finish(op, runs, initial, carried, loop)

    def _finish(
        self, op: ops.For | ops.While, runs: bool, initial: tuple[Any, ...], carried: tuple[Any, ...], loop: Loop
    ) -> None:
        ends = [values for values in (*loop.continued, *loop.broken) if len(values) == len(carried)]
        if isinstance(op, ops.While) or not runs or not ends:
            ends.insert(0, carried)
        joined = self.join_all(ends)
        if op.orelse is not None:
            with self.maybe():
                self._bind(op.orelse.parameters, joined)
                _, values = self._region(op.orelse)
            given = [values, *(each for each in loop.broken if len(each) == len(op.results))]
            joined = self.join_all([each for each in given if len(each) == len(op.results)] or [()])
        self.define_all(op.results, joined)
        if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
            self.left = True

    def _bind(self, parameters: tuple[Value, ...], values: tuple[Any, ...]) -> None:
        for number, parameter in enumerate(parameters):
            self.define(parameter, values[number] if number < len(values) else UNKNOWN)

    def _lose_changed(self, op: Op) -> None:
        """Before a part of the program of which it is not known whether, or how often, it runs: containers that it may
        change are not followed any further."""
        inner = [each for region in regions(op) for each in walk(region)]
        changing = [each for each in inner if self._changes_containers(each)]
        made = {value.name: each for each in inner for value in defined(each)}
        own = {name for region in regions(op) for name in _parameters(region)} | made.keys()
        for each in changing:
            target = self._changed(each, made)
            if target is None or target in own:
                # It may be any that is reached from what the part uses.
                names = {value.name for each in (op, *inner) for value in used(each)}
                self.lose_containers(*(self.values[name] for name in names if name in self.values))
                self.lose_containers(*self.cells.values())
                return
            self.forget([self.values.get(target)])

    @staticmethod
    def _changed(op: Op, made: Mapping[str, Op]) -> str | None:
        """The name of the container that an op changes; `None` where it may be any."""
        match op:
            case ops.SetItem(object=Value(name=name)) | ops.Operator(operands=(Value(name=name), *_)):
                return name
            case ops.Call(function=Value(name=function), target=str() as target) if target.startswith("method."):
                method = made.get(function)
                if isinstance(method, ops.Attribute) and isinstance(method.object, Value):
                    receiver = made.get(method.object.name)
                    if isinstance(receiver, ops.Build) and not receiver.elements:
                        return ""  # it is made here
                    return method.object.name
        return None

    def _changes_containers(self, op: Op) -> bool:
        match op:
            case ops.SetItem() | ops.Delete() | ops.SetAttribute():
                return True
            case ops.Operator(in_place=in_place):
                return in_place
            case ops.Call():
                known = self.known(op)
                return known is None or known.behaviour is Behaviour.CONTAINER
        return False

    def _closure(self, op: ops.Closure) -> None:
        """A closure may run at any time from here on, and change what it sees."""
        inner = list(walk(op.body))
        own = {value.name for each in inner for value in defined(each)}
        seen = {value.name for each in inner for value in used(each)} - own
        for name in seen & self.cells.keys():
            self.store(name, UNKNOWN, always=True)
        if any(map(self._changes_containers, inner)) or any(map(self.reshapes, inner)):
            self.lose(*(self.values[name] for name in seen if name in self.values))
        else:
            self.harmless.add(op.result.name)
        self.define(op.result, UNKNOWN)
        for each in inner:
            for value in defined(each):
                self.shapes[value.name] = None
