"""Programs that no one writes on purpose, each of which once took the compiler down: they mean what they mean in
Python, or are refused with their line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, Experiment, FileError, NNsight, intervene
from nnsight_compiler.files.document import parse
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.files.saving import experiment_document


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.h:
            x = layer(x)
        return x


X = torch.ones(1, 4)


@pytest.fixture(scope="module")
def net() -> NNsight:
    torch.manual_seed(0)
    return NNsight(Net())


def refusal(experiment: Experiment, *given: Any) -> tuple[str, int]:
    """What is refused of a call, and at which line of the function."""
    with pytest.raises(CompileError) as caught:
        experiment(*given)
    (told,) = caught.value.diagnostics
    return told.reason, told.span.line - experiment._function.__code__.co_firstlineno


def test_a_slice_of_modules_in_steps_of_zero(net: NNsight) -> None:
    @intervene
    def steps(net, x, step):
        with net.trace(x):
            found = [layer.output for layer in net.h[::step]]
        return found

    assert len(steps(net, X, 2)) == 2
    assert refusal(steps, net, X, 0) == ("slice step cannot be zero", 3)


def test_a_slice_of_calls_in_steps_of_zero(net: NNsight) -> None:
    @intervene
    def calls(net, x, step):
        with net.trace(x):
            found = [call.output for call in net.h[0].calls[::step]]
        return found

    assert len(calls(net, X, 1)) == 1
    assert refusal(calls, net, X, 0) == ("slice step cannot be zero", 3)


def test_a_slice_of_a_list_of_modules_in_steps_of_zero(net: NNsight) -> None:
    @intervene
    def listed(net, x):
        held = (net.h[0], net.h[1])
        with net.trace(x):
            found = [layer.output for layer in held[::0]]
        return found

    assert refusal(listed, net, X) == ("slice step cannot be zero", 4)


def test_a_slice_of_a_range_in_steps_of_zero(net: NNsight) -> None:
    @intervene
    def sliced(net, x, wrong):
        with net.trace(x):
            out = net.output
        if wrong:
            return range(5)[::0], [1, 2][::0]
        return out, range(5)[1:][0]

    assert sliced(net, X, False)[1] == 1
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        sliced(net, X, True)


def test_isinstance_of_one_argument(net: NNsight) -> None:
    @intervene
    def asks(net, x):
        with net.trace(x):
            out = net.output
        return isinstance(out)

    with pytest.raises(TypeError, match="isinstance expected 2 arguments, got 1"):
        asks(net, X)


def test_sums_of_three_arguments(net: NNsight) -> None:
    @intervene
    def adds(net, x):
        with net.trace(x):
            out = net.output
        return sum([out], out, out)

    with pytest.raises(TypeError, match="at most 2 arguments"):
        adds(net, X)


def test_a_number_that_no_tensor_holds(net: NNsight) -> None:
    @intervene
    def large(net, x):
        with net.trace(x):
            out = net.output + 1000000000000000000000000000000
        return out

    with pytest.raises((OverflowError, RuntimeError)) as wanted:
        net._module(X) + 10**30
    with pytest.raises(type(wanted.value)):
        large(net, X)


def test_a_slice_of_slices(net: NNsight) -> None:
    @intervene
    def nested(net, x):
        with net.trace(x):
            out = net.output[slice(slice(0, 1), None)]
        return out

    with pytest.raises(TypeError, match="slice indices must be integers"):
        net._module(X)[slice(slice(0, 1), None)]
    with pytest.raises(TypeError, match="slice indices must be integers"):
        nested(net, X)


def test_the_gradient_of_a_slice(net: NNsight) -> None:
    @intervene
    def sliced(net, x):
        with net.trace(x):
            hidden = net.h[0].output
            loss = net.output.sum()
            with loss.backward():
                found = hidden.grad
        return found

    document, tensors = experiment_document(sliced)
    text = json.dumps(document)
    (grad,) = [op for op in _ops(document) if op["op"] == "Grad"]
    none = {"constant": "None"}
    other = {**grad, "value": {"slice": [grad["value"], none, none]}}
    loaded = experiment_from(parse(text.replace(json.dumps(grad), json.dumps(other))), tensors)
    with pytest.raises(CompileError, match="only tensors have gradients, and this is none") as caught:
        loaded(net, X)
    assert caught.value.diagnostics[0].span.line == sliced._function.__code__.co_firstlineno + 6


def _ops(held: Any) -> list[Any]:
    if isinstance(held, list):
        return [op for each in held for op in _ops(each)]
    if isinstance(held, dict):
        own = [held] if "op" in held and "span" in held else []
        return own + [op for each in held.values() for op in _ops(each)]
    return []


def two(first, second):
    return first, second


@pytest.mark.parametrize("name", ["\uff53econd", "\U0001d42cecond"])
def test_parameters_that_only_look_different(name: str) -> None:
    document, tensors = experiment_document(intervene(two))
    text = json.dumps(document).replace('"first"', json.dumps(name))
    with pytest.raises(FileError, match="at program: two parameters have one name"):
        experiment_from(parse(text), tensors)


@pytest.mark.parametrize("name", ["_\uff3fglobals_\uff3f", "\uff47i_frame", "\uff4dro"])
def test_attributes_that_only_look_different(name: str) -> None:
    @intervene
    def asks(x):
        return x.attribute

    document, tensors = experiment_document(asks)
    text = json.dumps(document).replace('"attribute"', json.dumps(name))
    with pytest.raises(FileError, match="no file may ask for the attribute"):
        experiment_from(parse(text), tensors)


def test_a_number_that_python_does_not_show() -> None:
    @intervene
    def number():
        return 12345678987654321

    document, tensors = experiment_document(number)
    text = json.dumps(document)
    shown = json.dumps({"int": hex(12345678987654321)})
    assert shown in text
    assert experiment_from(parse(text.replace(shown, json.dumps({"int": hex(7**1000)}))), tensors)() == 7**1000
    with pytest.raises(FileError, match=r"'int' does not hold '0xf+"):
        experiment_from(parse(text.replace(shown, json.dumps({"int": "0x" + "f" * 4000}))), tensors)
