"""Python statements from ops: the body of a generated function as a syntax tree.

    %0 = global torch
    %1 = attr %0.stack                     stacked = torch.stack(acts)
    %stacked = call %1(%acts)       ──▶    if stacked.ndim > 2:
    %2 = attr %stacked.ndim                    shown = stacked[0]
    %3 = operator > %2, 2                  else:
    %shown = if %3 …                           shown = stacked

An op becomes one statement. An expression that only the next statement needs moves into it, if Python then still
evaluates everything in the order of the ops. Every node carries the position of its op in the user's source.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import assert_never

from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import (
    AnyOp,
    Applied,
    At,
    AtGradient,
    Attribute,
    Backward,
    Bound,
    Break,
    Build,
    Cache,
    Call,
    Captured,
    Cell,
    Closure,
    Continue,
    Delete,
    Edit,
    Emit,
    For,
    Format,
    Forward,
    FromEnd,
    Global,
    Grad,
    Gradients,
    If,
    Import,
    Invoke,
    Item,
    Load,
    Operator,
    Postponed,
    Prefix,
    Raise,
    Read,
    Record,
    Release,
    Require,
    Return,
    Save,
    Session,
    SetAttribute,
    SetGlobal,
    SetGrad,
    SetItem,
    Skip,
    Stage,
    Steps,
    Stop,
    Store,
    Strand,
    Strands,
    Track,
    Try,
    Unpack,
    While,
    With,
    Write,
    Yield,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Operand, Unbound, Value
from nnsight_compiler.runtime import support
from nnsight_compiler.runtime.control import Control
from nnsight_compiler.runtime.trees import BINARY, load, place, reads


class Statements(Control):
    """Turns regions of a program into Python statements.

    A subclass says where values live (`reference`, `target`, `rebound`), which modules are meant (`module`), and what
    the ops of a model do (`model_op`).
    """

    def lower(self, op: AnyOp) -> ast.expr | list[ast.stmt]:
        """An op as an expression, where it only computes its result, else as statements."""
        span = op.span
        match op:
            case Load(cell=cell) if self.looks_first(op):
                outside = isinstance(cell, Value) and cell.name in self.scopes[-1].captured
                error = support.unbound_free if outside else support.unbound
                return self._checked(op.result, self.expression(op, span), op.name or "", error, span)
            case Bound(result=result, value=value, name=name):
                return self._checked(result, self.operand(value, span), name, support.unbound, span)
            case Operator(in_place=True):
                return self._augmented(op)
            case Cell(result=cell, initial=initial) if self.plain_cell(cell):
                return self._variable(cell, initial, span)
            case Global() | Cell() | Load() | Attribute() | Item() | Build() | Format() | Operator() | Call():
                return self.expression(op, span)
            case SetGlobal():
                return self._set_global(op)
            case Store():
                return self._store(op)
            case Import():
                return self._import(op)
            case SetAttribute(object=owner, name=name, value=value):
                stored = self.operand(value, span)
                changed = ast.Attribute(value=self.operand(owner, span), attr=name, ctx=ast.Store())
                return [ast.Assign(targets=[changed], value=stored)]
            case SetItem(object=owner, index=index, value=value):
                stored = self.operand(value, span)
                container = self.operand(owner, span)
                item = ast.Subscript(value=container, slice=self.index(index, span), ctx=ast.Store())
                return [ast.Assign(targets=[item], value=stored)]
            case Delete(object=owner, index=index, name=name):
                container = self.operand(owner, span)
                if index is None:
                    return [ast.Delete(targets=[ast.Attribute(value=container, attr=name or "", ctx=ast.Del())])]
                item = ast.Subscript(value=container, slice=self.index(index, span), ctx=ast.Del())
                return [ast.Delete(targets=[item])]
            case Unpack(value=value):
                return [ast.Assign(targets=[self.pattern(op)], value=self.operand(value, span))]
            case Closure():
                return self.closure(op)
            case Stage():
                return self.stage(op)
            case If():
                return self.condition(op)
            case For():
                return self.loop_over(op)
            case While():
                return self.loop_while(op)
            case Try():
                return self.guarded(op)
            case With():
                return self.context(op)
            case Yield(values=values):
                return self.assign(self.exits.results, values, span)
            case Emit(value=value):
                return [ast.Expr(value=ast.Yield(value=self.operand(value, span)))]
            case Break(values=values):
                return [*self.assign(self.exits.left, values, span), ast.Break()]
            case Continue(values=values):
                jump: list[ast.stmt] = [] if self.exits.falls else [ast.Continue()]
                return self.assign(self.exits.carried, values, span) + jump
            case Return(value=value):
                return [ast.Return(value=self.operand(value, span))]
            case Raise(exception=exception, cause=cause):
                raised, because = (None if part is None else self.operand(part, span) for part in (exception, cause))
                return [ast.Raise(exc=raised, cause=because)]
            case Save(result=result, value=value, copy=False):
                return [ast.Assign(targets=[self.target(result)], value=self.operand(value, span))]
            case (
                Forward() | Prefix() | Release() | Postponed() | Strands() | Strand() | Session() | Invoke() | Steps()
                | FromEnd() | Read() | Write() | Skip() | Save() | Stop()
                | Backward() | Grad() | SetGrad() | At() | Cache() | Record() | Gradients() | Require() | Track()
                | AtGradient() | Edit() | Applied() | Captured()
            ):  # fmt: skip
                return self.model_op(op)
            case _:
                assert_never(op)

    def _checked(
        self, result: Value, value: ast.expr, name: str, error: Callable[[str], NameError], span: Span
    ) -> list[ast.stmt]:
        """Keeps a variable's value, if it has one."""
        target = self.target(result)
        kept: list[ast.stmt] = [ast.Assign(targets=[target], value=value)] if place(value) != place(target) else []
        nothing = self.constant("UNBOUND", support.UNBOUND)
        empty = ast.Compare(left=self.reference(result, span), ops=[ast.Is()], comparators=[nothing])
        made = ast.Call(func=self.constant(error.__name__, error), args=[ast.Constant(name)], keywords=[])
        return [*kept, ast.If(test=empty, body=[ast.Raise(exc=made, cause=None)], orelse=[])]

    def _augmented(self, op: Operator) -> list[ast.stmt]:
        left, right = (self.operand(operand, op.span) for operand in op.operands)
        if op.operator not in BINARY:
            raise IRError(f"{op.span}: {op.operator!r} has no augmented assignment")
        target, changed = self.target(op.result), self.target(op.result)
        assert isinstance(changed, ast.Name | ast.Attribute | ast.Subscript)
        kept: list[ast.stmt] = []
        if place(left) != place(target):
            if reads(right, {place(target)}):
                name = self.names.fresh("change")
                both = ast.Tuple(elts=[target, ast.Name(name, ast.Store())], ctx=ast.Store())
                kept = [ast.Assign(targets=[both], value=ast.Tuple(elts=[left, right], ctx=ast.Load()))]
                right = load(name)
            else:
                kept = [ast.Assign(targets=[target], value=left)]
        return [*kept, ast.AugAssign(target=changed, op=BINARY[op.operator](), value=right)]

    def _set_global(self, op: SetGlobal) -> list[ast.stmt]:
        value = self.operand(op.value, op.span)
        if self.hidden(op.name, op.scope):
            setter = self.accessor("set", op.name, op.scope, op.span)
            return [ast.Expr(value=ast.Call(func=setter, args=[value], keywords=[]))]
        self.scopes[-1].declared[op.name] = op.scope
        return [ast.Assign(targets=[ast.Name(op.name, ast.Store())], value=value)]

    def _variable(self, cell: Value, initial: Operand, span: Span) -> list[ast.stmt]:
        """The start of a cell that is a Python variable. One that only closures assign has to be declared."""
        variable = ast.Name(self.names[cell], ast.Store())
        if not isinstance(initial, Unbound):
            return [ast.Assign(targets=[variable], value=self.operand(initial, span))]
        if cell.name in self.cells.declared:
            return [ast.AnnAssign(target=variable, annotation=load("object"), value=None, simple=1)]
        return []

    def _store(self, op: Store) -> list[ast.stmt]:
        value = self.operand(op.value, op.span)
        if not self.plain_cell(op.cell):
            held = ast.Attribute(value=self.operand(op.cell, op.span), attr="value", ctx=ast.Store())
            return [ast.Assign(targets=[held], value=value)]
        name = self.names[op.cell]
        scope = self.scopes[-1]
        if op.cell.name in scope.captured:
            scope.declared[name] = "free"
        if isinstance(op.value, Unbound):  # it may be empty already, which `del` would not pass over
            emptied = ast.Delete(targets=[ast.Name(name, ast.Del())])
            return [ast.Assign(targets=[ast.Name(name, ast.Store())], value=ast.Constant(None)), emptied]
        return [ast.Assign(targets=[ast.Name(name, ast.Store())], value=value)]

    def _import(self, op: Import) -> list[ast.stmt]:
        name, after = self.named_target(op.result)
        if op.name is not None:
            found = ast.alias(name=op.name, asname=name)
            return [ast.ImportFrom(module=op.module or None, names=[found], level=op.level), *after]
        made: list[ast.stmt] = [ast.Import(names=[ast.alias(name=op.module, asname=name)])]
        top = op.module.partition(".")[0]
        if not op.leaf and top != op.module:
            made.append(ast.Import(names=[ast.alias(name=top, asname=name)]))
        return made + after
