"""The state of lowering: what each variable holds at this point, and how it merges where paths meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal as OneOf
from typing import final

import libcst as cst

from nnsight_compiler.frontend.flow import Variable
from nnsight_compiler.frontend.scopes import Analysis, Scope
from nnsight_compiler.frontend.syntax import Syntax
from nnsight_compiler.frontend.trees import CONSTANTS
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import (
    Bound,
    Break,
    Cell,
    Continue,
    For,
    Global,
    If,
    Load,
    Op,
    Region,
    SetGlobal,
    Store,
    Yield,
)
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import UNBOUND, Operand, Unbound, Value, values_in

Environment = dict[Variable, Operand]


@final
@dataclass(slots=True)
class Arm:
    """One of two paths that meet: its ops, what the variables hold at its end, whether control reaches that end, and
    the value of the expression that it computes, if it is one."""

    ops: list[Op]
    environment: Environment
    alive: bool
    value: Operand | None


@final
@dataclass(slots=True)
class LoopFrame:
    """The loop around the code being lowered: what it carries, and which of that may be unassigned at its exits."""

    carried: list[Variable]
    unsure: set[Variable] = field(default_factory=set)
    unsure_at_break: set[Variable] = field(default_factory=set)


class Lowering(ABC):
    """Variables, paths and loops. Subclasses lower expressions and statements.

    unsure: names of values that may stand for an unassigned variable, so that a use goes through `bound`.
    assigned: every assignment of an SSA variable so far, in order; expressions merge what their paths assigned.
    alive: control reaches this point.
    in_forward: the code stands inside a forward, where `.output`, `.input` and `.inputs` are sites.
    in_backward: it stands inside a backward pass, where `.grad` is a gradient. In both, `.save()` is known.
    """

    def __init__(self, syntax: Syntax, analysis: Analysis) -> None:
        self.syntax = syntax
        self.analysis = analysis
        self.scope: Scope = analysis.root
        self.builder = Builder()
        self.environment: Environment = {}
        self.cells: dict[Variable, Value] = {}
        self.unsure: set[str] = set()
        self.assigned: list[Variable] = []
        self.alive = True
        self.loop: LoopFrame | None = None
        self.in_forward = False
        self.in_session = False
        self.in_backward = False

    @abstractmethod
    def expression(self, node: cst.BaseExpression, hint: str = "") -> Operand:
        """The value of an expression. `hint` is the name of the variable that it goes to."""

    @abstractmethod
    def condition(self, node: cst.BaseExpression) -> Operand:
        """An operand that is true where the expression is. Nothing is tested twice."""

    def fresh(self, hint: str = "") -> Value:
        """A new value, named after a variable where there is one."""
        return self.builder.fresh(hint)

    def span(self, node: cst.CSTNode) -> Span:
        """Where a node stands."""
        return self.syntax.span(node)

    # --- variables ---

    def declare(self, scope: Scope, given: dict[str, Value], span: Span) -> None:
        """Begins a scope: its parameters are bound, its cells made."""
        for variable in scope.own_variables():
            initial = given.get(variable.name, UNBOUND)
            if variable.cell:
                cell = self.fresh(variable.name)
                self.builder.emit(Cell(cell, variable.name, initial, span=span))
                self.cells[variable] = cell
            else:
                self.environment[variable] = initial

    def read(self, name: str, span: Span) -> Operand:
        """The value of a name."""
        found = self.scope.find(name)
        if not isinstance(found, Variable):
            result = self.fresh(name)
            self.builder.emit(Global(result, name, found, span=span))
            return result
        if found.cell:
            result = self.fresh(name)
            self.builder.emit(Load(result, self.cells[found], name, span=span))
            return result
        value = self.environment.get(found, UNBOUND)
        if self.is_unsure(value):
            result = self.fresh(name)
            self.builder.emit(Bound(result, value, name, span=span))
            self.environment[found] = value = result
        return value

    def assign(self, name: str, value: Operand, span: Span) -> None:
        """Gives a name a value; `Unbound` deletes it."""
        found = self.scope.find(name)
        if not isinstance(found, Variable):
            self.builder.emit(SetGlobal(name, value, found, span=span))
        elif found.cell:
            self.builder.emit(Store(self.cells[found], value, span=span))
        else:
            self.environment[found] = value
            self.assigned.append(found)

    def is_plain(self, node: cst.BaseExpression) -> bool:
        """Whether evaluating the expression runs no code and reads no memory."""
        match node:
            case cst.Name(value=value):
                if value in CONSTANTS:
                    return True
                found = self.scope.find(self.syntax.name(value))
                if not isinstance(found, Variable) or found.cell:
                    return False
                return found in self.environment and not self.is_unsure(self.environment[found])
            case cst.Integer() | cst.Float() | cst.Imaginary() | cst.SimpleString() | cst.Ellipsis():
                return True
        return False

    def is_unsure(self, value: Operand) -> bool:
        """Whether the value may stand for an unassigned variable."""
        return isinstance(value, Unbound) or (isinstance(value, Value) and value.name in self.unsure)

    def held(self, variables: Iterable[Variable]) -> tuple[Operand, ...]:
        """What the variables hold here."""
        return tuple(self.environment.get(variable, UNBOUND) for variable in variables)

    def merge_value(self, variable: Variable, unsure: bool) -> Value:
        """A new value of a variable where paths meet; the variable holds it from here on."""
        value = self.fresh(variable.name)
        if unsure:
            self.unsure.add(value.name)
        self.environment[variable] = value
        return value

    # --- paths ---

    def choose(
        self,
        condition: Operand,
        then: Callable[[], Operand | None],
        orelse: Callable[[], Operand | None],
        span: Span,
        hint: str = "",
        merged: Iterable[Variable] | None = None,
    ) -> Operand | None:
        """An `if` over two paths. `merged`: the variables to merge where the paths meet; by default all that a path
        assigned. Returns the value, if the paths compute one."""
        before, alive, start = self.environment, self.alive, len(self.assigned)
        arms: list[Arm] = []
        for path in (then, orelse):
            self.environment, self.alive = dict(before), alive
            with self.builder.region() as ops:
                value = path()
            arms.append(Arm(ops, self.environment, self.alive, value))
        self.environment = before
        changed = dict.fromkeys(self.assigned[start:])
        self.assigned[start:] = changed
        self.alive = arms[0].alive or arms[1].alive
        results: list[Value] = []
        yielded: list[list[Operand]] = [[], []]
        result: Value | None = None
        if arms[0].value is not None and arms[1].value is not None:
            result = self.fresh(hint)
            results.append(result)
            yielded = [[arms[0].value], [arms[1].value]]
        for variable in (changed if merged is None else merged) if self.alive else ():
            operands = [arm.environment.get(variable, UNBOUND) for arm in arms]
            reaching = [operand for operand, arm in zip(operands, arms, strict=True) if arm.alive]
            agree = all(each == reaching[0] for each in reaching)
            if agree and (len(reaching) == 2 or not any(values_in(reaching[0]))):
                before[variable] = reaching[0]
                continue
            results.append(self.merge_value(variable, any(map(self.is_unsure, reaching))))
            for operand, column in zip(operands, yielded, strict=True):
                column.append(operand)
        for arm, column in zip(arms, yielded, strict=True):
            if arm.alive and results:
                arm.ops.append(Yield(tuple(column), span=span))
        regions = [Region((), tuple(arm.ops)) for arm in arms]
        self.builder.emit(If(tuple(results), condition, regions[0], regions[1], span=span))
        return result

    def value_of(
        self,
        condition: Operand,
        then: Callable[[], Operand],
        orelse: Callable[[], Operand],
        span: Span,
        hint: str = "",
    ) -> Operand:
        """A conditional value."""
        value = self.choose(condition, then, orelse, span, hint)
        assert value is not None, "both paths compute a value"
        return value

    # --- loops ---

    def iterate(
        self,
        iterable: Operand,
        carried: list[Variable],
        body: Callable[[Value], None],
        span: Span,
        hint: str = "",
        orelse: Callable[[], None] | None = None,
    ) -> None:
        """A `for` over an iterable; `body` is given the item."""
        before, start = self.environment, len(self.assigned)
        initial = self.held(carried)
        unsure = {variable for variable, value in zip(carried, initial, strict=True) if self.is_unsure(value)}
        self.environment = dict(before)
        item = self.fresh(hint)
        parameters = [self.merge_value(each, each in unsure or each.deleted) for each in carried]
        inner, frame = self.loop_body(carried, lambda: body(item), span)
        region = Region((item, *parameters), inner)
        frame.unsure |= unsure
        otherwise = self.loop_exit(frame, before, orelse, span)
        results = self.loop_results(frame, before, start)
        self.builder.emit(For(results, iterable, initial, region, otherwise, span=span))

    def loop_body(
        self, carried: list[Variable], body: Callable[[], None], span: Span
    ) -> tuple[tuple[Op, ...], LoopFrame]:
        """The ops of a loop's body, which begins the next round at its end."""
        frame = LoopFrame(carried)
        outer, self.loop = self.loop, frame
        with self.builder.region() as ops:
            body()
            if self.alive:
                self.jump("continue", span)
        self.loop, self.alive = outer, True
        return tuple(ops), frame

    def loop_exit(
        self, frame: LoopFrame, before: Environment, orelse: Callable[[], None] | None, span: Span
    ) -> Region | None:
        """The `else` of a loop, after which code counts as reachable. What may be unassigned where the loop ends is in
        `frame.unsure` afterwards."""
        unsure_at_head, frame.unsure = frame.unsure, frame.unsure_at_break
        if orelse is None:
            frame.unsure |= unsure_at_head
            return None
        self.environment = dict(before)
        parameters = [self.merge_value(each, each in unsure_at_head) for each in frame.carried]
        with self.builder.region() as ops:
            orelse()
            if self.alive:
                held = self.held(frame.carried)
                frame.unsure |= {each for each, value in zip(frame.carried, held, strict=True) if self.is_unsure(value)}
                self.builder.emit(Yield(held, span=span))
        self.alive = True
        return Region(tuple(parameters), tuple(ops))

    def loop_results(self, frame: LoopFrame, before: Environment, start: int) -> tuple[Value, ...]:
        """The results of a loop, which the carried variables hold from here on."""
        self.environment = before
        self.assigned[start:] = frame.carried
        return tuple(self.merge_value(variable, variable in frame.unsure) for variable in frame.carried)

    def jump(self, word: OneOf["break", "continue"], span: Span) -> None:
        """Leaves the body of the nearest loop."""
        frame = self.loop
        assert frame is not None, "a jump outside of loops is refused before lowering"
        held = self.held(frame.carried)
        unsure = {variable for variable, value in zip(frame.carried, held, strict=True) if self.is_unsure(value)}
        if word == "break":
            frame.unsure_at_break |= unsure
            self.builder.emit(Break(held, span=span))
        else:
            frame.unsure |= unsure
            self.builder.emit(Continue(held, span=span))
        self.alive = False


def in_order(variables: Iterable[Variable]) -> list[Variable]:
    """The SSA variables among these, in the order of their first mention."""
    return sorted((each for each in variables if not each.cell), key=lambda each: (each.order, each.name))
