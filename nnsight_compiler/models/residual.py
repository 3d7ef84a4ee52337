"""The residual stream of a block: what it is given, what it returns, and what lies between its two parts.

`resid_pre` is what the block is given and `resid_post` what it returns. `resid_mid` is their sum so far: `resid_pre`
and what attention adds to it. It has no module of its own. It stands where the norm before the feed-forward part is
given it (or that part itself, where norms follow the parts), and the block goes on with the same tensor.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.view import ModuleView, UnknownModuleError, describe, named
from nnsight_compiler.passes.streams import Stream
from nnsight_compiler.runtime.observation import Event, Observation


def stream_of(block: ModuleView, name: str, seen: Observation) -> Stream:
    """The site of a value of a block's residual stream. `seen` is a forward of the model.

    Raises:
        ModelError: the module is no block, or has no such value.
    """
    if not _is_block(block):
        raise ModelError(
            f"`.{name}` belongs to a block, one of `model.layers`, and {describe(block)} is none (a list of another"
            ' name becomes `layers` by `rename={"name": "layers"}`)'
        )
    if name == "resid_pre":
        return Stream(block._path, "input")
    if name == "resid_post":
        several = seen.kind.get(Event(block._path, "output", 0)) == "tuple"
        return Stream(block._path, "output", 0 if several else None)
    if seen.how == "registered":
        raise ModelError(
            f"where `.{name}` of {describe(block)} stands is seen in a forward only, and none could be run"
        )
    site = _between(block, seen)
    flat = _dimensions(site, seen) < _dimensions(block, seen)
    return Stream(site._path, "input", flat=flat, within=True)


def _dimensions(view: ModuleView, seen: Observation) -> int:
    given = seen.shape.get(Event(view._path, "input", 0))
    return len(given.shape) if given is not None and given.shape is not None else 0


def _between(block: ModuleView, seen: Observation) -> ModuleView:
    """The module that is given the stream between attention and the feed-forward part."""
    attention = _part(block, "attn")
    if attention is None or not seen.count(attention._path):
        raise ModelError(f"{describe(block)} has no `resid_mid`: nothing in it stands for attention (`attn`)")
    if getattr(block._module, "apply_residual_connection_post_layernorm", False):
        raise ModelError(
            f"{describe(block)} has no `resid_mid`: it adds each part to what its norm returns, so that no stream runs"
            " through it"
        )
    after = seen.time(attention._path, "output")
    first = _part(block, "ln1")
    if first is not None and seen.count(first._path) and seen.time(first._path, "input") > after:
        return first  # the norm follows the sum
    norm, forward = _part(block, "ln2"), _part(block, "mlp")
    site = forward if norm is None else norm
    if site is None or not seen.count(site._path):
        raise ModelError(f"{describe(block)} has no `resid_mid`: nothing in it stands for `ln2` or `mlp`")
    given = Event(site._path, "input", 0)
    since = seen.since.get(given)
    if since is None or since < after:
        raise ModelError(
            f"{describe(block)} has no `resid_mid`: attention and the feed-forward part stand side by side and are"
            " given the same stream; use `resid_pre`, or the outputs of both"
        )
    if norm is None and since != seen.time(site._path, "input"):
        raise ModelError(
            f"{describe(block)} has no `resid_mid` under a name that is known: what `{site._path}` is given was"
            " returned by another module; read the input of the norm before it"
        )
    return site


def _part(block: ModuleView, name: str) -> ModuleView | None:
    """A part of a block by its own, a given or its standard name."""
    own = block._module._modules.get(name)
    try:
        return block[name] if own is not None else named(block._root, block._path, name)
    except UnknownModuleError:
        return None


def _is_block(view: ModuleView) -> bool:
    """Whether a module is one of the `layers` of a module above it."""
    holder, _, name = view._path.rpartition(".")
    above = holder
    while name:
        found = _layers(view._root, above)
        if found is not None and found._path == holder:
            return isinstance(found._module, nn.ModuleList | nn.Sequential)
        if not above:
            break
        above = above.rpartition(".")[0]
    return False


def _layers(root: Any, path: str) -> ModuleView | None:
    view: ModuleView = root[path] if path else root
    return _part(view, "layers")
