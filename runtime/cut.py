"""A large model cut to its first layers, in which every kind of layer occurs.

Two layers are of one kind where their modules have the same classes, weights of the same shapes and the same plain
attributes, and the lists in the model's config that have an entry for each layer have the same one for both. What is
kept is a prefix, so that every layer keeps its number, and each kind occurs in it twice where it occurs twice at all:
the first layer of a model is often handed less than the others. Each layer left out is represented by the last of its
kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.runtime.shadow import is_transformers

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""What a config of transformers calls its number of layers; names of its own (`n_layer`) are mapped to these."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention")

_Plain = (bool, int, float, str, type(None), torch.dtype)


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """How many layers of each list to keep.

    kept: by the path of the list.
    represented: by the path of each layer left out, the path of the one that stands for it.
    """

    kept: Mapping[str, int]
    represented: Mapping[str, str]

    def left_out(self, module: nn.Module, more: int = 0) -> frozenset[nn.Module]:
        """The layers that are left out of a model when each list keeps so many more."""
        return frozenset(
            layer
            for path, kept in self.kept.items()
            for layer in list(module.get_submodule(path)._modules.values())[kept + more :]
            if layer is not None
        )

    def deeper(self) -> Cut:
        """One that keeps a layer more of each list, which then stands for the layers of its kind: those before it may
        hold what the model itself still holds."""
        more = {path: f"{path}.{kept}" for path, kept in self.kept.items()}
        instead = {self.represented[layer]: layer for layer in more.values()}
        represented = {
            left_out: instead.get(layer, layer)
            for left_out, layer in self.represented.items()
            if left_out not in instead.values()
        }
        return Cut({path: kept + 1 for path, kept in self.kept.items()}, represented)

    def layer_of(self, path: str) -> str | None:
        """The layer of a cut list that a path is in or below; `None` for any other path."""
        for layers in self.kept:
            if path.startswith(f"{layers}."):
                return f"{layers}.{path.removeprefix(f'{layers}.').partition('.')[0]}"
        return None

    def represented_by(self, path: str) -> str:
        """The path that stands for one in a layer left out; any other path itself."""
        layer = self.layer_of(path)
        return self.represented.get(layer, layer) + path[len(layer) :] if layer else path


def _configs(module: nn.Module) -> list[Any]:
    """The configs that the modules hold, each once."""
    found = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return list(found.values())


def windows(module: nn.Module) -> frozenset[int]:
    """The lengths from which on a model of transformers attends to a part of the tokens only: it builds other masks."""
    values = {getattr(config, name, None) for config in _configs(module) for name in _WINDOWS}
    return frozenset(value for value in values if isinstance(value, int) and value > 1)


def plan_cut(module: nn.Module) -> Cut | None:
    """How to cut a model; `None` where nothing would be gained or nothing is known of its layers."""
    if not is_transformers(module):
        return None
    kept: dict[str, int] = {}
    represented: dict[str, str] = {}
    configs = _configs(module)
    counts = {getattr(config, name, None) for config in configs for name in _COUNTS}
    for path, layers in layer_lists(module):
        if len(layers) not in counts or len(set(layers)) < len(layers):
            continue
        kinds = _kinds(layers, configs)
        keep = max(_second(kinds, kind) for kind in set(kinds)) + 1
        if 2 * keep <= len(layers) > keep:
            kept[path] = keep
            last = {kind: index for index, kind in enumerate(kinds[:keep])}
            represented |= {f"{path}.{i}": f"{path}.{last[kinds[i]]}" for i in range(keep, len(layers))}
    return Cut(kept, represented) if kept else None


def layer_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules, each with its path."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield below, child
        else:
            yield from layer_lists(child, below)


def _kinds(layers: nn.ModuleList, configs: list[Any]) -> list[object]:
    """For each layer what tells its kind."""
    plain = [dict(_attributes(layer)) for layer in layers]
    shared = set.intersection(*map(set, plain))
    numbers = {key for key in shared if _counts_up([attributes[key] for attributes in plain])}
    listed = [
        value
        for config in configs
        for value in vars(config).values()
        if isinstance(value, (list, tuple)) and len(value) == len(layers)
    ]
    return [
        (
            tuple((key, value) for key, value in attributes.items() if key not in numbers),
            tuple((name, type(part)) for name, part in layer.named_modules()),
            tuple((name, tuple(one.shape), one.dtype) for name, one in layer.named_parameters()),
            tuple(repr(value[index]) for value in listed),
        )
        for index, (attributes, layer) in enumerate(zip(plain, layers, strict=True))
    ]


def _attributes(layer: nn.Module) -> Iterator[tuple[tuple[str, str], object]]:
    """The numbers, flags and texts that the modules of a layer hold."""
    for path, part in layer.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, _Plain):
                yield (path, name), value


def _counts_up(values: list[object]) -> bool:
    """Whether an attribute is the layer's own number."""
    first = values[0]
    if not isinstance(first, int) or isinstance(first, bool):
        return False
    return values == list(range(first, first + len(values)))


def _second(kinds: list[object], kind: object) -> int:
    """Where a kind occurs for the second time; for the first, if it occurs once."""
    at = [index for index, one in enumerate(kinds) if one == kind]
    return at[min(1, len(at) - 1)]
