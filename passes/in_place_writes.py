"""In-place writes by name: which ops write to an operand of theirs, which operand, and which storages that changes."""

from __future__ import annotations

from collections.abc import Sequence

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.values import Operand
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.memory import Memory, Root


def in_place(op: Op, memory: Memory) -> bool:
    """Whether an op is known to write its operand in place. A host call may write to what it is given, but is taken to
    do so to the copy that it gets where its values come from different sites."""
    match op:
        case ops.SetItem() | ops.Delete() | ops.SetAttribute():
            return True
        case ops.Operator(in_place=changes):
            return changes
        case ops.Call():
            return memory.origins.known(op) is not None
    return False


def changed_operands(op: Op, memory: Memory) -> Sequence[Operand]:
    """The operands that an op changes, if it is one that writes in place."""
    match op:
        case ops.SetItem(object=base) | ops.SetAttribute(object=base) | ops.Delete(object=base):
            return [base]
        case ops.Operator(operands=(first, *_)):
            return [first]
        case ops.Call() if (known := memory.origins.known(op)) is not None:
            return [argument.value for argument in memory.origins.at(op, known.mutates)]
    return []


def targets(op: Op, memory: Memory) -> frozenset[Root]:
    """The storages that an op changes by name."""
    match op:
        case ops.SetItem() | ops.SetAttribute() | ops.Delete() | ops.Operator():
            of = memory.roots
        case ops.Call():
            known = memory.origins.known(op)
            assert known is not None
            of = memory.roots if known.behaviour is Behaviour.CONTAINER else memory.named
        case _:
            return memory.writes(op)
    return frozenset[Root]().union(*map(of, changed_operands(op, memory)))
