"""Leaves out the copies that saves do not need.

    %y = call torch.Tensor.softmax(%x, -1)            %y = call torch.Tensor.softmax(%x, -1)
    %s = save %y                              ──▶     %s = keep %y
    return %s                                         return %s

A save copies, so that nothing that happens later changes what was saved. The copy is left out only where
nothing can: the value is made by the program itself, so that the model never holds it, and is all of its storage, so
that it keeps nothing larger alive; no op of the program writes to it; and no container, closure, cell or host call got
hold of it. Of several saves of one value one keeps it, and none where it is returned besides: two results are two
tensors to whoever changes one of them. In doubt the copy stays.
"""

from __future__ import annotations

from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.ir.values import Operand, Value, values_in
from nnsight_compiler.passes.memory import Fresh, Memory, Root


def copy_on_save(program: Program) -> Program:
    """The program whose saves copy only where something may write to the value later."""
    memory = Memory.of(program)
    written: set[Root] = set()
    returned: set[Root] = set()
    kept: set[Operand] = set()
    for op in program.walk():
        written |= memory.writes(op)
        if isinstance(op, ops.Save) and not op.copy:
            kept.add(op.value)
        elif isinstance(op, (ops.Return, ops.Emit)):
            for value in values_in(op.value):
                if not isinstance(memory.origins.definition(value), ops.Save):
                    returned |= memory.reachable(value)

    def safe(save: ops.Save) -> bool:
        roots = memory.roots(save.value)
        made_here = isinstance(save.value, Value) and roots == {Fresh(save.value.name)}
        return (
            made_here
            and not memory.live(save.value)
            and not memory.live(save.result)
            and not memory.escaped(save.value)
            and not roots & returned
            and not memory.overlap(roots | memory.roots(save.result), written)
        )

    def change(op: Op) -> Op:
        if isinstance(op, ops.Save) and op.copy and op.value not in kept and safe(op):
            kept.add(op.value)
            return replace(op, copy=False)
        return rewrite(op, region=inside)

    def inside(region: Region) -> Region:
        return Region(region.parameters, tuple(map(change, region.ops)))

    return replace(program, body=inside(program.body))
