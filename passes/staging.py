"""Stages: what depends on a value that only a run can give is specialised when the run has given it.

    layer = choose()                                      layer = choose()
    with model.trace(prompt):                 ──▶         stage(model, prompt, layer)
        h = model.layers[layer].output                    # compiled when it is called, once for each layer

The op that needs to know such a value, and all that follows it in its region, becomes the program of a stage. It is
specialised with the values that it takes known, as an experiment is with its arguments, and guarded on those that it
needs. So everything with an effect runs once, at run time, in the order of the source. No stage begins inside a
forward: its model could not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NoReturn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.traverse import defined, used, walk
from nnsight_compiler.ir.values import UNBOUND, Unbound, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.completion import AccessInClosure
from nnsight_compiler.passes.control_flow import emits
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements, Method, SiteModule
from nnsight_compiler.passes.known_calls import known_method
from nnsight_compiler.passes.outline import outline
from nnsight_compiler.passes.steps import StepLoops
from nnsight_compiler.passes.transparent_calls import FOLDED

FOLDED_TARGETS = frozenset(f"{function.__module__}.{function.__name__}" for function in FOLDED)
SITES = ("output", "input", "inputs", "calls", "skip", "stop")


class Staging(StepLoops):
    """Decides where stages begin, and cuts regions off there."""

    def unknown(self, value: Abstract, span: Span, what: str) -> NoReturn:
        loops = value.loops
        if isinstance(value.fact, Elements):
            loops |= value.fact.loops
        if loops - self.decisions.unroll - self.decisions.roll and not value.at_run:
            raise Undecided(unroll=set(loops))
        if self.closures:
            raise AccessInClosure
        statement = next((op for op in reversed(self.positions) if id(op) not in self.decisions.whole), None)
        if statement is None or id(statement) in self.decisions.stages or self.one_stage:
            self.not_known(value, span, what)
        if self.forward is not None and (self.made_inside(value) or self._only_repeats(statement)):
            ahead = self.moved_ahead(self.forward.op, self.forward.index)
            if ahead is None:
                self.not_known(value, span, what)
            raise Undecided(ahead={id(statement): ahead})
        raise Undecided(stages={id(statement): what})

    def not_known(self, value: Abstract, span: Span, what: str) -> NoReturn:
        """The error of a value that no stage can know."""
        related = ((value.span, "it is made here"),) if value.span.line else ()
        self.fail(
            span,
            f"{what} must be known before the model runs, but only a run can give it",
            "compute it before the `with`: in a forward of its own, where it depends on values of the model",
            related,
        )

    def made_inside(self, value: Abstract) -> bool:
        plain = (ops.Operator, ops.Item, ops.Attribute, ops.Global, ops.Build)
        return self._depends(
            value, lambda op: not isinstance(op, plain) and getattr(op, "target", None) not in FOLDED_TARGETS
        )

    def of_this_forward(self, value: Abstract) -> bool:
        """Whether a value depends on one of the model's in the forward around."""
        if isinstance(value.fact, SiteModule):
            return False
        if value.operand is None and isinstance(value.fact, Method):
            return self.of_this_forward(value.fact.receiver)
        return self._depends(value, lambda op: isinstance(op, ops.Read))

    def _depends(self, value: Abstract, on: Callable[[Op], bool]) -> bool:
        """Whether a value depends on such an op of the body of the forward around."""
        assert self.forward is not None
        if value.operand is None:
            return True
        made: dict[str, Op] = {}
        for op in self.builder.open_ops(self.forward.depth):
            made.update((result.name, op) for result in defined(op))
        waiting = [each.name for each in values_in(value.operand)]
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in made:
                continue
            seen.add(name)
            if on(made[name]):
                return True
            waiting += [each.name for each in used(made[name])]
        return False

    def moved_ahead(self, forward: ops.Forward, index: int) -> tuple[Op, ...] | None:
        """The code of a forward's body before the op at `index` in which the model has no part, and the forward without
        it; `None` where there is none. Such code runs before the model in any case, and effects keep their order.
        """
        ahead: list[Op] = []
        of_model: set[str] = {forward.result.name}
        waiting = False
        for op in forward.body.ops[:index]:
            inside = list(walk(Region((), (op,))))
            touches = any(_touches(each, of_model) for each in inside) or any(
                self.of_this_forward(self.scope[value]) for value in defined(op)
            )
            acts = any(_acts(each, forward) for each in inside)
            if touches or (acts and waiting):
                waiting |= acts
                of_model.update(value.name for value in defined(op))
            else:
                ahead.append(op)
        ahead = list(_without_idle_modules(ahead, self.scope))
        if not ahead:
            return None
        chosen = {id(op) for op in ahead}
        rest = tuple(op for op in forward.body.ops if id(op) not in chosen)
        return *ahead, replace(forward, body=Region((), rest))

    def staged(self, region: Region, index: int) -> Region:
        op = region.ops[index]
        needs = self.decisions.stages[id(op)]
        if self._only_repeats(op):
            self.not_known(Abstract(None), self.span(op), needs)
        cut = self.decisions.outlines.get(id(op))
        if cut is None:
            cut = outline(region, index, self.function, self.frame.name, self.program.span)
            self.decisions.outlines[id(op)] = cut
        if emits(cut.program.body):
            raise Undecided(whole={id(op)})
        held = [self.scope[value] for value in cut.free]
        for value in held:
            if not self._can_cross(value):
                raise Undecided(whole={id(op)})
        span = self.span(op)
        stage, result = self.builder.fresh("stage"), self.builder.fresh()
        bound = [number for number, value in enumerate(held) if not isinstance(value.operand, Unbound)]
        self.emit(ops.Stage(stage, _taking(cut.program, bound), needs, span=span))
        arguments = tuple(ops.Argument(self.handed_over(held[number])) for number in bound)
        self.emit(ops.Call(result, stage, arguments, span=span))
        self.stages[stage.name] = self.frame
        self.disturb()
        for value in held:
            if isinstance(value.fact, Elements):
                value.fact.forget()
        loops = NO_LOOPS.union(*(value.loops for value in held))
        self.scope[cut.result] = Abstract(result, None, loops, 0, span, at_run=True)
        return Region((), cut.rest)

    def _only_repeats(self, op: Op) -> bool:
        """Whether a stage that begins at an op would do nothing but begin another: what it needs, it does not find."""
        first = next((each for each in self.program.body.ops if not isinstance(each, ops.Closure)), None)
        return self.program.kind == "stage" and op is first

    def _can_cross(self, value: Abstract) -> bool:
        """Whether a value can be handed to a stage."""
        self.evaluate.resolved(value)
        if isinstance(value.fact, Elements) and value.fact.items is not None:
            return all(map(self._can_cross, value.fact.items))
        return value.operand is not None or value.make is not None


