"""Variables in boxes, while a program is specialised: those that a closure shares with the code around it.

What a box holds is followed until code in a kept region may change it: so a variable of a closure can name a module.
"""

from __future__ import annotations

from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Unbound
from nnsight_compiler.passes.facts import Abstract, Elements, Known
from nnsight_compiler.passes.interpretation import Interpretation


def interpret_cell(interpretation: Interpretation, op: ops.Cell | ops.Load | ops.Store) -> None:
    """Interprets what makes a box, fills it, or looks into it."""
    match op:
        case ops.Cell():
            initial = interpretation.abstract(op.initial)
            box = Elements("list", [initial])
            _keep_with_unknown(interpretation, op, initial)
            interpretation.scope[op.result].fact = box
        case ops.Store():
            held = interpretation.abstract(op.cell)
            value = interpretation.abstract(op.value)
            _keep_with_unknown(interpretation, op, value)
            if isinstance(held.fact, Elements) and held.fact.items is not None:
                held.fact.items = [value]
            interpretation.change(held)
        case ops.Load():
            held = interpretation.abstract(op.cell)
            if isinstance(held.fact, Elements) and held.fact.items is not None:
                (value,) = held.fact.items
                if not isinstance(value.operand, Unbound):
                    interpretation.scope[op.result] = value
                    return
            kept = interpretation.keep(op)
            assert kept is not None
            match held.fact:
                case Elements():
                    kept.loops |= held.fact.loops
                case Known(value=box, text=text) if interpretation.relies_on(box):
                    if box.value is not interpretation.subject.unbound:
                        kept.fact = Known(box.value, f"{text}.value")
                case Known():
                    kept.at_run = True


def _keep_with_unknown(interpretation: Interpretation, op: ops.Cell | ops.Store, value: Abstract) -> None:
    """Keeps an op that stores a value; a module or a function that touches the model leaves the box empty."""
    if value.operand is not None or isinstance(value.fact, Elements):
        interpretation.keep(op)
    elif isinstance(op, ops.Cell):
        interpretation.keep(replace(op, initial=Unbound()))
