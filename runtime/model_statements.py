"""What the ops of models become: statements that run forwards, read and write at sites, and ask for gradients."""

from __future__ import annotations

import ast
import math

from nnsight_compiler.ir.ops import (
    AnyOp,
    Argument,
    AtGradient,
    Backward,
    Cache,
    Captured,
    FromEnd,
    Grad,
    Gradients,
    Op,
    Read,
    Record,
    Release,
    Require,
    Save,
    Session,
    SetGrad,
    SetItem,
    Skip,
    Steps,
    Stop,
    Strands,
    Track,
    Write,
)
from nnsight_compiler.ir.ops import Forward as ForwardOp
from nnsight_compiler.ir.ops import Prefix as PrefixOp
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.passes.moments import first_step, last_step
from nnsight_compiler.passes.share_prefixes import held_paths
from nnsight_compiler.runtime import autograd_recording, backward_passes, caches, gradients
from nnsight_compiler.runtime import sites as support
from nnsight_compiler.runtime.placed import (
    invoked,
    placed,
)
from nnsight_compiler.runtime.placed_statements import PlacedStatements
from nnsight_compiler.runtime.prefixes import PrefixPlan
from nnsight_compiler.runtime.requests import awaited
from nnsight_compiler.runtime.skipping import Skipped
from nnsight_compiler.runtime.statements import Statements
from nnsight_compiler.runtime.stopping import Stopped
from nnsight_compiler.runtime.trees import load


class ModelStatements(PlacedStatements):
    """The statements of a placed program."""

    def lower(self, op: AnyOp) -> ast.expr | list[ast.stmt]:
        return self._set_item(op) if isinstance(op, SetItem) and self.in_site else super().lower(op)

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
            case Strands(body=body):
                return self._strands(body)
            case PrefixOp():
                return self._prefix(op)
            case Release(prefix=prefix):
                freed = ast.Attribute(value=self.operand(prefix, op.span), attr="release", ctx=ast.Load())
                return [ast.Expr(value=ast.Call(func=freed, args=[], keywords=[]))]
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
                function = self.constant("require", autograd_recording.require)
                taken = [self.operand(value, op.span), ast.Constant(leaf), where]
                return [ast.Expr(value=ast.Call(func=function, args=taken, keywords=[]))]
            case Track(result=result, value=value, source=source):
                function = self.constant("track", gradients.track)
                of = ast.Constant(None) if source is None else self.operand(source, op.span)
                tracked = ast.Call(func=function, args=[self.operand(value, op.span), of, where], keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=tracked)]
            case Gradients(result=result, outputs=outputs, inputs=inputs, arguments=arguments):
                if self.strands and not self.in_site:
                    return self._ask_for_gradients(result, outputs, inputs, op.span)
                function = self.constant("gradients", gradients.gradients)
                rest = _arguments(arguments, self)
                given = [self.operand(outputs, op.span), self.operand(inputs, op.span), *rest, where]
                made = ast.Call(func=function, args=given, keywords=[])
                return [ast.Assign(targets=[self.target(result)], value=made)]

    def _ask_for_gradients(self, result: Value, outputs: Operand, inputs: Operand, span: Span) -> list[ast.stmt]:
        """Has a strand wait for gradients, which those of others come with."""
        given = [self.operand(outputs, span), self.operand(inputs, span), ast.Constant(str(span))]
        return self._awaited(result, "wanted", backward_passes.GradientsRequest, given)

    def _backward(self, op: Backward) -> list[ast.stmt]:
        rest = _arguments(op.arguments, self)
        tracked = [self.operand(part.value, op.span) for part in op.body.ops if isinstance(part, AtGradient)]
        models = [self.operand(model, op.span) for model in op.sparing]
        state: ast.expr = load(self.names[self.state]) if tracked else ast.Constant(None)
        runner = ast.Attribute(value=self.constant("backward", self.backwards[id(op)]), attr="run", ctx=ast.Load())
        tuples = [ast.Tuple(elts=list(each), ctx=ast.Load()) for each in (tracked, models)]
        if self.strands and not self.in_site:
            plan = self.constant("backward", self.backwards[id(op)])
            given = [plan, self.operand(op.loss, op.span), *tuples, state]
            asked = ast.Call(func=self.constant("wanted", backward_passes.BackwardRequest), args=given, keywords=[])
            return [ast.Expr(value=self._served(asked))]
        given = [self.operand(op.loss, op.span), *rest, *tuples, state]
        return [ast.Expr(value=ast.Call(func=runner, args=given, keywords=[]))]

    def _forward(self, op: ForwardOp) -> list[ast.stmt]:
        model = self.operand(op.model, op.span)
        positional, keyword = _arguments(op.arguments, self)
        plan = self.constant("forward", self.forwards[id(op)])
        state: ast.expr = (
            load(self.names[self.state]) if any(placed(op)) or op.method == "generate" else ast.Constant(None)
        )
        given = [model, positional, keyword, state]
        base = None if op.base is None else self.operand(op.base, op.span)
        if self.strands:
            given += [] if base is None else [base]
            asked = ast.Call(func=self.constant("awaited", awaited), args=[plan, *given], keywords=[])
            return [ast.Expr(value=ast.YieldFrom(value=asked))]
        invokes = [ast.Tuple(elts=list(_arguments(each.arguments, self)), ctx=ast.Load()) for each in invoked(op)]
        if invokes:
            given.append(ast.Tuple(elts=list(invokes), ctx=ast.Load()))
        given += [] if base is None else [base]
        runner = ast.Attribute(value=plan, attr="run" if base is None else "resume", ctx=ast.Load())
        return [ast.Expr(value=ast.Call(func=runner, args=given, keywords=[]))]

    def _prefix(self, op: PrefixOp) -> list[ast.stmt]:
        seen = self.seen[self.shares[op.result.name]]
        paths = sorted(held_paths(op), key=lambda path: seen.time(path, "output"))
        prompts = "" if self.prompts is None else self.names[self.prompts]
        plan = PrefixPlan(tuple(paths), op.span, prompts)
        maker = ast.Attribute(value=self.constant("prefix", plan), attr="of", ctx=ast.Load())
        state: ast.expr = load(self.names[self.state]) if self.has_state else ast.Constant(None)
        given = [self.operand(op.model, op.span), *_arguments(op.arguments, self), state]
        made = ast.Call(func=maker, args=given, keywords=[])
        return [ast.Assign(targets=[self.target(op.result)], value=made)]

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
