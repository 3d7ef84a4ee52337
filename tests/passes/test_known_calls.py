"""The table of known calls, held against what the calls do to real tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.passes.known_calls import (
    ALL,
    EVERY,
    Behaviour,
    KnownCall,
    Place,
    behaviour_of,
    callable_of,
    known_function,
    known_method,
    known_target,
)

Broken = Callable[..., str | None]


def wrong(target: str, **more: Any) -> KnownCall:
    return replace(known_target(target), **more)


@pytest.mark.parametrize(
    ("row", "arguments", "complaint"),
    [
        (wrong("torch.Tensor.add_", mutates=(), aliases=EVERY), [torch.rand(4), 4], "changed ['0'], [] were said"),
        (wrong("torch.Tensor.view", aliases=()), [torch.rand(4), 4], "shares storage with ['0'], [] were said"),
        (wrong("torch.stack", scalar=True), [[torch.rand(4)]], "is no scalar: <class 'torch.Tensor'>"),
        (wrong("torch.unbind", leaf=True), [torch.rand(4)], "holds parts: <class 'tuple'>"),
        (wrong("torch.rand", random=False), [4], "draws"),
        (wrong("builtins.print", behaviour=Behaviour.PURE), [4], "shows"),
        (wrong("builtins.list", aliases=()), [[torch.rand(4)]], "shares storage with ['0'], [] were said"),
        (wrong("numpy.asarray", aliases=()), [np.ones(3)], "shares storage with ['0'], [] were said"),
        (wrong("builtins.sorted"), [len], "is a host call with these arguments"),
    ],
)
def test_the_check_of_claims_can_fail(
    broken_claim: Broken, row: KnownCall, arguments: list[Any], complaint: str
) -> None:
    keywords = {"key": abs} if "host" in complaint else {}
    assert broken_claim(row, arguments, keywords) == complaint


TENSOR = torch.rand(3, 4)


@pytest.mark.parametrize(
    ("target", "behaviour"),
    [
        ("torch.softmax", Behaviour.PURE),
        ("torch.nn.functional.cross_entropy", Behaviour.PURE),
        ("torch.Tensor.clone", Behaviour.PURE),
        ("torch.stack", Behaviour.PURE),
        ("torch.zeros", Behaviour.PURE),
        ("torch.Tensor.view", Behaviour.VIEW),
        ("torch.Tensor.reshape", Behaviour.VIEW),
        ("torch.Tensor.to", Behaviour.VIEW),
        ("torch.Tensor.float", Behaviour.VIEW),
        ("torch.Tensor.unbind", Behaviour.VIEW),
        ("torch.Tensor.detach", Behaviour.VIEW),
        ("torch.Tensor.expand", Behaviour.VIEW),
        ("torch.einsum", Behaviour.VIEW),
        ("torch.Tensor.add_", Behaviour.MUTATES),
        ("torch.Tensor.copy_", Behaviour.MUTATES),
        ("torch.Tensor.requires_grad_", Behaviour.MUTATES),
        ("builtins.print", Behaviour.HARMLESS),
        ("method.append", Behaviour.CONTAINER),
        ("method.add", Behaviour.CONTAINER),
    ],
)
def test_behaviours(target: str, behaviour: Behaviour) -> None:
    assert known_target(target).behaviour is behaviour


@pytest.mark.parametrize(
    "target", ["torch.Tensor.backward", "torch.Tensor.register_hook", "torch.load", "builtins.exec"]
)
def test_what_is_not_known(target: str) -> None:
    assert target not in ALL
    with pytest.raises(KeyError):
        known_target(target)


def test_views_do_share_storage() -> None:
    """A table in which everything is a view would be of no use, and neither one in which nothing is."""
    for name, arguments in [
        ("view", (12,)),
        ("reshape", (12,)),
        ("t", ()),
        ("detach", ()),
        ("float", ()),
        ("numpy", ()),
    ]:
        result = getattr(TENSOR, name)(*arguments)
        assert torch.as_tensor(result).untyped_storage().data_ptr() == TENSOR.untyped_storage().data_ptr()
        row = known_method(name)
        assert row is not None
        assert row.behaviour is Behaviour.VIEW
    views = sum(row.behaviour is Behaviour.VIEW for row in ALL.values())
    assert views < len(ALL) / 3


@pytest.mark.parametrize(
    "function",
    [
        torch.rand,
        torch.bernoulli,
        torch.multinomial,
        F.dropout,
        torch.Tensor.normal_,
        torch.manual_seed,
        torch.randperm,
    ],
)
def test_random_calls(function: object) -> None:
    row = known_function(function)
    assert row is not None
    assert row.random


@pytest.mark.parametrize("function", [torch.softmax, torch.zeros, torch.matmul, F.layer_norm, torch.sort])
def test_calls_that_are_not_random(function: object) -> None:
    row = known_function(function)
    assert row is not None
    assert not row.random


def test_functions_are_known_by_identity() -> None:
    def softmax(x: object) -> object:
        return x

    assert known_function(softmax) is None
    assert known_function(F.softmax) is known_target("torch.nn.functional.softmax")
    assert known_function(len) is known_target("builtins.len")
    assert known_function(logging.getLogger("a").info) is known_target("logging.Logger.info")
    assert known_function(itertools.chain.from_iterable) is known_target("itertools.chain.from_iterable")
    assert known_function(np.add) is known_target("numpy.add")
    assert known_function(np.random.normal) is known_target("numpy.random.normal")


class Counter:
    """A class of a user's, whose names mean something else."""

    total = 0

    def info(self, text: str) -> None:
        self.total += 1


