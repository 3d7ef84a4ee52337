"""What was found out about a module, kept as long as the module lives, however often it is wrapped."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from nnsight_compiler.runtime.axes import Axes, infer_axes
from nnsight_compiler.runtime.input_axes import InputAxes, input_axes, places
from nnsight_compiler.runtime.operations import alike

_axes: WeakKeyDictionary[Any, dict[Any, Axes]] = WeakKeyDictionary()
_lock = threading.Lock()


def axes_of(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], operations: Collection[str] = ()
) -> tuple[Axes, int, int]:
    """The axes of every value of a wrapped model's forward, of these operations inside of its modules too, and how many
    rows and tokens these inputs have.

    Found once for each kind of input: prompts of other numbers of rows and tokens are of the same kind. The inputs are
    those of `trace`; weights are not loaded for it. What was found with more operations serves for fewer.
    """
    args, kwargs = model._prepare(args, {name: value for name, value in kwargs.items() if name != "grad"})
    module = model._module
    inputs = _apart(input_axes(module, args, kwargs))
    rows, tokens = inputs.sizes(args, kwargs)
    kind = tuple((place, _kind(leaf, place, inputs)) for place, leaf in places(args, kwargs))
    inside = alike(module, operations)
    key = tuple(map(id, module.modules())), module.training, kind
    with _lock:
        held = _axes.setdefault(module, {})
        for (same, sizes, among), found in held.items():
            if same == key and sizes in (None, (rows, tokens)) and inside <= among and _holds(found, rows, tokens):
                return found, rows, tokens
        found = infer_axes(module, args, kwargs, inputs, operations=inside)
        # What holds for some sizes only, or for none, is found anew for others.
        held[key, (rows, tokens) if found.fixed or found.how == "none" else None, inside] = found
        return found, rows, tokens


def _apart(inputs: InputAxes) -> InputAxes:
    """The same, with a decoder's tokens held as they are beside an encoder's: they are others, of one length or not."""
    if not {"input_ids", "inputs_embeds", "0"} & inputs.dims.keys():
        return inputs
    return InputAxes(
        {
            place: tuple(None if axis == "tokens" and place.startswith("decoder_") else axis for axis in names)
            for place, names in inputs.dims.items()
        }
    )


def _holds(axes: Axes, rows: int, tokens: int) -> bool:
    return axes.fixed.get("rows", rows) == rows and axes.fixed.get("tokens", tokens) == tokens


def _kind(leaf: Any, place: str, inputs: InputAxes) -> Any:
    """What of an input may decide shapes: of a tensor the dtype and the sizes that are neither rows nor tokens."""
    if isinstance(leaf, torch.Tensor):
        names = inputs.dims.get(place, ())
        names = names + (None,) * (leaf.dim() - len(names))
        return leaf.dtype, tuple(name or int(size) for name, size in zip(names, leaf.shape, strict=True))
    if isinstance(leaf, (bool, int, float, str, type(None))):
        return type(leaf).__name__, leaf
    return type(leaf).__name__
