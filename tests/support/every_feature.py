"""One small program or two for each feature, with what it must give: the plain module under hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel, NNsight, intervene

WIDTH = 8


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.linear(x))
        return x + y, y


class Net(nn.Module):
    """Three layers, a module that returns a tuple, one that runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.pair = Pair()
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x, _ = self.pair(x)
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(5)
    return Net().eval()


def language_model() -> nn.Module:
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=24, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@contextmanager
def hooks(module: nn.Module, *given: tuple[str, Callable[[Any], Any]]) -> Iterator[None]:
    """The module with functions put on the outputs of some of its modules; what they return, if anything, replaces."""
    handles = [
        module.get_submodule(path).register_forward_hook(lambda _module, _inputs, output, f=function: f(output))
        for path, function in given
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(module: nn.Module, x: torch.Tensor, *paths: str) -> list[Any]:
    """What some modules of the plain model return, in the order of the paths; `""` is the model."""
    found: dict[str, Any] = {}
    with hooks(module, *((path, lambda output, path=path: found.update({path: output})) for path in paths)):
        module(x)
    return [found[path] for path in paths]


@final
@dataclass(frozen=True, slots=True)
class Feature:
    """A program of a model and an input, and what it must give.

    runs: how often a test of leaks runs it.
    gradients: it asks for gradients itself, so it is refused where there can be none.
    exact: to which tolerance its values equal the oracle's.
    awaited: why it does not run yet.
    """

    name: str
    program: Callable[[Any, torch.Tensor], Any]
    oracle: Callable[[Any, torch.Tensor], Any]
    make: Callable[[], nn.Module] = net
    runs: int = 250
    gradients: bool = False
    tolerance: float = 0.0
    awaited: str = ""

    def module(self) -> nn.Module:
        return self.make()

    def wrapped(self, module: nn.Module) -> Any:
        return NNsight(module) if self.make is net else LanguageModel(module)

    def inputs(self, number: int) -> torch.Tensor:
        """An input of its own for each number."""
        generator = torch.Generator().manual_seed(number)
        if self.make is net:
            return torch.randn(2, WIDTH, generator=generator)
        return torch.randint(1, 31, (1, 5), generator=generator)


# --- one forward ---


@intervene
def read(model, x):
    with model.trace(x):
        hidden = model.layers[1].output
    return hidden


@intervene
def read_an_input(model, x):
    with model.trace(x):
        hidden = model.layers[1].input
    return hidden


@intervene
def write_in_place(model, x):
    with model.trace(x):
        model.layers[1].output[:, 2] += 1
        out = model.output
    return out


@intervene
def replace(model, x):
    with model.trace(x):
        model.layers[1].output = model.layers[1].output * 2
        out = model.output
    return out


@intervene
def replace_an_item_of_a_tuple(model, x):
    with model.trace(x):
        model.pair.output[0] = model.pair.output[1] * 3
        out = model.output
    return out


@intervene
def save_in_containers(model, x):
    with model.trace(x):
        found = {"states": [layer.output for layer in model.layers], "norm": model.layers[0].output.norm()}
    return found


def save_from_a_block(model, x):
    with model.trace(x):
        model.layers[0].output[:] *= 2
        hidden = model.layers[1].output.save()
    return hidden


def store_outside(model, x):
    kept = []
    with model.trace(x):
        for layer in model.layers:
            kept.append(layer.output)
    return kept


@intervene
def branch_on_a_value(model, x):
    with model.trace(x):
        hidden = model.layers[0].output
        if hidden.sum() > 0:
            hidden *= 2
        else:
            hidden[:] = 0.5
        out = model.output
    return out


def branched(module, x):
    hidden = module.layers[0](x)
    with hooks(module, ("layers.0", lambda output: output * 2 if hidden.sum() > 0 else torch.full_like(output, 0.5))):
        return module(x)


@intervene
def loop_over_columns(model, x):
    with model.trace(x):
        hidden = model.layers[0].output
        for column in range(0, 8, 3):
            hidden[:, column] *= column
        out = model.output
    return out


def columns(output):
    output = output.clone()
    for column in range(0, 8, 3):
        output[:, column] *= column
    return output


def _doubled(layer):
    layer.output = layer.output * 2
    return layer.output


@intervene
def call_a_helper(model, x):
    with model.trace(x):
        changed = _doubled(model.layers[1])
        out = model.output
    return changed, out


class Scaler:
    """A plain class, with a module in its objects."""

    times = 2

    def __init__(self) -> None:
        self.shift, self.rounds, self.inner = torch.ones(WIDTH), [], nn.Identity()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.count = self.times
        return self.scaled(self.inner(hidden)) + self.shift

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rounds.append(1)
        return hidden * self.times


SCALER = Scaler()


@intervene
def call_an_object(model, x):
    with model.trace(x):
        model.layers[1].output = SCALER(model.layers[1].output)
        out = model.output
    return out


@intervene
def call_a_module(model, x):
    with model.trace(x):
        lens = model.head(model.layers[0].output)
    return lens


@intervene
def call_index(model, x):
    with model.trace(x):
        first = model.twice.calls[0].output
        second = model.twice.calls[1].output
    return first, second


def both_calls(module, x):
    found = []
    with hooks(module, ("twice", found.append)):
        module(x)
    return tuple(found)


@intervene
def patch(model, x):
    with model.trace(x):
        source = model.layers[1].output[:, :4]
    with model.trace(-x):
        model.layers[1].output[:, :4] = source
        out = model.output
    return out


def patched(module, x):
    (source,) = outputs(module, x, "layers.1")
    with hooks(module, ("layers.1", lambda output: torch.cat([source[:, :4], output[:, 4:]], -1))):
        return module(-x)


@intervene
def a_stage(model, x):
    with model.trace(x):
        norm = model.layers[0].output.norm()
    layer = 1 if norm > 0 else 2
    with model.trace(x):
        hidden = model.layers[layer].output
    return hidden


# --- parts of the surface that have a section of their own ---


@intervene
def stop(model, x):
    with model.trace(x) as tracer:
        hidden = model.layers[1].output
        tracer.stop()
    return hidden


@intervene
def skip(model, x):
    with model.trace(x):
        model.layers[1].skip(model.layers[1].input * 2)
        out = model.output
    return out


def skipped(module, x):
    (before,) = outputs(module, x, "layers.0")
    with hooks(module, ("layers.1", lambda output: before.tanh() * 2)):
        return module(x)


def session(model, x):
    with model.session():
        with model.trace(x):
            hidden = model.layers[0].output
        with model.trace(x):
            model.layers[1].output = hidden
            out = model.output.save()
    return out


def from_the_first(module, x):
    (hidden,) = outputs(module, x, "layers.0")
    with hooks(module, ("layers.1", lambda output: hidden)):
        return module(x)


def cache(model, x):
    with model.trace(x) as tracer:
        kept = tracer.cache(modules=[model.layers[1]])
    return kept["model.layers.1"].output


def edit(model, x):
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    with edited.trace(x):
        out = edited.output.save()
    return out


@intervene
def read_gradients(model, x):
    with model.trace(x):
        hidden = model.layers[1].output
        with model.output.sum().backward():
            gradient = hidden.grad
    return gradient


def gradient_of_the_sum(module, x):
    with torch.enable_grad():
        (hidden,) = outputs(module, x, "layers.1")
        held = hidden.detach().requires_grad_()
        with hooks(module, ("layers.1", lambda output: held)):
            return torch.autograd.grad(module(x).sum(), held)[0]


@intervene
def write_gradients(model, x):
    with model.trace(x):
        early = model.layers[0].output
        late = model.layers[1].output
        with model.output.sum().backward():
            late.grad = late.grad * 2
            gradient = early.grad
    return gradient


def gradient_doubled(module, x):
    with torch.enable_grad():
        held = module.layers[0](x).detach().requires_grad_()
        with hooks(module, ("layers.0", lambda output: held)):
            return torch.autograd.grad(module(x).sum(), held)[0] * 2


@intervene
def source_of_a_forward(model, x):
    with model.trace(x):
        inner = model.pair.source.torch_tanh_0.output
    return inner


def source_written(model, x):
    with model.trace(x):
        model.pair.source.torch_tanh_0.output[:] = 0
        out = model.output.save()
    return out


def without_the_inner(module, x):
    with hooks(module, ("pair.linear", lambda output: output * 0)):
        return module(x)


# --- rows and steps, which need a language model ---


@intervene
def invokes(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            model.transformer.h[0].output[:] *= 2
            first = model.lm_head.output[:, -1]
        with tracer.invoke(x[:, :3]):
            second = model.lm_head.output[:, -1]
    return first, second


def each_alone(module, x):
    with hooks(module, ("transformer.h.0", lambda output: output * 2)):
        first = module(x).logits[:, -1]
    return first, module(x[:, :3]).logits[:, -1]


@intervene
def generate(model, x):
    with model.generate(x, max_new_tokens=3, min_new_tokens=3) as tracer:
        tokens = list()
        for _ in tracer.iter[:3]:
            model.transformer.h[0].output[:, -1] += 1
            tokens.append(model.lm_head.output[:, -1].argmax(-1))
        ids = tracer.result
    return tokens, ids


def generated(module, x):
    tokens = []

    def more(output):
        output = output.clone()
        output[:, -1] += 1
        return output

    read = lambda output: tokens.append(output[:, -1].argmax(-1))  # noqa: E731
    with hooks(module, ("transformer.h.0", more), ("lm_head", read)):
        ids = module.generate(x, max_new_tokens=3, min_new_tokens=3)
    return tokens[:3], ids


def head(path: str, change: Callable[[Any], Any]) -> Callable[[Any, torch.Tensor], Any]:
    """The oracle of a program that changes one output and reads the model's."""

    def run(module: nn.Module, x: torch.Tensor) -> Any:
        with hooks(module, (path, change)):
            return module(x)

    return run


def added(output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output[:, 2] += 1
    return output


def shifted_twice(module: nn.Module, x: torch.Tensor) -> Any:
    with hooks(module, ("layers.1", lambda output: output * 2 + 1)):
        return module(x)


def doubled_and_read(module: nn.Module, x: torch.Tensor) -> Any:
    (hidden,) = outputs(module, x, "layers.1")
    with hooks(module, ("layers.1", lambda output: output * 2)):
        return hidden * 2, module(x)


def states(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return outputs(module, x, "layers.0", "layers.1", "layers.2")


FEATURES = [
    Feature("read", read, lambda module, x: outputs(module, x, "layers.1")[0], runs=1000),
    Feature("read_an_input", read_an_input, lambda module, x: outputs(module, x, "layers.0")[0].tanh()),
    Feature("write_in_place", write_in_place, head("layers.1", added), runs=1000),
    Feature("replace", replace, head("layers.1", lambda output: output * 2)),
    Feature("replace_an_item", replace_an_item_of_a_tuple, head("pair", lambda pair: (pair[1] * 3, pair[1]))),
    Feature(
        "save_in_containers",
        save_in_containers,
        lambda module, x: {"states": states(module, x), "norm": states(module, x)[0].norm()},
    ),
    Feature(
        "save_from_a_block", save_from_a_block, lambda module, x: module.layers[1]((module.layers[0](x) * 2).tanh())
    ),
    Feature("store_outside", store_outside, states),
    Feature("branch_on_a_value", branch_on_a_value, branched),
    Feature("loop_over_columns", loop_over_columns, head("layers.0", columns)),
    Feature("call_a_helper", call_a_helper, doubled_and_read),
    Feature("call_an_object", call_an_object, shifted_twice),
    Feature("call_a_module", call_a_module, lambda module, x: module.head(module.layers[0](x))),
    Feature("call_index", call_index, both_calls),
    Feature("patch", patch, patched),
    Feature("stage", a_stage, lambda module, x: outputs(module, x, "layers.1")[0]),
    Feature("stop", stop, lambda module, x: outputs(module, x, "layers.1")[0]),
    Feature("skip", skip, skipped),
    Feature("session", session, from_the_first),
    Feature("cache", cache, lambda module, x: outputs(module, x, "layers.1")[0]),
    Feature("edit", edit, head("layers.1", lambda output: output * 2), runs=100),
    Feature("read_gradients", read_gradients, gradient_of_the_sum, gradients=True),
    Feature("write_gradients", write_gradients, gradient_doubled, gradients=True),
    Feature("source", source_of_a_forward, lambda module, x: outputs(module, x, "pair")[0][1]),
    Feature("source_written", source_written, without_the_inner),
    Feature("invokes", invokes, each_alone, language_model, runs=100, tolerance=1e-5),
    Feature("generate", generate, generated, language_model, runs=20),
]
