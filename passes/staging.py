"""Stages: what depends on a value that only a run can give is specialised when the run has given it.

    layer = choose()                                      layer = choose()
    with model.trace(prompt):                 ──▶         stage(model, prompt, layer)
        h = model.layers[layer].output                    # compiled when it is called, once for each layer

The op that needs to know such a value, and all that follows it in its region, becomes the program of a stage. It is
specialised with the values that it takes known, as an experiment is with its arguments, and guarded on those that it
needs. So everything with an effect runs once, at run time, in the order of the source. No stage begins inside a
forward: its model could not wait for it.
"""

from __future__ import annotations

from dataclasses import replace

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.values import UNBOUND, Unbound, Value
from nnsight_compiler.passes.control_flow import ControlFlow
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements
from nnsight_compiler.passes.interpretation import Undecided
from nnsight_compiler.passes.outline import outline


class Staging(ControlFlow):
    """Cuts regions off where a stage begins."""

    def staged(self, region: Region, index: int) -> Region:
        op = region.ops[index]
        needs = self.decisions.stages[id(op)]
        if self._only_repeats(region, index):
            self.not_known(Abstract(None), self.span(op), needs)
        cut = self.decisions.outlines.get(id(op))
        if cut is None:
            cut = outline(region, index, self.function, self.frame.name, self.program.span)
            self.decisions.outlines[id(op)] = cut
        held = [self.scope[value] for value in cut.free]
        for value in held:
            if not self._can_cross(value):
                raise Undecided(whole={id(op)})
        span = self.span(op)
        stage, result = self.builder.fresh("stage"), self.builder.fresh()
        bound = [number for number, value in enumerate(held) if not isinstance(value.operand, Unbound)]
        self.emit(ops.Stage(stage, _taking(cut.program, bound), needs, span=span))
        arguments = tuple(ops.Argument(self.handed_over(held[number])) for number in bound)
        self.emit(ops.Call(result, stage, arguments, span=span))
        self.stages[stage.name] = self.frame
        self.disturb()
        for value in held:
            if isinstance(value.fact, Elements):
                value.fact.forget()
        loops = NO_LOOPS.union(*(value.loops for value in held))
        self.scope[cut.result] = Abstract(result, None, loops, 0, span, at_run=True)
        return Region((), cut.rest)

    def _only_repeats(self, region: Region, index: int) -> bool:
        """Whether a stage would do nothing but begin another: what it needs to know, it does not find out."""
        closures = sum(isinstance(op, ops.Closure) for op in region.ops[:index])
        return self.program.kind == "stage" and region is self.program.body and closures == index

    def _can_cross(self, value: Abstract) -> bool:
        """Whether a value can be handed to a stage."""
        self.evaluate.resolved(value)
        if isinstance(value.fact, Elements) and value.fact.items is not None:
            return all(map(self._can_cross, value.fact.items))
        return value.operand is not None or value.make is not None


def _taking(program: Program, numbers: list[int]) -> Program:
    """The program with these of its parameters; the others have no value."""
    kept = tuple(program.parameters[number] for number in numbers)
    if len(kept) == len(program.parameters):
        return program
    without: dict[Value, Unbound] = {
        parameter.value: UNBOUND for parameter in program.parameters if parameter not in kept
    }
    return replace(program, parameters=kept, body=substitute(program.body, dict(without)))
