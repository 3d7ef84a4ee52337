"""Recording what happens to variables, for `flow`: uses, assignments, captures, in the order of evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import libcst as cst

from nnsight_compiler.frontend import unsupported
from nnsight_compiler.frontend.flow import Define, Event, Use, Variable, solve
from nnsight_compiler.frontend.scopes import Analysis, Scope, ScopeKind
from nnsight_compiler.frontend.syntax import Syntax
from nnsight_compiler.frontend.trees import CONSTANTS
from nnsight_compiler.ir.errors import Diagnostic


class EventRecorder:
    """The scope, the loops and the guarded sections around the code being read, and the events so far.

    certain: the code is not part of an expression that may be skipped.
    clock: counts up, so that moments can be compared.
    """

    def __init__(self, syntax: Syntax, analysis: Analysis) -> None:
        self.syntax = syntax
        self.analysis = analysis
        self.scope = analysis.root
        self.events: list[Event] = []
        self.certain = True
        self.in_forward = False
        self.loops: tuple[int, ...] = ()
        self.sections: tuple[int, ...] = ()
        self.breakable = False
        self.clock = 0
        self.global_in_nested: set[str] = set()
        self.deleted: list[tuple[Scope, cst.Name]] = []

    def finish(self, scope: Scope, live_at_end: Sequence[Variable]) -> None:
        """Ends a scope that is code of its own: decides on cells, then on merges."""
        for variable in scope.variables.values():
            variable.cell |= not scope.owns(variable.name) or variable.outlives_a_change()
        live, surely = solve(self.events, live_at_end)
        if scope is self.analysis.root:
            for inner, node in self.deleted:
                if not isinstance(inner.find(self.syntax.name(node.value)), Variable):
                    self.report(node, *unsupported.DELETED_OUTER_NAME)
            self.analysis.live, self.analysis.surely_assigned = live, surely

    def place(self, name: str) -> tuple[Scope, Variable]:
        """The scope in which this code's name is recorded: a comprehension's own, or that of the code around it."""
        scope = self.scope
        while scope.kind == "comprehension" and name not in scope.variables:
            assert scope.parent is not None, "a comprehension stands in other code"
            scope = scope.parent
        return scope, scope.mention(name)

    def use(self, variable: Variable) -> None:
        variable.uses += 1
        for section in self.sections:
            variable.uses_in_section[section] = variable.uses_in_section.get(section, 0) + 1
        self.events.append(Use(variable))

    def define(self, node: cst.Name) -> Variable:
        scope, variable = self.place(self.syntax.name(node.value))
        self.clock += 1
        variable.bound = True
        variable.last_assigned = self.clock
        variable.assigning_loops.update(self.loops)
        variable.assigning_sections.update(self.sections)
        self.events.append(Define(variable, self.certain or scope.kind == "comprehension"))
        return variable

    def delete(self, node: cst.Name) -> None:
        self.name(node)
        self.define(node).deleted = True

    def name(self, node: cst.Name) -> None:
        if node.value not in CONSTANTS:
            self.use(self.place(self.syntax.name(node.value))[1])

    def report(self, node: cst.CSTNode, reason: str, way_out: str) -> None:
        self.analysis.diagnostics.append(Diagnostic(self.syntax.span(node), reason, way_out))

    @contextmanager
    def possibly(self) -> Iterator[None]:
        """Code that may be skipped within an expression."""
        before, self.certain = self.certain, False
        yield
        self.certain = before

    @contextmanager
    def sequence(self) -> Iterator[list[Event]]:
        """Collects the events of a nested sequence."""
        outer, self.events = self.events, []
        yield self.events
        self.events = outer

    @contextmanager
    def loop(self) -> Iterator[None]:
        before = self.loops
        self.clock += 1
        self.loops = (*before, self.clock)
        yield
        self.loops = before

    @contextmanager
    def section(self) -> Iterator[list[Event]]:
        before = self.sections
        self.clock += 1
        self.sections = (*before, self.clock)
        with self.sequence() as events:
            yield events
        self.sections = before

    @contextmanager
    def nested(self, node: cst.CSTNode, kind: ScopeKind) -> Iterator[Scope]:
        """Code that runs later: its own events, and its free names captured where it stands."""
        outer = self.scope
        state = self.events, self.certain, self.loops, self.sections, self.breakable, self.in_forward
        self.scope = self.analysis.scopes[node] = Scope(kind, outer)
        self.events, self.certain, self.loops, self.sections, self.breakable = [], True, (), (), False
        self.in_forward = False
        yield self.scope
        inner, self.scope = self.scope, outer
        self.events, self.certain, self.loops, self.sections, self.breakable, self.in_forward = state
        self.global_in_nested |= inner.declared_global
        for name, variable in inner.variables.items():
            if not inner.owns(name) and name not in inner.declared_global:
                changed = variable.changed_inside or (variable.bound and name in inner.declared_nonlocal)
                self.capture(self.place(name)[1], changed)

    def capture(self, variable: Variable, changed: bool) -> None:
        self.clock += 1
        self.use(variable)
        variable.changed_inside |= changed
        variable.first_captured = min(variable.first_captured, self.clock)
        variable.capturing_loops.update(self.loops)
