"""From a placed program to functions: one for the experiment itself, and one for each site that it touches.

A value that is made in one of these functions and used in another lives in `state`, which is made anew for each call;
every other value is a local variable. The functions bear the user's file name and lines.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, final

from nnsight_compiler.ir.ops import (
    AnyOp,
    Argument,
    At,
    AtGradient,
    Attribute,
    Backward,
    Cache,
    Call,
    Captured,
    FromEnd,
    Global,
    Grad,
    Gradients,
    Invoke,
    Item,
    Op,
    Operator,
    Parameter,
    Read,
    Record,
    Region,
    Require,
    Save,
    Session,
    SetGrad,
    SetItem,
    Skip,
    Stage,
    Steps,
    Stop,
    Track,
    Write,
)
from nnsight_compiler.ir.ops import Forward as ForwardOp
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, definitions, regions, used, walk
from nnsight_compiler.ir.values import Module, Operand, Tuple, Value, values_in
from nnsight_compiler.passes.inline import MODULE_CALL
from nnsight_compiler.passes.moments import first_step, last_step
from nnsight_compiler.passes.origins import Origins
from nnsight_compiler.passes.pauses import pauses, pausing
from nnsight_compiler.runtime import caches, gradients, observed_calls
from nnsight_compiler.runtime import sites as support
from nnsight_compiler.runtime.forwards import Confirm, Forward, Given, SiteName, SitePlan, resolve
from nnsight_compiler.runtime.functions import link
from nnsight_compiler.runtime.generation import Asked, Wanted
from nnsight_compiler.runtime.names import Names
from nnsight_compiler.runtime.observe import Observation
from nnsight_compiler.runtime.rows import Divided, SiteAxes, SitesAxes
from nnsight_compiler.runtime.scanning import scanning
from nnsight_compiler.runtime.skipping import Left, Skipped
from nnsight_compiler.runtime.statements import Statements
from nnsight_compiler.runtime.stopping import Later, Stopped
from nnsight_compiler.runtime.trees import load, locate


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled program: `run` takes the arguments in the order of the program's parameters.

    source: the generated functions, as text.
    forwards: the plan of each forward, in the order of the program.
    """

    program: Program
    run: FunctionType
    source: str
    forwards: tuple[Forward, ...]


Stages = Callable[[Stage], Callable[..., Any]]
"""Gives the function that specialises the program of a stage to its arguments, and runs it."""


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """What stands at the sites of forwards whose invokes see their own rows.

    known: what stands at a site; `None` where that becomes known only with the inputs of the forward.
    found: what stands at the sites of a model's forward on these inputs.
    confirm: says why invokes cannot share the sites of a forward.
    """

    known: Callable[[ForwardOp, At], SiteAxes | None]
    found: Callable[[Any, Given], SitesAxes]
    confirm: Confirm


def plan(
    program: Program,
    globals_: dict[str, Any],
    closure: Mapping[str, CellType] | None,
    stages: Stages,
    axes: Axes,
    seen: Mapping[str, Observation],
) -> Plan:
    """Generates the functions of a placed program. `seen`: how the model of each forward runs, by its result's name."""
    return _Generator(program, stages, axes, seen).plan(globals_, closure)


