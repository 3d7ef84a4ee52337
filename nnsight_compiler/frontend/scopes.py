"""The scopes of a program: which names belong to which, and what is known of them before lowering."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Literal as OneOf
from typing import final

import libcst as cst

from nnsight_compiler.frontend.flow import Branch, Loop, Variable
from nnsight_compiler.ir.errors import Diagnostic

ScopeKind = OneOf["function", "block", "generator", "comprehension"]
Comprehension = cst.ListComp | cst.SetComp | cst.DictComp
Suite = cst.BaseSuite | Sequence[cst.BaseStatement | cst.BaseSmallStatement]


@final
@dataclass(eq=False, slots=True)
class Scope:
    """A scope and its names. A comprehension's is evaluated in place; the others are code of their own.

    outside: for the outermost scope, the names that belong to functions around the program.
    frame: for a block, the names that belong to the frame around it and not to its globals.
    complete: whether `frame` is all of them, as for a function; in a module or a class, what the block assigns is too.
    traced: for a block, the name of the model that it traces, whose value is at hand.
    walrus: for a comprehension, the variables of the surrounding code that it assigns.
    """

    kind: ScopeKind
    parent: Scope | None = None
    outside: Container[str] = ()
    frame: Container[str] = ()
    complete: bool = False
    traced: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    declared_global: set[str] = field(default_factory=set)
    declared_nonlocal: set[str] = field(default_factory=set)
    walrus: set[Variable] = field(default_factory=set)

    def mention(self, name: str) -> Variable:
        """The scope's record of the name, made on its first mention."""
        return self.variables.setdefault(name, Variable(name, len(self.variables)))

    def owns(self, name: str) -> bool:
        """Whether the name is a variable of this scope."""
        if name in self.declared_global or name in self.declared_nonlocal:
            return False
        variable = self.variables.get(name)
        if variable is None or self.kind != "block":
            return variable is not None and variable.bound
        return (
            name in self.frame
            or name == self.traced
            or (not self.complete and (variable.bound or variable.changed_inside))
        )

    def find(self, name: str) -> Variable | OneOf["global", "free"]:
        """What the name means in code of this scope."""
        scope: Scope | None = self
        while scope is not None:
            if scope.owns(name):
                return scope.variables[name]
            if name in scope.declared_global:
                return "global"
            if scope.parent is None:
                return "free" if name in scope.outside else "global"
            scope = scope.parent
        raise AssertionError("every chain of scopes ends")

    def own_variables(self) -> list[Variable]:
        """The variables of this scope, in the order of their first mention."""
        return [variable for name, variable in self.variables.items() if self.owns(name)]


@final
@dataclass(slots=True)
class Analysis:
    """What lowering needs to know. Nodes are compared by identity.

    live: the variables that are used before they are assigned; a block's come from the frame.
    surely_assigned: the variables that every way to the end has assigned.
    """

    root: Scope
    scopes: dict[cst.CSTNode, Scope] = field(default_factory=dict)
    branches: dict[cst.CSTNode, Branch] = field(default_factory=dict)
    loops: dict[cst.CSTNode, Loop] = field(default_factory=dict)
    live: set[Variable] = field(default_factory=set)
    surely_assigned: set[Variable] = field(default_factory=set)
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def reads(self) -> list[Variable]:
        """The variables that are used before they are assigned."""
        return [each for each in self.root.own_variables() if each in self.live]

    def exports(self) -> list[Variable]:
        """The variables of a block that it assigns or deletes."""
        return [each for each in self.root.own_variables() if each.bound or each.changed_inside]
