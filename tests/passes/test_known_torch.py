"""Torch's rows of the table of known calls, held against what the calls do to real tensors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight_compiler.passes.known_calls import ALL, Behaviour, KnownCall, callable_of

Broken = Callable[..., str | None]

MISFITS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError)
"""What a call raises when the arguments that were made up do not fit it."""
SKIPPED = ("cuda", "xpu", "sparse", "fake_quantize", "fused_moving", "choose_q", "dequantize", "vulkan")
"""Names whose kernels want another device or layout, and may bring the process down."""


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    square = torch.rand(4, 4) + 4 * torch.eye(4)
    return [square, torch.rand(2, 4, 4), torch.randint(0, 4, (4, 4)), square > 1, torch.rand(4), torch.tensor(2.0)]


TENSORS = tensors()


def samples(kind: str, name: str, tensor: torch.Tensor) -> list[Any]:
    """Values that an argument of this type may well take."""
    match kind:
        case "Tensor":
            return [tensor, torch.ones(tensor.shape, dtype=torch.int64)]
        case "List[Tensor]":
            return [[tensor, tensor.clone()], [tensor]]
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


def schemas_of(row: KnownCall) -> list[Any]:
    space, name = row.target.rsplit(".", 1)
    prefix = {"torch.special": "special_", "torch.linalg": "linalg_", "torch.fft": "fft_"}.get(space, "")
    return [
        schema
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{prefix}{name}")
        if torch._C._dispatch_has_kernel(f"{schema.name}.{schema.overload_name}".rstrip("."))
        and not any(argument.kwarg_only and not argument.has_default_value() for argument in schema.arguments)
    ]


def calls_of(row: KnownCall) -> Iterator[list[list[tuple[str, Any]]]]:
    """Arguments for the call, made from its schemas: what has no default, for tensors of all kinds. One of each group
    will do."""
    for schema in schemas_of(row):
        needed = [argument for argument in schema.arguments if not argument.has_default_value()]
        for tensor in TENSORS:
            choices = [samples(str(argument.type), argument.name, tensor) for argument in needed]
            names = [argument.name for argument in needed]
            yield [
                list(zip(names, map(fresh, given), strict=True))
                for given in itertools.islice(itertools.product(*choices), 6)
            ]


def fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(map(fresh, value)) if isinstance(value, list) else value


def rows() -> Iterator[tuple[str, KnownCall]]:
    for target, row in ALL.items():
        name = target.rsplit(".", 1)[1]
        if target.startswith("torch.") and not name.startswith(SKIPPED) and row.behaviour is not Behaviour.HARMLESS:
            yield target, row


def fits(function: Any, arguments: list[Any]) -> bool:
    """Whether a function takes such arguments. It is called on copies: most do not fit, and looking at all that a call
    could do takes far longer than calling."""
    try:
        function(*map(fresh, arguments))
    except MISFITS:
        return False
    return True


def test_every_row_with_a_schema_keeps_what_it_claims(broken_claim: Broken) -> None:
    torch.set_num_threads(1)
    checked, broken = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target, row in rows():
            for group in calls_of(row):
                for arguments in group:
                    given = [value for _, value in arguments]
                    if not fits(callable_of(target), given):
                        continue
                    try:
                        complaint = broken_claim(row, given)
                    except MISFITS:
                        continue
                    checked.add(target)
                    broken += [f"{target}: {complaint}"] if complaint else []
                    break
    assert not broken, "\n".join(broken)
    assert len(checked) > 1000


def test_arguments_by_keyword_are_found(broken_claim: Broken) -> None:
    """What a schema calls `self` is `input` in Python: a view or a write of it must be seen by that name too."""
    checked, broken = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target, row in rows():
            if target.startswith("torch.Tensor.") or not (row.mutates or row.aliases):
                continue
            for first, *others in itertools.chain.from_iterable(itertools.islice(calls_of(row), 6)):
                if first[0] != "self":
                    continue
                try:
                    complaint = broken_claim(row, [], {"input": first[1], **dict(others)})
                except MISFITS:
                    continue
                checked += 1
                if complaint:
                    broken.append(f"{target}: {complaint}")
                break
    assert not broken, "\n".join(broken)
    assert checked > 60
