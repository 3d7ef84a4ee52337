"""What is computed while a program is compiled stays small: a large result is left for the run, a small one is what
Python gives."""

from __future__ import annotations

import math
import operator
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, compilation, intervene
from nnsight_compiler.passes.bounded import (
    BITS,
    CHARACTERS,
    LONGEST,
    MOST_OPS,
    MOST_OPS_OF_JOBS,
    length_of,
    may_apply,
    may_call,
)

HUGE = 10**9
LARGE = 1 << BITS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.h:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def net() -> NNsight:
    return NNsight(Net())


@pytest.mark.parametrize(
    ("sign", "operands"),
    [
        ("*", ("a", HUGE)), ("*", (HUGE, b"a")), ("*", ((1, 2), HUGE)), ("*", (LARGE, 2)), ("<<", (1, HUGE)),
        ("<<", (LARGE, 1)), ("+", (LARGE, 1)), ("+", ("a" * (CHARACTERS + 1), "a")), ("%", ("%1000000000d", 1)),
        ("%", (b"%*d", (HUGE, 1))), ("==", ((0,) * (LONGEST + 1), (0,))), ("in", (1.5, range(10**12))),
        ("-", (LARGE,)),
    ],
)  # fmt: skip
def test_operators_that_are_left_for_the_run(sign: str, operands: tuple[Any, ...]) -> None:
    assert not may_apply(sign, operands)


@pytest.mark.parametrize(
    ("sign", "operands"),
    [
        ("*", ("ab", 3)), ("*", (3, (1, 2))), ("*", ("ab", -HUGE)), ("<<", (1, 10)), ("+", (2**60, 2**60)),
        ("%", (7, 3)), ("in", (5, range(10**12))), ("-", (3,)), ("==", (range(10**12), range(10**12))),
        ("+", ("a" * 1000, "b")),
    ],
)  # fmt: skip
def test_operators_that_are_computed(sign: str, operands: tuple[Any, ...]) -> None:
    assert may_apply(sign, operands)


def test_tuples_that_hold_one_another_many_times_over() -> None:
    held: tuple[Any, ...] = (1, 2)
    for _ in range(200):
        held = (held, held)
    begun = time.process_time()
    assert not may_apply("+", (held, (1,)))
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (sum, (range(10**12),)), (sorted, (range(10**12),)), (tuple, (range(10**12),)), (max, (range(10**12),)),
        (math.prod, (range(10**12),)), (math.factorial, (10**6,)), (math.comb, (10**6, 10**5)),
        (math.perm, (10**6, 10**5)), (round, (1, -(10**9))), (math.isqrt, (LARGE,)), (str, (LARGE,)),
        (int, ("9" * (CHARACTERS + 1),)), (range, (1, LARGE * 2)),
    ],
)  # fmt: skip
def test_calls_that_are_left_for_the_run(function: Any, arguments: tuple[Any, ...]) -> None:
    assert not may_call(function, arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (sum, (range(100),)), (len, (range(10**12),)), (range, (10**12,)), (isinstance, (range(10**12), range)),
        (math.factorial, (5,)), (round, (2.5, 1)), (round, (10**18,)), (max, (3, 4)), (bool, (range(10**12),)),
    ],
)  # fmt: skip
def test_calls_that_are_computed(function: Any, arguments: tuple[Any, ...]) -> None:
    assert may_call(function, arguments)


@pytest.mark.parametrize("held", [range(0), range(5), range(5, 0), range(5, 0, -2), range(0, 5, 2), range(-3, 3)])
def test_lengths_are_pythons(held: range) -> None:
    assert length_of(held) == len(held)


def test_lengths_that_python_has_no_room_for() -> None:
    assert length_of(range(10**30)) == 10**30
    with pytest.raises(OverflowError):
        operator.length_hint(range(10**30))


def bombs(net, x, n, flag):
    if flag:
        return "a" * n, sum(range(n)), [n] * n, 1 << n, math.factorial(n), list(range(n)), sorted(range(n))
    with net.trace(x):
        out = net.output
    return out


def test_a_program_with_bombs_in_it_is_compiled_at_once(net: NNsight) -> None:
    experiment, x = intervene(bombs), torch.ones(1, 4)
    begun = time.process_time()
    found = experiment(net, x, 10**11, False)
    assert time.process_time() - begun < 3
    assert torch.equal(found, net._module(x))


def literal_bombs(net, x, flag):
    if flag:
        return "a" * 100000000000, sum(range(100000000000)), 1 << 100000000000, (0,) * 100000000000
    with net.trace(x):
        out = net.output
    return out


def test_literal_ones_too(net: NNsight) -> None:
    experiment, x = intervene(literal_bombs), torch.ones(1, 4)
    begun = time.process_time()
    assert torch.equal(experiment(net, x, False), net._module(x))
    assert time.process_time() - begun < 3


def doubling(net, x, layer):
    a = layer + layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    a = a + a - layer
    with net.trace(x):
        out = net.h[0].output
    return out, a


def test_expressions_that_double_with_each_line(net: NNsight) -> None:
    begun = time.process_time()
    _, found = intervene(doubling)(net, torch.ones(1, 4), 1)
    assert time.process_time() - begun < 3
    assert found == 2**30 + 1


def unrolled(net, x, n):
    with net.trace(x):
        for number in range(n):
            out = net.h[number % 3].output
    return out


def test_a_loop_over_modules_with_too_many_rounds(net: NNsight) -> None:
    x = torch.ones(1, 4)
    assert torch.equal(intervene(unrolled)(net, x, 2), net._module.h[1](net._module.h[0](x)))
    with pytest.raises(CompileError) as caught:
        intervene(unrolled)(net, x, 10**12)
    (told,) = caught.value.diagnostics
    assert told.reason == (
        "this loop names modules, so that it is unrolled round by round, and comes to more than 250,000 ops"
    )
    assert told.way_out.startswith("go over fewer modules at once, in several calls")
    assert told.related == ()
    assert told.span.line == unrolled.__code__.co_firstlineno + 2


