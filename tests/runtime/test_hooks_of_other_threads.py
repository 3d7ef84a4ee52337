"""Hooks of one run, called by a thread that runs the same model at the same time: they do nothing there.

torch notes that a hook takes keywords after it has put the hook in its place: another thread may call it without.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from nnsight_compiler.ir.span import NOWHERE
from nnsight_compiler.runtime.hooks import SitePlan, input_hook
from nnsight_compiler.runtime.observed_calls import observed


def test_a_hook_of_inputs_may_be_called_without_keywords() -> None:
    def never(value: Any, state: Any) -> Any:
        raise AssertionError("this run is another thread's")

    fired = [0]
    hook: Any = input_hook(SitePlan("0", "input", None, never, NOWHERE), object(), None, fired, 0, False)
    assert hook(nn.Linear(2, 2), (torch.ones(2),)) is None
    assert fired == [0]


class Interrupted(nn.Module):
    """Between its two calls of a part, another thread calls it, with other values."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.part(x)
        other = threading.Thread(target=self.part, args=(x + 100,))
        other.start()
        other.join()
        return found


def test_what_is_observed_in_a_call_is_that_of_its_own_thread() -> None:
    module, x = Interrupted(), torch.ones(1, 2)
    result, record = observed(module, x, hook=True)
    assert record["part", "output"] is result
    assert record["part", "input"] is x
