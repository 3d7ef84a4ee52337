"""What a program is specialised to: one call of an experiment, and the model that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.bounded import MOST_OPS
from nnsight_compiler.passes.sites import Order
from nnsight_compiler.passes.streams import Streams, no_streams

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a forward."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a program is specialised to: one call.

    arguments: the value of each parameter, by name; a parameter that is not bound is missing.
    lower: gives the IR of a helper function.
    save: the function that users import as `save`.
    unbound: what an empty cell holds.
    streams: says at which site a value of a block's residual stream stands.
    order: in which order a wrapped model runs its modules on these inputs (`None`: not known before the run).
    function: makes a Python function of a program that runs no model, as `runtime.functions.generate_function` does.
    most_ops: what the program may be unrolled to.
    """

    arguments: Mapping[str, Any]
    globals: Mapping[str, Any]
    closure: Mapping[str, CellType]
    lower: Callable[[FunctionType], Program]
    save: Callable[..., Any]
    unbound: object = None
    streams: Streams = no_streams
    order: Callable[[Any, Inputs | None], Order] | None = None
    function: Callable[..., FunctionType] | None = None
    most_ops: int = MOST_OPS
