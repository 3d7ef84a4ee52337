"""What jobs were found to cost, so that the next one of the same kind is not looked at again.

    steer("The Eiffel Tower is in", vector, 2.0)    the cost of both, as long as the prompts have as many tokens
    steer("The Space Needle is in", other, 3.5)     and the vectors one shape

A cost rests on the code, on what it was compiled to, and on the data as far as sizes depend on it: the shapes of
tensors; of a text that only forwards are given, how many tokens it has; of a number that tensors are only scaled or
shifted by, nothing. All other data counts as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar, final

import torch

from nnsight_compiler.compilation import Compiled
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.traverse import used
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.models import LanguageModel, NNsight
from nnsight_compiler.remote.batch import guarded

MOST = 4096
"""How many costs are kept."""
LONGEST = 1000
"""Entries of containers up to which data is compared."""
_LITERALS = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.Size, range)

Cost = TypeVar("Cost")


@final
class KnownCosts(Generic[Cost]):
    """Costs, by what they rest on."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, tuple[Compiled, Cost]] = OrderedDict()

    def get(self, kind: Hashable, compiled: Compiled) -> Cost | None:
        """The cost of a job of this kind."""
        held = self._held.get(kind)
        if held is None or held[0] is not compiled:
            return None
        self._held.move_to_end(kind)
        return held[1]

    def keep(self, kind: Hashable, compiled: Compiled, cost: Cost) -> None:
        """Notes what a job of this kind costs."""
        self._held[kind] = compiled, cost
        while len(self._held) > MOST:
            self._held.popitem(last=False)


def kind_of(compiled: Compiled, data: Mapping[str, Any], model: NNsight) -> Hashable | None:
    """What a cost rests on besides the code, for these values of the parameters; `None` where that is too much."""
    relied = guarded(compiled.program, compiled.guards)
    uses: dict[str, list[Op]] = {name: [] for name in data}
    for op in compiled.program.walk():
        for value in used(op):
            if value.name in uses:
                uses[value.name].append(op)
    left = [LONGEST]
    parts = []
    for name, held in data.items():
        if name in relied:
            part = _part(held, left)
        elif type(held) is str and isinstance(model, LanguageModel) and _only_given(uses[name]):
            part = "tokens", tuple(model._prepare((held,), {})[1]["input_ids"].shape)
        elif type(held) is float and _only_scales(uses[name]):
            part = "float"
        else:
            part = _part(held, left)
        if part is None:
            return None
        parts.append((name, part))
    return id(compiled), torch.get_default_dtype(), tuple(parts)


def _only_given(ops_: Sequence[Op]) -> bool:
    """Whether a value is the input of forwards, and nothing else."""
    return all(isinstance(op, (ops.Forward, ops.Prefix, ops.Invoke)) for op in ops_)


def _only_scales(ops_: Sequence[Op]) -> bool:
    """Whether a number is only added to tensors, or the like."""
    return all(
        isinstance(op, ops.Operator) and op.operator in ("+", "-", "*", "/") and isinstance(op.result.type, TensorType)
        for op in ops_
    )


def _part(held: Any, left: list[int]) -> Hashable | None:
    """A value as far as sizes may depend on it; `None` for what cannot be told apart from others of its kind."""
    left[0] -= 1
    if left[0] < 0:
        return None
    if isinstance(held, torch.Tensor):
        return "tensor", held.dtype, tuple(held.shape), held.stride(), held.requires_grad, str(held.device)
    if type(held) in _LITERALS:
        return type(held).__name__, held
    if type(held) in (list, tuple):
        parts = [_part(each, left) for each in held]
    elif type(held) is dict:
        parts = [_part(each, left) for item in held.items() for each in item]
    else:
        return None
    return None if None in parts else (type(held).__name__, *parts)


__all__ = ["KnownCosts", "kind_of"]
