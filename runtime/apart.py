"""Whether the rows of a forward are apart: that one row's input changes that row at a site, and no other.

How sizes grow does not tell: a recurrent network that is given time first has "rows" of time, and a dimension of
`2*rows` may hold all first halves before all second ones. So the model is run on three rows of numbers, and again with
others in the second row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.passes.rows import Part
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.formulas import Opaque, TensorAxes
from nnsight_compiler.runtime.input_axes import InputAxes, Sampler, places
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.operations import Operations
from nnsight_compiler.runtime.shadow import Reals, generators_kept, shadowed
from nnsight_compiler.runtime.shares import CannotDivideError, Share, SiteAxes, Sizes, region

ROWS, TOKENS = 3, 5
_SECOND = Share(Part(1, 2, 0, TOKENS), Sizes(ROWS, TOKENS))


def mixed(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inputs: InputAxes,
    sites: Mapping[Event, SiteAxes],
) -> Event | None:
    """The first of these sites at which one row's input changes other rows too; `None` if there is none."""
    sampler = Sampler(module, args, kwargs, inputs)
    tokens = TOKENS if "tokens" in inputs.names else 1
    plain = sampler.sample(ROWS, tokens, 1, padded=False)
    other = _second_row_of(sampler.sample(ROWS, tokens, 2, padded=False), plain, inputs)
    with generators_kept(module), torch.no_grad():
        first, second = (_seen(module, given, sites) for given in (plain, other))
    for event, axes in sites.items():
        leaves = zip(axes.leaves, pytree.tree_leaves(first[event]), pytree.tree_leaves(second[event]), strict=True)
        if any(_differs_elsewhere(*leaf) for leaf in leaves):
            return event
    return None


def _second_row_of(other: Any, plain: Any, inputs: InputAxes) -> Any:
    """The inputs with the second row of others, and a token hidden in it where there is a mask."""
    leaves = []
    for (place, mine), (_, theirs) in zip(places(*plain), places(*other), strict=True):
        names = inputs.dims.get(place, ())
        if isinstance(mine, torch.Tensor) and "rows" in names:
            dim = names.index("rows")
            mine = mine.clone()
            mine.select(dim, 1).copy_(theirs.select(dim, 1))
            if place == "attention_mask" and mine.dim() == 2:
                mine[1, 0] = 0
        leaves.append(mine)
    return pytree.tree_unflatten(leaves, pytree.tree_structure(plain))


def _seen(module: nn.Module, given: Any, sites: Iterable[Event]) -> dict[Event, Any]:
    """What stands at these sites in a forward of a shadow, drawing the same numbers each time."""
    shadow = shadowed(module, Reals())
    found: dict[Event, Any] = {}
    calls: dict[tuple[str, str], int] = {}

    def keep(path: str, port: Any, value: Any) -> None:
        number = calls.get((path, port), 0)
        calls[path, port] = number + 1
        event = Event(path, port, number)
        if event in sites:
            found[event] = pytree.tree_map_only(torch.Tensor, torch.clone, value)

    run = object()
    operations = Operations(shadow, run)
    for path in {event.path for event in sites}:
        part: Any = operations.operation(path) if ":" in path else shadow.get_submodule(path)
        part.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: keep(path, "input", (args, kwargs)), with_kwargs=True
        )
        part.register_forward_hook(lambda _, args, output, path=path: keep(path, "output", output))
    torch.manual_seed(0)
    with ACTIVE.running(run):
        shadow(*given[0], **given[1])
    return found


def _differs_elsewhere(axes: Any, first: Any, second: Any) -> bool:
    """Whether two values of a leaf differ outside of the second row."""
    axes = axes.sometimes if isinstance(axes, Opaque) else axes
    if not isinstance(axes, TensorAxes) or not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    if first.shape != second.shape:
        return True
    left = second.clone()
    try:
        if any(extent.rows or extent.rows_tokens for extent in axes.shape):
            region(left, axes, _SECOND)[0].copy_(region(first, axes, _SECOND)[0])
    except CannotDivideError:
        return False  # its use is refused
    if not left.is_floating_point():
        return not torch.equal(left, first)
    scale = float(first.abs().max()) if first.numel() else 0.0
    return not torch.allclose(left, first, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
