"""The table of known calls: what each function and method does to its arguments, by its name on the wire.

`torch.nn.functional.relu` and `torch.Tensor.softmax` are torch's, `builtins.len` and `math.sqrt` Python's, and
`method.append` is a method whose receiver is not known: what its row says holds for every container, string and tensor
that has it. Rows are derived when they are first asked for. A call that is not in the table is a host call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import final

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place, words
from nnsight_compiler.passes.known_python import python_method, python_methods, python_object, python_rows
from nnsight_compiler.passes.known_torch import torch_identities, torch_object, torch_row, torch_targets

__all__ = [
    "ALL",
    "CHANGES_MODULES",
    "EVERY",
    "Behaviour",
    "KnownCall",
    "Place",
    "behaviour_of",
    "callable_of",
    "known_function",
    "known_method",
    "known_target",
]

CHANGES_MODULES = frozenset(
    f"torch.Tensor.{name}"
    for name in words("to cpu cuda xpu float double half bfloat16 type requires_grad_ share_memory_")
)
"""Methods which a tensor and an `nn.Module` both have, and by which a module changes itself."""


@final
class _Table(Mapping[str, KnownCall]):
    """All rows by name. Looking one up derives that one; iterating derives them all."""

    def __getitem__(self, target: str) -> KnownCall:
        found = _find(target)
        if found is None:
            raise KeyError(target)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from torch_targets()
        yield from python_rows()
        for name in python_methods():
            yield f"method.{name}"

    def __len__(self) -> int:
        return sum(1 for _ in self)


ALL: Mapping[str, KnownCall] = _Table()
"""Every known call, by its name on the wire."""


@cache
def _find(target: str) -> KnownCall | None:
    if target.startswith("torch."):
        return torch_row(target)
    if target.startswith("method."):
        return python_method(target.removeprefix("method."))
    return python_rows().get(target)


def known_target(target: str) -> KnownCall:
    """The row of a name on the wire; `KeyError` where the table has none."""
    return ALL[target]


def known_function(function: object) -> KnownCall | None:
    """The row of this very object; a function that only bears the same name is not known."""
    target = _torch_names().get(id(function)) or _torch_name(function) or _python_name(function)
    if target is None and isinstance(function, MethodType):
        target = _python_name(function.__func__)
    return None if target is None else _find(target)


@cache
def _torch_names() -> dict[int, str]:
    # The functions are attributes of torch's modules and live as long as the process, so that their ids stay theirs.
    # The first name wins: where two modules share a function, the one listed first is its home.
    names: dict[int, str] = {}
    for identity, target in torch_identities():
        names.setdefault(identity, target)
    return names


def _torch_name(function: object) -> str | None:
    """The name of a function that torch put in the place of another since the table was made, as its compiler does."""
    target = f"torch.{getattr(function, '__name__', '')}"
    return target if torch_object(target) is function else None


def _python_name(function: object) -> str | None:
    """The name of a row of Python's whose callable is this object, among the modules that are loaded."""
    name = getattr(function, "__name__", None)
    for target in _python_names().get(name, ()) if isinstance(name, str) else ():
        if python_object(target) == function:
            return target
    return None


@cache
def _python_names() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for target in python_rows():
        names.setdefault(target.rpartition(".")[2], []).append(target)
    return names


def known_method(name: str, *, tensor: bool = False) -> KnownCall | None:
    """The row of a method on a receiver which is a `tensor`, or of which nothing is known.

    The latter is taken for a tensor's where tensors have it, unless a container or a string has one of that name too.
    """
    ambiguous = None if tensor else python_method(name)
    return ambiguous or _find(f"torch.Tensor.{name}")


def behaviour_of(known: KnownCall, keywords: Set[str]) -> KnownCall | None:
    """The row of a call with these keyword arguments: `out=` and `inplace=` make it write.

    `None` if a keyword brings a function of the user's which the call would run: then it is a host call.
    """
    if keywords & set(known.calls):
        return None
    if known.target.startswith("torch."):
        if "out" in keywords:
            return replace(known, behaviour=Behaviour.MUTATES, mutates=("out",), aliases=("out",), scalar=False)
        if "inplace" in keywords:
            return replace(known, behaviour=Behaviour.MUTATES, mutates=(0, "input"), aliases=(0, "input"))
        if "max_norm" in keywords:
            return replace(known, behaviour=Behaviour.MUTATES, mutates=(1, "weight"))
    return known


def callable_of(target: str) -> object | None:
    """The function behind a name on the wire, if its module is loaded; `None` for `method.…`."""
    return torch_object(target) if target.startswith("torch.") else python_object(target)
