"""Python's rows of the table of known calls, and einops', held against real calls."""

from __future__ import annotations

import collections
import fractions
import importlib
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples

from nnsight_compiler.passes.known_calls import Behaviour, callable_of, known_method, known_target
from nnsight_compiler.passes.known_methods import TYPES, python_methods
from nnsight_compiler.passes.known_python import python_rows

Broken = Callable[..., str | None]

MISFITS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, StopIteration, Warning)
ALIKE = ("tqdm", "logging", "time", "warnings", "traceback", "gc", "pprint")
"""Modules whose rows show or measure."""


class Held:
    """An object of a user's."""

    def __init__(self) -> None:
        self.scale = [1.0]


def things() -> dict[str, Any]:
    """One of each kind of value that a function may be given."""
    return {
        "number": 2,
        "real": 0.5,
        "text": "a b",
        "bytes": b"ab",
        "list": [2, 1, 3],
        "nested": [[1, 2], [3]],
        "tensors": [torch.ones(2), torch.zeros(2)],
        "tuple": (2, 1),
        "dict": {"a": [1], "b": [2]},
        "set": {1, 2},
        "deque": collections.deque([1, 2]),
        "tensor": torch.rand(3),
        "array": np.ones(3),
        "object": Held(),
        "complex": 1j,
        "json": '{"a": [1]}',
        "none": None,
        "class": list,
    }


SHAPES: list[tuple[str, ...]] = [
    (), *((kind,) for kind in things()), ("list", "number"), ("nested", "number"), ("tensors", "number"),
    ("number", "number"), ("real", "real"), ("text", "text"), ("tensor", "tensor"), ("tensor", "number"),
    ("list", "list"), ("nested", "nested"), ("tuple", "tuple"), ("set", "set"), ("dict", "text"), ("dict", "dict"),
    ("dict", "text", "list"), ("object", "text"), ("object", "text", "list"), ("number", "list"), ("number", "nested"),
    ("text", "text", "text"), ("list", "number", "list"), ("number", "number", "number"), ("array", "array"),
    ("list", "none"), ("text", "list"), ("number", "tensor"), ("list", "class"), ("class", "class"),
]  # fmt: skip


def receivers(module: str) -> list[Any]:
    return [random.Random(0)] if module == "random.Random" else []


@pytest.mark.parametrize("target", [name for name, row in python_rows().items() if not name.startswith(ALIKE)])
def test_every_row_keeps_what_it_claims(broken_claim: Broken, target: str) -> None:
    module = target.rpartition(".")[0]
    row = known_target(target)
    if (
        module.startswith("nnsight_compiler.")
        or module == "einops"
        or (row.behaviour is Behaviour.HARMLESS and row.random)
    ):
        pytest.skip("has a test of its own")
    importlib.import_module(module.removesuffix(".chain").removesuffix(".Random"))
    if target == "math.sumprod" and sys.version_info < (3, 12):
        pytest.skip("new in Python 3.12")
    checked = 0
    for shape in SHAPES:
        values = things()
        arguments = receivers(module) + [values[kind] for kind in shape]
        if target in ENDLESS:
            pytest.skip("never ends")
        try:
            complaint = broken_claim(row, arguments)
        except MISFITS:
            continue
        if complaint == "is a host call with these arguments":
            continue
        checked += 1
        assert complaint is None, (shape, complaint)
        if checked == 8:
            break
    assert checked or target in NEEDS_MORE


ENDLESS = ("itertools.count", "itertools.cycle", "itertools.repeat")
NEEDS_MORE = {
    *("builtins.UnicodeDecodeError", "builtins.UnicodeEncodeError", "builtins.UnicodeTranslateError"),
    *("builtins.ExceptionGroup", "builtins.BaseExceptionGroup", "builtins.next", "collections.namedtuple"),
    *("builtins.ord", "builtins.delattr", "textwrap.shorten", "random.Random.setstate"),
}
"""Rows that take arguments of a special kind."""


@pytest.mark.parametrize("name", list(python_methods()))
def test_what_is_said_of_a_method_holds_for_all_that_have_it(broken_claim: Broken, name: str) -> None:
    row = known_method(name)
    assert row is not None
    checked = 0
    for receiver in RECEIVERS:
        method = getattr(type(receiver), name, None)
        if method is None or (isinstance(receiver, torch.Tensor) and name == "index"):
            continue
        for shape in AFTER_A_RECEIVER:
            values = things()
            mine = random_copy(receiver)
            try:
                complaint = broken_claim(row, [mine, *(values[kind] for kind in shape)], function=bound(mine, name))
            except MISFITS:
                continue
            if complaint == "is a host call with these arguments":
                continue
            checked += 1
            assert complaint is None, (type(receiver), shape, complaint)
    assert checked or name in ("move_to_end", "fromhex")


AFTER_A_RECEIVER: list[tuple[str, ...]] = [
    (), ("number",), ("text",), ("list",), ("nested",), ("dict",), ("set",), ("bytes",), ("text", "text"),
    ("text", "list"), ("number", "list"), ("number", "text"), ("tensor",), ("array", "array"),
]  # fmt: skip


