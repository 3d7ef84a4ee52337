"""Optimised and unoptimised programs agree, with each other and with plain torch, on random programs and models."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from sweeps import WIDTH, Net, Outcome, Writer, differences, expected, outcome, shown

from nnsight_compiler import CompileError, NNsight, UnusedValueWarning, intervene

FIRED: Counter[str] = Counter()
"""How many programs each optimisation did something to."""


@pytest.fixture(scope="module")
def model() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    return NNsight(Net().eval())


LENGTHS = (3, 4, 3), (4, 4, 4), (3, 5, 4, 3)
"""The lengths of the prompts in the calls of one program."""


def arguments(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    xs = [torch.randn(1, tokens, WIDTH, generator=generator) for tokens in lengths]
    vectors = [torch.randn(WIDTH, generator=generator) for _ in range(3)]
    return xs[0], xs[1], xs, vectors[0], vectors[1:]


def assert_agree(found: Outcome, wanted: Outcome, text: str, until_errors: bool = False) -> None:
    """Equal in result, error and what was printed; `until_errors`: also in what was printed before one."""
    assert found.error == wanted.error, text
    if wanted.error and not until_errors:
        return
    wrong = list(differences(found.result, wanted.result))
    assert not wrong, "\n".join([*wrong, text])
    assert [shown(line)[0] for line in found.log] == [shown(line)[0] for line in wanted.log], text
    for line, other in zip(found.log, wanted.log, strict=True):
        assert not list(differences(shown(line)[1], shown(other)[1])), f"{line}\n{other}\n{text}"


def compare(choices: random.Random, model: NNsight, straight: bool = False) -> None:
    net = model._wrapped
    traced, hooked = Writer(choices).straight() if straight else Writer(choices).program()
    optimised = intervene.from_source(traced, {"torch": torch})
    plain = optimised.with_options(without="all")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UnusedValueWarning)
        try:
            compiled = optimised.compile(model, *arguments(LENGTHS[0]))
        except CompileError as error:
            raise AssertionError(f"refused: {error}\n{traced}") from error
        for lengths in LENGTHS:
            wanted = expected(hooked, net, *arguments(lengths))
            text = f"{lengths}\n{traced}\n{hooked}"
            assert_agree(outcome(lambda: plain(model, *arguments(lengths))), wanted, f"unoptimised {text}", straight)  # noqa: B023
            assert_agree(outcome(lambda: optimised(model, *arguments(lengths))), wanted, f"optimised {text}", straight)  # noqa: B023
    FIRED.update({f"{remark.optimisation}{' straight' * straight}" for remark in compiled.remarks if remark.fired})
    FIRED[f"programs{' straight' * straight}"] += 1
    assert not any(vars(module).get("forward") or module._forward_hooks for module in net.modules())


@examples(15)
@given(choices=st.randoms(use_true_random=False))
def test_random_sweeps(model: NNsight, choices: random.Random) -> None:
    compare(choices, model)


@examples(20)
@given(choices=st.randoms(use_true_random=False))
def test_random_straight_code(model: NNsight, choices: random.Random) -> None:
    """Traces that follow one another: what is printed before an exception is compared, too."""
    compare(choices, model, straight=True)


def test_the_optimisations_fired() -> None:
    """Runs after the test above, in the same process: most programs have something to optimise."""
    if not FIRED["programs"]:
        pytest.skip("no programs ran in this process")
    assert FIRED["merge_forwards"] >= 0.2 * FIRED["programs"], FIRED
    assert FIRED["share_prefixes"] >= 0.1 * FIRED["programs"], FIRED


def test_straight_code_was_merged() -> None:
    if not FIRED["programs straight"]:
        pytest.skip("no programs ran in this process")
    assert FIRED["merge_forwards straight"] >= 0.3 * FIRED["programs straight"], FIRED
