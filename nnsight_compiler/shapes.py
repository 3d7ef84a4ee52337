"""The shapes of a model's sites, as the pass `infer` asks for them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.ir.ops import Port
from nnsight_compiler.observations import axes_of
from nnsight_compiler.passes.shapes import Extent
from nnsight_compiler.passes.stand_ins import UNKNOWN
from nnsight_compiler.runtime.axes import Axes, AxisError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def extent_of(model: Any, inputs: Inputs | None, operations: Collection[str] = ()) -> Extent | None:
    """The extent of a forward of a wrapped model on these arguments of `trace`, with these operations inside of its
    modules; `None` where nothing can be told.

    Where the arguments are known only when the forward runs, those of the model's own example say of what kind they
    are, and the numbers of rows and tokens stay open.
    """
    given = inputs if inputs is not None else model._example()
    if given is None:
        return None
    args, kwargs = given
    axes, rows, tokens = axes_of(model, args, kwargs, operations)
    if axes.how == "none":
        return None
    varies = axes.inputs.names - axes.fixed.keys()
    if inputs is None:
        return Extent(_Sites(axes), varies=varies) if not axes.fixed else None
    return Extent(_Sites(axes), rows, tokens, varies)


@final
@dataclass(frozen=True, slots=True)
class _Sites:
    """A model's axes, as the pass asks for them."""

    axes: Axes

    def value(self, path: str, port: Port, call: int, rows: int, tokens: int) -> Any:
        event = "output" if port == "output" else "input"
        if call < 0:
            call += sum(each.path == path and each.port == event for each in self.axes.events)
        try:
            held = self.axes.value(path, event, call, rows, tokens)  # type: ignore[arg-type]
        except (AxisError, KeyError):
            return UNKNOWN
        if port != "input":
            return held
        args, kwargs = held
        return args[0] if args else next(iter(kwargs.values()), UNKNOWN)
