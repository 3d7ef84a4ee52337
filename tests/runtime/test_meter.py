"""What the meter counts, against sizes and products worked out by hand, and torch's own counter."""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from nnsight_compiler.runtime.meter import Meter

FLOAT = 4


def test_counts_what_is_alive_and_the_most_that_was() -> None:
    outside = torch.ones(1000)
    with Meter() as meter:
        one = outside + 1
        two = one * 2
        assert meter.live == 2 * 1000 * FLOAT
        del one
        assert meter.live == 1000 * FLOAT
        three = two[:500] + 1
        assert (meter.live, meter.peak) == (1500 * FLOAT, 2000 * FLOAT)
        meter.mark()
        assert meter.peak == 1500 * FLOAT
        del two, three
        assert (meter.live, meter.peak) == (0, 1500 * FLOAT)


def test_views_and_tensors_from_outside_cost_nothing_and_a_view_keeps_its_base() -> None:
    outside = torch.ones(10, 100)
    with Meter() as meter:
        view = outside.t()[3:]
        outside += 1
        assert (meter.live, meter.peak) == (0, 0)
        base = torch.zeros(10, 100)
        view = base[0, :1]
        del base
        assert meter.live == 1000 * FLOAT
        del view
        assert meter.live == 0


def test_the_whole_storage_counts_where_a_tensor_is_expanded_or_of_another_dtype() -> None:
    with Meter() as meter:
        made = torch.zeros(7, dtype=torch.float64).expand(100, 7)
        assert meter.live == 7 * 8
        flags = torch.zeros(30, dtype=torch.bool)
        assert meter.live == 7 * 8 + 30
        del made, flags


def test_what_autograd_keeps_counts() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Meter() as meter:
        loss = (x * x).exp().sum()
        assert meter.live == 1000 * FLOAT + FLOAT  # what `exp` gives is kept for its gradient
        loss.backward()
        del loss
        assert meter.live == 1000 * FLOAT  # the gradient


def test_another_thread_is_not_counted() -> None:
    with Meter() as meter:
        thread = threading.Thread(target=lambda: torch.zeros(1000) + 1)
        thread.start()
        thread.join()
        assert (meter.live, meter.peak) == (0, 0)


def test_operations_are_those_of_torchs_counter() -> None:
    model = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Flatten(), nn.Linear(5 * 9, 7), nn.ReLU())
    x = torch.randn(4, 3, 10)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    with torch.no_grad(), Meter() as meter:
        model(x)
    assert meter.flops == counter.get_total_flops() == 2 * 4 * (5 * 9 * 3 * 2 + 5 * 9 * 7)


def test_attention_is_two_products_in_a_kernel_and_without_one() -> None:
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    expected = 2 * 2 * 3 * 5 * 6 * (8 + 8)
    with torch.no_grad(), Meter() as meter:
        scaled_dot_product_attention(query, key, value)
        assert meter.flops == expected
        (query @ key.mT).softmax(-1) @ value
        assert meter.flops == 2 * expected