@pytest.mark.parametrize(
    "function",
    [
        torch.rand(3).softmax,
        torch.rand(3).add_,
        [].append,
        "a".join,
        np.ones(3).sum,
        np.add.reduce,
        np.add.at,
        torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.relu_.default,
        functools.partial(torch.softmax, dim=-1),
        functools.partialmethod(torch.softmax),
        functools.wraps(torch.softmax)(lambda x, dim: x),
        functools.lru_cache(len),
        torch.nn.ReLU(),
        Counter().info,
        MethodType(np.mean, [1.0]),
        MethodType(torch.relu_, torch.rand(3)),
        MethodType(logging.Logger.info, Counter()),
        Counter,
        random.Random(0).random,
        np.random.default_rng(0).normal,
        torch.load,
        torch.save,
        np.load,
        open,
        exec,
        input,
    ],
    ids=lambda function: getattr(function, "__qualname__", type(function).__name__),
)
def test_what_is_no_row_by_itself(function: object) -> None:
    """A bound method does not show its receiver; a wrapper may do anything besides."""
    assert known_function(function) is None


@pytest.mark.parametrize(
    ("name", "of", "target"),
    [
        ("add", torch.Tensor, "torch.Tensor.add"),
        ("add", set, "method.add"),
        ("join", str, "method.join"),
        ("log", str, None),
        ("sum", np.ndarray, "numpy.ndarray.sum"),
        ("put", np.ndarray, "numpy.ndarray.put"),
        ("tofile", np.ndarray, None),
        ("normal", np.random.Generator, "numpy.random.Generator.normal"),
        ("choice", random.Random, "random.Random.choice"),
        ("update", Counter, None),
        ("partition", None, "method.partition"),
        ("put", None, "method.put"),
        ("softmax", None, "torch.Tensor.softmax"),
        ("backward", None, None),
    ],
)
def test_methods_by_the_class_of_their_receiver(name: str, of: type | None, target: str | None) -> None:
    row = known_method(name, of=of)
    assert (None if row is None else row.target) == target


def test_every_name_resolves_to_its_function_and_back() -> None:
    """Two names of one function (`torch.conv2d`, `torch.nn.functional.conv2d`) say the same; the first is used."""
    pytest.importorskip("einops")
    for module in dict.fromkeys(target.rpartition(".")[0] for target in ALL):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    lost = []
    assert len(set(ALL)) == len(list(ALL))
    for target, row in ALL.items():
        assert row.target == target
        function = callable_of(target)
        if target.startswith("method."):
            assert function is None
            continue
        if function is None and not (target == "math.sumprod" and sys.version_info < (3, 12)):
            lost.append(f"{target}: nothing there")
        if function is None:
            continue
        found = known_function(function)
        if found is None or replace(found, target=target, takes=row.takes) != row:
            lost.append(f"{target}: {found}")
    assert not lost, "\n".join(lost)


