"""The shapes of a model's sites for the pass `infer`: found once for each module and kind of input."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch

from nnsight_compiler.ir.ops import Port
from nnsight_compiler.passes.shapes import Extent
from nnsight_compiler.passes.stand_ins import UNKNOWN
from nnsight_compiler.runtime.axes import Axes, AxisError, infer_axes, input_axes
from nnsight_compiler.runtime.input_axes import InputAxes, places

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_found: WeakKeyDictionary[Any, dict[Any, Axes]] = WeakKeyDictionary()
_lock = threading.Lock()


def extent_of(model: Any, inputs: Inputs | None) -> Extent | None:
    """The extent of a forward of a wrapped model on these arguments of `trace`; `None` where nothing can be told.

    Where the arguments are known only when the forward runs, those of the model's own example say of what kind they
    are, and the numbers of rows and tokens stay open.
    """
    given = inputs if inputs is not None else model._example()
    if given is None:
        return None
    kwargs = {name: value for name, value in given[1].items() if name != "grad"}
    args, kwargs = model._prepare(given[0], kwargs)
    axes = _axes(model, args, kwargs)
    if axes.how == "none":
        return None
    varies = axes.inputs.names - axes.fixed.keys()
    if inputs is None:
        return Extent(_Sites(axes), varies=varies) if not axes.fixed else None
    return Extent(_Sites(axes), *axes.inputs.sizes(args, kwargs), varies)


def _axes(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes:
    module = model._module
    inputs = input_axes(module, args, kwargs)
    structure = tuple(map(id, module.modules())), module.training
    key = structure, tuple(_signature(inputs, place, leaf) for place, leaf in places(args, kwargs))
    sized = key, inputs.sizes(args, kwargs)
    with _lock:
        held = _found.setdefault(module, {})
        found = held.get(key) or held.get(sized)
        if found is None:
            found = infer_axes(module, args, kwargs, inputs)
            # What holds for some sizes only is found anew for others.
            held[sized if found.fixed or found.how == "none" else key] = found
    return found


def _signature(inputs: InputAxes, place: str, leaf: Any) -> Any:
    """What of one input the shapes in a forward may rest on: all of it, but the contents and the sizes of a tensor
    along rows and tokens."""
    if isinstance(leaf, torch.Tensor):
        names = inputs.dims.get(place, ())
        sizes = [names[i] if i < len(names) and names[i] else int(size) for i, size in enumerate(leaf.shape)]
        return place, str(leaf.dtype), *sizes
    if isinstance(leaf, (bool, int, float, str, type(None))):
        return place, type(leaf).__name__, leaf
    return place, type(leaf).__name__


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
