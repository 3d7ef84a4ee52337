"""Which cells can be plain Python variables: Python's own variables are boxes too, one for each run of a function.

    %c = cell total = unbound               total = 0
    store %c = 0                     ──▶    total = total + 1
    %0 = load %c as total
    %1 = %0 + 1
    store %c = %1

A cell that is made once in a run of its function, and only loaded and stored, in it or in closures, is a variable of
that function. If it may be empty it also needs its own name, which Python tells when it has no value. A cell that
a loop makes anew stays a box if a closure may keep an old one, and so does one in which a forward takes part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nnsight_compiler.ir.ops import Cell, Closure, For, Load, Op, Region, Steps, Store, While
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions, used
from nnsight_compiler.ir.values import Unbound, Value
from nnsight_compiler.runtime.variables import MODEL_REGIONS


@dataclass(slots=True)
class _Facts:
    """What happens to one cell. `owner` is the body of its function."""

    op: Cell
    owner: Region
    looped: bool
    names: set[str] = field(default_factory=set)
    captured: bool = False
    escapes: bool = False
    emptied: bool = False
    stored_at_home: bool = False

    @property
    def full(self) -> bool:
        """Whether it always has a value."""
        return not self.emptied and not isinstance(self.op.initial, Unbound)


@dataclass(frozen=True, slots=True)
class Cells:
    """What is known of a program's cells, each set by the names of their values.

    full: they start with a value and lose it nowhere.
    plain: Python variables.
    declared: those of them that only closures assign.
    """

    full: frozenset[str]
    plain: frozenset[str]
    declared: frozenset[str]


def study_cells(program: Program, identifiers: dict[str, str]) -> Cells:
    """Sorts the cells of a program.

    identifiers: for each cell the name of its variable, if it gets one.
    """
    found: dict[str, _Facts] = {}
    _study(program.body, program.body, False, False, found)
    known = {name: facts for name, facts in found.items() if not facts.escapes}
    plain = {
        name: facts
        for name, facts in known.items()
        if (facts.full or facts.names <= {identifiers[name]})
        and (not facts.looped or not (facts.captured or isinstance(facts.op.initial, Unbound)))
    }
    return Cells(
        frozenset(name for name, facts in known.items() if facts.full),
        frozenset(plain),
        frozenset(
            name for name, facts in plain.items() if isinstance(facts.op.initial, Unbound) and not facts.stored_at_home
        ),
    )


def _study(region: Region, function: Region, looped: bool, modelled: bool, found: dict[str, _Facts]) -> None:
    for op in region.ops:
        if isinstance(op, Cell):
            found[op.result.name] = _Facts(op, function, looped, escapes=modelled)
        _note(op, function, modelled, found)
        for inner in regions(op):
            if isinstance(op, Closure):
                _study(inner, op.body, False, modelled, found)
            else:
                again = looped or isinstance(op, For | While | Steps)
                _study(inner, function, again, modelled or isinstance(op, MODEL_REGIONS), found)


def _note(op: Op, function: Region, modelled: bool, found: dict[str, _Facts]) -> None:
    """Takes down what an op does to the cells that it mentions."""
    used_as_cell = None
    if isinstance(op, Load | Store) and isinstance(op.cell, Value):
        facts = found.get(op.cell.name)
        if facts is not None:
            used_as_cell = op.cell.name
            at_home = facts.owner is function
            facts.captured |= not at_home
            facts.escapes |= modelled
            if isinstance(op, Load):
                facts.names.add(op.name or "")
            elif isinstance(op.value, Unbound):
                facts.emptied = True
            else:
                facts.stored_at_home |= at_home
    values = [value.name for value in used(op)]
    if used_as_cell is not None:
        values.remove(used_as_cell)
    for name in values:
        if name in found:
            found[name].escapes = True
