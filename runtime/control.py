"""Control flow and closures as Python: conditions, loops, exceptions, nested functions."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace

from nnsight_compiler.ir.ops import Closure, For, Handler, If, Region, Try, Unpack, While, With
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.runtime.blocks import Blocks, Exits
from nnsight_compiler.runtime.expressions import Scope
from nnsight_compiler.runtime.regions import breaks, captured, continues_through_finally, yields
from nnsight_compiler.runtime.trees import call, function, load, locate, place, plain_arguments, reads


class Control(Blocks):
    """Lowers the ops that have regions of their own."""

    def condition(self, op: If) -> ast.expr | list[ast.stmt]:
        """An `if`: an expression where both sides only compute one value that has no name, else a statement."""
        test = self.operand(op.condition, op.span)
        if len(op.results) == 1 and op.results[0].name.isdecimal() and yields(op.then) and yields(op.orelse):
            then, (value,) = self.computed(op.then, 1)
            orelse, (other,) = self.computed(op.orelse, 1)
            if not then and not orelse:
                return ast.IfExp(test=truth(test), body=value, orelse=other)
            then += self.assign_expressions(op.results, [value], op.span)
            orelse += self.assign_expressions(op.results, [other], op.span)
        else:
            exits = replace(self.exits, results=op.results)
            then, orelse = self.within(op.then, exits), self.within(op.orelse, exits)
        if orelse and not then:
            test, then, orelse = ast.UnaryOp(op=ast.Not(), operand=truth(test)), orelse, []
        return [ast.If(test=truth(test), body=then or [ast.Pass()], orelse=orelse)]

    def loop_over(self, op: For) -> list[ast.stmt]:
        """A `for`. `continue` assigns the parameters themselves, unless a `finally` may still read them."""
        carried = op.body.parameters[1:]
        if continues_through_finally(op.body):
            carried = tuple(self.names.temporary(value.name) for value in carried)
        iterable = self.operand(op.iterable, op.span)
        statements: list[ast.stmt] = []
        if reads(iterable, {place(self.target(value)) for value in carried}):
            kept = self.names.fresh("items")
            statements = [ast.Assign(targets=[ast.Name(kept, ast.Store())], value=iterable)]
            iterable = load(kept)
        statements += self.assign(carried, op.initial, op.span)
        loop = self.rounds(op, carried, iterable)
        after = self.after(op.orelse, op, carried)
        inside = op.orelse is not None or breaks(op.body)
        loop.orelse = after if inside else []
        return [*statements, loop, *([] if inside else after)]

    def rounds(self, op: For, carried: Sequence[Value], iterable: ast.expr) -> ast.For:
        """The rounds of a `for` over `iterable`, whose `continue` assigns `carried`."""
        item, *parameters = op.body.parameters
        target, ops = self.target(item), op.body.ops
        if ops and isinstance(ops[0], Unpack) and ops[0].value == item and self.uses[item.name] == 1:
            target, ops = locate(self.pattern(ops[0]), ops[0].span), ops[1:]
        body = self.assign(parameters, carried, op.span)
        body += self.within(Region((), ops), Exits(carried=tuple(carried), left=op.results, falls=True))
        return ast.For(target=target, iter=iterable, body=body or [ast.Pass()], orelse=[])

    def loop_while(self, op: While) -> list[ast.stmt]:
        """A `while`. A condition that is more than an expression is computed in the body, and ends the loop through a
        flag, so that `else` and the jumps in it keep their meaning."""
        carried = op.condition.parameters
        statements = self.assign(carried, op.initial, op.span)
        computing, (test, *handed) = self.computed(op.condition, 1)
        test = truth(test)
        body = self.assign_expressions(op.body.parameters, handed, op.span)
        body += self.within(op.body, Exits(carried=carried, left=op.results, falls=True))
        passed = op.condition.ops[-1].values[1:]  # type: ignore[attr-defined]  # a `yield`
        after = self.after(op.orelse, op, passed)
        if not computing:
            inside = op.orelse is not None or breaks(op.body)
            loop = ast.While(test=test, body=body or [ast.Pass()], orelse=after if inside else [])
            return [*statements, loop, *([] if inside else after)]
        flag = self.names.fresh("going")
        going = ast.Assign(targets=[ast.Name(flag, ast.Store())], value=ast.Constant(True))
        stopping = ast.Assign(targets=[ast.Name(flag, ast.Store())], value=ast.Constant(False))
        choice = ast.If(test=test, body=body or [ast.Pass()], orelse=[stopping])
        return [*statements, going, ast.While(test=load(flag), body=[*computing, choice], orelse=after)]

    def after(self, region: Region | None, op: For | While, handed: Sequence[Operand]) -> list[ast.stmt]:
        """What runs once a loop has come to its end without `break`."""
        if region is None:
            return self.assign(op.results, handed, op.span)
        statements = self.assign(region.parameters, handed, op.span)
        return statements + self.within(region, replace(self.exits, results=op.results))

    def guarded(self, op: Try) -> list[ast.stmt]:
        """A `try`."""
        exits = replace(self.exits, results=(), falls=False)
        before: list[ast.stmt] = []
        body = self.within(op.body, exits)
        handlers = [self._handler(handler, exits, op, before) for handler in op.handlers]
        orelse = [] if op.orelse is None else self.within(op.orelse, exits)
        final = [] if op.finalizer is None else self.within(op.finalizer, exits) or [ast.Pass()]
        return [*before, ast.Try(body=body or [ast.Pass()], handlers=handlers, orelse=orelse, finalbody=final)]

    def _handler(self, handler: Handler, exits: Exits, op: Try, before: list[ast.stmt]) -> ast.ExceptHandler:
        """An `except`. Types that take statements to compute come from a function, called when an exception arrives."""
        types: ast.expr | None = None
        if handler.types is not None:
            computing, (types,) = self.computed(handler.types, 1)
            if computing:
                name = self.names.fresh("types")
                before.append(function(name, plain_arguments([]), [*computing, ast.Return(value=types)]))
                types = call(name)
        (exception,) = handler.body.parameters
        name_, after = None, list[ast.stmt]()
        if self.uses[exception.name]:
            name_, after = self.named_target(exception)
            types = types or self.constant("BaseException", BaseException)
        body = after + self.within(handler.body, exits)
        return ast.ExceptHandler(type=types, name=name_, body=body or [ast.Pass()])

    def context(self, op: With) -> list[ast.stmt]:
        """A `with` on a context manager of Python's."""
        variable = self.target(op.result) if self.uses[op.result.name] else None
        item = ast.withitem(context_expr=self.operand(op.context, op.span), optional_vars=variable)
        return [ast.With(items=[item], body=self.within(op.body, replace(self.exits, results=())) or [ast.Pass()])]

    def closure(self, op: Closure) -> list[ast.stmt]:
        """A nested function. What it captures is looked up when it runs; so a variable that may hold another value by
        then, or whose name one of its parameters bears, is handed to a function around it which makes it."""
        own = {self.names[parameter.value] for parameter in op.parameters}
        handed: dict[str, str] = {}
        given: list[ast.expr] = []
        around = captured(op)
        for value in around:
            found = self.variable(value, op.span)
            hides = isinstance(found, ast.Name) and found.id in own
            if hides or (self.rebound(value) and not self.was_handed(value)):
                handed[value.name] = self.names.fresh(value.name) if hides else self.names[value]
                given.append(found)
        defaults = [locate(self.operand(default, op.span), op.span) for default in op.defaults]
        name, after = self.named_target(op.result)
        inner = self.names.fresh(name) if handed else name
        self.scopes.append(Scope(frozenset(handed.values()), frozenset(), {}, handed))
        made = self.define(inner, op.name, op.parameters, op.body, op.span, around, op.generator)
        self.scopes.pop()
        self._give_defaults(made.args, op, defaults)
        if not handed:
            return [made, *after]
        maker = self.names.fresh(f"make_{name}")
        making = function(maker, plain_arguments(list(handed.values())), [made, ast.Return(value=load(inner))])
        kept = ast.Assign(targets=[self.target(op.result)], value=call(maker, *given))
        return [making, kept]

    def _give_defaults(self, arguments: ast.arguments, op: Closure, defaults: list[ast.expr]) -> None:
        by_name = [parameter for parameter in op.parameters if parameter.kind == "keyword_only"]
        optional = [parameter for parameter in op.parameters if parameter.optional]
        for parameter, default in zip(optional, defaults, strict=True):
            if parameter.kind == "keyword_only":
                arguments.kw_defaults[by_name.index(parameter)] = default
            else:
                arguments.defaults.append(default)


def truth(test: ast.expr) -> ast.expr:
    """A condition, with `and` and `or` for what was written with them: only whether it holds matters."""
    match test:
        case ast.IfExp(test=first, body=second, orelse=ast.Constant(value=False)):
            return ast.copy_location(ast.BoolOp(op=ast.And(), values=[truth(first), truth(second)]), test)
        case ast.IfExp(test=first, body=ast.Constant(value=True), orelse=second):
            return ast.copy_location(ast.BoolOp(op=ast.Or(), values=[truth(first), truth(second)]), test)
        case _:
            return test
