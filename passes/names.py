"""What names stand for, while a program is specialised: globals, builtins, and the free variables of closures.

A name of the program's own stays one, looked up at its line; one of a helper that is inlined from elsewhere is fetched
from the helper's module. Either is known, and guarded on where that is relied on, until the program assigns it.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.passes.facts import Abstract, anchored, immutable
from nnsight_compiler.passes.interpretation import Interpretation


def read_name(specialiser: Interpretation, op: ops.Global) -> Abstract:
    """The value of a name that is no variable of the function."""
    frame = specialiser.frame
    if op.scope == "free":
        return _free(specialiser, op)
    own_builtins = vars(builtins)
    if op.name not in frame.globals and op.name not in own_builtins:
        return _undefined(specialiser, op)
    value = frame.globals[op.name] if op.name in frame.globals else own_builtins[op.name]
    own_globals = specialiser.subject.globals
    same_builtin = op.name not in frame.globals and op.name not in own_globals
    if frame.own or frame.globals is own_globals or same_builtin:
        return _looked_up(specialiser, op, value, op.name)
    held = specialiser.guards.name(frame.globals, "globals")
    fact = anchored(value, f"{held}[{op.name!r}]")
    module = frame.globals.get("__name__")
    if vars(sys.modules.get(str(module), builtins)) is not frame.globals:
        return Abstract(Literal(value) if immutable(value) else None, fact, span=op.span)
    owner = specialiser.builder.fresh("module")
    result = specialiser.builder.fresh(op.name)
    span = specialiser.span(op)
    specialiser.emit(ops.Import(owner, str(module), leaf=True, span=span))
    specialiser.emit(ops.Attribute(result, owner, op.name, span=span))
    if _assigned(specialiser, op, value):
        return Abstract(result, span=span, at_run=True)
    return Abstract(result, fact, span=span)


def _kept(specialiser: Interpretation, op: ops.Global) -> Abstract:
    kept = specialiser.keep(op)
    assert kept is not None
    return kept


def _looked_up(specialiser: Interpretation, op: ops.Global, value: Any, text: str) -> Abstract:
    """A name that Python looks up where the specialised program says it: known unless it may be assigned by then."""
    kept = _kept(specialiser, op)
    if _assigned(specialiser, op, value):
        kept.at_run = True
    else:
        kept.fact = anchored(value, text)
    return kept


def _undefined(specialiser: Interpretation, op: ops.Global) -> Abstract:
    """A name that stands for nothing now: looked up at its line, where Python raises unless it was assigned by then,
    even if nothing uses it."""
    found = _kept(specialiser, op)
    assert isinstance(found.operand, Value)
    result = specialiser.builder.fresh(op.name)
    specialiser.emit(ops.Bound(result, found.operand, op.name, span=specialiser.span(op)))
    return Abstract(result, span=found.span, at_run=True)


def _assigned(specialiser: Interpretation, op: ops.Global, value: Any) -> bool:
    """Whether a name may stand for another value by now. One that stands for a module, a function or an object is taken
    to stay; what the object holds is another question."""
    changes = specialiser.changes
    if not immutable(value):
        return op.name in changes.names
    specialiser.reliances += 1
    return changes.anything or op.name in changes.names


def _free(specialiser: Interpretation, op: ops.Global) -> Abstract:
    frame = specialiser.frame
    cell = frame.closure.get(op.name)
    try:
        value = None if cell is None else cell.cell_contents
    except ValueError:
        cell = None
    if cell is None and frame.own:
        return _kept(specialiser, op)
    if cell is None:
        specialiser.fail(op.span, f"`{op.name}` has no value yet")
    text = f"{specialiser.guards.name(cell, op.name)}.cell_contents"
    if frame.own:
        return _looked_up(specialiser, op, value, text)
    return Abstract(Literal(value) if immutable(value) else None, anchored(value, text), span=op.span)
