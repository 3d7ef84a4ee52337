"""Python expressions from operands, and from the ops that only compute a value."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import TypeGuard, assert_never

from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import (
    Attribute,
    Build,
    Call,
    Cell,
    Format,
    FormatPart,
    Global,
    Item,
    Load,
    Operator,
)
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.runtime import support
from nnsight_compiler.runtime.cells import study_cells
from nnsight_compiler.runtime.names import Names
from nnsight_compiler.runtime.trees import (
    BINARY,
    COMPARISON,
    UNARY,
    function,
    in_call_order,
    load,
    locate,
    plain_arguments,
)

ValueOp = Global | Cell | Load | Attribute | Item | Build | Format | Operator | Call
"""The ops that become an expression, an operator in place and a load that must look first excepted."""


@dataclass(slots=True)
class Scope:
    """One `def` that is being filled.

    parameters: the identifiers of its parameters, which hide globals of the same name.
    declared: the names that it assigns, with where they belong: `global` or `free`.
    captured: the names of the values that it takes from the function around it.
    handed: identifiers of values that it was given as parameters, by the values' names.
    """

    parameters: frozenset[str]
    captured: frozenset[str]
    declared: dict[str, str]
    handed: dict[str, str]


class Expressions:
    """Turns operands and value ops of one program into Python expressions.

    constants: the objects that the generated code needs besides the user's globals, by identifier.
    free: the free variables of the user's function that the program mentions.
    prelude: functions that stand before the generated ones and serve them.
    """

    def __init__(self, program: Program, names: Names) -> None:
        self.program = program
        self.names = names
        self.constants: dict[str, object] = {}
        self.free = frozenset(name for name, scope in names.outside if scope == "free")
        self.prelude: list[ast.stmt] = []
        self._accessors: dict[tuple[str, str, str], str] = {}
        self._constant_names: dict[int, str] = {}
        self.cells = study_cells(program, names.cells)
        self.moved: dict[str, ast.expr] = {}
        self.scopes: list[Scope] = []

    # --- what subclasses change ---

    def reference(self, value: Value, span: Span) -> ast.expr:
        """Where a value is read: a local variable."""
        return load(self.names[value])

    def module(self, operand: Module, span: Span) -> ast.expr:
        """A module of a model: the value that holds the model, and the way from there."""
        found = self.operand(operand.model, span)
        for part in operand.path.split(".") if operand.path else ():
            if part.isdecimal():
                found = ast.Subscript(value=found, slice=ast.Constant(int(part)), ctx=ast.Load())
            else:
                found = ast.Attribute(value=found, attr=part, ctx=ast.Load())
        return found

    # --- operands ---

    def constant(self, hint: str, value: object) -> ast.expr:
        """A name by which generated code reads an object; the same name for the same object."""
        name = self._constant_names.get(id(value))
        if name is None:
            name = self._constant_names[id(value)] = self.names.fresh(hint)
            self.constants[name] = value
        return load(name)

    def operand(self, operand: Operand, span: Span) -> ast.expr:
        """An operand as an expression."""
        match operand:
            case Value():
                moved = self.moved.pop(operand.name, None)
                return moved if moved is not None else self.variable(operand, span)
            case Literal(value=value):
                return _literal(value)
            case Unbound():
                return self.constant("UNBOUND", support.UNBOUND)
            case Module():
                return self.module(operand, span)
            case Slice(lower=lower, upper=upper, step=step):
                parts = [self.operand(part, span) for part in (lower, upper, step)]
                return ast.Call(func=self.constant("slice", slice), args=parts, keywords=[])
            case Tuple(parts=operands):
                return ast.Tuple(elts=[self.operand(part, span) for part in operands], ctx=ast.Load())
            case _:
                assert_never(operand)

    def variable(self, value: Value, span: Span) -> ast.expr:
        for scope in reversed(self.scopes):
            if value.name in scope.handed:
                return load(scope.handed[value.name])
        return self.reference(value, span)

    def was_handed(self, value: Value) -> bool:
        """Whether the code that is being filled holds the value as a parameter of a function around it."""
        return any(value.name in scope.handed for scope in self.scopes)

    def index(self, index: Operand, span: Span) -> ast.expr:
        """What stands between brackets: there a slice has a form of its own."""
        match index:
            case Slice():
                return self._slice(index, span)
            case Tuple(parts=parts) if parts:
                elements = [
                    self._slice(part, span) if isinstance(part, Slice) else self.operand(part, span) for part in parts
                ]
                return ast.Tuple(elts=elements, ctx=ast.Load())
            case _:
                return self.operand(index, span)

    def _slice(self, index: Slice, span: Span) -> ast.expr:
        lower, upper, step = (
            None if part == Literal(None) else self.operand(part, span)
            for part in (index.lower, index.upper, index.step)
        )
        return ast.Slice(lower=lower, upper=upper, step=step)

    # --- names outside the program ---

    def hidden(self, name: str, scope: str) -> bool:
        """Whether a name from outside the program means something else where code is being generated."""
        return any(name in each.parameters for each in self.scopes) or (scope == "global" and name in self.free)

    def accessor(self, action: str, name: str, scope: str, span: Span) -> ast.expr:
        """A function that reads or assigns a name from outside the program, for code in which that name is hidden."""
        key = (action, name, scope)
        if key not in self._accessors:
            identifier = self._accessors[key] = self.names.fresh(f"{action}_{name}")
            declaration: ast.stmt = ast.Global(names=[name]) if scope == "global" else ast.Nonlocal(names=[name])
            if action == "read":
                made = function(identifier, plain_arguments([]), [declaration, ast.Return(value=load(name))])
            else:
                given = self.names.fresh("value")
                assignment = ast.Assign(targets=[ast.Name(name, ast.Store())], value=load(given))
                made = function(identifier, plain_arguments([given]), [declaration, assignment])
            self.prelude.append(locate(made, span))
        return load(self._accessors[key])

    # --- ops ---

    def expression(self, op: ValueOp, span: Span) -> ast.expr:
        """The expression of an op that only computes its result."""
        match op:
            case Global(name=name, scope=scope):
                if self.hidden(name, scope):
                    return ast.Call(func=self.accessor("read", name, scope, span), args=[], keywords=[])
                return load(name)
            case Cell(initial=initial):
                made = self.constant("Cell", support.Cell)
                return ast.Call(func=made, args=[self.operand(initial, span)], keywords=[])
            case Load(cell=cell):
                if self.plain_cell(cell):
                    return load(self.names[cell])
                return ast.Attribute(value=self.operand(cell, span), attr="value", ctx=ast.Load())
            case Attribute(object=owner, name=name):
                return ast.Attribute(value=self.operand(owner, span), attr=name, ctx=ast.Load())
            case Item(object=owner, index=index):
                held = self.operand(owner, span)
                return ast.Subscript(value=held, slice=self.index(index, span), ctx=ast.Load())
            case Build():
                return self._display(op, span)
            case Format():
                return self._format(op, span)
            case Operator():
                return self._operator(op, span)
            case Call():
                return self._call(op, span)
            case _:
                assert_never(op)

    def plain_cell(self, cell: Operand) -> TypeGuard[Value]:
        """Whether a cell is a Python variable."""
        return isinstance(cell, Value) and cell.name in self.cells.plain

    def looks_first(self, op: Load) -> bool:
        """Whether the cell that is loaded may be empty, and Python would not tell."""
        full = isinstance(op.cell, Value) and op.cell.name in self.cells.full | self.cells.plain
        return op.name is not None and not full

    def _display(self, op: Build, span: Span) -> ast.expr:
        if op.kind == "dict":
            keys: list[ast.expr | None] = []
            values: list[ast.expr] = []
            for element in op.elements:
                keys.append(None if element.key is None else self.operand(element.key, span))
                values.append(self.operand(element.value, span))
            return ast.Dict(keys=keys, values=values)
        elements: list[ast.expr] = []
        for element in op.elements:
            value = self.operand(element.value, span)
            elements.append(ast.Starred(value=value, ctx=ast.Load()) if element.starred else value)
        if op.kind == "set":
            return ast.Set(elts=elements)
        return (ast.List if op.kind == "list" else ast.Tuple)(elts=elements, ctx=ast.Load())

    def _format(self, op: Format, span: Span) -> ast.expr:
        return ast.JoinedStr(values=[*map(lambda part: self._format_part(part, span), op.parts)])

    def _format_part(self, part: str | FormatPart, span: Span) -> ast.expr:
        if isinstance(part, str):
            return ast.Constant(part)
        value = self.operand(part.value, span)
        specification: ast.expr | None = None
        if part.specification is not None:
            found = self.operand(part.specification, span)
            if isinstance(found, ast.JoinedStr):
                specification = found
            elif isinstance(found, ast.Constant):
                specification = ast.JoinedStr(values=[found])
            else:
                specification = ast.JoinedStr(values=[ast.FormattedValue(value=found, conversion=-1)])
        return ast.FormattedValue(
            value=value, conversion=ord(part.conversion) if part.conversion else -1, format_spec=specification
        )

    def _operator(self, op: Operator, span: Span) -> ast.expr:
        operands = [self.operand(operand, span) for operand in op.operands]
        sign = op.operator
        if len(operands) == 1 and sign in UNARY:
            return ast.UnaryOp(op=UNARY[sign](), operand=operands[0])
        if len(operands) == 2 and sign in BINARY:
            return ast.BinOp(left=operands[0], op=BINARY[sign](), right=operands[1])
        if len(operands) == 2 and sign in COMPARISON:
            return ast.Compare(left=operands[0], ops=[COMPARISON[sign]()], comparators=[operands[1]])
        raise IRError(f"{span}: {sign!r} is no operator on {len(operands)} operands")

    def _call(self, op: Call, span: Span) -> ast.expr:
        made = ast.Call(func=self.operand(op.function, span), args=[], keywords=[])
        for argument in in_call_order(op.arguments):
            value = self.operand(argument.value, span)
            if argument.star == "*":
                made.args.append(ast.Starred(value=value, ctx=ast.Load()))
            elif argument.star == "**" or argument.keyword is not None:
                made.keywords.append(ast.keyword(arg=argument.keyword, value=value))
            else:
                made.args.append(value)
        return made


def _literal(value: object) -> ast.expr:
    """A constant. A negative number is spelled with its sign, so that the tree reads back from its text."""
    negative = value < 0 if isinstance(value, int) else isinstance(value, float) and math.copysign(1, value) < 0
    if negative:
        assert isinstance(value, int | float)
        return ast.UnaryOp(op=ast.USub(), operand=ast.Constant(-value))
    return ast.Constant(value)  # type: ignore[arg-type]  # the verifier admits nothing else