class _Generator(Statements):
    """Generates the functions of one program: those at its sites first, then the one that runs the forwards."""

    def __init__(self, program: Program, stages: Stages, axes: Axes, seen: Mapping[str, Observation]) -> None:
        super().__init__(program, Names(program))
        self.stages, self.axes, self.seen = stages, axes, seen
        self.value = self.names.temporary("value")
        self.state = self.names.temporary("state")
        self.step = self.names.temporary("step")
        self.crossing = _crossing(program)
        self.pausing = pausing(program)
        if self.pausing:  # a debugger shows them at other sites too
            placed = (at for op in walk(program.body) if isinstance(op, ForwardOp) for at in _placed(op))
            self.crossing |= {value.name: value for at in placed for op in at.body.ops for value in defined(op)}
            self.uses.update(self.crossing.keys())
        self.reads: dict[str, Read] = {}
        self.divided = False
        self.later: set[int] = set()
        self.shared: dict[int, list[SiteName]] = {}
        self.direct: set[str] = set()
        self.recorded: set[str] = set()
        self.in_site = False
        self.forwards: dict[int, Forward] = {}
        self.backwards: dict[int, gradients.Backward] = {}

    def plan(self, globals_: dict[str, Any], closure: Mapping[str, CellType] | None) -> Plan:
        program = self.program
        forwards = [op for op in walk(program.body) if isinstance(op, ForwardOp)]
        origins = Origins(program)
        pieces = [(piece, self._site(None, at)) for at, piece in self._pieces(origins)]
        sites = [(op, at, self._site(op, at)) for op in forwards for at in _placed(op)]
        made = [*(function for _, function in pieces), *(function for _, _, function in sites)]
        functions = link(self, made, globals_, closure, program.span) if made else []
        for (piece, _), function in zip(pieces, functions, strict=False):
            piece.function = function
        functions = functions[len(pieces) :]
        plans: dict[int, list[SitePlan]] = {id(op): [] for op in forwards}
        for (op, at, _), function in zip(sites, functions, strict=True):
            plans[id(op)].append(self._site_plan(op, at, function))
        named = _named_weights(program, origins)
        for op in forwards:
            wanted = next((each.span for each in walk(op.body) if _wants_gradients(each)), None)
            copies = wanted is not None or any(map(origins.writes_tensors, walk(op.body)))
            called = (each.function for each in walk(op.body) if isinstance(each, Call))
            own = frozenset(function.path for function in called if isinstance(function, Module))
            divided = tuple(self.shared.get(id(op), ()))
            generates = op.method == "generate"
            found = plans[id(op)]
            self.forwards[id(op)] = Forward(
                sites=tuple(site for site in found if site.port != "result"),
                stops=not generates and _stops(op),
                copies=copies,
                brings=self._brings(op),
                span=op.span,
                own=own,
                wanted=wanted,
                named=named,
                invokes=self._invokes(op),
                axes=self.axes.found if id(op) in self.later else None,
                divided=divided,
                confirm=self.axes.confirm if divided else None,
                results=tuple(site for site in found if site.port == "result"),
                generation=Asked(self.names[self.step], _wanted(op)) if generates else None,
            )
        driver = self._driver(bool(made) or any(op.method == "generate" for op in forwards))
        (run,) = link(self, [driver], globals_, closure, program.span)
        if any(op.method == "scan" for op in forwards):
            run = scanning(run, program.span)
        source = "\n\n\n".join(map(ast.unparse, (*made, driver)))
        return Plan(program, run, source, tuple(self.forwards.values()))

    def _site_plan(self, op: ForwardOp, at: At, function: FunctionType) -> SitePlan:
        path, call = at.module.path, at.call
        left = Left.of(self.seen[op.result.name], path, call or 0) if at.port == "skip" else None
        later: tuple[Later, ...] = ()
        if any(isinstance(each, Stop) for each in walk(op.body)):
            made = [(value, each.span) for each in walk(at.body) for value in defined(each)]
            later = tuple(
                Later(self.names[value], value.name.partition(".")[0], span)
                for value, span in made
                if value.name in self.crossing
            )
        return SitePlan(path, at.port, call, function, at.span, _counted_from_the_end(at), _ranges(at), left, later)

    def _driver(self, has_state: bool) -> ast.FunctionDef:
        program = self.program
        parameters = [Parameter(parameter.value) for parameter in program.parameters]
        name = self.names.fresh(program.name)
        driver = self.define(name, program.name, parameters, program.body, program.span)
        prologue: list[ast.stmt] = []
        if has_state:
            held = (*self.crossing.values(), self.step)
            slots = tuple(dict.fromkeys(self.names[value] for value in held))
            # Python changes slots' names that begin with two underscores, unless the class is named by them alone.
            state = type("_", (), {"__slots__": slots, "__doc__": "The values of one call that sites share."})
            made = ast.Call(func=self.constant("State", state), args=[], keywords=[])
            prologue.append(ast.Assign(targets=[ast.Name(self.names[self.state], ast.Store())], value=made))
        for parameter in program.parameters:
            if parameter.value.name in self.crossing:
                given = load(self.names[parameter.value])
                prologue.append(ast.Assign(targets=[self.target(parameter.value)], value=given))
        driver.body[:0] = [locate(each, program.span) for each in prologue]
        return driver

    def _brings(self, op: ForwardOp) -> tuple[str, ...]:
        """What the sites of a forward take from outside of it."""
        inside = {value.name for value in definitions(op.body)}
        taken = (value for part in walk(op.body) for value in used(part))
        return tuple(
            dict.fromkeys(
                self.names[value] for value in taken if value.name not in inside and value.name in self.crossing
            )
        )

    def _invokes(self, op: ForwardOp) -> tuple[str, ...]:
        """Where in the state each invoke's share of a forward goes; nowhere if no site asks for it."""
        results = (invoke.result for invoke in _invoked(op))
        return tuple(self.names[value] if value.name in self.crossing else "" for value in results)

    # --- where values live ---

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

    # --- the ops of a model ---

    def lower(self, op: AnyOp) -> ast.expr | list[ast.stmt]:
        if isinstance(op, SetItem) and self.in_site:
            return self._set_item(op)
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

    def _set_item(self, op: SetItem) -> list[ast.stmt]:
        new = self.operand(op.value, op.span)
        held = self.operand(op.object, op.span)
        index = self.operand(op.index, op.span)
        read = self.reads.get(op.object.name) if isinstance(op.object, Value) else None
        port = None if read is None else read.port
        if read is None or port not in ("output", "input"):
            call = ast.Call(func=self.constant("put", support.put), args=[held, index, new], keywords=[])
            return [ast.Expr(value=call)]
        assert isinstance(op.object, Value)
        setter = support.set_item if port == "output" else support.set_first_item
        if self.divided:
            arguments = [self._share(read.rows, op.span), held, index, new, ast.Constant(str(op.span))]
            return [ast.Assign(targets=[self.target(op.object)], value=self._of_value(setter.__name__, arguments))]
        made = ast.Call(
            func=self.constant(setter.__name__, setter), args=[self._value(), held, index, new], keywords=[]
        )
        targets = ast.Tuple(elts=[self._value(ast.Store()), self.target(op.object)], ctx=ast.Store())
        return [ast.Assign(targets=[targets], value=made)]

    def model_op(self, op: Op) -> list[ast.stmt]:
        match op:
            case ForwardOp():
                return self._forward(op)
            case Session(body=body):
                return self.block(body.ops)
            case Read(result=result, port=port):
                self.reads[result.name] = op
                if port == "result" and op.rows is not None:
                    own = ast.Attribute(value=self.operand(op.rows, op.span), attr="result", ctx=ast.Load())
                    part = ast.Call(func=own, args=[self._value()], keywords=[])
                    return [ast.Assign(targets=[self.target(result)], value=part)]
                if self.divided:
                    return [ast.Assign(targets=[self.target(result)], value=self._read_share(op))]
                if result.name in self.direct:
                    return []
                source: ast.expr = self._value()
                if port == "input":
                    getter = self.constant("first_argument", support.first_argument)
                    source = ast.Call(func=getter, args=[source, ast.Constant(str(op.span))], keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=source)]
            case Write(port=port, value=value) if self.divided:
                method = {"output": "write", "input": "write_first", "inputs": "write_all"}[port]
                share = self._share(op.rows, op.span)
                arguments = [share, self.operand(value, op.span), ast.Constant(str(op.span))]
                return [ast.Expr(value=self._of_value(method, arguments))]
            case Write(port=port, value=value):
                setters = {
                    "output": support.replaced,
                    "input": support.replaced_first,
                    "inputs": support.replaced_all,
                }
                setter = self.constant(setters[port].__name__, setters[port])
                arguments = [self._value(), self.operand(value, op.span), ast.Constant(str(op.span))]
                made = ast.Call(func=setter, args=arguments, keywords=[])
                return [ast.Assign(targets=[self._value(ast.Store())], value=made)]
            case Skip(value=value):
                skipped = self.constant("Skipped", Skipped)
                arguments = [self.operand(value, op.span), ast.Constant(str(op.span))]
                made = ast.Call(func=skipped, args=arguments, keywords=[])
                return [ast.Assign(targets=[self._value(ast.Store())], value=made)]
            case Stop() if self.divided:
                return [ast.Return(value=self.constant("stop", Stopped(op.span)))]
            case Stop():
                return [ast.Assign(targets=[self._value(ast.Store())], value=self.constant("stop", Stopped(op.span)))]
            case Cache():
                options = (op.model, op.device, op.dtype, op.detach)
                container = self.constant("cache", caches.ActivationCache)
                made = ast.Call(func=container, args=[self.operand(each, op.span) for each in options], keywords=[])
                return [ast.Assign(targets=[self.target(op.result)], value=made)]
            case Record(step=step):
                parts = [self.operand(each, op.span) for each in (op.cache, op.path)]
                parts += [ast.Constant(op.port), self.operand(op.value, op.span), ast.Constant(op.call)]
                parts.append(ast.Constant(None) if step is None else self.operand(step, op.span))
                return [ast.Expr(ast.Call(func=self.constant("record", caches.record), args=parts, keywords=[]))]
            case Steps():
                return self._steps(op)
            case FromEnd(result=result, index=index):
                asked = self.constant("from_end", support.from_end)
                parts = [self.operand(index, op.span), ast.Constant(str(op.span))]
                made = ast.Call(func=asked, args=parts, keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=made)]
            case Captured(result=result, model=model, edit=edit, name=name):
                parts = [self.operand(model, op.span), self.operand(edit, op.span), ast.Constant(name)]
                made = ast.Call(func=self.constant("captured", support.captured), args=parts, keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=made)]
            case Save(result=result, value=value):
                kept = self.constant("keep", support.keep)
                made = ast.Call(func=kept, args=[self.operand(value, op.span)], keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=made)]
            case Backward():
                return self._backward(op)
            case Gradients() | Require() | Track() | Grad() | SetGrad():
                return self._gradient_op(op)
        return super().model_op(op)

    def _gradient_op(self, op: Gradients | Require | Track | Grad | SetGrad) -> list[ast.stmt]:
        where = ast.Constant(str(op.span))
        match op:
            case Grad(result=result):
                return [ast.Assign(targets=[self.target(result)], value=self._value())]
            case SetGrad(gradient=gradient):
                setter = self.constant("replaced", support.replaced)
                new = ast.Call(func=setter, args=[self._value(), self.operand(gradient, op.span), where], keywords=[])
                return [ast.Assign(targets=[self._value(ast.Store())], value=new)]
            case Require(value=value, leaf=leaf):
                function = self.constant("require", gradients.require)
                taken = [self.operand(value, op.span), ast.Constant(leaf), where]
                return [ast.Expr(value=ast.Call(func=function, args=taken, keywords=[]))]
            case Track(result=result, value=value, source=source):
                function = self.constant("track", gradients.track)
                of = ast.Constant(None) if source is None else self.operand(source, op.span)
                tracked = ast.Call(func=function, args=[self.operand(value, op.span), of, where], keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=tracked)]
            case Gradients(result=result, outputs=outputs, inputs=inputs, arguments=arguments):
                function = self.constant("gradients", gradients.gradients)
                rest = _arguments(arguments, self)
                given = [self.operand(outputs, op.span), self.operand(inputs, op.span), *rest, where]
                made = ast.Call(func=function, args=given, keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=made)]

    def _pieces(self, origins: Origins) -> Iterator[tuple[AtGradient, gradients.Piece]]:
        """The parts of all backward passes, each with its place in the plan of its pass."""
        changes = tuple(
            op.span
            for op in walk(self.program.body)
            if origins.writes_tensors(op) and not isinstance(op, (AtGradient, Backward, At, ForwardOp))
        )
        for op in walk(self.program.body):
            if not isinstance(op, Backward):
                continue
            parts = [part for part in op.body.ops if isinstance(part, AtGradient)]
            makers = {value.name: number for number, part in enumerate(parts) for value in definitions(part.body)}
            pieces = []
            for number, part in enumerate(parts):
                inside = list(walk(part.body))
                homes = {makers[value.name] for each in inside for value in used(each) if value.name in makers}
                writes = any(not isinstance(each, Grad) for each in inside)
                pieces.append(gradients.Piece(part.span, writes, tuple(sorted(homes - {number}))))
                yield part, pieces[-1]
            named = _named_weights(self.program, origins)
            self.backwards[id(op)] = gradients.Backward(op.span, tuple(pieces), changes, named)

    def _backward(self, op: Backward) -> list[ast.stmt]:
        rest = _arguments(op.arguments, self)
        tracked = [self.operand(part.value, op.span) for part in op.body.ops if isinstance(part, AtGradient)]
        models = [self.operand(model, op.span) for model in op.sparing]
        state: ast.expr = load(self.names[self.state]) if tracked else ast.Constant(None)
        runner = ast.Attribute(value=self.constant("backward", self.backwards[id(op)]), attr="run", ctx=ast.Load())
        tuples = [ast.Tuple(elts=list(each), ctx=ast.Load()) for each in (tracked, models)]
        given = [self.operand(op.loss, op.span), *rest, *tuples, state]
        return [ast.Expr(value=ast.Call(func=runner, args=given, keywords=[]))]

    def _forward(self, op: ForwardOp) -> list[ast.stmt]:
        model = self.operand(op.model, op.span)
        positional, keyword = _arguments(op.arguments, self)
        runner = ast.Attribute(value=self.constant("forward", self.forwards[id(op)]), attr="run", ctx=ast.Load())
        state: ast.expr = (
            load(self.names[self.state]) if any(_placed(op)) or op.method == "generate" else ast.Constant(None)
        )
        given = [model, positional, keyword, state]
        invokes = [ast.Tuple(elts=list(_arguments(each.arguments, self)), ctx=ast.Load()) for each in _invoked(op)]
        if invokes:
            given.append(ast.Tuple(elts=list(invokes), ctx=ast.Load()))
        return [ast.Expr(value=ast.Call(func=runner, args=given, keywords=[]))]

    def _share(self, rows: Operand | None, span: Span) -> ast.expr:
        return ast.Constant(None) if rows is None else self.operand(rows, span)

    def _of_value(self, method: str, arguments: list[ast.expr]) -> ast.expr:
        """A method of the value at a site that is divided among invokes."""
        found = ast.Attribute(value=self._value(), attr=method, ctx=ast.Load())
        return ast.Call(func=found, args=arguments, keywords=[])

    def _read_share(self, op: Read) -> ast.expr:
        share = self._share(op.rows, op.span)
        if op.port == "input":
            return self._of_value("read_first", [share, ast.Constant(str(op.span))])
        return self._of_value("read", [share])

    def _steps(self, op: Steps) -> list[ast.stmt]:
        """What happens at some steps of a generation."""
        step = ast.Attribute(value=load(self.names[self.state]), attr=self.names[self.step], ctx=ast.Load())
        (number,) = op.body.parameters
        body: list[ast.stmt] = []
        if self.uses[number.name]:
            body.append(ast.Assign(targets=[self.target(number)], value=step))
        body += self.within(op.body, self.exits)
        start, last = first_step(op), last_step(op)
        if op.rows is not None:
            least = 0 if not op.asked else start + 1 if last == math.inf else int(last) + 1
            lasts = ast.Attribute(value=self.operand(op.rows, op.span), attr="lasts", ctx=ast.Load())
            asked = ast.Call(func=lasts, args=[ast.Constant(least), ast.Constant(str(op.span))], keywords=[])
            body = [ast.If(test=asked, body=body or [ast.Pass()], orelse=[])]
        if last == start:
            test = ast.Compare(left=step, ops=[ast.Eq()], comparators=[ast.Constant(start)])
        elif last == math.inf and start == 0:
            return body
        elif last == math.inf:
            test = ast.Compare(left=step, ops=[ast.GtE()], comparators=[ast.Constant(start)])
        else:
            bounds: list[ast.expr] = [step, ast.Constant(int(last))]
            test = ast.Compare(left=ast.Constant(start), ops=[ast.LtE(), ast.LtE()], comparators=bounds)
        return [ast.If(test=test, body=body or [ast.Pass()], orelse=[])]

    def _value(self, context: ast.expr_context | None = None) -> ast.Name:
        """The value at the site, in a site function."""
        return ast.Name(self.names[self.value], context or ast.Load())

    def _site(self, op: ForwardOp | None, at: At | AtGradient) -> ast.FunctionDef:
        """The function at a site of a forward, or at the arrival of a gradient."""
        self.in_site = True
        self.divided = False
        if isinstance(at, At):
            name = self.names.fresh(f"at.{at.module.path}.{at.port}" if at.module.path else f"at.{at.port}")
            self.divided = at.port != "result" and any(
                isinstance(each, (Read, Write)) and each.rows is not None for each in walk(at.body)
            )
            if not self.divided and not any(
                isinstance(each, (Write, SetItem)) or pauses(each, self.pausing) for each in walk(at.body)
            ):
                self._read_directly(at)
        else:
            name = self.names.fresh("at.gradient")
        parameters = (Parameter(self.value), Parameter(self.state))
        made = self.define(name, self.program.name, parameters, at.body, at.span)
        if self.divided:
            assert op is not None
            assert isinstance(at, At)
            axes = self._site_axes(op, at)
            divided = ast.Call(func=self.constant("Divided", Divided), args=[self._value(), axes], keywords=[])
            made.body.insert(0, locate(ast.Assign(targets=[self._value(ast.Store())], value=divided), at.span))
        result = self._of_value("whole", []) if self.divided else self._value()
        made.body.append(locate(ast.Return(value=result), at.span))
        self.in_site = self.divided = False
        return made

    def _site_axes(self, op: ForwardOp, at: At) -> ast.expr:
        self.shared.setdefault(id(op), []).append((at.module.path, at.port, at.call or 0))
        known = self.axes.known(op, at)
        if known is not None:
            return self.constant("axes", known)
        self.later.add(id(op))
        rows = next(each.rows for each in walk(at.body) if isinstance(each, (Read, Write)) and each.rows is not None)
        asked = ast.Attribute(value=self.operand(rows, at.span), attr="axes", ctx=ast.Load())
        place: list[ast.expr] = [ast.Constant(part) for part in (at.module.path, at.port, at.call or 0)]
        return ast.Call(func=asked, args=place, keywords=[])

    def _read_directly(self, at: At) -> None:
        """Has the reads of a site that is not written stand for its value, without a variable of their own."""
        for op in walk(at.body):
            plain = isinstance(op, Read) and op.port != "input" and not (op.port == "result" and op.rows is not None)
            if plain and isinstance(op, Read) and op.result.name not in self.crossing:
                self.names.give(op.result, self.names[self.value])
                self.direct.add(op.result.name)


