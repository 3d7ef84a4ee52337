"""Calls that hand the program to a debugger: `breakpoint()`, `pdb.set_trace()`.

They run where they stand: after all that is written before them, so that its values are there to be looked at. In a
program with such a call nothing is left out and nothing is shared, and the generated functions name values as the
source does.
"""

from __future__ import annotations

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Value


def pausing(program: Program) -> frozenset[str]:
    """The results of the calls of a program that hand it to a debugger."""
    found: set[str] = set()
    callees: set[Value] = set()
    for op in program.walk():
        match op:
            case ops.Global(name="breakpoint" | "set_trace") | ops.Attribute(name="set_trace"):
                callees.add(op.result)
            case ops.Call(function=Value() as callee) if callee in callees:
                found.add(op.result.name)
    return frozenset(found)


def pauses(op: Op, calls: frozenset[str]) -> bool:
    """Whether an op is one of these calls."""
    return isinstance(op, ops.Call) and op.result.name in calls
