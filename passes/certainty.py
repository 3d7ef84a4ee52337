"""Whether a reduction of a value is sure to be made, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.passes.containers import Container, Element, Put
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.reductions import Reduction
from nnsight_compiler.passes.selections import Numbers

Taken = Sequence[tuple[Element, Reduction]]
"""Elements of a container, with what is computed of them."""

_LOOPS = (ops.For, ops.While)


@final
class Certainty:
    """The answers for one program."""

    def __init__(self, memory: Memory, layout: Layout, numbers: Numbers) -> None:
        self.memory = memory
        self.layout = layout
        self.numbers = numbers

    def is_sure(self, place: Op, reduction: Reduction, whole: tuple[Op, ...] = ()) -> bool:
        """Whether a reduction is made wherever an op ran, if these loops have rounds."""

        def entered(op: Op) -> bool:
            if isinstance(op, ops.For):
                return any(op is each for each in whole) or self.numbers.has_items(op.iterable)
            return isinstance(op, (ops.Forward, ops.Invoke, ops.Session, ops.With))

        return self.layout.sure(place, reduction.ops[-1], entered)

    def is_sure_for_all(self, container: Container, puts: list[Put], taken: Taken) -> bool:
        """Whether it is sure to be made of each of the values that are put, or of one as large as all of them."""
        whole = whole_loops(taken)
        sure = [element for element, each in taken if self.is_sure(container.maker, each, whole)]
        if len(puts) == 1 and puts[0].key is not None:
            return bool(sure)
        after = (each.whole and all(self.layout.before(put.op, each.op) for put in puts) for each in sure)
        return any(after) or (bool(sure) and self._are_alike(container, puts))

    def _are_alike(self, container: Container, puts: list[Put]) -> bool:
        """Whether values come from one run of one forward, with the same dimensions."""
        makers = [op for put in puts if (op := self.memory.origins.definition(put.value)) is not None]
        forwards = {id(self.layout.forward(op)) for op in makers if self.layout.forward(op) is not None}
        types = {put.value.type for put in puts}
        if len(makers) < len(puts) or len(forwards) != 1 or len(types) != 1:
            return False
        if any(self.layout.forward(op) is None or self._loops(op, container.maker) for op in makers):
            return False
        (known,) = types
        return isinstance(known, TensorType) and known.shape is not None and all(
            each.axis is not None or each.size is not None for each in known.shape
        )  # fmt: skip

    def is_repeated(self, reduction: Reduction, place: Op, whole: tuple[Op, ...] = ()) -> bool:
        """Whether a reduction is made several times of what is kept once; these loops come by each value once."""
        return any(all(each is not one for one in whole) for each in self._loops(reduction.ops[-1], place))

    def _loops(self, op: Op, place: Op) -> list[Op]:
        """The loops around an op that are not around another."""
        outer = [each for each, _ in self.layout.around(place)]
        around = (each for each, _ in self.layout.around(op))
        return [each for each in around if isinstance(each, _LOOPS) and all(each is not one for one in outer)]


def whole_loops(taken: Taken) -> tuple[Op, ...]:
    """The loops that come by all elements."""
    return tuple(element.loop for element, _ in taken if element.loop is not None and element.whole)
