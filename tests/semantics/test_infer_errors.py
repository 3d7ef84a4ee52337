"""Mistakes of shape, found before the run at their lines; and what is none, which compiles and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, intervene
from nnsight_compiler.ir.types import TensorType

PROMPT = "The Eiffel Tower is in the city of"
"""Eight tokens."""

LINES = Path(__file__).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """The tiny model, without its weights."""
    return LanguageModel("tiny")


def refused(experiment: Any, *args: Any, says: str, way_out: str = "") -> None:
    """The call is refused at the lines marked `# here`, the first with this reason."""
    with pytest.raises(CompileError) as caught:
        experiment(*args)
    first = experiment.__wrapped__.__code__.co_firstlineno
    last = max(line for *_, line in experiment.__wrapped__.__code__.co_lines() if line is not None)
    marked = [number for number in range(first, last + 1) if "# here" in LINES[number - 1]]
    found = caught.value.diagnostics
    assert [each.span.line for each in found] == marked
    assert all(each.span.file == __file__ for each in found)
    assert found[0].reason == says
    assert way_out in found[0].way_out
    assert experiment.cache_info().size == 0


@intervene
def position(model, prompt, position):
    with model.trace(prompt):
        hidden = model.layers[1].output[:, position]  # here
    return hidden


def test_an_index_out_of_range(model) -> None:
    refused(
        position, model, PROMPT, 9,
        says="index 9 is out of range: this dimension (tokens) has 8 entries", way_out="from -8 to 7",
    )  # fmt: skip
    assert position(model, PROMPT, 7).shape == (1, 128)
    assert position(model, PROMPT, -8).shape == (1, 128)
    position.cache_clear()


def test_a_position_that_a_compiled_program_is_called_with_later_is_the_runs_to_refuse(model) -> None:
    @intervene
    def read(model, prompt, position):
        with model.trace(prompt):
            hidden = model.layers[1].output[:, position]
        return hidden

    assert read(model, PROMPT, 0).shape == (1, 128)
    with pytest.raises(IndexError, match="out of bounds"):
        read(model, PROMPT, 9)
    longer = read(model, f"{PROMPT} Paris and in the city of Rome", 9)
    assert longer.shape == (1, 128)
    assert read.cache_info().misses == 1


def test_two_mistakes_and_one_of_another_kind_at_once(model) -> None:
    @intervene
    def wrong(model, prompt, vector):
        with model.trace(prompt):
            model.layers[0].output[:, -1] = vector  # here
            early = model.layers[1].output[0, 0, 128]  # here
            model.layers[2].mlp.output = vector  # here
            logits = model.output.logits
        return early, logits

    refused(wrong, model, PROMPT, torch.zeros(3), says="a value of shape [3] is assigned to a part of shape [1, 128]")


def test_a_write_that_reaches_nothing_comes_with_the_others(model) -> None:
    @intervene
    def wrong(model, prompt):
        with model.trace(prompt):
            early = model.layers[0].output[9]  # here
            model.layers[2].output = 0  # here
        return early

    refused(wrong, model, PROMPT, says="index 9 is out of range: this dimension (rows) has 1 entry")


def test_vectors_of_another_width(model) -> None:
    @intervene
    def steer(model, prompt, vector):
        with model.trace(prompt):
            model.layers[1].output += 2 * vector  # here
            logits = model.lm_head.output
        return logits

    refused(
        steer, model, PROMPT, torch.zeros(64),
        says="The size of tensor a (128) must match the size of tensor b (64) at non-singleton dimension 2",
        way_out="the shapes here are [1, 8, 128], [64]",
    )  # fmt: skip


def test_a_lens_on_the_wrong_slice(model) -> None:
    @intervene
    def lens(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[1].output[..., :64]
            logits = model.lm_head(hidden)  # here
        return logits

    refused(
        lens, model, PROMPT,
        says="mat1 and mat2 shapes cannot be multiplied (8x64 and 128x1007)", way_out="[1, 8, 64], [1007, 128]",
    )  # fmt: skip


def test_values_of_two_forwards_of_different_lengths(model) -> None:
    @intervene
    def patch(model, clean, corrupt):
        with model.trace(clean):
            source = model.layers[1].output
        with model.trace(corrupt):
            model.layers[1].output[:] = source  # here
            logits = model.lm_head.output
        return logits

    refused(
        patch, model, PROMPT, f"{PROMPT} Paris",
        says="a value of shape [1, 8, 128] is assigned to a part of shape [1, 9, 128]",
    )  # fmt: skip
    assert patch(model, PROMPT, PROMPT).shape == (1, 8, 1007)
    patch.cache_clear()


def test_after_the_trace_and_in_a_helper(model) -> None:
    def last(hidden):
        return hidden[:, 8]  # here

    @intervene
    def wrong(model, prompt):
        with model.trace(prompt):
            hidden = last(model.layers[1].output)
            logits = model.lm_head.output
        return logits[1], hidden

    with pytest.raises(CompileError) as caught:
        wrong(model, PROMPT)
    lines = [LINES[each.span.line - 1].strip() for each in caught.value.diagnostics]
    assert lines == ["return hidden[:, 8]  # here", "return logits[1], hidden"]


def test_what_may_not_happen_is_not_refused(model) -> None:
    @intervene
    def guarded(model, prompt, position):
        with model.trace(prompt):
            hidden = model.layers[1].output
            if position < hidden.shape[1]:
                picked = hidden[:, position]
            else:
                picked = hidden[:, -1]
            if hidden.norm() < 0:
                picked = hidden[:, 99]
            for number in [n for n in (1, 99) if n < 8]:
                picked = picked + hidden[:, number]
        return picked

    assert guarded(model, PROMPT, 99).shape == (1, 128)
    assert guarded(model, PROMPT, 3).shape == (1, 128)


# --- random programs ---


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + x


class Net(nn.Module):
    """Rows and tokens, and a module that sees them laid into one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.flat = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.flat(x.flatten(0, 1)).view(*x.shape[:-1], 4)


