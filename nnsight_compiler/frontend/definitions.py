"""The functions and undecorated traces that a text holds, found without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import libcst as cst

from nnsight_compiler.frontend.analysis import analyse_function
from nnsight_compiler.frontend.contexts import trace_item
from nnsight_compiler.frontend.syntax import Syntax
from nnsight_compiler.frontend.trees import dotted_name


@final
@dataclass(frozen=True, slots=True)
class Definition:
    """A function in a text.

    path: its name, after those of the classes and functions around it.
    depth: how many functions stand around it.
    outside: the local names of those functions.
    """

    node: cst.FunctionDef
    path: str
    depth: int
    class_name: str
    outside: frozenset[str]


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """An undecorated `with` whose item number `item` opens a trace.

    names: the local names of the functions around it; `None` in a module or a class.
    """

    node: cst.With
    item: int
    owner: str
    class_name: str
    names: frozenset[str] | None


@final
class Definitions(cst.CSTVisitor):
    """Collects what a text defines, in the order of the text.

    functions: every function.
    experiments: those decorated with `intervene`, under any name that an import gives it.
    traces: every undecorated trace outside of experiments, outermost only.
    """

    def __init__(self, syntax: Syntax) -> None:
        super().__init__()
        self.functions: list[Definition] = []
        self.experiments: list[Definition] = []
        self.traces: list[Trace] = []
        self._syntax = syntax
        self._path: list[cst.FunctionDef | cst.ClassDef] = []
        self._names: list[frozenset[str]] = []
        self._decorators = {"intervene"}
        self._closed = 0
        syntax.module.module.visit(self)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:  # noqa: N802  # libcst's name
        if isinstance(node.names, cst.ImportStar):
            return
        for alias in node.names:
            if alias.name.value == "intervene" and alias.asname is not None:
                self._decorators.add(dotted_name(alias.asname.name))

    def visit_ClassDef(self, node: cst.ClassDef) -> None:  # noqa: N802  # libcst's name
        self._path.append(node)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:  # noqa: N802  # libcst's name
        self._path.pop()

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:  # noqa: N802  # libcst's name
        class_name = self._class_name()
        path = ".".join([each.name.value for each in self._path] + [node.name.value])
        outside = frozenset[str]().union(*self._names)
        definition = Definition(node, path, len(self._names), class_name, outside)
        self.functions.append(definition)
        if any(self._is_ours(decorator.decorator) for decorator in node.decorators):
            if not self._closed:
                self.experiments.append(definition)
            self._closed += 1
        self._path.append(node)
        local = analyse_function(self._syntax.within(class_name), node, ()).root.own_variables()
        self._names.append(frozenset(variable.name for variable in local))

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:  # noqa: N802  # libcst's name
        self._path.pop()
        self._names.pop()
        if any(self._is_ours(decorator.decorator) for decorator in original_node.decorators):
            self._closed -= 1

    def visit_With(self, node: cst.With) -> bool:  # noqa: N802  # libcst's name
        item = trace_item(node)
        if item is None:
            return True
        if not self._closed:
            in_function = bool(self._path) and isinstance(self._path[-1], cst.FunctionDef)
            names = frozenset[str]().union(*self._names) if in_function else None
            owner = self._path[-1].name.value if self._path else ""
            self.traces.append(Trace(node, item, owner, self._class_name(), names))
        return False

    def _class_name(self) -> str:
        """The nearest class around this place, which names are mangled for."""
        return next((each.name.value for each in reversed(self._path) if isinstance(each, cst.ClassDef)), "")

    def _is_ours(self, decorator: cst.BaseExpression) -> bool:
        name = dotted_name(decorator.func if isinstance(decorator, cst.Call) else decorator)
        return name in self._decorators or name.endswith(".intervene")
