"""The inputs of several invokes as the arguments of one forward: rows of rows, one after the other.

Where prompts differ in length, the shorter ones are filled on the left, and masks and positions say so, so that each
gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.passes.rows import Batch, Part
from nnsight_compiler.runtime.input_axes import InputAxes, input_axes, places

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward."""


class BatchError(ModelError, ValueError):
    """Inputs that cannot share a forward."""


def concatenated(module: nn.Module, given: Sequence[Given], options: Mapping[str, Any]) -> Batch:
    """One forward's arguments for these invokes of any module: tensors one after the other along their rows.

    Raises:
        BatchError: they differ in anything but rows.
    """
    axes = [input_axes(module, *each) for each in given]
    first, *others = [pytree.tree_flatten(each) for each in given]
    for number, other in enumerate(others, 1):
        if other[1] != first[1]:
            raise BatchError(
                f"invoke {number} is given other arguments than invoke 0: {_names(given[number])} instead of"
                f" {_names(given[0])}"
            )
    where = [place for place, _ in places(*given[0])]
    columns = zip(first[0], *(other[0] for other in others), strict=True)
    leaves = [_joined(place, column, axes) for place, column in zip(where, columns, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, first[1])
    sizes = [each.sizes(*inputs) for each, inputs in zip(axes, given, strict=True)]
    parts, start = [], 0
    for each, (rows, tokens) in zip(axes, sizes, strict=True):
        if "rows" not in each.names:
            raise BatchError("nothing that these invokes are given has rows: their inputs cannot share a forward")
        parts.append(Part(start, start + rows, 0, tokens))
        start += rows
    return Batch(args, {**options, **kwargs}, tuple(parts), start, sizes[0][1])


def _joined(place: str, values: Sequence[Any], axes: Sequence[InputAxes]) -> Any:
    """One argument of all invokes."""
    first = values[0]
    if not isinstance(first, torch.Tensor):
        if any(type(value) is not type(first) or value != first for value in values):
            raise BatchError(f"`{place}` differs between invokes: {first!r} and {_other(first, values)!r}")
        return first
    names = axes[0].dims.get(place, ())
    if "rows" not in names:
        if any(value.shape != first.shape or not torch.equal(value, first) for value in values):
            raise BatchError(f"`{place}` differs between invokes and has no rows")
        return first
    dim = names.index("rows")
    for number, value in enumerate(values):
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype != first.dtype
            or _beside(value, dim) != _beside(first, dim)
        ):
            raise BatchError(
                f"`{place}` of invoke {number} is {_told(value)}, and that of invoke 0 {_told(first)}: they cannot"
                " stand in one tensor"
            )
    return torch.cat(list(values), dim)


def _beside(value: torch.Tensor, dim: int) -> tuple[int, ...]:
    return (*value.shape[:dim], *value.shape[dim + 1 :])


def _other(first: Any, values: Sequence[Any]) -> Any:
    return next(value for value in values if type(value) is not type(first) or value != first)


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def _names(given: Given) -> str:
    return ", ".join(place for place, _ in places(*given)) or "nothing"


def padded(given: Sequence[Mapping[str, Any]], padding_id: int, takes: Collection[str]) -> Batch:
    """One forward's arguments for these prompts of a language model, each given as the arguments of a forward of its
    own. A mask and positions are always given where the model takes them, so that all batches are of one kind.

    Raises:
        BatchError: they differ in anything but rows and tokens.
    """
    main = "input_ids" if "input_ids" in given[0] else "inputs_embeds"
    whole = [_with_positions(each, main, takes) if main in each else dict(each) for each in given]
    for number, (each, made) in enumerate(zip(given, whole, strict=True)):
        if made.keys() != whole[0].keys():
            raise BatchError(
                f"invoke {number} is given {_listed(each)}, and invoke 0 {_listed(given[0])}: they cannot share a"
                " forward"
            )
    lengths = [each[main].shape[1] for each in given]
    longest = max(lengths)
    if min(lengths) < longest and "attention_mask" not in takes:
        raise BatchError("this model takes no attention mask: prompts of different lengths cannot share a forward")
    kwargs = {name: _stacked(name, [each[name] for each in whole], lengths, padding_id) for name in whole[0]}
    parts, start = [], 0
    for each, length in zip(whole, lengths, strict=True):
        rows = each[main].shape[0]
        own = own_lengths(each.get("attention_mask"))
        parts.append(Part(start, start + rows, longest - length, length, own))
        start += rows
    return Batch((), kwargs, tuple(parts), start, longest)


def _with_positions(given: Mapping[str, Any], main: str, takes: Collection[str]) -> dict[str, Any]:
    """The arguments with a mask and positions."""
    made = dict(given)
    shape = given[main].shape[:2]
    if "attention_mask" in takes and "attention_mask" not in made:
        made["attention_mask"] = torch.ones(shape, dtype=torch.long, device=given[main].device)
    if "position_ids" in takes and "position_ids" not in made:
        mask = made.get("attention_mask")
        if mask is None or mask.dim() != 2:
            mask = torch.ones(shape, dtype=torch.long, device=given[main].device)
        made["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return made


def _stacked(name: str, values: list[Any], lengths: Sequence[int], padding_id: int) -> Any:
    """One argument of all prompts: what has tokens is filled on the left."""
    first = values[0]
    if not isinstance(first, torch.Tensor):
        if any(type(value) is not type(first) or value != first for value in values):
            raise BatchError(f"`{name}` differs between invokes: {first!r} and {_other(first, values)!r}")
        return first
    if first.dim() == 0:
        if any(not torch.equal(value, first) for value in values):
            raise BatchError(f"`{name}` differs between invokes and has no rows")
        return first
    token_wise = name.endswith(("_ids", "_mask")) or name in ("labels", "inputs_embeds")
    token_wise = token_wise and not name.startswith(("pixel", "decoder")) and first.dim() > 1
    fill = {"input_ids": padding_id, "labels": -100}.get(name, 0)
    longest = max(lengths)
    made: list[torch.Tensor] = []
    for number, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if token_wise and value.shape[1] == length < longest:
            filling = value.new_full((value.shape[0], longest - length, *value.shape[2:]), fill)
            value = torch.cat([filling, value], 1)
        if value.dtype != first.dtype or value.shape[1:] != (made[0] if made else value).shape[1:]:
            raise BatchError(
                f"`{name}` of invoke {number} is {_told(value)}, and that of invoke 0 {_told(first)}: they cannot stand"
                " in one tensor"
            )
        made.append(value)
    return torch.cat(made, 0)


def own_lengths(mask: Any) -> tuple[int, ...]:
    """How many tokens each row has, where it has fewer than the rectangle."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return ()
    return tuple(mask.long().sum(-1).tolist())


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in given) or "nothing"
