"""Modules of the user's, attached and called in the body. The oracle: torch hooks, and the modules by themselves."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, RunError, intervene
from nnsight_compiler.models.view import OutsideTraceError


class Autoencoder(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.encoder, self.act, self.decoder = nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.act(self.encoder(x)))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def model() -> NNsight:
    torch.manual_seed(0)
    made = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    made[0].sae = Autoencoder()
    return made


@intervene
def replaced(model, x):
    with model.trace(x):
        layer = model[0]
        layer.output = layer.sae(layer.output, hook=True)
        codes, given, whole = layer.sae.act.output, layer.sae.encoder.input, layer.sae.output
        out = model.output
    return codes, given, whole, out


@torch.no_grad()
def test_the_inside_of_an_observed_call(model: NNsight) -> None:
    net = model._wrapped
    sae, h = net[0].sae, net[0](X)
    codes, given, whole, out = replaced(model, X)
    assert torch.equal(codes, sae.act(sae.encoder(h)))
    assert torch.equal(given, h)
    assert torch.equal(whole, sae(h))
    assert torch.equal(out, net[1](sae(h)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())

    with model.trace(X):
        model[0].output = model[0].sae(model[0].output, hook=True)
        again = model[0].sae.act.output.save()
    assert torch.equal(again, codes)


def test_a_training_loop(model: NNsight) -> None:
    net = model._wrapped
    sae = net[0].sae
    with torch.no_grad():
        h = net[0](X)
    plain = Autoencoder()
    plain.load_state_dict(sae.state_dict())

    @intervene
    def losses(model, x):
        with model.trace(x):
            h = model[0].output.detach()
            error = model[0].sae(h, hook=True) - h
            loss = error.pow(2).sum() + model[0].sae.act.output.abs().sum()
        return loss

    for module, loss_of in ((sae, lambda: losses(model, X)), (plain, lambda: loss_on(plain, h))):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            loss_of().backward()
            optimiser.step()
    for one, other in zip(sae.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert all(parameter.grad is None for parameter in net[1].parameters())


def loss_on(sae: Autoencoder, h: torch.Tensor) -> torch.Tensor:
    codes = sae.act(sae.encoder(h))
    return (sae.decoder(codes) - h).pow(2).sum() + codes.abs().sum()


@torch.no_grad()
def test_attaching_replacing_and_deleting(model: NNsight) -> None:
    net, first = model._wrapped, model[0].sae
    before = replaced(model, X)[-1]
    other = Autoencoder()
    model[0].sae = other
    assert model[0].sae._module is other
    after = replaced(model, X)[-1]
    assert torch.equal(after, net[1](other(net[0](X))))
    assert not torch.equal(after, before)
    del model[0].sae
    assert not hasattr(net[0], "sae")
    with pytest.raises(CompileError, match="has no `sae`"):
        replaced(model, X)
    assert first is not None


def test_what_cannot_be_attached(model: NNsight) -> None:
    for name, value in (("weight", nn.Linear(1, 1)), ("probe", 3), ("output", nn.Linear(1, 1))):
        with pytest.raises(OutsideTraceError, match="cannot be set or deleted through a view"):
            setattr(model[1], name, value)
    with pytest.raises(OutsideTraceError, match="cannot be set or deleted through a view"):
        del model[1].weight


@torch.no_grad()
def test_a_value_that_the_module_changes_in_place(model: NNsight) -> None:
    model[0].sae = Autoencoder(inplace=True)

    @intervene
    def read(model, x):
        with model.trace(x):
            out = model[0].sae(model[0].output, hook=True)
            codes, before = model[0].sae.act.output, model[0].sae.encoder.output
        return out, codes, before

    _, codes, before = read(model, X)
    sae = model[0].sae._module
    assert torch.equal(codes, sae.act(sae.encoder(model._wrapped[0](X))))
    with pytest.raises(RunError, match="the output of `encoder` was changed in place by the module around it"):
        before.sum()


REFUSED = [
    ("y = model[0].sae(model[0].output); h = model[0].sae.act.output, y",
     "`0.sae.act` is called in the body, and no part of the model's forward: its values are not observed"),
    ("h = model[0].sae.act.output; y = model[0].sae(model[0].output, hook=True)",
     "`0.sae.act` is called in the body, and no part of the model's forward: its values are not observed"),
    ("h = model[1](model[0].output, hook=True)", "`1` is a module that the model runs itself"),
    ("h = model[0].sae(x, hook=True); h = model[0].sae(x, hook=True)", "`0.sae` is called with `hook=True` twice"),
    ("h = model[0].sae(x, hook=1)", "`hook` says whether the inside of a call is observed"),
    ("h = model[0].sae(x, hook=True); model[0].sae.act.output = 0",
     "`0.sae.act` is called in the body, and what happens inside of that call cannot be changed"),
    ("h = model[0].sae(x) if model[0].output.sum() > 0 else 0; h = model[0].sae.output", "is called in the body"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_mistakes(model: NNsight, body: str, reason: str) -> None:
    text = f"def use(model, x):\n    with model.trace(x):\n        {body}\n    return h\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(model, X)
    assert found.value.diagnostics[0].span.line == 3
    assert "way out" in str(found.value)


def test_a_module_that_is_attached_before_the_weights_are_loaded_stays() -> None:
    model, probe = LanguageModel("tiny"), nn.Linear(128, 4)
    model.layers[1].probe = probe
    with model.trace("The Eiffel Tower"):
        hidden = model.layers[1].output.save()
        found = model.layers[1].probe(hidden).save()
    assert torch.equal(found, probe(hidden))
    assert model.layers[1].probe._module is probe