def test_modules_that_are_not_loaded_are_not_imported() -> None:
    """Looking up a function in a fresh process imports neither numpy's parts nor einops."""
    code = """
        import sys
        import torch
        from nnsight_compiler.passes.known_calls import callable_of, known_function
        assert known_function(torch.softmax) is not None
        assert known_function(len) is not None
        assert callable_of("einops.rearrange") is None
        assert "einops" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def call_with(*operands: str, **keywords: str) -> list[Argument]:
    """Arguments in the text form, such as `%x` and `True`."""
    given = "".join(f"{operand}, " for operand in operands) + ", ".join(f"{k}={v}" for k, v in keywords.items())
    program = parse_program(f"function f(%f, %x, %y)\n  %0 = call %f({given.rstrip(', ')})\n  return %0\n")
    call = program.body.ops[0]
    assert isinstance(call, ops.Call)
    return list(call.arguments)


@pytest.mark.parametrize(
    ("target", "arguments", "mutates"),
    [
        ("torch.nn.functional.relu", call_with("%x"), ()),
        ("torch.nn.functional.relu", call_with("%x", inplace="True"), (0, "input")),
        ("torch.nn.functional.relu", call_with("%x", inplace="%y"), (0, "input")),
        ("torch.nn.functional.relu", call_with("%x", inplace="False"), ()),
        ("torch.nn.functional.relu", call_with("%x", "True"), (0, "input")),
        ("torch.nn.functional.relu", call_with("*%x"), (0, "input")),
        ("torch.nn.functional.relu", call_with("%x", "**%y"), ("out", 0, "input")),
        ("torch.nn.functional.dropout", call_with("%x", "0.5", "False", "True"), (0, "input")),
        ("torch.nn.functional.embedding", call_with("%x", "%y", max_norm="2.0"), (1, "weight")),
        ("torch.nn.functional.embedding", call_with("%x", "%y", "None", "2.0"), (1, "weight")),
        ("torch.nn.functional.embedding", call_with("%x", "%y", "0"), ()),
        ("torch.add", call_with("%x", "%x", out="%y"), ("out",)),
        ("numpy.add", call_with("%x", "%x", "%y"), (2,)),
        ("numpy.add", call_with("%x", "%x"), ()),
        ("torch.Tensor.max", call_with("%x", "0", "True"), ()),
        ("torch.Tensor.max", call_with("%x", "0", "%y"), (2,)),
    ],
)
def test_arguments_make_calls_write(target: str, arguments: list[Argument], mutates: tuple[Place, ...]) -> None:
    found = behaviour_of(known_target(target), arguments)
    assert found is not None
    assert set(found.mutates) == set(mutates)
    assert (found.behaviour is Behaviour.MUTATES) == bool(mutates)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("builtins.sorted", call_with("%x", key="%f")),
        ("builtins.sorted", call_with("%x", "**%y")),
        ("builtins.iter", call_with("%f", "%x")),
        ("re.sub", call_with("'a'", "%f", "'b'")),
        ("itertools.accumulate", call_with("*%x")),
        ("einops.reduce", call_with("%x", "'a b -> a'", "%f")),
        # What a tensor, a string or a dict cannot be given was given to something else of the same name.
        ("torch.Tensor.log", call_with("%x", "%y")),
        ("torch.Tensor.log", call_with("%x", data="%y")),
        ("torch.Tensor.trace", call_with("%x", "'prompt'")),
        ("torch.Tensor.scatter", call_with("%x", "%x", "%y")),
        ("torch.Tensor.gather", call_with("%x", "%y")),
        ("method.get", call_with("%x")),
        ("method.replace", call_with("%x", "'other.txt'")),
    ],
)
def test_arguments_make_host_calls(target: str, arguments: list[Argument]) -> None:
    assert behaviour_of(known_target(target), arguments) is None


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("builtins.max", call_with("*%x")),
        ("builtins.sorted", call_with("%x", key="None")),
        ("re.sub", call_with("'a'", "'c'", "'b'")),
        ("einops.reduce", call_with("%x", "'a b -> a'", "'mean'")),
        ("torch.Tensor.view", call_with("%x", "1", "2", "3", "4")),
        ("torch.Tensor.permute", call_with("%x", "1", "2", "0")),
        ("torch.Tensor.log", call_with("%x")),
        ("torch.Tensor.sum", call_with("%x", "0", dtype="%y")),
        ("method.get", call_with("%x", "1")),
        ("method.replace", call_with("%x", "'a'", "'b'")),
    ],
)
def test_arguments_that_leave_a_call_known(target: str, arguments: list[Argument]) -> None:
    assert behaviour_of(known_target(target), arguments) == known_target(target)


@pytest.mark.parametrize("name", ["add", "update", "pop", "clear", "remove", "sort", "extend", "setdefault"])
def test_a_method_that_a_container_may_have_changes_its_receiver(name: str) -> None:
    row = known_method(name)
    assert row is not None
    assert 0 in row.mutates


@pytest.mark.parametrize("name", ["index", "count", "copy", "split", "get", "items", "join"])
def test_a_method_that_only_looks_changes_nothing(name: str) -> None:
    row = known_method(name)
    assert row is not None
    assert not row.mutates


def test_a_tensor_s_own_method() -> None:
    row = known_method("add", of=torch.Tensor)
    assert row is known_target("torch.Tensor.add")
    assert row.behaviour is Behaviour.PURE
