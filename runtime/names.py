"""Python identifiers for the values of a program."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable

from nnsight_compiler.ir.ops import Cell, Closure, Global, SetGlobal
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Value
from nnsight_compiler.runtime.regions import stem
from nnsight_compiler.runtime.variables import shared_variables

_FORBIDDEN = frozenset([*keyword.kwlist, *keyword.softkwlist, *dir(builtins)])


def signature_name(value: Value) -> str:
    """The name under which callers know a parameter: the value's name without the suffix that makes it unique."""
    return stem(value.name)


class Names:
    """Gives each value of a program an identifier: `h` for `h`, `h_1` for `h.1`, `v0` for `0`. Values that can share a
    variable (see `variables`) have one identifier, all others have their own.

    Parameters keep the names by which callers may pass them, so two closures can both have an `x`. No other value
    gets the name of a parameter, of a global or free variable that the program mentions, of a builtin, a keyword, or
    one of `reserved`.

    cells: the identifiers of cells, by the names of their values.
    outside: the names that the program takes from around it, each with where it belongs (`global`, `free`).
    """

    def __init__(self, program: Program, reserved: Iterable[str] = ()) -> None:
        self._taken = {*_FORBIDDEN, *reserved}
        self._next: dict[str, int] = {}
        self._found: dict[str, str] = {}
        self.outside: set[tuple[str, str]] = set()
        parameters = list(program.parameters)
        for op in program.walk():
            if isinstance(op, Global | SetGlobal):
                self.outside.add((op.name, op.scope))
                self._taken.add(op.name)
            elif isinstance(op, Closure):
                parameters.extend(op.parameters)
        for parameter in parameters:
            name = signature_name(parameter.value)
            if name.isidentifier() and not keyword.iskeyword(name):
                self._found[parameter.value.name] = name
                self._taken.add(name)

        self.cells = {op.result.name: self.fresh(op.name) for op in program.walk() if isinstance(op, Cell)}
        self._found.update(self.cells)
        for group in shared_variables(program):
            known = next((self._found[name] for name in group if name in self._found), None)
            identifier = self.fresh(stem(group[0])) if known is None else known
            self._found.update(dict.fromkeys(group, identifier))

    def __getitem__(self, value: Value) -> str:
        """The identifier of a value."""
        found = self._found.get(value.name)
        if found is None:
            found = self._found[value.name] = self.fresh(value.name)
        return found

    def give(self, value: Value, identifier: str) -> None:
        """Gives a value this identifier, which the caller keeps free of other meanings."""
        self._found[value.name] = identifier

    def fresh(self, hint: str) -> str:
        """An identifier that nothing else has, close to the hint."""
        stem = re.sub(r"\W", "_", hint) or "v"
        if stem[0].isdigit():
            stem = f"v{stem}"
        number = self._next.get(stem, 0)
        name = f"{stem}_{number}" if number else stem
        while name in self._taken or not name.isidentifier():
            number += 1
            name = f"{stem}_{number}"
        self._next[stem] = number + 1
        self._taken.add(name)
        return name

    def temporary(self, hint: str) -> Value:
        """A new value, which no program has, with an identifier of its own."""
        name = self.fresh(hint)
        self._found[f"{name}.temporary"] = name
        return Value(f"{name}.temporary")
