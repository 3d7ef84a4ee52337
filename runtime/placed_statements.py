"""Where values live in the functions of a placed program, and how strands wait: what all of its statements rest on.

A value that is made in one function and used in another lives in `state`, which is made anew for each call; every other
value is a local variable.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from nnsight_compiler.ir.ops import (
    AnyOp,
    At,
    Backward,
    Call,
    For,
    Global,
    Gradients,
    Item,
    Op,
    Operator,
    Postponed,
    Read,
    Region,
    Stage,
    Strand,
)
from nnsight_compiler.ir.ops import Forward as ForwardOp
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, walk
from nnsight_compiler.ir.values import Module, Tuple, Value
from nnsight_compiler.passes.known_calls import FUSED_CALL, MODULE_CALL
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.pauses import pauses, pausing
from nnsight_compiler.passes.rows import Batch
from nnsight_compiler.passes.sink import waits_within
from nnsight_compiler.runtime import calls, gradients, observed_calls
from nnsight_compiler.runtime import sites as support
from nnsight_compiler.runtime.blocks import Exits
from nnsight_compiler.runtime.budget import Measured
from nnsight_compiler.runtime.expressions import Scope
from nnsight_compiler.runtime.failures import Failure
from nnsight_compiler.runtime.forwards import Forward
from nnsight_compiler.runtime.inputs import Given
from nnsight_compiler.runtime.invokes import Confirm
from nnsight_compiler.runtime.names import Names
from nnsight_compiler.runtime.observation import Observation
from nnsight_compiler.runtime.placed import (
    crossing,
    placed,
)
from nnsight_compiler.runtime.prompts import repeats_prompts
from nnsight_compiler.runtime.requests import served
from nnsight_compiler.runtime.runs import SiteName
from nnsight_compiler.runtime.scanning import resolve
from nnsight_compiler.runtime.shares import SiteAxes, SitesAxes
from nnsight_compiler.runtime.statements import Statements
from nnsight_compiler.runtime.together import Together
from nnsight_compiler.runtime.trees import function, load, locate, plain_arguments

Stages = Callable[[Stage], Callable[..., Any]]
"""Gives the function that specialises the program of a stage to its arguments, and runs it."""


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """What stands at the sites of forwards whose invokes see their own rows.

    known: what stands at a site; `None` where that becomes known only with the inputs of the forward.
    found: what stands at the sites of a model's forward on these inputs.
    concatenated: the arguments of one forward for those of several, one after the other along their rows.
    measured: the shapes and the cost of a model's forward on inputs of one kind.
    confirm: says why invokes cannot share the sites of a forward.
    """

    known: Callable[[ForwardOp, At], SiteAxes | None]
    found: Callable[[Any, Given], SitesAxes]
    concatenated: Callable[[Any, Sequence[Given], Mapping[str, Any]], Batch]
    measured: Callable[[Any, Given], Measured]
    confirm: Confirm


class PlacedStatements(Statements):
    """The statements of a placed program, without those of its models' ops.

    value, state, step: the value at a site, what the functions of a call have in common, the step of a generation.
    crossing: the values that live in the state. direct: those that stand for the value at their site.
    strands: how many strands the code is in. in_site, divided: whether it is a site's, and one that invokes share.
    """

    def __init__(
        self, program: Program, stages: Stages, axes: Axes, seen: Mapping[str, Observation], together: Together
    ) -> None:
        super().__init__(program, Names(program))
        self.stages, self.axes, self.seen, self.together = stages, axes, seen, together
        self.value = self.names.temporary("value")
        self.state = self.names.temporary("state")
        self.step = self.names.temporary("step")
        self.prompts = self.names.temporary("prompts") if repeats_prompts(program) else None
        self.crossing = crossing(program)
        self.pausing = pausing(program)
        if self.pausing:  # a debugger shows them at other sites too
            sites = (at for op in walk(program.body) if isinstance(op, ForwardOp) for at in placed(op))
            self.crossing |= {value.name: value for at in sites for op in at.body.ops for value in defined(op)}
            self.uses.update(self.crossing.keys())
        self.reads: dict[str, Read] = {}
        self.divided = False
        self.later: set[int] = set()
        self.shared: dict[int, list[SiteName]] = {}
        self.direct: set[str] = set()
        self.recorded: set[str] = set()
        self.in_site = False
        self.strands = 0
        self.differentiates = any(isinstance(op, (Backward, Gradients)) for op in walk(program.body))
        self.shares: dict[str, str] = {}
        self.has_state = False
        self.forwards: dict[int, Forward] = {}
        self.backwards: dict[int, gradients.Backward] = {}

    def _slots(self, values: Iterable[Value]) -> tuple[str, ...]:
        """Where in the state these values go, as far as they do."""
        return tuple(self.names[value] for value in values if value.name in self.crossing)

    def reference(self, value: Value, span: Span) -> ast.expr:
        if value.name in self.crossing:
            return ast.Attribute(value=load(self.names[self.state]), attr=self.names[value], ctx=ast.Load())
        return super().reference(value, span)

    def target(self, value: Value) -> ast.expr:
        if value.name in self.crossing:
            return ast.Attribute(value=load(self.names[self.state]), attr=self.names[value], ctx=ast.Store())
        return super().target(value)

    def module(self, operand: Module, span: Span) -> ast.expr:
        found = self.constant("module_of", resolve)
        return ast.Call(func=found, args=[self.operand(operand.model, span), ast.Constant(operand.path)], keywords=[])

    def stage(self, op: Stage) -> ast.expr:
        return self.constant("stage", self.stages(op))

    def loop_over(self, op: For) -> list[ast.stmt]:
        """A `for`; of one whose rounds run together, each is a generator that yields where a forward must run."""
        if not op.together:
            return super().loop_over(op)
        carried, given = op.body.parameters[1:], self.names.temporary("round")
        name = self.names.fresh("strand")
        self.titles[name] = self.program.name
        parameters = [self.names[given], self.names[self.state]]
        iterable = self.operand(op.iterable, op.span)
        before = self.assign(carried, op.initial, op.span)
        self.scopes.append(Scope(frozenset(parameters), frozenset(), {}, {}))
        self.strands += 1
        body: list[ast.stmt] = [self.rounds(op, carried, load(self.names[given]))]
        self.strands -= 1
        self.scopes.pop()
        kept = [place.id for place in map(self.target, carried) if isinstance(place, ast.Name)]
        if kept:
            body.insert(0, ast.Nonlocal(names=list(dict.fromkeys(kept))))
        state = load(self.names[self.state]) if self.has_state else ast.Constant(None)
        method = "side_by_side" if self.strands else "run"
        runner = ast.Attribute(value=self.constant("together", self.together), attr=method, ctx=ast.Load())
        memory = Memory.of(self.program, copies=True)
        brought = ast.Constant(any(map(memory.outlives, memory.roots(op.iterable))))
        run: ast.expr = ast.Call(func=runner, args=[load(name), iterable, state, brought], keywords=[])
        if self.strands:
            run = ast.YieldFrom(value=run)
        strand = function(name, plain_arguments(parameters), body)
        return [*before, strand, ast.Expr(value=run), *self.after(op.orelse, op, carried)]

    def within(self, region: Region, exits: Exits) -> list[ast.stmt]:
        places = [number for number, op in enumerate(region.ops) if isinstance(op, Postponed)]
        if not places:
            return super().within(region, exits)
        start, end = places[0], places[-1] + 1
        early, late, rest = region.ops[:start], region.ops[start:end], region.ops[end:]
        where, name = late[0].span, self.names.fresh("failure")
        marks = [op.reached for op in late if isinstance(op, Postponed) and isinstance(op.reached, Value)]
        before = [self._mark(each) for each in marks if each.name not in self.crossing]
        held = ast.Call(func=self.constant("failure", Failure), args=[], keywords=[])
        guarded = super().within(Region((), early), replace(exits, falls=False))
        made: list[ast.stmt] = [*before, ast.Assign(targets=[ast.Name(name, ast.Store())], value=held)]
        made.append(ast.With(items=[ast.withitem(context_expr=load(name))], body=guarded))
        turn = ast.Attribute(value=load(name), attr="turn", ctx=ast.Load())
        made.append(ast.Expr(value=ast.YieldFrom(value=ast.Call(func=turn, args=[], keywords=[]))))
        for op in late:
            assert isinstance(op, Postponed), "what is postponed stands together"
            made.append(_raised(name, self._reached(op)))
            made += super().within(op.body, Exits())
        made.append(_raised(name, ast.Constant(False)))
        return [*(locate(each, where) for each in made), *super().within(Region((), rest), exits)]

    def _mark(self, value: Value) -> ast.stmt:
        """Says that a round has not come to where this value is made."""
        return ast.Assign(targets=[self.target(value)], value=ast.Constant(False))

    def _reached(self, op: Postponed) -> ast.expr:
        """Whether a round came to where what is postponed stood."""
        if not isinstance(op.reached, Value) or op.reached.name not in self.crossing:
            return self.operand(op.reached, op.span)
        held = [load(self.names[self.state]), ast.Constant(self.names[op.reached]), ast.Constant(False)]
        return ast.Call(func=self.constant("getattr", getattr), args=held, keywords=[])

    def _strands(self, region: Region) -> list[ast.stmt]:
        """Strands, each a generator. What one makes for others lives in the state, which they have in common."""
        made: list[ast.stmt] = []
        names: list[ast.expr] = []
        for op in region.ops:
            assert isinstance(op, Strand)
            name = self.names.fresh("strand")
            self.titles[name] = self.program.name
            self.scopes.append(Scope(frozenset(), frozenset(), {}, {}))
            self.strands += 1
            waits = [ast.Expr(value=ast.Yield(value=ast.Tuple(elts=[], ctx=ast.Load()))) for _ in range(op.after)]
            body = [*waits, *self.within(op.body, Exits())]
            self.strands -= 1
            self.scopes.pop()
            if not op.after and not any(map(waits_within, op.body.ops)):  # it is a generator nevertheless
                body += [ast.Return(value=None), ast.Expr(value=ast.Yield(value=None))]
            made.append(locate(function(name, plain_arguments([]), body), op.span))
            names.append(load(name))
        state = load(self.names[self.state]) if self.has_state else ast.Constant(None)
        runner = ast.Attribute(value=self.constant("together", self.together), attr="run_strands", ctx=ast.Load())
        run = ast.Call(func=runner, args=[ast.Tuple(elts=names, ctx=ast.Load()), state], keywords=[])
        return [*made, ast.Expr(value=run)]

    def lower(self, op: AnyOp) -> ast.expr | list[ast.stmt]:
        if isinstance(op, Call) and op.target == FUSED_CALL and isinstance(op.function, Module):
            (argument,) = op.arguments
            given = [self.operand(op.function, op.span), self.operand(argument.value, op.span)]
            given.append(ast.Constant(self.differentiates))
            return self._awaited(op.result, "call", calls.CallRequest, given)
        if isinstance(op, Call) and op.target == MODULE_CALL and any(each.keyword == "hook" for each in op.arguments):
            self.recorded.add(op.result.name)
            made = super().lower(op)
            assert isinstance(made, ast.Call)
            made.args.insert(0, made.func)
            made.func = self.constant("observed", observed_calls.observed)
            return made
        if isinstance(op, Item) and isinstance(op.object, Value) and op.object.name in self.recorded:
            return self._inside(op)
        if pauses(op, self.pausing):
            made = super().lower(op)
            return [*self._named(op), *(made if isinstance(made, list) else [ast.Expr(value=made)])]
        return super().lower(op)

    def _inside(self, op: Item) -> ast.expr:
        """A part of what an observed call gave: what it returned, or what stood inside."""
        held = self.operand(op.object, op.span)
        if not isinstance(op.index, Tuple):
            return ast.Subscript(value=held, slice=ast.Constant(0), ctx=ast.Load())
        record = ast.Subscript(value=held, slice=ast.Constant(1), ctx=ast.Load())
        key = [self.operand(part, op.span) for part in op.index.parts[1:]]
        return ast.Call(func=self.constant("inside", observed_calls.inside), args=[record, *key], keywords=[])

    def _augmented(self, op: Operator) -> list[ast.stmt]:
        made = super()._augmented(op)
        change = made[-1]
        if self.in_site and isinstance(change, ast.AugAssign) and not isinstance(change.value, ast.Constant):
            numbers = self.constant("numbers", support.numbers)
            change.value = ast.Call(func=numbers, args=[change.value], keywords=[])
        return made

    def _named(self, op: Op) -> Iterator[ast.stmt]:
        """The values made so far, under the names that the source gives them, for a debugger."""
        for other in self.program.walk():
            if other is op:
                return
            for value in defined(other):
                name = value.name.partition(".")[0]
                if name.isidentifier() and value.name in self.crossing and not isinstance(other, Global):
                    held = [load(self.names[self.state]), ast.Constant(self.names[value]), ast.Constant(None)]
                    got = ast.Call(func=self.constant("getattr", getattr), args=held, keywords=[])
                    yield ast.Assign(targets=[ast.Name(name, ast.Store())], value=got)

    def _awaited(self, result: Value, hint: str, request: type, given: list[ast.expr]) -> list[ast.stmt]:
        """Has a strand wait for what a request finds, together with those of others."""
        made = ast.Call(func=self.constant(hint, request), args=given, keywords=[])
        return [ast.Assign(targets=[self.target(result)], value=ast.Attribute(self._served(made), "found", ast.Load()))]

    def _served(self, request: ast.expr) -> ast.expr:
        """Has a strand wait for a request."""
        return ast.YieldFrom(value=ast.Call(func=self.constant("served", served), args=[request], keywords=[]))

    def _value(self, context: ast.expr_context | None = None) -> ast.Name:
        """The value at the site, in a site function."""
        return ast.Name(self.names[self.value], context or ast.Load())


def _raised(failure: str, reached: ast.expr) -> ast.stmt:
    """Raises what a round failed with, unless it had come to what follows."""
    unless = ast.Attribute(value=load(failure), attr="unless", ctx=ast.Load())
    return ast.Expr(value=ast.Call(func=unless, args=[reached], keywords=[]))
