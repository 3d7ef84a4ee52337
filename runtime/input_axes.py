"""Which dimensions of a model's inputs are rows and which are tokens; and inputs of other sizes, made by that rule."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime.shadow import is_transformers
from nnsight_compiler.runtime.signatures import forward_parameters

Names = tuple[str | None, ...]
"""What each dimension of a tensor counts: `rows`, `tokens`, or `None` for neither."""


@final
@dataclass(frozen=True, slots=True)
class InputAxes:
    """What each dimension of each input tensor counts.

    dims: by place: the name of a keyword argument or the number of a positional one, and within containers the keys
        below it (`0`, `input_ids`, `batch.image`). A tensor that is not named has neither axis.
    """

    dims: Mapping[str, Names]

    @property
    def names(self) -> frozenset[str]:
        """Which axes the inputs have."""
        return frozenset(name for names in self.dims.values() for name in names if name is not None)

    def sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """The numbers of rows and of tokens in these arguments; 1 where there is no such axis."""
        found: dict[str, int] = {}
        for place, leaf in places(args, kwargs):
            if isinstance(leaf, torch.Tensor):
                for name, size in zip(self.dims.get(place, ()), leaf.shape, strict=False):
                    if name is not None:
                        found.setdefault(name, int(size))
        return found.get("rows", 1), found.get("tokens", 1)

    def without(self, *axes: str) -> InputAxes:
        """The same, with dimensions that count these held as they are."""
        return InputAxes(
            {place: tuple(None if name in axes else name for name in names) for place, names in self.dims.items()}
        )


def input_axes(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InputAxes:
    """The axes of the inputs of a model.

    Of a transformers model they are known from the parameter's name: ids and masks are [rows, tokens], embeddings
    [rows, tokens, width], everything else [rows, ...]. Of any other module the first dimension of every tensor is
    taken for rows: a hypothesis, which inference tests. A dimension whose size is not that of the others of its axis
    is neither: an encoder's length beside a decoder's, position ids of one row beside several.
    """
    named = is_transformers(module)
    parameters = _positional(module)
    guessed: dict[str, Names] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for place, leaf in places(args, kwargs):
        if isinstance(leaf, torch.Tensor):
            guessed[place] = _by_name(_name(place, parameters), leaf.dim()) if named else ("rows",)[: leaf.dim()]
            shapes[place] = tuple(map(int, leaf.shape))
    main: dict[str, int] = {}
    for place, names in guessed.items():
        for axis, size in zip(names, shapes[place], strict=False):
            if axis is not None and main.get(axis, 1) == 1:
                main[axis] = size
    return InputAxes(
        {
            place: tuple(
                axis if axis is not None and main[axis] == size else None
                for axis, size in zip(names, shapes[place], strict=False)
            )
            for place, names in guessed.items()
        }
    )


def _by_name(name: str, dimensions: int) -> Names:
    token_wise = name.endswith(("_ids", "_mask")) or name in ("labels", "inputs_embeds", "decoder_inputs_embeds")
    match name, dimensions:
        case _, 0:
            return ()
        case "cache_position", 1:
            return ("tokens",)
        case "attention_mask", 4:
            return ("rows", None, "tokens", "tokens")
        case _, 2 | 3 if token_wise and not name.startswith("pixel"):
            return ("rows", "tokens")
        case _:
            return ("rows",)


def _positional(module: nn.Module) -> list[str]:
    """The names of the parameters that may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, one in forward_parameters(module).items() if one.kind in kinds]


def _name(place: str, parameters: list[str]) -> str:
    """The name of the parameter that takes what stands at a place; of a place within a container, its last key."""
    if place.isdigit() and int(place) < len(parameters):
        return parameters[int(place)]
    return place.rpartition(".")[2]


_LEAVES = frozenset({torch.Tensor, nn.Parameter, bool, int, float, str, type(None)})


def are_flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether no argument is a container, nor of a type that might be one."""
    return all(type(value) in _LEAVES for value in args) and all(type(value) in _LEAVES for value in kwargs.values())


def places(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each leaf of the arguments with the name of its place."""
    if are_flat(args, kwargs):
        yield from zip(map(str, range(len(args))), args, strict=True)
        yield from kwargs.items()
        return
    leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    for path, leaf in leaves:
        keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path[1:]]
        yield ".".join(map(str, keys)), leaf


@final
@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes inputs of any size for a model: the numbers are random, the kinds those of the arguments given."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axes: InputAxes

    def sample(self, rows: int, tokens: int, seed: int, padded: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with that many rows and tokens; `padded` if an attention mask is to hide a token."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {"rows": rows, "tokens": tokens}
        parameters = _positional(self.module)
        made: list[Any] = []
        for place, leaf in places(self.args, self.kwargs):
            if not isinstance(leaf, torch.Tensor):
                made.append(leaf)
                continue
            names = self.axes.dims.get(place, ())
            names = names + (None,) * (leaf.dim() - len(names))
            shape = [sizes[name] if name else int(size) for name, size in zip(names, leaf.shape, strict=True)]
            name = _name(place, parameters)
            tensor = self._tensor(name, leaf, shape, names, generator)
            if padded and name == "attention_mask" and leaf.dim() == 2:
                tensor[0, 0] = 0
            made.append(tensor if leaf.is_meta else tensor.to(leaf.device))
        _, structure = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        args, kwargs = pytree.tree_unflatten(made, structure)
        return args, kwargs

    def _tensor(
        self, name: str, leaf: torch.Tensor, shape: list[int], names: Names, generator: torch.Generator
    ) -> torch.Tensor:
        if leaf.is_floating_point() or leaf.is_complex():
            return torch.randn(shape, dtype=leaf.dtype, generator=generator)
        if leaf.dtype == torch.bool or name.endswith("_mask"):
            return torch.ones(shape, dtype=leaf.dtype)
        if name in ("position_ids", "cache_position") and names[-1] == "tokens":
            return torch.arange(shape[-1], dtype=leaf.dtype).expand(shape).clone()
        lowest, highest = self._range(name, leaf)
        return torch.randint(lowest, highest + 1, shape, dtype=leaf.dtype, generator=generator)

    def _range(self, name: str, leaf: torch.Tensor) -> tuple[int, int]:
        """Between which numbers an integer input may lie: the vocabulary, or what was given."""
        vocabulary = _vocabulary(self.module) if name in ("input_ids", "decoder_input_ids") else None
        if vocabulary is not None:
            return 0, vocabulary - 1
        if leaf.is_meta or leaf.numel() == 0:
            return 0, 0
        return int(leaf.min()), int(leaf.max())


def _vocabulary(module: nn.Module) -> int | None:
    """How many tokens a model of transformers has embeddings for; `None` where it does not say."""
    if not is_transformers(module):
        return None
    try:
        size = getattr(module.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except NotImplementedError:  # a model with several kinds of input, such as CLIP
        return None
    return size if isinstance(size, int) else None