def _taking(program: Program, numbers: list[int]) -> Program:
    """The program with these of its parameters; the others have no value."""
    kept = tuple(program.parameters[number] for number in numbers)
    if len(kept) == len(program.parameters):
        return program
    without: dict[Value, Unbound] = {
        parameter.value: UNBOUND for parameter in program.parameters if parameter not in kept
    }
    return replace(program, parameters=kept, body=substitute(program.body, dict(without)))


def _without_idle_modules(ahead: list[Op], scope: Mapping[Value, Abstract]) -> Iterator[Op]:
    """The ops without those that name a module which no other of them uses: the rest of the body can name it."""
    needed: set[Value] = set()
    kept = []
    for op in reversed(ahead):
        if needed.isdisjoint(defined(op)) and any(isinstance(scope[each].fact, SiteModule) for each in defined(op)):
            continue
        kept.append(op)
        needed.update(value for inner in walk(Region((), (op,))) for value in used(inner))
    return reversed(kept)


def _touches(op: Op, of_model: set[str]) -> bool:
    """Whether an op reads or writes the model, or uses what such an op made."""
    if isinstance(op, (ops.Read, ops.Write, ops.Skip, ops.Save, ops.Stop, *ops.TERMINATORS)):
        return True
    if isinstance(op, (ops.Attribute, ops.SetAttribute)) and op.name in SITES:
        return True
    return any(value.name in of_model for value in used(op))


def _acts(op: Op, forward: ops.Forward) -> bool:
    """Whether an op has, or may have, an effect besides its result."""
    match op:
        case ops.Call(function=function):
            made = (each for each in walk(forward.body) if function in defined(each))
            method = next((each.name for each in made if isinstance(each, ops.Attribute)), "")
            known = known_method(method)
            plain = known is not None and known.behaviour in (Behaviour.PURE, Behaviour.VIEW) and not known.random
            return not plain
        case ops.Attribute() | ops.Item() | ops.Global() | ops.Operator(in_place=False) | ops.Build() | ops.Load():
            return False
        case ops.Read() | ops.Closure() | ops.Format() | ops.Unpack() | ops.Bound():
            return False
    return True
