"""Warns of values that are computed from the model and then used by nothing. Changes nothing.

    acts = model.layers[3].output        acts = model.layers[3].output
    acts = acts * 0                ──▶   acts = acts * 0        # warning: this changes a name, not the model

Only what was given a name is reported, and neither saves nor reads are: a save that nothing uses is dead by rule.
"""

from __future__ import annotations

import warnings

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import used, walk
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.sites import forwards


class UnusedValueWarning(UserWarning):
    """A value made from a value of the model is used by nothing: probably the model was meant to be changed."""


def check_unused_values(program: Program) -> Program:
    """The program itself; each value of the model's that was computed for nothing is warned of, at its line."""
    wanted = {value.name for op in program.walk() for value in used(op)}
    memory = Memory.of(program)
    for forward in forwards(program.body):
        for op in walk(forward.body):
            if not isinstance(op, (ops.Operator, ops.Call)) or op.result.name in wanted:
                continue
            name = op.result.name.partition(".")[0]
            if name.isdecimal() or not _computes(op, memory):
                continue
            if any(memory.origins.is_from_model(value) for value in used(op)):
                warnings.warn_explicit(
                    f"`{name}` is made from a value of the model and used by nothing, so the model is not changed;"
                    " to change it, assign a module's `.output`, or write to it in place",
                    UnusedValueWarning,
                    op.span.file,
                    op.span.line,
                )
    return program


def _computes(op: ops.Operator | ops.Call, memory: Memory) -> bool:
    """Whether an op does nothing besides computing its result."""
    if isinstance(op, ops.Operator):
        return not op.in_place
    known = memory.origins.known(op)
    return known is not None and known.behaviour in (Behaviour.PURE, Behaviour.VIEW) and not known.random
