"""On which side each op of a program runs: the worker has the model, the client has the user's objects and functions.

    with model.trace(prompt):                        worker
        h = model.layers[3].output
    probability = h[0, -1].softmax(-1)               either
    score = my_metric(probability)                   client: no code of this function is in the job
    scores.append(score)                             client: what a client's function gives may be anything

Whether a call is in the closed set is what `files.admission` says of it, as on the worker. What it cannot say, since it
knows no values, is told here by what each value is: data, a name, a module of the model, or something that the client
alone has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any

from nnsight_compiler.files.admission import look
from nnsight_compiler.files.kinds import is_known_method
from nnsight_compiler.files.vocabulary import KnownName
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used
from nnsight_compiler.ir.values import Operand, Unbound, Value
from nnsight_compiler.remote.callees import Callees
from nnsight_compiler.remote.kinds import (
    DATA,
    LOCAL,
    MODULES,
    OF_MODEL,
    Belonging,
    Called,
    Closed,
    Helper,
    Kind,
    Local,
    Side,
    together,
)
from nnsight_compiler.remote.listeners import KEYWORD


@dataclass(frozen=True, slots=True)
class Sides:
    """What was found of one program.

    of: the side of each op, by its `id`. reasons: why an op is the client's, where the op itself is the reason.
    kinds: what each value is. made: the op that makes it. names: what the names of the program stand for.
    """

    program: Program
    of: Mapping[int, Side]
    reasons: Mapping[int, str]
    kinds: Mapping[str, Kind]
    made: Mapping[str, Op]
    names: Mapping[tuple[str, str], Kind]
    model: Any
    finder: _Finder

    @property
    def whole(self) -> bool:
        """Whether nothing needs the client."""
        return Side.CLIENT not in self.of.values()

    def side(self, op: Op) -> Side:
        return self.of.get(id(op), Side.EITHER)

    def kind(self, operand: Operand) -> Kind:
        return self.kinds.get(operand.name, DATA) if isinstance(operand, Value) else DATA

    def needs_model(self, helper: Helper) -> bool:
        """Whether a function of the user's has parts that run where the model is."""
        return self.finder.helper(helper.held)[0] in (Side.WORKER, Side.BOTH)

    def called(self, helper: Helper) -> Called:
        """A function of the user's, with what the program gives it wherever it calls it."""
        calls = [
            op.arguments for op in self.program.walk() if isinstance(op, ops.Call) and self.kind(op.function) == helper
        ]
        return Called(helper.held, tuple(self.finder.given_to(helper.held, calls).items()))

    def target(self, op: ops.Call) -> str | None:
        """The known call that a call is."""
        kind = self.kind(op.function)
        if isinstance(kind, KnownName):
            return kind.target
        maker = self.made.get(op.function.name) if isinstance(op.function, Value) else None
        if isinstance(maker, ops.Attribute) and is_known_method(maker.name):
            return f"method.{maker.name}"
        return None


def find_sides(
    program: Program,
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
    given: Mapping[str, Kind],
) -> Sides:
    """Finds the side of every op.

    given: what each parameter is, by its name.
    """
    found = _Finder(program, globals_, closure, given)
    found.run()
    return Sides(program, found.sides, found.reasons, found.kinds, found.made, found.names, found.model(), found)


