"""Calls of a module by several strands, as one call on the stack of what each gives it.

The module treats each vector by itself. The calls run as they would have in the forwards behind which they stand: where
nothing is recorded, without gradients, and else with the weights of the model as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.runtime.autograd_recording import Frozen


@final
@dataclass(slots=True, eq=False)
class CallRequest:
    """A call of a module that a strand waits for: `found` is what it gives, `failure` what it raised.

    one: whether the gradients of all strands are taken in one pass; else each value that has one keeps a graph of its
        own.
    """

    module: nn.Module
    given: Any
    one: bool = False
    found: Any = None
    failure: Exception | None = None


def run_calls(requests: Sequence[CallRequest]) -> None:
    """Runs these calls, those of one module on values of one kind as one."""
    groups: dict[Any, list[CallRequest]] = {}
    for each in requests:
        kind: Any = id(each)
        if isinstance(each.given, torch.Tensor) and (each.one or not each.given.requires_grad):
            kind = each.given.shape, each.given.dtype, each.given.device, each.given.requires_grad
        groups.setdefault((id(each.module), kind), []).append(each)
    for group in groups.values():
        module, values = group[0].module, [each.given for each in group]
        recorded = any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
        with Frozen(module.parameters()) if recorded else torch.no_grad():
            parts = _parts(module, values)
            for number, each in enumerate(group):
                try:
                    each.found = module(each.given) if parts is None else parts[number]
                except Exception as error:
                    each.failure = error


def _parts(module: nn.Module, values: Sequence[Any]) -> Sequence[Any] | None:
    """What a module gives for several values, from one call; `None` where each has a call of its own."""
    if len(values) == 1:
        return None
    try:
        found: torch.Tensor = module(torch.stack(list(values)))
    except Exception:  # whose it is shows where each is by itself
        return None
    return found.unbind()
