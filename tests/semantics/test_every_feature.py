"""Every feature leaves nothing behind, runs in four threads at once, and means the same in every mode and in bf16."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from every_feature import FEATURES, Feature
from torch import nn

from nnsight_compiler import ExperimentError

EVERY = [
    pytest.param(
        feature, id=feature.name, marks=[pytest.mark.xfail(strict=True, reason=feature.awaited)] * bool(feature.awaited)
    )
    for feature in FEATURES
]


@pytest.fixture
def garbage_is_counted() -> Iterator[None]:
    """No collection of garbage during a test; what exists before it is not looked at, nor later, which takes long."""
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.enable()


def flat(value: Any) -> list[Any]:
    """The tensors in a result, in order."""
    if isinstance(value, dict):
        return [each for item in value.values() for each in flat(item)]
    if isinstance(value, list | tuple):
        return [each for item in value for each in flat(item)]
    assert isinstance(value, torch.Tensor)
    return [value]


def assert_same(found: Any, wanted: Any, feature: Feature, tolerance: float = 0.0) -> None:
    assert len(flat(found)) == len(flat(wanted))
    for left, right in zip(flat(found), flat(wanted), strict=True):
        allowed = max(feature.tolerance, tolerance)
        torch.testing.assert_close(left, right, atol=allowed, rtol=allowed)


def traces_on(module: nn.Module) -> list[str]:
    """What a run could have left on the modules of a model."""
    found = []
    for path, each in module.named_modules():
        for name, kept in vars(each).items():
            if name.endswith("_hooks") and kept:
                found.append(f"{path}: {name}")
            if name == "forward":
                found.append(f"{path}: forward")
        found.extend(f"{path}: {name}.grad" for name, each in each.named_parameters() if each.grad is not None)
    return found


@pytest.mark.parametrize("feature", EVERY)
def test_runs_leave_nothing_behind(feature: Feature, request: pytest.FixtureRequest) -> None:
    module = feature.module()
    names = {path: set(vars(each)) for path, each in module.named_modules()}
    model, x = feature.wrapped(module), feature.inputs(0)
    with torch.no_grad():
        wanted = feature.oracle(module, x)
    for _ in range(3):
        assert_same(feature.program(model, x), wanted, feature)
    del wanted
    request.getfixturevalue("garbage_is_counted")
    for _ in range(feature.runs):
        feature.program(model, x)
    fresh = gc.get_objects()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in fresh)
    count = len(fresh)
    del fresh
    assert tensors == 0
    assert count < 25, "runs leave objects"  # the record of the last run stays
    assert gc.collect() < 10, "runs leave cycles"
    assert not traces_on(module)
    assert {path: set(vars(each)) for path, each in module.named_modules()} == names


@pytest.mark.parametrize("feature", EVERY)
def test_four_threads_at_once(feature: Feature) -> None:
    module = feature.module()
    model = feature.wrapped(module)
    inputs = [feature.inputs(number) for number in range(4)]
    with torch.no_grad():
        wanted = [feature.oracle(module, x) for x in inputs]
    start = threading.Barrier(4)

    def work(number: int) -> list[Any]:
        torch.set_num_threads(1)
        start.wait()
        return [feature.program(model, inputs[number]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, right in zip(pool.map(work, range(4)), wanted, strict=True):
            for found in results:
                assert_same(found, right, feature)
    assert not traces_on(module)


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", EVERY)
def test_a_mode_around_the_call(feature: Feature, mode: str) -> None:
    module = feature.module()
    model, x = feature.wrapped(module), feature.inputs(0)
    context: AbstractContextManager[Any] = MODES[mode]()
    if feature.gradients:
        with context, pytest.raises((ExperimentError, RuntimeError), match="grad"):
            feature.program(model, x)
        assert not traces_on(module)
        return
    with torch.no_grad():
        wanted = feature.oracle(module, x)
    for _ in range(2):  # compiled, then found in the cache
        with context:
            found = feature.program(model, x)
        assert_same(found, wanted, feature)
        assert not any(each.requires_grad for each in flat(found))
    assert_same(feature.program(model, x), wanted, feature)  # compiled in one mode, it runs in another
    assert not any(each.is_inference() for each in flat(feature.program(model, x)))


@pytest.mark.parametrize("feature", EVERY)
def test_in_bf16(feature: Feature) -> None:
    module = feature.module().to(torch.bfloat16)
    x = feature.inputs(0)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    with torch.no_grad():
        wanted = feature.oracle(module, x)
    found = feature.program(feature.wrapped(module), x)
    assert_same(found, wanted, replace(feature, tolerance=0.0 if not feature.tolerance else 0.05))