def _arguments(arguments: tuple[Argument, ...], statements: Statements) -> tuple[ast.expr, ast.expr]:
    """The arguments of a forward, as a tuple and a dict."""
    positional: list[ast.expr] = []
    keys: list[ast.expr | None] = []
    values: list[ast.expr] = []
    for argument in arguments:
        value = statements.operand(argument.value, Span("", 0))
        if argument.star == "*":
            positional.append(ast.Starred(value=value, ctx=ast.Load()))
        elif argument.star == "**":
            keys.append(None)
            values.append(value)
        elif argument.keyword is not None:
            keys.append(ast.Constant(argument.keyword))
            values.append(value)
        else:
            positional.append(value)
    return ast.Tuple(elts=positional, ctx=ast.Load()), ast.Dict(keys=keys, values=values)


def _crossing(program: Program) -> dict[str, Value]:
    """The values that are made in one generated function and used in another."""
    home: dict[str, object] = {parameter.value.name: None for parameter in program.parameters}
    for where, value in _definitions(program.body, None):
        home[value.name] = where
    return {value.name: value for where, value in _uses(program.body, None) if home.get(value.name, where) is not where}


def _ranges(at: At) -> tuple[tuple[int, int | None], ...]:
    """The steps at which a site does something."""
    return tuple(dict.fromkeys((each.start, each.stop) for _, each in _asked(at)))


