"""Blocks of Python statements: which expressions stay inside others, where the ends of regions lead."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never, cast

from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import (
    AnyOp,
    Break,
    Continue,
    Emit,
    Global,
    Load,
    Op,
    Parameter,
    Region,
    Stage,
    Unpack,
    Yield,
)
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, used, walk
from nnsight_compiler.ir.values import Operand, Value
from nnsight_compiler.runtime.expressions import Expressions, Scope
from nnsight_compiler.runtime.names import Names
from nnsight_compiler.runtime.regions import assigned_again
from nnsight_compiler.runtime.trees import evaluated, function, load, locate, place, plain_arguments, reads

DEEPEST = 24
"""How far expressions nest before one of them gets a statement of its own."""


@dataclass(frozen=True, slots=True)
class Exits:
    """Where the ends of a region lead.

    results: what `yield` assigns.
    carried: what `continue` assigns.
    left: what `break` assigns.
    falls: whether the loop's next round begins where the region ends, so that `continue` needs no statement.
    """

    results: tuple[Value, ...] = ()
    carried: tuple[Value, ...] = ()
    left: tuple[Value, ...] = ()
    falls: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """An expression that is to move into the statement which uses it."""

    value: Value
    expression: ast.expr
    depth: int
    span: Span


class Blocks(Expressions):
    """Lines up the statements of ops, as an op's `lower` makes them.

    titles: for the identifiers of generated functions, the names by which users know them.
    """

    def __init__(self, program: Program, names: Names) -> None:
        super().__init__(program, names)
        self.titles: dict[str, str] = {}
        self.exits = Exits()
        self.uses = Counter(value.name for op in program.walk() for value in used(op))
        self._assigned_again = assigned_again(program)

    # --- what subclasses change ---

    def target(self, value: Value) -> ast.expr:
        """Where a value is kept: a local variable."""
        return ast.Name(self.names[value], ast.Store())

    def rebound(self, value: Value) -> bool:
        """Whether a value's variable may be assigned again while a closure that uses the value is alive."""
        return value.name in self._assigned_again

    def model_op(self, op: Op) -> list[ast.stmt]:
        """The statements of an op that takes part in a model's forward."""
        raise IRError(f"{op.span}: {type(op).__name__} stands in code that runs no model")

    def stage(self, op: Stage) -> ast.expr:
        """The function that specialises and runs a stage."""
        raise IRError(f"{op.span}: a stage stands in code that is not specialised")

    def lower(self, op: AnyOp) -> ast.expr | list[ast.stmt]:
        """An op as an expression, where it only computes its result, else as statements."""
        raise NotImplementedError

    # --- functions ---

    def define(
        self,
        name: str,
        title: str,
        parameters: Sequence[Parameter],
        body: Region,
        span: Span,
        captured: Iterable[Value] = (),
        generator: bool = False,
    ) -> ast.FunctionDef:
        """A `def` whose parameters have no defaults yet; tracebacks call it by its title."""
        self.titles[name] = title
        identifiers = frozenset(self.names[parameter.value] for parameter in parameters)
        scope = Scope(identifiers, frozenset(value.name for value in captured), {}, {})
        self.scopes.append(scope)
        exits, self.exits = self.exits, Exits()
        statements = self.block(body.ops)
        self.exits = exits
        self.scopes.pop()
        declarations: list[ast.stmt] = []
        for kind, form in (("global", ast.Global), ("free", ast.Nonlocal)):
            declared = [found for found, belongs in scope.declared.items() if belongs == kind]
            if declared:
                declarations.append(form(names=declared))
        if generator and not any(isinstance(op, Emit) for op in walk(body)):
            statements += [ast.Return(value=None), ast.Expr(value=ast.Yield(value=None))]
        return locate(function(name, self._arguments(parameters), declarations + statements), span)

    def _arguments(self, parameters: Sequence[Parameter]) -> ast.arguments:
        arguments = plain_arguments([])
        for parameter in parameters:
            argument = ast.arg(self.names[parameter.value])
            match parameter.kind:
                case "positional_only":
                    arguments.posonlyargs.append(argument)
                case "positional_or_keyword":
                    arguments.args.append(argument)
                case "var_positional":
                    arguments.vararg = argument
                case "keyword_only":
                    arguments.kwonlyargs.append(argument)
                    arguments.kw_defaults.append(None)
                case "var_keyword":
                    arguments.kwarg = argument
                case _:
                    assert_never(parameter.kind)
        return arguments

    # --- blocks ---

    def block(self, ops: Iterable[Op]) -> list[ast.stmt]:
        """The statements of ops that run one after the other; never empty where ops are given."""
        statements, pending = self._run(tuple(ops))
        return statements + self._flush(pending)

    def within(self, region: Region, exits: Exits) -> list[ast.stmt]:
        """The statements of a region whose ends lead elsewhere than those of the code around it."""
        before, self.exits = self.exits, exits
        statements = self.block(region.ops)
        self.exits = before
        return statements

    def computed(self, region: Region, moving: int) -> tuple[list[ast.stmt], list[ast.expr]]:
        """Statements, and then the values of the `yield` that ends the region. The first `moving` values may be
        whole expressions, the rest are variables and constants."""
        *ops, last = region.ops
        assert isinstance(last, Yield)
        before, self.exits = self.exits, replace(self.exits, results=(), falls=False)
        statements, pending = self._run(tuple(ops), last)
        self.exits = before
        self._settle(replace(last, values=last.values[:moving]), statements, pending)
        statements += self._flush(pending)
        return statements, [self.operand(value, last.span) for value in last.values]

    def _run(self, ops: tuple[Op, ...], last: Op | None = None) -> tuple[list[ast.stmt], list[Pending]]:
        """Statements, and the expressions after them that still wait for the op that uses them."""
        end = last if last is not None else ops[-1] if ops else None
        here = {value.name for op in (*ops, *((last,) if last else ())) for value in used(op)}
        handed_over = {value.name for value in evaluated(end)} if isinstance(end, Yield | Break | Continue) else set()
        exits = self.exits
        statements: list[ast.stmt] = []
        pending: list[Pending] = []
        for number, op in enumerate(ops, start=1):
            self.exits = exits if number == len(ops) else replace(exits, falls=False)
            depth = self._settle(op, statements, pending)
            made = self.lower(cast(AnyOp, op))
            if isinstance(made, ast.expr):
                locate(made, op.span)
                (value,) = defined(op)
                single = self.uses[value.name] == 1 and value.name in here
                glue = value.name.isdecimal() or isinstance(op, Global | Load) or value.name in handed_over
                if single and glue:
                    pending.append(Pending(value, made, depth + 1, op.span))
                    continue
                made = [self._keep(value, made, op.span)]
            statements += self._flush(pending)
            statements += [locate(statement, op.span) for statement in made]
            pending.clear()
        self.exits = exits
        return statements, pending

    def _settle(self, op: Op, statements: list[ast.stmt], pending: list[Pending]) -> int:
        """Decides which waiting expressions move into an op: the last ones, if the op would evaluate them in the same
        order. Those that it uses otherwise become statements. Returns how deep the ones that move are nested."""
        wanted = [value.name for value in evaluated(cast(AnyOp, op))]
        first = len(pending)
        while first and pending[first - 1].value.name in wanted and pending[first - 1].depth < DEEPEST:
            wanted = wanted[: wanted.index(pending[first - 1].value.name)]
            first -= 1
        needed = {value.name for value in used(op)}
        stopped = max((number for number in range(first) if pending[number].value.name in needed), default=-1) + 1
        statements += self._flush(pending[:stopped])
        moving = pending[first:]
        self.moved.update((item.value.name, item.expression) for item in moving)
        pending[:] = pending[stopped:first]
        return max((item.depth for item in moving), default=0)

    def _flush(self, pending: Iterable[Pending]) -> list[ast.stmt]:
        return [locate(self._keep(item.value, item.expression, item.span), item.span) for item in pending]

    def _keep(self, value: Value, expression: ast.expr, span: Span) -> ast.stmt:
        if not self.uses[value.name]:
            return ast.Expr(value=expression)
        return ast.Assign(targets=[self.target(value)], value=expression)

    def assign(self, targets: Sequence[Value], operands: Sequence[Operand], span: Span) -> list[ast.stmt]:
        """Assigns all at once: no target is written before every operand is read."""
        return self.assign_expressions(targets, [self.operand(operand, span) for operand in operands], span)

    def assign_expressions(self, targets: Sequence[Value], sources: list[ast.expr], span: Span) -> list[ast.stmt]:
        pairs = [
            (target, source)
            for target, source in zip(map(self.target, targets), sources, strict=True)
            if not (isinstance(source, ast.Name | ast.Attribute) and place(source) == place(target))
        ]
        written: set[str] = set()
        apart = True
        for target, source in pairs:
            apart = apart and not reads(source, written)
            written.add(place(target))
        if apart:
            made: list[ast.stmt] = [ast.Assign(targets=[target], value=source) for target, source in pairs]
        else:
            left = ast.Tuple(elts=[target for target, _ in pairs], ctx=ast.Store())
            made = [ast.Assign(targets=[left], value=ast.Tuple(elts=[source for _, source in pairs], ctx=ast.Load()))]
        return [locate(statement, span) for statement in made]

    def named_target(self, value: Value) -> tuple[str, list[ast.stmt]]:
        """An identifier for statements that bind nothing else, and what brings it to where the value is kept."""
        target = self.target(value)
        if isinstance(target, ast.Name):
            return target.id, []
        name = self.names.fresh(value.name)
        return name, [ast.Assign(targets=[target], value=load(name))]

    def pattern(self, op: Unpack) -> ast.expr:
        """What an unpacking assigns to."""
        elements = [self.target(result) for result in op.results]
        if op.star >= 0:
            elements[op.star] = ast.Starred(value=elements[op.star], ctx=ast.Store())
        return ast.Tuple(elts=elements, ctx=ast.Store())
