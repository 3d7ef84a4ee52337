"""The table of known calls, held against what the calls do to real tensors."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from nnsight_compiler.passes.known_calls import (
    ALL,
    Behaviour,
    KnownCall,
    behaviour_of,
    callable_of,
    known_function,
    known_method,
    known_target,
)

RISKY = (
    "cudnn",
    "miopen",
    "mkldnn",
    "fbgemm",
    "q_",
    "quant",
    "sparse",
    "from_file",
    "vulkan",
    "choose_q",
    "xpu",
    "cuda",
)
"""Names whose kernels are for other devices or layouts, and may bring the process down."""


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    square = torch.rand(4, 4) + 4 * torch.eye(4)
    return [square, torch.rand(2, 4, 4), torch.randint(0, 4, (4, 4)), square > 1, torch.rand(4), torch.tensor(2.0)]


def samples(kind: str, name: str, tensor: torch.Tensor) -> list[Any]:
    """Values that an argument of this type may well take."""
    match kind:
        case "Tensor":
            return [tensor.clone(), torch.randint(0, 2, tensor.shape)]
        case "List[Tensor]":
            return [[tensor.clone(), tensor.clone()], [tensor.clone()]]
        case "int" | "SymInt":
            return [0, 1]
        case "List[int]" | "List[SymInt]":
            return [list(tensor.shape), [0], [1, 0]]
        case "bool":
            return [False]
        case "float" | "number":
            return [0.5, 2]
        case "str":
            return ["ij->ji"] if name == "equation" else ["mean"]
        case _:
            return []


def calls_of(row: KnownCall) -> Iterator[list[Any]]:
    """Arguments for the call, made from its schemas: what has no default, for tensors of all kinds."""
    space, name = row.target.rsplit(".", 1)
    prefix = {"torch.special": "special_", "torch.linalg": "linalg_", "torch.fft": "fft_"}.get(space, "")
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{prefix}{name}"):
        if any(argument.kwarg_only and not argument.has_default_value() for argument in schema.arguments):
            continue
        needed = [argument for argument in schema.arguments if not argument.has_default_value()]
        for tensor in tensors():
            choices = [samples(str(argument.type), argument.name, tensor) for argument in needed]
            for given in itertools.islice(itertools.product(*choices), 6):
                yield [
                    [part.clone() for part in g] if _is_list(g) else g.clone() if _is_tensor(g) else g for g in given
                ]


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_tensor, value))


def storages(value: object) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()} - {0} if value.layout is torch.strided else set()
    if isinstance(value, (list, tuple)):
        return set().union(*map(storages, value))
    return set()


def contents(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return (
            value.shape,
            value.dtype,
            bytes(value.contiguous().view(-1).view(torch.uint8).tolist()) if value.numel() else b"",
        )
    return [contents(part) for part in value] if isinstance(value, list) else repr(value)


def broken_claim(row: KnownCall, arguments: list[Any]) -> str | None:
    """What the row says and the call does not keep to; an exception means that the arguments did not fit."""
    before = [contents(argument) for argument in arguments]
    owned = [storages(argument) for argument in arguments]
    function = callable_of(row.target)
    assert callable(function)
    result = function(*arguments)
    changed = {place for place, argument in enumerate(arguments) if contents(argument) != before[place]}
    shared = {place for place in range(len(arguments)) if owned[place] & storages(result)}
    if not changed <= set(row.mutates):
        return f"changed {changed}"
    if -1 not in row.aliases and not shared <= set(row.aliases):
        return f"shares storage with {shared}"
    if row.scalar and storages(result):
        return "is no scalar"
    if row.leaf and not isinstance(
        result, (torch.Tensor, int, float, complex, bool, str, torch.dtype, torch.Size, tuple)
    ):
        return f"holds parts: {type(result)}"
    if row.leaf and isinstance(result, (tuple, list)) and storages(result):
        return "holds tensors"
    return None


def test_every_row_with_a_schema_keeps_what_it_claims() -> None:
    torch.set_num_threads(1)
    checked, broken = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target, row in ALL.items():
            name = target.rsplit(".", 1)[1]
            if not target.startswith("torch.") or name.startswith(RISKY) or row.behaviour is Behaviour.HARMLESS:
                continue
            for arguments in calls_of(row):
                try:
                    complaint = broken_claim(row, arguments)
                except (
                    RuntimeError,
                    TypeError,
                    ValueError,
                    LookupError,
                    ArithmeticError,
                    AttributeError,
                    AssertionError,
                ):
                    continue
                checked.add(target)
                if complaint:
                    broken.append(f"{target}: {complaint}")
                    break
    assert not broken, "\n".join(broken)
    assert len(checked) > 600


IMAGE = (torch.rand(2, 3, 4, 4),)
ROWS = (torch.rand(3, 4),)
LISTED: dict[str, tuple[Any, ...]] = {
    **{name: IMAGE for name in ("normalize", "dropout2d", "instance_norm")},
    **{
        name: (*IMAGE, 2)
        for name in ("local_response_norm", "max_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d")
    },
    **{name: (*IMAGE, 4) for name in ("interpolate", "upsample")},
    **{name: ROWS for name in ("softmin", "softsign", "tanhshrink", "logsigmoid", "gumbel_softmax", "relu", "silu")},
    **{name: (*ROWS, 0.5, False) for name in ("dropout", "alpha_dropout")},
    "lp_pool2d": (*IMAGE, 2.0, 2),
    "rrelu": (*ROWS, 0.1, 0.3, False),
    "pad": (*ROWS, (0, 0)),
    "cross_entropy": (*ROWS, torch.tensor([0, 1, 2])),
    "gaussian_nll_loss": (*ROWS, torch.rand(3, 4), torch.rand(3, 4)),
    "batch_norm": (*ROWS, torch.zeros(4), torch.ones(4), None, None, True),
    "linear": (*ROWS, torch.rand(5, 4)),
    "embedding": (torch.tensor([0, 1]), torch.rand(3, 4)),
    "multilabel_soft_margin_loss": (*ROWS, torch.ones(3, 4)),
}
"""Functions of `torch.nn.functional` that have no schema of their own name, with arguments."""


@pytest.mark.parametrize("name", LISTED)
def test_rows_without_a_schema_keep_what_they_claim(name: str) -> None:
    arguments = [each.clone() if _is_tensor(each) else each for each in LISTED[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert broken_claim(known_target(f"torch.nn.functional.{name}"), arguments) is None


def test_the_check_of_claims_can_fail() -> None:
    wrong = {"add_": "changed {0}", "view": "shares storage with {0}"}
    for name, complaint in wrong.items():
        row = replace(known_target(f"torch.Tensor.{name}"), mutates=(), aliases=())
        assert broken_claim(row, [torch.rand(4), 4]) == complaint


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


def test_every_function_is_found_again() -> None:
    lost = []
    for target, row in ALL.items():
        function = callable_of(target)
        if function is not None:
            found = known_function(function)
            # Torch and torch.nn.functional share some functions; what is said of them must be the same.
            if found is None or (found.behaviour, found.random) != (row.behaviour, row.random):
                lost.append(target)
    assert not lost


def test_keywords_make_calls_write() -> None:
    relu = known_target("torch.nn.functional.relu")
    assert behaviour_of(relu, set()) is relu
    inplace = behaviour_of(relu, {"inplace"})
    assert inplace is not None
    assert inplace.behaviour is Behaviour.MUTATES
    assert 0 in inplace.mutates
    out = behaviour_of(known_target("torch.add"), {"out"})
    assert out is not None
    assert out.mutates == ("out",)
    assert behaviour_of(known_target("builtins.sorted"), {"key"}) is None


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
    row = known_method("add", tensor=True)
    assert row is known_target("torch.Tensor.add")
    assert row.behaviour is Behaviour.PURE