def _wanted(op: ForwardOp) -> tuple[Wanted, ...]:
    """The steps that the program asks a generation for."""
    return tuple(dict.fromkeys(each for at in _placed(op) for steps, each in _asked(at) if steps.asked))


def _asked(at: At) -> Iterator[tuple[Steps, Wanted]]:
    for op in walk(at.body):
        if isinstance(op, Steps):
            last = last_step(op)
            yield op, Wanted(first_step(op), None if last == math.inf else int(last) + 1, op.span)


def _definitions(region: Region, where: object) -> Iterator[tuple[object, Value]]:
    for op in region.ops:
        for value in defined(op):
            yield where, value
        for inner in regions(op):
            for value in inner.parameters:
                yield op if isinstance(op, Steps) else where, value
            yield from _definitions(inner, op if isinstance(op, (At, AtGradient, Steps)) else where)


def _uses(region: Region, where: object) -> Iterator[tuple[object, Value]]:
    for op in region.ops:
        if isinstance(op, (Read, Write, Skip)):
            held = [] if isinstance(op, Read) else [value for value in used(op) if value is not _model(op)]
            taken = [*held, *(() if op.rows is None else values_in(op.rows))]
        elif isinstance(op, Steps):
            taken = [] if op.rows is None else list(values_in(op.rows))
        elif isinstance(op, (At, Stop, Grad)):
            taken = []
        elif isinstance(op, SetGrad):
            taken = list(values_in(op.gradient))
        else:
            taken = list(used(op))
        for value in taken:
            yield where, value
        for inner in regions(op):
            yield from _uses(inner, op if isinstance(op, (At, AtGradient, Steps)) else where)