def bound(receiver: Any, name: str) -> Callable[..., Any]:
    """The method as a function of its receiver, class methods included."""
    return lambda mine, *others: getattr(mine, name)(*others)


RECEIVERS = [
    [2, 1], [[1], [2]], {"a": [1], "b": [2]}, {1, 2}, frozenset({1, 2}), ("x", [1]), "a b", b"a b", 3, 0.5, 1j,
    range(3), slice(1), collections.deque([[1], [2]]), collections.Counter("aab"), collections.OrderedDict(a=[1]),
    collections.defaultdict(list, a=[1]), torch.rand(3), np.array([2.0, 1.0, 3.0]),
]  # fmt: skip


def random_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, dict, set, collections.deque, np.ndarray)):
        made = value.copy()
        if isinstance(made, list):
            return [part.copy() if isinstance(part, list) else part for part in made]
        return made
    return value


def test_every_method_of_python_s_containers_is_there() -> None:
    names = {name for each in TYPES for name in dir(each) if not name.startswith("_") and callable(getattr(each, name))}
    assert not {name for name in names if known_method(name) is None}


PATTERNS = [
    ("rearrange", "a b -> b a", {}),
    ("rearrange", "a b -> a b", {}),
    ("rearrange", "a b -> (a b)", {}),
    ("rearrange", "(a c) b -> a c b", {"c": 2}),
    ("reduce", "a b -> a", {"reduction": "mean"}),
    ("reduce", "a b -> a b", {"reduction": "sum"}),
    ("repeat", "a b -> a b c", {"c": 2}),
    ("repeat", "a b -> a b", {}),
    ("parse_shape", "a b", {}),
]


@pytest.mark.parametrize(("name", "pattern", "sizes"), PATTERNS)
@pytest.mark.parametrize("make", [lambda: torch.rand(4, 2), lambda: np.ones((4, 2))], ids=["tensor", "array"])
def test_einops(broken_claim: Broken, name: str, pattern: str, sizes: dict[str, Any], make: Callable[[], Any]) -> None:
    pytest.importorskip("einops")
    assert broken_claim(known_target(f"einops.{name}"), [make(), pattern], sizes) is None


def test_einops_on_several_tensors(broken_claim: Broken) -> None:
    einops = pytest.importorskip("einops")
    first, second = torch.rand(2, 3), torch.rand(3, 2)
    assert broken_claim(known_target("einops.einsum"), [first, second, "a b, b c -> a c"]) is None
    assert broken_claim(known_target("einops.einsum"), [first, "a b -> b a"]) is None
    assert broken_claim(known_target("einops.pack"), [[first, torch.rand(4, 3)], "* c"]) is None
    assert broken_claim(known_target("einops.pack"), [[first], "* c"]) is None
    packed, shapes = einops.pack([first, torch.rand(4, 3)], "* c")
    assert broken_claim(known_target("einops.unpack"), [packed, shapes, "* c"]) is None
    assert broken_claim(known_target("einops.rearrange"), [[first, torch.rand(2, 3)], "n a b -> a n b"]) is None
    assert broken_claim(known_target("einops.asnumpy"), [first]) is None
    shared = einops.rearrange(first, "a b -> b a")
    assert shared.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", [row.target for row in python_rows().values() if row.random])
def test_random_rows_draw(name: str) -> None:
    """With the seed set back the same comes out, and the generator has moved."""
    if name.endswith(("seed", "setstate", "getstate")) or "Random" in name:
        pytest.skip("reads or sets a generator, or has one of its own")
    function: Any = callable_of(name)
    for arguments in ((), (4,), (1, 4), ([1, 2, 3],), ([1, 2, 3], 2), (0.5,), (0.5, 0.5)):
        random.seed(1)
        before = random.getstate()
        try:
            first = function(*arguments)
        except (TypeError, ValueError):
            continue
        assert random.getstate() != before
        random.seed(1)
        assert function(*arguments) == first
        return
    pytest.fail("no arguments fit")


ITEMS = st.recursive(
    st.integers(-3, 3) | st.text("ab", max_size=2), lambda inner: st.lists(inner, max_size=3), max_leaves=8
)
PURE = [row.target for row in python_rows().values() if row.target.startswith(("builtins.", "operator.", "copy."))]


@given(st.sampled_from(PURE), st.lists(ITEMS, min_size=1, max_size=3))
@examples(200)
def test_rows_keep_what_they_claim_on_any_arguments(broken_claim: Broken, target: str, arguments: list[Any]) -> None:
    try:
        complaint = broken_claim(known_target(target), arguments)
    except (*MISFITS, MemoryError, OverflowError):
        return
    assert complaint in (None, "is a host call with these arguments")


def test_fractions_are_plain(broken_claim: Broken) -> None:
    halves = [fractions.Fraction(1, 2), fractions.Fraction(1, 4)]
    assert broken_claim(known_target("statistics.mean"), [halves]) is None
    assert broken_claim(known_target("statistics.median"), [halves]) is None
