"""What the forward of a module takes, and the places of its arguments, are told as without what is remembered."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.models.padding import padding_position
from nnsight_compiler.runtime.input_axes import are_flat, places
from nnsight_compiler.runtime.signatures import forward_parameters


class Plain(nn.Module):
    def forward(self, x: torch.Tensor, *more: Any, scale: float = 1, **others: Any) -> torch.Tensor:
        return x


class Static(nn.Module):
    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x


def test_the_parameters_of_a_forward():
    for module in (Plain(), Plain(), Static(), nn.Linear(2, 2), nn.Sequential()):
        for _ in range(2):
            assert dict(forward_parameters(module)) == dict(inspect.signature(module.forward).parameters)


def test_a_forward_that_is_replaced_is_seen(monkeypatch):
    module, other = Plain(), Plain()
    assert list(forward_parameters(module)) == ["x", "more", "scale", "others"]
    module.forward = lambda a, b: a  # type: ignore[method-assign]
    assert list(forward_parameters(module)) == ["a", "b"]
    monkeypatch.setattr(Plain, "forward", lambda self, c: c)
    assert list(forward_parameters(other)) == ["c"]


def test_the_places_of_arguments_without_containers_are_those_of_the_tree():
    x = torch.zeros(2)
    for args, kwargs in (
        ((x, None, 3), {"ids": x, "flag": True, "scale": 0.5, "name": "a"}),
        ((), {}),
        (([x], {"a": x}), {"more": (x, None), "size": torch.Size([1])}),
    ):
        leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
        keys = [".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path[1:]) for path, _ in leaves]
        assert [place for place, _ in places(args, kwargs)] == keys
        assert all(mine is leaf for (_, mine), (_, leaf) in zip(places(args, kwargs), leaves, strict=True))
        assert are_flat(args, kwargs) == all("." not in key for key in keys)


def test_the_padding_that_a_model_looks_for_is_each_models_own():
    def model(padding: int | None) -> nn.Module:
        return nn.ModuleDict({"position_embeddings": nn.Embedding(4, 2, padding_idx=padding), "other": nn.Linear(1, 1)})

    models = model(1), model(None), model(0), nn.Linear(1, 1)
    for _ in range(2):
        assert [padding_position(each) for each in models] == [1, None, 0, None]
