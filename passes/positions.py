"""What an index means outside of loops over steps of a generation: a position of the prompt, or one of each step.

An index of the dimension that counts tokens that is not negative is a position of the prompt; a negative one counts
from the end of each step, and so do slices without bounds. Which dimension that is, `infer` has found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal as OneOf

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import NONE, Literal, Operand, Slice, Tuple, Value

Where = OneOf["prompt", "each", "run"]
"""A position of the prompt; one of each step; the run tells which."""


class Positions:
    """Tells the positions that items name. `makers`: the op that makes a value."""

    def __init__(self, makers: Mapping[str, Op]) -> None:
        self.makers = makers

    def of(self, op: ops.Item | ops.SetItem) -> Where:
        """Which step the index of an item means."""
        found = [self._where(part, op) for part in self._of_tokens(op)]
        return "prompt" if "prompt" in found else "run" if "run" in found else "each"

    def at_run(self, op: ops.Item | ops.SetItem) -> Operand | None:
        """The part of an index by which the run can tell; `None` where it is known before."""
        if self.of(op) != "run":
            return None
        parts = [part for part in self._of_tokens(op) if self._where(part, op) == "run"]
        return parts[0] if len(parts) == 1 else Tuple(tuple(parts))

    def _of_tokens(self, op: ops.Item | ops.SetItem) -> Iterator[Operand]:
        """The parts of an index that stand at dimensions which count tokens."""
        kind = op.object.type if isinstance(op.object, Value) else None
        if not isinstance(kind, TensorType) or kind.shape is None:
            return
        parts = op.index.parts if isinstance(op.index, Tuple) else (op.index,)
        consuming = [part for part in parts if part != NONE and part != Literal(...)]
        dimension = 0
        for part in parts:
            if part == NONE:
                continue
            if part == Literal(...):
                dimension += len(kind.shape) - len(consuming)
                continue
            if dimension < len(kind.shape) and "tokens" in (kind.shape[dimension].axis or ""):
                yield part
            dimension += self._dimensions(part)

    @staticmethod
    def _dimensions(part: Operand) -> int:
        """How many dimensions a part of an index stands for: a mask as many as it has."""
        kind = part.type if isinstance(part, Value) else None
        if isinstance(kind, TensorType) and kind.dtype == "bool" and kind.shape:
            return len(kind.shape)
        return 1

    def _where(self, part: Operand, op: Op) -> Where:
        match part:
            case Literal(value=int() as number):
                return "each" if number < 0 else "prompt"
            case Slice(lower=lower, upper=upper):
                found = [self._where(bound, op) for bound in (lower, upper) if bound != NONE]
                return "prompt" if "prompt" in found else "run" if "run" in found else "each"
            case Tuple(parts=parts):
                return self._several(parts, op)
            case Value(name=name):
                maker = self.makers.get(name)
                if isinstance(maker, ops.Build) and all(not each.starred for each in maker.elements):
                    return self._several(tuple(each.value for each in maker.elements), op)
                return "run"
        return "each"

    def _several(self, parts: tuple[Operand, ...], op: Op) -> Where:
        found = {self._where(part, op) for part in parts}
        if {"prompt", "each"} <= found:
            reason = "this index names positions of the prompt and, with negative numbers, some of each step"
            raise CompileError([Diagnostic(op.span, reason, "write two lines, one for each")])
        return "run" if "run" in found else "prompt" if "prompt" in found else "each"
