"""What was found out about a module, kept as long as the module lives, however often it is wrapped.

What was found on tensors without numbers serves all modules that are alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nnsight_compiler.runtime.axes import Axes, infer_axes
from nnsight_compiler.runtime.costs import Cost, measure_cost
from nnsight_compiler.runtime.input_axes import InputAxes, input_axes, places
from nnsight_compiler.runtime.likeness import Alike
from nnsight_compiler.runtime.observation import Observation, registered
from nnsight_compiler.runtime.observe import observe
from nnsight_compiler.runtime.operations import alike

_axes: WeakKeyDictionary[Any, dict[Any, Axes]] = WeakKeyDictionary()
_costs: WeakKeyDictionary[Any, dict[int, Cost]] = WeakKeyDictionary()
"""By the identity of the axes, which live as long."""
_observations: WeakKeyDictionary[Any, dict[Any, Observation]] = WeakKeyDictionary()
_lock = threading.Lock()
_order_lock = threading.Lock()

_alike_in_axes: Alike[Axes] = Alike()
_alike_in_order: Alike[Observation] = Alike()


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
        with _disable_current_modes():  # a meter of the run around would count what is made here
            found = _alike_in_axes.find(
                module, (kind, inside), lambda: infer_axes(module, args, kwargs, inputs, operations=inside), _on_fakes
            )
        # What holds for some sizes only, or for none, is found anew for others.
        held[key, (rows, tokens) if found.fixed or found.how == "none" else None, inside] = found
        return found, rows, tokens


def cost_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Cost, int, int]:
    """What a wrapped model's forward on inputs of this kind costs, and how many rows and tokens these have. Measured
    once for each kind of input, when it is first asked for.

    Raises:
        AxisError: it cannot be told before the run.
    """
    axes, rows, tokens = axes_of(model, args, kwargs)
    args, kwargs = model._prepare(args, {name: value for name, value in kwargs.items() if name != "grad"})
    with _lock:
        held = _costs.setdefault(model._module, {})
        if id(axes) not in held:
            with _disable_current_modes():
                held[id(axes)] = measure_cost(model._module, args, kwargs, axes)
        return held[id(axes)], rows, tokens


def measured(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Axes, Callable[[], Cost]]:
    """The axes of a forward on inputs of this kind, and what gives its cost, where that is asked for."""
    axes, _, _ = axes_of(model, *inputs)
    return axes, lambda: cost_of(model, *inputs)[0]


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


def _on_fakes(found: Axes | Observation) -> bool:
    """Whether this was found on tensors without numbers, so that it holds for all modules that are alike."""
    return found.how == "fake" and not found.reason and not (isinstance(found, Axes) and found.fixed)


# --- the order of sites ---


def observed(
    model: Any,
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    exact: bool = False,
    operations: Collection[str] = (),
) -> Observation:
    """The order in which a model runs its modules, and these operations inside of them: observed once for each kind of
    input, and with `exact` for each size of it. What was observed at a size serves all that follows.

    Where the inputs of a forward are known only when it runs, an earlier observation of the model stands in, then one
    on the model's own example, then the order in which its modules are registered; a run that goes otherwise is an
    error.
    """
    if inputs is None:
        known = _observations.get(model._root._base)
        if known and not operations:
            return next(reversed(known.values()))
        inputs = model._example()
    if inputs is None:
        return registered(model._module)
    kwargs = {name: value for name, value in inputs[1].items() if name != "grad"}
    args, kwargs = model._prepare(inputs[0], kwargs)
    module = model._module
    structure = tuple(map(id, module.modules())), module.training
    inside = alike(module, operations)
    given = tuple(map(_signature, args)), tuple((name, _signature(kwargs[name])) for name in kwargs)
    sizes = tuple(getattr(value, "shape", None) for value in (*args, *kwargs.values()))
    key = structure, given, inside, sizes if exact else None
    with _order_lock:
        held = _observations.setdefault(model._root._base, {})
        if key not in held:
            # How often a module runs may rest on the sizes: one that is like it may have seen others.
            held[key] = _alike_in_order.find(
                module, (given, inside, sizes), lambda: _observe(model, args, kwargs, inside), _on_fakes
            )
        return held[key]


def _observe(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: frozenset[str]) -> Observation:
    try:
        return observe(model._module, args, kwargs, inside)
    except Exception:
        if not any(parameter.is_meta for parameter in model._module.parameters()):
            raise
    return observe(model._ready(), args, kwargs, inside)  # it looks at numbers, so it needs its weights


def _signature(value: Any) -> Any:
    """What of an input may decide which modules run: the kind of a tensor, not its contents or sizes."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.ndim, str(value.dtype)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_signature, value))
    return type(value).__name__
