"""The state of torch's generator goes along with a program that draws, and comes back: as if it drew here.

Which calls draw is told by the names that a program mentions, before any of them is looked up: a program that draws
nothing and has such a name sends 5 kB in vain. Python's and numpy's own generators stay here: see `split`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from nnsight_compiler.files.document import refuse
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.known_calls import ALL, known_target

KEY = "state.random"
"""The tensor of a job that holds it."""


def draws(programs: Iterable[Program]) -> bool:
    """Whether any of these programs may draw from torch's generator."""
    for program in programs:
        for op in program.walk():
            if isinstance(op, (ops.Attribute, ops.Global, ops.Import)) and op.name in _names():
                return True
            if isinstance(op, ops.Forward) and op.method == "generate":
                return True
    return False


@cache
def _names() -> frozenset[str]:
    """The last part of the name of each call that draws, or sets a generator."""
    return frozenset(target.rpartition(".")[2] for target in ALL if known_target(target).random)


def checked(state: torch.Tensor, where: str) -> torch.Tensor:
    """A state of torch's generator on the CPU, by its form."""
    own = torch.get_rng_state()
    if state.dtype != own.dtype or state.shape != own.shape:
        refuse(where, "this is no state of torch's generator")
    return state
