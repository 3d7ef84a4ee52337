"""Views of modules: the oracle is the torch module itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models import (
    ModuleIndexError,
    ModuleView,
    NNsight,
    NotAContainerError,
    OutsideTraceError,
    TraceArgumentError,
    UnknownModuleError,
    resolve,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.by_name = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Tanh()})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))])
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.width = 4
        self.absent = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def find(self, name: str) -> nn.Module:
        return self.get_submodule(name)


@pytest.fixture
def torch_model() -> Model:
    return Model()


@pytest.fixture
def model(torch_model: Model) -> NNsight:
    return NNsight(torch_model)


def test_names_reach_modules_weights_and_attributes(model: NNsight, torch_model: Model):
    assert model.layers[1].attn._module is torch_model.layers[1].attn
    assert model.layers[1].attn.weight is torch_model.layers[1].attn.weight
    assert model.layers[0].mask is torch_model.layers[0].mask
    assert (model.width, model.head.out_features, model.absent) == (4, 2, None)
    assert resolve(model, "layers.1", "attn") == model.layers[1].attn


def test_items(model: NNsight, torch_model: Model):
    assert len(model.layers) == 3
    assert [layer._path for layer in model.layers] == ["layers.0", "layers.1", "layers.2"]
    assert model.layers[-1] == model.layers[2]
    assert model.layers[1:] == [model.layers[1], model.layers[2]]
    assert model.layers[torch.tensor(1)] == model.layers[1]
    assert model.by_name["b"]._module is torch_model.by_name["b"]
    assert list(model.by_name) == ["a", "b"]
    assert dict(model.by_name.items())["a"] == model.by_name["a"]
    assert "a" in model.by_name
    assert "c" not in model.by_name
    assert model.layers[0] in model.layers
    assert model.head not in model.layers
    assert model.scales[1] is torch_model.scales[1]
    assert model["layers.2.attn"] == model.layers[2].attn
    with pytest.raises(ModuleIndexError, match="holds 3 modules: no index 3"):
        model.layers[3]
    with pytest.raises(IndexError):
        model.layers[-4]
    with pytest.raises(NotAContainerError, match="head"):
        model.head[0]
    with pytest.raises(NotAContainerError):
        len(model.head)


def test_an_unknown_name_names_the_nearest_and_the_path(model: NNsight):
    with pytest.raises(UnknownModuleError, match=r"layers\.0 \(Block\) has no `atn`; did you mean .*attn"):
        model.layers[0].atn  # noqa: B018
    with pytest.raises(UnknownModuleError, match=r"did you mean layers"):
        model["layer"]
    assert not hasattr(model, "nothing_like_it")
    assert issubclass(UnknownModuleError, ModelError)


def test_sites_are_for_traces(model: NNsight):
    for name in ("output", "input", "inputs", "calls", "skip"):
        with pytest.raises(OutsideTraceError, match=r"inside `with model\.trace"):
            getattr(model.layers[0].attn, name)
    with pytest.raises(OutsideTraceError, match="cannot be set"):
        model.layers[0].output = 0
    with pytest.raises(OutsideTraceError, match="cannot be set"):
        model.head = nn.Linear(1, 1)
    with pytest.raises(OutsideTraceError, match="deleted"):
        del model.head


def test_a_module_named_like_a_site_is_an_item(model: NNsight, torch_model: Model):
    assert model.layers[0]["output"]._module is torch_model.layers[0].output
    with pytest.raises(OutsideTraceError, match=r'\["output"\]'):
        model.layers[0].output  # noqa: B018


def test_one_module_under_two_names_is_one(model: NNsight):
    assert model.tied == model.head
    assert hash(model.tied) == hash(model.head)
    assert model.tied._path == "head"


def test_views_follow_a_replaced_module(model: NNsight, torch_model: Model):
    view = model.layers[0].attn
    torch_model.layers[0].attn = nn.Linear(4, 4, bias=False)
    assert view._module is torch_model.layers[0].attn
    assert view.bias is None
    del torch_model.layers[2]
    assert len(model.layers) == 2


def test_equality_is_of_model_and_path(model: NNsight, torch_model: Model):
    other = NNsight(torch_model)
    assert model.head == model.head
    assert model.head != other.head
    assert model != other
    assert len({model.head, model.head, other.head}) == 2
    assert isinstance(model, ModuleView)
    assert model._path == ""


def test_calls_and_methods_are_those_of_torch(model: NNsight, torch_model: Model):
    x = torch.randn(1, 4)
    assert torch.equal(model(x), torch_model(x))
    assert torch.equal(model.layers[0](x), torch_model.layers[0](x))
    assert model.find("layers.1") == model.layers[1]
    assert model.eval() is model
    assert not torch_model.training
    assert {name: view._module for name, view in model.named_modules()} == dict(torch_model.named_modules())
    assert [view._module for view in model.layers[0].children()] == list(torch_model.layers[0].children())


def test_the_tree_collapses_equal_layers(model: NNsight, torch_model: Model):
    assert "(0-2): 3 x Block(" in repr(model)
    torch_model.layers[1].attn = nn.Linear(4, 4, bias=False)
    assert "(0): Block(" in repr(model)
    assert "(2): Block(" in repr(model)
    plain = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"x": nn.ReLU()}), nn.Dropout(0.5), nn.Dropout(0.5))
    assert repr(NNsight(plain)) == (
        "Sequential(\n  (0): Linear(in_features=2, out_features=3, bias=True)\n"
        "  (1): ModuleDict(\n    (x): ReLU()\n  )\n"
        "  (2-3): 2 x Dropout(p=0.5, inplace=False)\n)"
    )


def test_generation_is_named_where_it_is_meant(model: NNsight):
    with pytest.raises(TraceArgumentError, match=r"max_new_tokens.*generate"):
        model.trace(torch.ones(1, 4), max_new_tokens=3)
    with pytest.raises(ModelError, match="has no `generate`"):
        model.generate(torch.ones(1, 4))

    class Heats(nn.Module):
        def forward(self, x: torch.Tensor, temperature: float) -> torch.Tensor:
            return x / temperature

    assert "temperature" in NNsight(Heats())._forward_parameters()


def test_only_modules_are_wrapped(model: NNsight):
    with pytest.raises(ModelError, match="wrapped already"):
        NNsight(model.head)
    with pytest.raises(ModelError, match="not str"):
        NNsight("gpt2")