@dataclass(slots=True)
class _Finder(Callees):
    def run(self) -> None:
        self.names = {}
        assigned = {(op.name, op.scope) for op in self.program.walk() if isinstance(op, ops.SetGlobal)}
        for op in self.program.walk():
            self.made.update((value.name, op) for value in defined(op))
            if isinstance(op, ops.Closure):
                self.closures[op.result.name] = op
            elif isinstance(op, ops.Global) and (op.name, op.scope) not in self.names:
                key = op.name, op.scope
                self.names[key] = LOCAL if key in assigned else self.named(*key)
        self.escaping = self.escaping_closures()
        self.waiting = set(self.closures)
        found = look(self.program, self.environment, True, frozenset())
        self.refused = {id(op): host.name for op, host in zip(found.host_ops, found.hosts, strict=True)}
        for parameter in self.program.parameters:
            self.put(parameter.value, self.given.get(parameter.value.name, LOCAL))
        while self.changed:  # kinds only ever grow
            self.changed = False
            self.region(self.program.body, False, _Ways())
            if not self.changed and self.waiting:  # nothing calls them
                self.waiting.clear()
                self.changed = True

    def is_known(self, parameter: Parameter) -> bool:
        return parameter.optional or parameter.kind.startswith("var_") or parameter.value.name in self.kinds

    def enter(self, closure: ops.Closure, live: bool) -> None:
        self.waiting.discard(closure.result.name)
        self.region(closure.body, live, _Ways())

    def escaping_closures(self) -> set[str]:
        """The closures that are not only called, by their own names or from the variables that hold them."""
        held = {name: {name} for name in self.closures}
        for op in self.program.walk():
            match op:
                case (
                    ops.Cell(result=cell, initial=Value(name=name))
                    | ops.Store(cell=Value() as cell, value=Value(name=name))
                ):
                    held.setdefault(cell.name, set()).update(held.get(name, ()))
        for op in self.program.walk():
            match op:
                case ops.Load(result=result, cell=Value(name=name)):
                    held.setdefault(result.name, set()).update(held.get(name, ()))
        escaping: set[str] = set()
        for op in self.program.walk():
            called = [op.function] if isinstance(op, ops.Call) else []
            if isinstance(op, ops.Forward):  # it is called where the model is, with tokens
                called += [argument.value for argument in op.arguments if argument.keyword == KEYWORD]
            if not isinstance(op, (ops.Cell, ops.Store, ops.Load)):
                escaping.update(*(held[value.name] for value in used(op) if value not in called and value.name in held))
        return escaping

    def region(self, region: Region, live: bool, ways: _Ways) -> None:
        for op in region.ops:
            self.op(op, live, ways)

    def op(self, op: Op, live: bool, ways: _Ways) -> None:
        """`live`: whether it stands inside a forward."""
        if id(op) in self.refused and not isinstance(op, (ops.Attribute, ops.Call)) and not any(regions(op)):
            self.clients(op, self.refused[id(op)])  # at once: what is set twice never comes to rest
            return
        match op:
            case ops.Yield(values=values):
                self.join(ways.results, values)
            case ops.Break(values=values):
                self.join(ways.broken, values)
            case ops.Continue(values=values):
                self.join(ways.carried, values)
            case ops.Return() | ops.Raise() | ops.Emit():
                pass
            case ops.If(results=results):
                for region in (op.then, op.orelse):
                    self.region(region, live, ways.within(results))
                self.around(op, live)
            case ops.For() | ops.While():
                self.loop(op, live, ways)
            case ops.Try():
                for region in regions(op):
                    for value in region.parameters:
                        self.put(value, DATA)
                    self.region(region, live, ways)
                self.around(op, live)
            case ops.With(result=result, context=context, body=body):
                self.put(result, self.kind(context))
                self.region(body, live, ways)
                self.around(op, live)
            case ops.Session(result=result, body=body):
                self.put(result, MODULES)
                self.region(body, live, ways)
                inside = self.content(body)
                self.set(op, Side.BOTH if inside in (Side.CLIENT, Side.BOTH) else Side.WORKER)
            case ops.Forward(result=result, body=body) | ops.Invoke(result=result, body=body):
                self.put(result, MODULES)
                self.region(body, True, ways)
                self.set(op, Side.WORKER)
            case ops.Steps(body=body) | ops.Backward(body=body):
                for value in body.parameters:
                    self.put(value, DATA)
                self.region(body, True, ways)
                self.set(op, Side.WORKER)
            case ops.Edit(results=(tracer, edited), model=model, body=body):
                self.put(tracer, MODULES)
                self.put(edited, self.kind(model))
                self.region(body, True, ways)
            case ops.Closure(parameters=parameters, body=body):
                self.put(op.result, Closed(op.result.name))
                if op.result.name in self.escaping:  # anyone may call it
                    for parameter in parameters:
                        self.put(parameter.value, LOCAL)
                if op.result.name not in self.waiting or all(map(self.is_known, parameters)):
                    self.enter(op, live)
            case ops.Call():
                self.call(op, live)
            case ops.Attribute():
                self.attribute(op, live)
            case _:
                self.plain(op, live)
        if id(op) in self.refused and any(regions(op)):
            self.clients(op, self.refused[id(op)])

    def join(self, values: Iterable[Value], given: Iterable[Operand]) -> None:
        for value, operand in zip(values, given, strict=False):
            if not isinstance(operand, Unbound):
                self.put(value, self.kind(operand))

    def around(self, op: Op, live: bool) -> None:
        """The side of an op with regions: that of what is in it, and of what it goes by."""
        inside = [self.content(region) for region in regions(op)]
        if not live and any(isinstance(self.kind(value), Local) for value in used(op)):
            inside.append(Side.CLIENT)
        self.set(op, together(inside))

    def loop(self, op: ops.For | ops.While, live: bool, ways: _Ways) -> None:
        carried = op.body.parameters
        if isinstance(op, ops.For):
            self.put(carried[0], self.element(self.kind(op.iterable)))
            carried = carried[1:]
            self.join(carried, op.initial)
            if op.orelse is None:
                self.join(op.results, carried)
        else:
            self.join(op.condition.parameters, op.initial)
            self.region(op.condition, live, _Ways())
            last = op.condition.ops[-1]
            assert isinstance(last, ops.Yield)
            self.join(carried, last.values[1:])
            again = op.condition.parameters
            if op.orelse is None:
                self.join(op.results, last.values[1:])
            self.region(op.body, live, _Ways((), op.results, again))
        if isinstance(op, ops.For):
            self.region(op.body, live, _Ways((), op.results, carried))
        if op.orelse is not None:
            self.join(op.orelse.parameters, carried)
            self.region(op.orelse, live, ways.within(op.results))
        self.around(op, live)
        if isinstance(op, ops.While) and not live:
            last = op.condition.ops[-1]
            assert isinstance(last, ops.Yield)
            if isinstance(self.kind(last.values[0]), Local):
                self.set(op, together((self.sides[id(op)], Side.CLIENT)))

    def plain(self, op: Op, live: bool) -> None:
        """An op that computes, or changes something, without a call."""
        match op:
            case ops.Global():
                kind = self.names[op.name, op.scope]
                self.put(op.result, kind)
                self.set(op, Side.CLIENT if isinstance(kind, Local) else Side.EITHER)
                return
            case ops.SetGlobal():
                self.clients(op, f"the assignment to the global `{op.name}`")
                return
            case ops.Import():
                self.imported(op)
                return
            case ops.Item(result=result, object=owner, index=index) if isinstance(self.kind(owner), OF_MODEL):
                self.put(result, self.item_of(self.kind(owner), index))
                self.set(op, Side.EITHER)
                return
            case ops.Cell(result=cell, initial=content) | ops.Store(cell=Value() as cell, value=content):
                self.join([cell], [content])  # a cell is what is in it
                return
            case ops.Load(result=result, cell=Value() as cell):
                if cell.name in self.kinds:
                    self.put(result, self.kinds[cell.name])
                return
            case ops.Bound(result=result, value=value):
                self.put(result, self.kind(value))
                return
            case ops.Read(result=result) | ops.Grad(result=result):
                self.put(result, DATA)
                self.set(op, Side.WORKER)
                return
        kinds = [self.kind(value) for value in used(op)]
        held = self.holding(kinds)
        if isinstance(held, Local) and not live:
            self.clients(op)
            return
        side = Side.EITHER
        if isinstance(op, (ops.Gradients, ops.Write, ops.Skip)):
            side = Side.WORKER
        elif isinstance(held, Belonging) and not live:
            side = Side.NEAR
        for value in defined(op):
            self.put(value, DATA if isinstance(op, ops.Format) or isinstance(held, Local) else held)
        self.set(op, side)


@dataclass(frozen=True, slots=True)
class _Ways:
    """Where values go that a terminator hands over."""

    results: tuple[Value, ...] = ()
    broken: tuple[Value, ...] = ()
    carried: tuple[Value, ...] = ()

    def within(self, results: tuple[Value, ...]) -> _Ways:
        return _Ways(results, self.broken, self.carried)


__all__ = ["Side", "Sides", "find_sides"]
