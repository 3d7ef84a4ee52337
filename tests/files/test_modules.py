"""Captured modules: the loaded experiment computes with them what torch computes with the originals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from safetensors import safe_open
from torch import nn

from nnsight_compiler import FileError, intervene

SCALE = 0.5


def shrink(x):
    return x * SCALE


class SparseAutoencoder(nn.Module):
    """As they come: tied weights, a threshold, methods of its own, and things that only training needs."""

    kind = "topk"

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, features)
        self.decoder = nn.Linear(features, width, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.T)
        self.register_buffer("mean", torch.linspace(0, 1, width))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.k = 4
        self.optimizer = object()

    @property
    def width(self):
        return self.mean.shape[0]

    @staticmethod
    def threshold(features, k):
        values, indices = features.topk(k)
        return torch.zeros_like(features).scatter(-1, indices, values)

    def encode(self, x, k=None):
        return self.threshold(torch.relu(self.encoder(x - self.mean)), self.k if k is None else k)

    def decode(self, features):
        return shrink(self.decoder(features)) + self.mean

    def forward(self, x):
        if self.kind == "topk" and x.shape[-1] == self.width:
            return self.decode(self.encode(x))
        raise ValueError("another width")


class Probe(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in "ab"])
        self.heads = nn.ModuleDict({"first": nn.Linear(width, 2), "second": nn.Linear(width, 3)})
        self.activations = [torch.tanh, F.silu]

    def forward(self, x, *, temperature=1.0):
        for index, block in enumerate(self.blocks):
            x = x + self.activations[index](block(self.norm(x)))
        return {name: head(x) / temperature for name, head in self.heads.items()}


class Wide(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).repeat_interleave(2, dim=-1)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def test_a_sparse_autoencoder_in_a_trace(through, tiny, tmp_path) -> None:
    sae = made(lambda: SparseAutoencoder(128, 32))

    def replaced(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[1].output
            features = sae.encode(hidden, k=2)
            model.layers[1].output = sae(hidden)
            logits = model.lm_head.output[0, -1]
        return features, logits, sae.decode(features)

    expected = intervene(replaced)(tiny, "The city of")
    for found, held in zip(through(replaced)(tiny, "The city of"), expected, strict=True):
        torch.testing.assert_close(found, held, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # and against torch itself
        plain: list[torch.Tensor] = []
        hook = tiny._module.transformer.h[1].register_forward_hook(lambda m, a, out: plain.append(out) or sae(out))
        logits = tiny("The city of").logits[0, -1]
        hook.remove()
    torch.testing.assert_close(expected[1], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(expected[0], sae.encode(plain[0], k=2))
    with safe_open(str(tmp_path / "replaced.safetensors"), framework="pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert sorted(shapes) == ["sae.encoder.bias", "sae.encoder.weight", "sae.mean", "sae.scratch"], "tied: stored once"


def test_a_probe_of_many_parts(through) -> None:
    probe = made(lambda: Probe(8))

    def classify(x):
        return probe(x, temperature=2.0)

    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    found, expected = through(classify)(x), probe(x, temperature=2.0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_gradients_flow_through_a_captured_module(through) -> None:
    probe = made(lambda: Probe(8))

    def loss(x):
        return probe(x)["first"].square().sum()

    x, y = (torch.linspace(-1, 1, 8).reshape(1, 8).requires_grad_() for _ in "ab")
    through(loss)(x).backward()
    probe(y)["first"].square().sum().backward()
    assert torch.equal(x.grad, y.grad)


TORCH_MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.Tanh()), (2, 4)),
    "embedding": (lambda: nn.Embedding(4, 3, padding_idx=0), "tokens"),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.ReLU()), (2, 4, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu"), (2, 3, 4)),
    "recurrent": (lambda: nn.GRU(4, 3, batch_first=True), (2, 3, 4)),
    "parameters": (lambda: nn.Sequential(nn.Softmax(-1), nn.PReLU(), nn.Flatten()), (2, 4)),
    "a subclass": (lambda: Wide(4, 3), (2, 4)),
}


@pytest.mark.parametrize("name", TORCH_MODULES)
def test_modules_of_torchs_own(through, name: str) -> None:
    build, shape = TORCH_MODULES[name]
    module = made(build)

    def apply(x):
        return module(x)

    x = torch.tensor([[0, 3]]) if shape == "tokens" else torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    found, expected = through(apply)(x), module(x)
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)


def test_training_mode_is_kept(through) -> None:
    dropout, still = nn.Dropout(0.5), nn.Dropout(0.5).eval()

    def both(x):
        return dropout(x), still(x)

    x = torch.ones(100)
    torch.manual_seed(1)
    found = through(both)(x)
    torch.manual_seed(1)
    assert torch.equal(found[0], dropout(x))
    assert torch.equal(found[1], x)


def test_a_module_among_parameters_of_another_is_one_module(through) -> None:
    shared = made(lambda: nn.Linear(2, 2))
    both = [shared, nn.Sequential(shared)]

    def one():
        return both[0] is both[1][0], both[0].weight is both[1][0].weight

    assert through(one)() == (True, True)


def test_state_that_a_module_changes_is_the_files_own(through) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = x
            return self.calls.clone()

    counter = Counter()

    def count(x):
        counter(x)
        return counter(x), counter.last

    found = through(count)(torch.ones(1))
    assert found[0] == 2
    assert torch.equal(found[1], torch.ones(1))
    assert counter.calls == 0


class Hooked(nn.Linear):
    pass


class Slow(nn.Module):
    def forward(self, x):
        match x:
            case _:
                return x


class Dynamic(nn.Module):
    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return x


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = object()

    def forward(self, x):
        return x if self.settings else -x


def hooked() -> nn.Module:
    module = Hooked(2, 2)
    module.register_forward_hook(lambda *_: None)
    return module


def replaced_forward() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    return module


REFUSED = {
    "hooks": (hooked, "`module`: the module (Hooked) has hooks, which a file cannot hold", "remove the hooks"),
    "a replaced forward": (
        replaced_forward,
        "`module`: the `forward` of this module (Linear) was replaced on the object itself",
        "write a subclass with that `forward`",
    ),
    "a forward that cannot be lowered": (
        Slow,
        "`module`: its `forward` cannot be compiled",
        "the match statement is not supported",
    ),
    "attribute lookup of its own": (
        Dynamic,
        "`module`: its class `Dynamic` defines `__getattr__`, which a file cannot hold",
        "capture a module without it",
    ),
    "an attribute of another kind": (
        Holding,
        "`module`, its `settings`: it is an object of class `object`",
        "pass it to the experiment as an argument",
    ),
    "a parametrization": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        "`module`: its class `ParametrizedLinear` is one that torch makes for itself",
        "undo the parametrization",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_can_hold_of_a_module(tmp_path, name: str) -> None:
    build, reason, way_out = REFUSED[name]
    module = build()

    @intervene
    def apply(x):
        return module(x)

    with pytest.raises(FileError) as caught:
        apply.save(tmp_path / "no.safetensors")
    assert reason in str(caught.value)
    assert way_out in str(caught.value)
    assert "return module(x)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_loaded_module_is_a_module(through) -> None:
    sae = made(lambda: SparseAutoencoder(8, 4))

    def give():
        return sae, sae.width

    found, width = through(give)()
    assert isinstance(found, nn.Module)
    assert width == 8
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in sae.named_parameters()}
    assert found.state_dict().keys() == sae.state_dict().keys()
    assert not hasattr(found, "optimizer"), "what no program mentions stays out of the file"