STEPS: dict[str, str] = {
    "half": "{0}.half().float()",
    "add": "{0} + {1}",
    "scaled": "{0} * 2",
    "compared": "({0} > 0)",
    "mean": "{0}.float().mean(-1)",
    "kept": "{0}.float().sum(0, keepdim=True)",
    "last": "{0}[..., -1:]",
    "first": "{0}[0]",
    "new": "{0}[None]",
    "turned": "{0}.transpose(0, -1)",
    "flat": "{0}.flatten()",
    "stacked": "torch.stack([{0}, {0}])",
    "joined": "torch.cat([{0}, {0}], dim=-1)",
    "product": "{0}.float() @ {1}.float()",
    "softmax": "{0}.float().softmax(-1)",
    "largest": "{0}.float().topk(2).indices",
    "sorted": "{0}.sort(dim=0).values",
    "zeros": "torch.zeros({0}.shape[0], 6)",
    "where": "torch.where({0} > 0, {0}, {1})",
    "reshaped": "{0}.reshape(-1, 6)",
    "steps": "torch.arange({0}.shape[-1])",
    "gathered": "{0}[..., [0, 1, 0]]",
    "masked": "{0}[{0} > 0]",
    "normed": "nn.functional.layer_norm({0}.float(), (6,))",
    "unbound": "{0}.unbind(0)[0]",
    "summed": "sum([{0}, {1}])",
}


@st.composite
def programs(draw: st.DrawFn) -> list[str]:
    """The lines of a trace body: values `v0`, `v1`, …, each made of earlier ones."""
    lines = ["v0 = model.layers[0].output", "v1 = model.flat.output"]
    for number in range(2, 2 + draw(st.integers(1, 6))):
        step = STEPS[draw(st.sampled_from(sorted(STEPS)))]
        names = [f"v{draw(st.integers(0, number - 1))}" for _ in range(2)]
        lines.append(f"v{number} = {step.format(*names)}")
    return lines


def evaluated(lines: list[str], net: Net, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int | None]:
    """The values that Python and plain torch compute, and the number of the line that raises, if one does."""
    held: dict[str, Any] = {}
    handle = net.layers[0].register_forward_hook(lambda _m, _a, out: held.update(v0=out))
    flat = net.flat.register_forward_hook(lambda _m, _a, out: held.update(v1=out))
    with torch.no_grad():
        net(x)
    handle.remove()
    flat.remove()
    scope: dict[str, Any] = {"torch": torch, "nn": nn, **held}
    for number, line in enumerate(lines[2:], 2):
        try:
            exec(line, scope)
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
            return held, number
        held[f"v{number}"] = scope[f"v{number}"]
    return held, None


NET = Net().eval()
WRAPPED = NNsight(NET)
SIZES = [(2, 3), (5, 4), (6, 6), (1, 1)]


@examples(25)
@given(lines=programs(), size=st.sampled_from(SIZES), rows=st.sampled_from([1, 2, 5, 6]))
def test_types_are_those_of_the_run_and_no_valid_program_is_refused(lines, size, rows) -> None:
    names = ", ".join(line.partition(" ")[0] for line in lines)
    body = [f"        {line}" for line in lines]
    source = "\n".join(["def f(model, x):", "    with model.trace(x):", *body, f"    return ({names},)"])
    experiment = intervene.from_source(source, {"torch": torch, "nn": nn})
    x = torch.randn(*size, 6)
    held, failing = evaluated(lines, NET, x)
    try:
        lowered = experiment.lower(WRAPPED, x)
    except CompileError as error:
        refused_at: int | None = error.diagnostics[0].span.line - 3
    else:
        refused_at = None
    if refused_at is not None:
        assert refused_at == failing
        return
    program = dict(lowered.stages)["infer"]
    types = {value.name: value.type for value in program.values() if isinstance(value.type, TensorType)}
    assert {"v0", "v1"} <= types.keys()
    for name, value in held.items():
        if name in types:
            assert types[name].dtype == str(value.dtype).removeprefix("torch.")
            assert [each.size for each in types[name].shape or ()] == list(value.shape), name
    if failing is None:
        found = experiment(WRAPPED, x)
        assert [each.shape for each in found] == [each.shape for each in held.values()]
    elsewhere, _ = evaluated(lines, NET, torch.randn(rows, size[1], 6))  # of such a net, rows are the only axis
    for name, value in elsewhere.items():
        for dimension, now in zip(types[name].shape or () if name in types else (), value.shape, strict=False):
            if dimension.axis is not None:
                assert (dimension.axis, now) == ("rows", rows)


def test_most_steps_have_a_type() -> None:
    """The property would hold of a pass that finds nothing."""
    typed = 0
    for step in STEPS.values():
        source = (
            f"def f(model, x):\n    with model.trace(x):\n        v0 = model.layers[0].output\n        v1 = {step}\n"
        )
        source = source.format("v0", "v0") + "    return v0, v1\n"
        experiment = intervene.from_source(source, {"torch": torch, "nn": nn})
        program = dict(experiment.lower(WRAPPED, torch.randn(6, 6, 6)).stages)["infer"]
        typed += any(value.name == "v1" and isinstance(value.type, TensorType) for value in program.values())
    assert typed == len(STEPS) - 1  # what a mask picks has a size that only the run can tell