def counted(net, x, n, held):
    with net.trace(x):
        out = net.output
    if x.sum() > 100:
        return len(range(n)), len(held), list(range(n)), [each for each in held], range(n)[5]
    return out, held[-1]


def test_ranges_that_python_cannot_count(net: NNsight) -> None:
    x, held = torch.ones(1, 4), range(10**30)
    out, last = intervene(counted)(net, x, 10**30, held)
    assert torch.equal(out, net._module(x))
    assert last == 10**30 - 1


def nested_tuples(net, x):
    held = (1, 2)
    with net.trace(x):
        for number in range(40):
            held = (held, held)
            out = net.h[number % 3].output
    return out, held


def nested_lists(net, x):
    held = [1]
    with net.trace(x):
        for number in range(40):
            held = [held, held]
            out = net.h[number % 3].output
    return out, held


def nested_rounds(net, x):
    chosen = 0
    with net.trace(x):
        for first in range(1000):
            for second in range(1000):
                for third in range(1000):
                    chosen = (chosen + first + second + third) % 3
        out = net.h[chosen].output
    return out


MANY = dict.fromkeys(range(10**6), 1)


def nested_numbers(net, x):
    with net.trace(x):
        for first in range(300):
            for second in range(300):
                out = net.h[(first + second) % 3].output
    return out


def a_long_range(net, x):
    with net.trace(x):
        for number in range(10**12):
            out = net.h[number % 3].output
    return out


def a_long_text(net, x, text="abc" * 10**6):
    with net.trace(x):
        for letter in text:
            out = net.h[ord(letter) % 3].output
    return out


def a_long_list(net, x, numbers=[1] * 10**6):
    with net.trace(x):
        for number in numbers:
            out = net.h[number].output
    return out


def a_long_dict(net, x, numbers=MANY):
    with net.trace(x):
        for _, number in numbers.items():
            out = net.h[number].output
    return out


def long_columns(net, x):
    with net.trace(x):
        for number, letter in zip(range(10**6), "abc" * 10**5, strict=False):
            out = net.h[(number + ord(letter)) % 3].output
    return out


def long_counts(net, x):
    with net.trace(x):
        for number, _ in enumerate(range(10**6)):
            out = net.h[number % 3].output
    return out


def a_while_without_end(net, x):
    number = 0
    with net.trace(x):
        while number >= 0:
            out = net.h[number % 3].output
            number = number + 1
    return out


def twice(module, depth):
    return module.output if depth == 0 else twice(module, depth - 1) + twice(module, depth - 1)


def many_helpers(net, x):
    with net.trace(x):
        out = twice(net.h[0], 40)
    return out


UNROLLED = "this loop names modules, so that it is unrolled round by round, and comes to more than 10,000 ops"
HELD = "this holds more than 10,000 values, itself counted as often as it is held"
GROWN = "this program is unrolled to more than 10,000 ops"
FEWER = "go over fewer modules at once, in several calls, and keep what names no module in a loop of its own"


@pytest.mark.parametrize(
    ("function", "place", "reason", "way_out"),
    [
        (nested_tuples, (3, 8), HELD, "keep what names no module in a loop of its own"),
        (nested_lists, (4, 19), HELD, "keep what names no module in a loop of its own"),
        (nested_rounds, (3, 8), UNROLLED, FEWER),
        (nested_numbers, (2, 8), UNROLLED, FEWER),
        (a_long_range, (2, 8), UNROLLED, FEWER),
        (a_long_text, (2, 8), UNROLLED, FEWER),
        (a_long_list, (2, 8), UNROLLED, FEWER),
        (a_long_dict, (2, 8), UNROLLED, FEWER),
        (long_columns, (2, 8), UNROLLED, FEWER),
        (long_counts, (2, 8), UNROLLED, FEWER),
        (a_while_without_end, (3, 8), UNROLLED, FEWER),
        (many_helpers, (-3, 11), GROWN, "call fewer helpers, and keep what names no module in a loop of its own"),
    ],
)
def test_programs_that_grow_without_end(
    net: NNsight,
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    place: tuple[int, int],
    reason: str,
    way_out: str,
) -> None:
    monkeypatch.setattr(compilation, "MOST_OPS", 10_000)
    experiment = intervene(function)
    begun = time.process_time()
    with pytest.raises(CompileError) as caught:
        experiment(net, torch.ones(1, 4))
    assert time.process_time() - begun < 3
    (told,) = caught.value.diagnostics
    assert (told.reason, told.way_out) == (reason, way_out)
    assert (told.span.file, told.span.line - function.__code__.co_firstlineno) == (__file__, place[0])
    assert told.span.column == place[1]


def test_the_page_on_passes_tells_the_bounds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
    assert f"unrolled to more than {MOST_OPS:,} ops" in page
    assert f"({MOST_OPS_OF_JOBS:,} for a job of a service" in page


def in_pieces(net, x):
    with net.trace(x):
        out = net.output
    if x.sum() > 100:
        return torch.zeros(1).expand(10**9).split(1), torch.zeros(10**9).unbind()
    return out, torch.arange(6).split(2)


def test_tensors_in_very_many_pieces(net: NNsight) -> None:
    begun = time.process_time()
    out, pieces = intervene(in_pieces)(net, torch.ones(1, 4))
    assert time.process_time() - begun < 3
    assert [each.tolist() for each in pieces] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(out, net._module(torch.ones(1, 4)))
