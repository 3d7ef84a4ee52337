"""The shapes of a model's sites, as the pass `infer` asks for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, final

from torch.utils import _pytree as pytree

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.ops import Port
from nnsight_compiler.ir.values import Module
from nnsight_compiler.observations import axes_of
from nnsight_compiler.passes.shapes import Extent
from nnsight_compiler.passes.sites import PlacePort, event_port
from nnsight_compiler.passes.stand_ins import UNKNOWN
from nnsight_compiler.passes.subject import Inputs
from nnsight_compiler.runtime.apart import mixed
from nnsight_compiler.runtime.axes import Axes, AxisError, Opaque, TensorAxes
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.shadow import is_transformers
from nnsight_compiler.runtime.shares import SiteAxes, SitesAxes


def extent_of(
    model: Any, inputs: Inputs | None, example: Inputs | None = None, operations: Collection[str] = ()
) -> Extent | None:
    """The extent of a forward of a wrapped model on these arguments of `trace`, with these operations inside of its
    modules; `None` where nothing can be told.

    Where the arguments are known only when the forward runs, those of an example, or of the model's own, say of what
    kind they are, and the numbers of rows and tokens stay open.
    """
    given = inputs or example or model._example()
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


def site_axes(
    model: Any, example: Inputs, path: str, port: PlacePort, call: int, operations: Collection[str] = ()
) -> SiteAxes:
    """Which dimensions of what stands at a site are rows and tokens, on inputs of this kind. `operations`: those inside
    of modules whose axes are asked for as well, so that all are found at once.

    Raises:
        AxisError: they cannot be told.
    """
    axes, _, _ = axes_of(model, *example, {*operations, path} if ":" in path else operations)
    if "rows" in axes.fixed:
        raise AxisError(f"the model takes one number of rows only: {axes.reason}")
    if call < 0:
        call += sum(each.path == path and each.port == port for each in axes.events)
    leaves, structure = pytree.tree_flatten(axes.types(path, "input" if port == "input" else "output", call))
    return SiteAxes(f"`{path or 'the model'}` {port}", tuple(leaves), structure)


def found_axes(model: Any, inputs: Inputs) -> SitesAxes:
    """What stands at the sites of a forward on these inputs, which the run has just brought."""

    def found(path: str, port: PlacePort, call: int) -> SiteAxes:
        try:
            return site_axes(model, inputs, path, port, call)
        except AxisError as error:
            name = path or "the model"
            raise RunError(
                f"the rows of an invoke cannot be told apart in the {port} of `{name}`: {error}\n"
                "  way out: read it outside of the invokes, where it is that of all rows, or run a `trace` for each"
                " input"
            ) from None

    return found


def why_undivided(
    model: Any, example: Inputs | None, op: ops.Read | ops.Write, operations: Collection[str] = ()
) -> str | None:
    """Why an invoke cannot be given its own rows of a site; `None` where it can."""
    if example is None:
        return None  # it becomes known when the forward runs
    assert isinstance(op.module, Module)
    try:
        axes = site_axes(model, example, op.module.path, event_port(op.port), op.call or 0, operations)
    except AxisError as error:
        return str(error)
    return axes.leaves[0].reason if axes.plain and isinstance(axes.leaves[0], Opaque) else None


def why_not_apart(model: Any, inputs: Inputs, sites: Iterable[tuple[str, PlacePort, int]]) -> str | None:
    """Why invokes cannot share these sites of a forward on these inputs: one row's input changes other rows. Models of
    transformers are taken to keep rows apart, but where rows are one dimension with something else."""
    module = model._wrapped
    sites = tuple(sites)
    operations = {path for path, _, _ in sites if ":" in path}
    found = {
        Event(path, "input" if port == "input" else "output", call): site_axes(
            model, inputs, path, port, call, operations
        )
        for path, port, call in sites
    }
    if is_transformers(module):
        found = {event: axes for event, axes in found.items() if any(map(_is_merged, axes.leaves))}
    if not found:
        return None
    axes, _, _ = axes_of(model, *inputs, operations)
    event = mixed(module, *inputs, axes.inputs, found)
    if event is None:
        return None
    return (
        f"`{event.path or 'the model'}` {event.port} cannot be shared by invokes: what one row is given changes others"
        " there\n  way out: run a `trace` for each input, or read it outside of the invokes"
    )


def _is_merged(leaf: Any) -> bool:
    leaf = leaf.sometimes if isinstance(leaf, Opaque) else leaf
    return isinstance(leaf, TensorAxes) and any(each.rows_tokens or each.rows > 1 for each in leaf.shape)


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
