"""The table of known calls: what each function and method does to its arguments, by its name on the wire.

`torch.nn.functional.relu` and `torch.Tensor.softmax` are torch's, `numpy.mean` numpy's, `builtins.len` and
`math.sqrt` Python's, and `method.append` is a method whose receiver is not known: what its row says holds for every
container, string, tensor and array that has it. Rows are derived when they are first asked for. A call that is not in
the table is a host call; `docs/passes.md` says of what kind these are, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import BuiltinMethodType, MethodType
from typing import final

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place, behaviour_of, words
from nnsight_compiler.passes.known_methods import TYPES, python_method, python_methods
from nnsight_compiler.passes.known_numpy import numpy_rows
from nnsight_compiler.passes.known_python import python_object, python_rows
from nnsight_compiler.passes.known_torch import torch_callables, torch_object, torch_row, torch_targets

__all__ = [
    "ALL",
    "CHANGES_MODULES",
    "EVERY",
    "FUSED_CALL",
    "METHODS",
    "MODULE_CALL",
    "Behaviour",
    "KnownCall",
    "Place",
    "behaviour_of",
    "callable_of",
    "known_function",
    "known_method",
    "known_target",
    "names_class",
]

CLASSES = ("torch.Tensor.", "numpy.ndarray.", "numpy.random.Generator.", "random.Random.")
METHODS = (*CLASSES, "method.")
"""How the names of methods begin whose first argument is the receiver: of a class, or of any object."""

CHANGES_MODULES = frozenset(
    f"torch.Tensor.{name}"
    for name in words("to cpu cuda xpu float double half bfloat16 type requires_grad_ share_memory_")
)
"""Methods which a tensor and an `nn.Module` both have, and by which a module changes itself."""

MODULE_CALL = "torch.nn.Module.__call__"
"""The target of a call of a module: of the user's own, or of one of the model's, out of its forward."""

FUSED_CALL = f"{MODULE_CALL} together"
"""The target of several such calls of one module as one, on the stack of what each is given."""


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
        yield from numpy_rows()
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
    return python_rows().get(target) or numpy_rows().get(target)


def known_target(target: str) -> KnownCall:
    """The row of a name on the wire; `KeyError` where the table has none."""
    return ALL[target]


def known_function(function: object) -> KnownCall | None:
    """The row of this very object; a function that only bears the same name is not known.

    A function that has two names has the row of the first. Of bound methods those are known which do nothing to their
    receiver: a row counts the receiver as an argument, and such a call does not show it.
    """
    target = _torch_names().get(id(function), (None, None))[1] or _torch_name(function) or _python_name(function)
    if target is not None:
        return _find(target)
    if isinstance(function, MethodType):
        target = _python_name(function.__func__)
        row = None if target is None else _find(target)
        if row is not None and row.behaviour is Behaviour.HARMLESS and _is_of_class(function, row):
            return row
    return None


def _is_of_class(method: MethodType, row: KnownCall) -> bool:
    holder = python_object(row.target.rpartition(".")[0])
    return isinstance(holder, type) and isinstance(method.__self__, holder)


@cache
def _torch_names() -> dict[int, tuple[object, str]]:
    # The functions are kept beside their names, so that no other object can come to have the id of one.
    # The first name wins: where two modules share a function, the one listed first is its home.
    names: dict[int, tuple[object, str]] = {}
    for function, target in torch_callables():
        names.setdefault(id(function), (function, target))
    return names


def _torch_name(function: object) -> str | None:
    """The name of a function that torch put in the place of another since the table was made, as its compiler does."""
    target = f"torch.{getattr(function, '__name__', '')}"
    return target if torch_object(target) is function else None


def _python_name(function: object) -> str | None:
    """The name of a row of Python's or numpy's whose callable is this object, among the modules that are loaded."""
    name = getattr(function, "__name__", None)
    bound = isinstance(function, (MethodType, BuiltinMethodType))
    for target in _python_names().get(name, ()) if isinstance(name, str) else ():
        found = python_object(target)
        # A class method is another object each time it is looked up.
        if found is function or (bound and type(found) is type(function) and found == function):
            return target
    return None


@cache
def _python_names() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for target in (*python_rows(), *numpy_rows()):
        names.setdefault(target.rpartition(".")[2], []).append(target)
    return names


def known_method(name: str, *, of: type | None = None) -> KnownCall | None:
    """The row of a method of a receiver of this class, or of one of which nothing is known.

    The latter is taken for a tensor's where tensors have it, unless a container or a string has one of that name too.
    """
    if of is None:
        return python_method(name) or _find(f"torch.Tensor.{name}")
    if of in TYPES:
        return python_method(name) if hasattr(of, name) else None
    for holder in CLASSES:
        if python_object(holder.rstrip(".")) is of:
            return _find(holder + name)
    return None


def names_class(target: str, text: str) -> bool:
    """Whether a method is spelled with its class, as `torch.Tensor.relu(value)`: its receiver is then an argument."""
    return target.startswith(CLASSES) and target.split(".")[-2:] == text.split(".")[-2:]


def callable_of(target: str) -> object | None:
    """The function behind a name on the wire, if its module is loaded; `None` for `method.…`."""
    return torch_object(target) if target.startswith("torch.") else python_object(target)