def _model(op: Write | Skip) -> Value | None:
    return op.module.model if isinstance(op.module, Module) else None


def _wants_gradients(op: Op) -> bool:
    """Whether an op of a forward's body needs its values to have gradients."""
    if isinstance(op, Call):
        return op.target == "torch.Tensor.requires_grad_"
    return isinstance(op, (Require, Track, Backward, Gradients))


def _named_weights(program: Program, origins: Origins) -> tuple[str, ...]:
    """The weights of models whose gradients are asked for, by their paths."""
    asked = (
        op.value if isinstance(op, Track) else op.object
        for op in walk(program.body)
        if isinstance(op, Track) or (isinstance(op, Attribute) and op.name == "grad")
    )
    return tuple(
        f"{op.object.path}.{op.name}".strip(".")
        for op in map(origins.definition, asked)
        if isinstance(op, Attribute) and isinstance(op.object, Module)
    )


def _placed(op: ForwardOp) -> Iterator[At]:
    for at in op.body.ops:
        if isinstance(at, Invoke):
            continue
        assert isinstance(at, At), "a program is placed before it is planned"
        yield at


def _invoked(op: ForwardOp) -> Iterator[Invoke]:
    """The invokes of a placed forward that bring its input."""
    return (each for each in op.body.ops if isinstance(each, Invoke))


def _counted_from_the_end(at: At) -> int | None:
    """How often the module of a site must run for `.calls[-1]` and the like to mean this site."""
    calls = (op.call for op in walk(at.body) if isinstance(op, (Read, Write, Skip)))
    return next(((at.call or 0) - call for call in calls if call is not None and call < 0), None)


def _stops(op: ForwardOp) -> bool:
    """Whether something of the model comes after the last site."""
    placed = list(_placed(op))
    return bool(placed) and not (placed[-1].module.path == "" and placed[-1].port == "output")
