"""Gradients and segments: a graph of autograd stays on the side where it was recorded.

    loss = model_loss(…)          a segment
    log(loss)                     the client
    loss.backward()               refused: the graph of `loss` is no longer there

What a segment is given is a constant to its gradients. What the client computed from its own tensors alone is its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Operand, Value, values_in
from nnsight_compiler.remote.sides import Side, Sides

REASON = (
    "this is a gradient of what another part of the experiment computes, and values are handed over without their graph"
)
WAY_OUT = "write `with loss.backward():` where the loss is computed, with no code of the client's between"
_FUNCTIONS = ("torch.autograd.grad", "torch.autograd.backward")


@final
class Graphs:
    """Tells which values come out of the model, and of which a gradient is taken."""

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self._of_model: dict[str, bool] = {}

    def of_model(self, value: Value) -> bool:
        """Whether a value was computed from the model's."""
        if value.name not in self._of_model:
            self._of_model[value.name] = False
            op = self.sides.made.get(value.name)
            inside = [] if op is None else [op, *(each for region in regions(op) for each in walk(region))]
            self._of_model[value.name] = any(
                (self.sides.side(each) is Side.WORKER and self.asks(each) is None)
                or any(self.of_model(operand) for operand in used(each))
                for each in inside
            )
        return self._of_model[value.name]

    def asks(self, op: Op) -> Operand | None:
        """What an op computes gradients of, if it does."""
        match op:
            case ops.Backward(loss=loss) | ops.Gradients(outputs=loss):
                return loss
            case ops.Call(function=Value(name=name), arguments=arguments):
                maker = self.sides.made.get(name)
                if isinstance(maker, ops.Attribute) and maker.name == "backward":
                    return maker.object if self.sides.target(op) not in _FUNCTIONS else _first(arguments)
                return _first(arguments) if self.sides.target(op) in _FUNCTIONS else None
        return None

    def is_clients(self, op: Op) -> bool:
        """Whether an op computes gradients of what the client computed by itself."""
        loss = self.asks(op)
        return loss is not None and not any(self.of_model(value) for value in values_in(loss))

    def check(self, taken: tuple[Op, ...]) -> None:
        """Refuses a segment that computes a gradient of what is not its own."""
        inside = {value.name for op in walk(Region((), taken)) for value in defined(op)}
        self._refuse(walk(Region((), taken)), inside)

    def check_client(self, op: Op) -> None:
        """Refuses an op of the client's that computes a gradient of what a segment gave."""
        self._refuse([op], set())

    def _refuse(self, found: Iterable[Op], own: set[str]) -> None:
        problems = []
        for op in found:
            loss = self.asks(op)
            for value in () if loss is None else values_in(loss):
                maker = self.sides.made.get(value.name)
                if value.name not in own and self.of_model(value) and maker is not None:
                    problems.append(Diagnostic(op.span, REASON, WAY_OUT, ((maker.span, "it is computed here"),)))
        if problems:
            raise CompileError(problems)


def _first(arguments: tuple[ops.Argument, ...]) -> Operand | None:
    return arguments[0].value if arguments else None
