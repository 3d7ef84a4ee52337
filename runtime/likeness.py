"""Which models are alike, so that what a forward of the one showed on tensors without numbers holds for the other.

Two modules are alike where they are of the same classes, with the same code, and all that they hold is equal, but for
the numbers in their tensors. One that holds anything else than tensors, plain values, functions without a closure and
configurations is like no other: nothing that it keeps alive stands in a likeness.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Generic, TypeVar, final

import torch
from torch import nn

_CONFIGURATIONS = ("PreTrainedConfig", "PretrainedConfig", "GenerationConfig")

_T = TypeVar("_T")


class UnlikeAnyError(Exception):
    """A value of which it cannot be told whether another is equal to it."""


def likeness(value: Any) -> Any:
    """What is equal for values that are equal, and for no others; of tensors, for those of one shape and kind.

    Raises:
        UnlikeAnyError: this cannot be told.
    """
    match value:
        case None | bool() | int() | float() | str() | Enum() | torch.dtype() | torch.device():
            return type(value), value
        case type():
            return value
        case FunctionType(__closure__=None) | BuiltinFunctionType(__self__=None | ModuleType()):
            return value
        case torch.Tensor():
            return type(value), value.dtype, value.shape, value.stride(), value.device, value.requires_grad
        case list() | tuple():
            return type(value), tuple(map(likeness, value))
        case dict():
            return type(value), tuple((likeness(key), likeness(item)) for key, item in value.items())
        case set() | frozenset():
            return type(value), frozenset(map(likeness, value))
        case _ if _is_configuration(value):
            return type(value), likeness(vars(value))
    raise UnlikeAnyError(type(value).__name__)


def _is_configuration(value: object) -> bool:
    """Whether it is a configuration of transformers, without importing that."""
    return any(
        kind.__name__ in _CONFIGURATIONS and kind.__module__.startswith("transformers.") for kind in type(value).mro()
    )


def likeness_of_module(module: nn.Module) -> Any:
    """The same for a module. A module or a tensor that is met again is told by where it was met first.

    Raises:
        UnlikeAnyError: this cannot be told.
    """
    first: dict[int, str] = {}
    found: list[Any] = []
    kinds: dict[type, Any] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        if (met := first.setdefault(id(each), path)) != path:
            found.append((path, met))
            continue
        held = {name: value for name, value in vars(each).items() if name != "_modules"}
        for group in ("_parameters", "_buffers"):
            found.extend((name, first.setdefault(id(one), f"{path}.{name}")) for name, one in held[group].items())
        kinds.setdefault(type(each), tuple(_code(type(each))))
        found.append((path, type(each), tuple(each._modules), likeness(held)))
    return tuple(found), tuple(kinds.items())


def _code(kind: type) -> Iterator[Any]:
    """The code of a class's methods, which someone may exchange while the class lives."""
    for base in kind.mro():
        if base in (nn.Module, object):
            continue
        for name, held in vars(base).items():
            if isinstance(held, FunctionType):
                yield base, name, held.__code__


@final
class Alike(Generic[_T]):
    """What was found out about modules, for all that are alike. What was not asked for longest gives way where there is
    much."""

    MOST = 64

    def __init__(self) -> None:
        self._found: dict[Any, _T] = {}
        self._lock = threading.Lock()

    def find(
        self, module: nn.Module, question: object, ask: Callable[[], _T], lasting: Callable[[_T], bool] = bool
    ) -> _T:
        """The answer to a question about a module: asked where no module like it was asked about, and kept for others
        where it is `lasting`."""
        try:
            key = likeness_of_module(module), question, torch.get_default_dtype()
        except UnlikeAnyError:
            return ask()
        with self._lock:
            if key in self._found:
                self._found[key] = self._found.pop(key)  # now the last of them
                return self._found[key]
        answer = ask()
        if lasting(answer):
            with self._lock:
                self._found[key] = answer
                while len(self._found) > self.MOST:
                    self._found.pop(next(iter(self._found)))
        return answer
