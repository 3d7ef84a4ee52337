"""Plain data on its way to a service and back, with the objects that a run has changed.

Plain are numbers, strings, tensors and containers of these, and what `structures` takes apart into such: outputs of
models, named tuples, arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.document import array, fields, string
from nnsight_compiler.files.kinds import is_instance
from nnsight_compiler.files.values import Node, ValueReader, ValueWriter
from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.remote.structures import put_together, take_apart

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.Size, range, slice,
    torch.Tensor, torch.nn.Parameter,
)  # fmt: skip
_DEEPEST = 100


def is_data(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain data."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth > _DEEPEST:
        return False
    if kind in (list, tuple, set, frozenset):
        return all(is_data(part, depth + 1) for part in value)
    if kind is dict:
        return all(is_data(key, depth + 1) and is_data(part, depth + 1) for key, part in value.items())
    apart = take_apart(value)
    return apart is not None and all(is_data(part, depth + 1) for _, part in apart[1])


def holds_modules(value: Any, depth: int = 0) -> bool:
    """Whether a value is a list, a tuple or a dict with modules of a wrapped model in it."""
    if depth > _DEEPEST or type(value) not in (list, tuple, dict):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return any(is_handle(part) or holds_modules(part, depth + 1) for part in parts)


class Holding:
    """Tensors and containers, so that what shares one of them can be told."""

    def __init__(self) -> None:
        self._storages: set[tuple[torch.device, int]] = set()
        self._objects: set[int] = set()

    def add(self, held: object) -> None:
        """Notes an object, without what is in it."""
        if isinstance(held, torch.Tensor) and held.numel():
            self._storages.add((held.device, held.untyped_storage().data_ptr()))
        else:
            self._objects.add(id(held))

    def shares(self, value: Any) -> bool:
        """Whether data is, or holds, one of them."""
        if isinstance(value, torch.Tensor) and value.numel():
            return (value.device, value.untyped_storage().data_ptr()) in self._storages
        if id(value) in self._objects and not isinstance(value, _CONSTANTS):
            return True
        match value:
            case list() | set() | frozenset():
                return any(map(self.shares, value))
            case dict():
                return any(map(self.shares, value.values()))
            case tuple() if type(value) is tuple:
                return any(map(self.shares, value))
        apart = take_apart(value)
        return apart is not None and any(self.shares(part) for _, part in apart[1])


class DataWriter(ValueWriter):
    """Writes data."""

    def gradients(self, code: Sequence[object]) -> dict[int, Node]:
        """The gradients that tensors have accumulated, by the tensors' numbers: those of this table first, then those
        of the code's. It is written last.

        Raises:
            CannotCaptureError: one of them cannot be stored.
        """
        own, others = _gradients(self.held), _gradients(code)
        nodes = [self.value(constant(gradient), ".grad") for _, gradient in (*own, *others)]
        first = len(self.objects)
        return dict(zip((*(each for each, _ in own), *(first + each for each, _ in others)), nodes, strict=True))

    def other_entry(self, held: Any, path: str) -> Node:
        apart = take_apart(held)
        if apart is None:
            raise CannotCaptureError(
                f"it is an object of class `{type(held).__qualname__}`, which cannot be sent",
                "use tensors, numbers, strings, or containers of these",
            )
        name, parts = apart
        self.keep(parts)  # some were made just now, and are known by their identity
        return {"kind": "structure", "class": name, "parts": [[key, self.value(part, path)] for key, part in parts]}


class DataReader(ValueReader):
    """Reads data.

    Args:
        model: the model whose values they may be.
    """

    def __init__(self, entries: object, tensors: Mapping[str, torch.Tensor], model: Any = None) -> None:
        super().__init__(entries, tensors)
        self.model = model

    def other_entry(self, kind: object, data: object, where: str) -> Any:
        if kind != "structure":
            return super().other_entry(kind, data, where)
        held = fields(data, ("kind", "class", "parts"), where)
        parts = []
        for number, pair in enumerate(array(held["parts"], f"{where}.parts")):
            at = f"{where}.parts[{number}]"
            key, node = array(pair, at, 2)
            parts.append((string(key, at), self.value(node, at)))
        return put_together(string(held["class"], f"{where}.class"), parts, self.model)


def _gradients(held: Sequence[object]) -> list[tuple[int, torch.Tensor]]:
    return [
        (number, each.grad)
        for number, each in enumerate(held)
        if isinstance(each, torch.Tensor) and each.is_leaf and each.grad is not None
    ]


def constant(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient without the graph by which it was computed: itself, where it has none."""
    return gradient if gradient.grad_fn is None else gradient.detach()


class Seen:
    """The objects that a run is given, as they were before it, so that what it changes can be told.

    Torch counts the changes of a tensor, but not those by `.data`, by an array that shares its memory, or of the
    statistics that a batch norm keeps. So what is stored is compared too.

    Args:
        held: the objects, by number.
        weights: whether the storages of parameters are compared, which takes a copy of each.
    """

    def __init__(self, held: Mapping[int, Any], weights: bool = True) -> None:
        self.held = {number: each for number, each in held.items() if not isinstance(each, type)}
        self._before = {number: _state(each) for number, each in self.held.items()}
        stored = (each for each in self.held.values() if isinstance(each, torch.Tensor))
        self._stored = {
            key: (memory, memory.clone())
            for key, memory in _storages(
                each for each in stored if weights or not isinstance(each, torch.nn.Parameter)
            ).items()
        }

    def anew(self, numbers: Iterable[int]) -> Seen:
        """The same, but of these objects as they are now."""
        made = copy(self)
        made._before = {**self._before, **{number: _state(self.held[number]) for number in numbers}}
        return made

    def attributes(self, number: int) -> tuple[dict[str, Any], list[str]]:
        """The attributes of an object that were set since, and the names of those that were deleted."""
        before, now = self._before[number], vars(self.held[number])
        half = len(before) // 2
        had = dict(zip(before[:half], before[half:], strict=True))
        return {
            name: value for name, value in now.items()
            if name not in had or (value is not had[name] and not _equal(value, had[name]))
        }, [name for name in had if name not in now]  # fmt: skip

    def changed(self) -> list[int]:
        """The numbers of those that are no longer what they were."""
        changed = {key for key, (memory, before) in self._stored.items() if not torch.equal(memory, before)}
        return [
            number
            for number, each in self.held.items()
            if _differs(before := self._before[number], _state(each))
            or (isinstance(each, torch.Tensor) and (each.device, before[1]) in changed)
        ]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.device, int], torch.Tensor]:
    """The bytes of the storages of tensors, each once."""
    made: dict[tuple[torch.device, int], torch.Tensor] = {}
    for each in tensors:
        storage = each.untyped_storage()
        key = each.device, storage.data_ptr()
        if key not in made:
            made[key] = torch.empty(0, dtype=torch.uint8, device=each.device).set_(storage)
    return made


def _state(held: Any) -> tuple[Any, ...]:
    match held:
        case torch.Tensor():
            grad = held.grad if held.is_leaf else None
            place = held.untyped_storage().data_ptr(), held.shape, *held.stride(), held.storage_offset()
            return held._version, *place, held.requires_grad, grad, None if grad is None else grad._version
        case dict() if type(held) is dict:
            return (*held.keys(), *held.values())
        case list() | set():
            return tuple(held)
        case torch.nn.Module():
            return (held.training, *_insides(held))
        case _ if is_instance(held):
            return (*vars(held), *vars(held).values())
    apart = take_apart(held)
    if apart is None:  # a function, which nothing can change
        return ()
    name, parts = apart
    if name == "numpy.ndarray":
        return (held.tobytes(), *held.shape)
    return _flat(tuple(value for _, value in parts))


def _flat(value: Any) -> tuple[Any, ...]:
    """What stands in tuples, which may be made anew whenever an object is taken apart."""
    if type(value) is not tuple:
        return (value,)
    return (len(value), *(each for part in value for each in _flat(part)))


def _insides(module: torch.nn.Module) -> tuple[Any, ...]:
    """What a module holds. Its tensors and modules have entries of their own."""
    inside = (module._parameters, module._buffers, module._modules)
    own = {name: held for name, held in vars(module).items() if not name.startswith("_")}
    return tuple(part for each in (*inside, own) for part in (*each.keys(), *each.values()))


def _differs(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return len(before) != len(after) or any(a is not b and not _equal(a, b) for a, b in zip(before, after, strict=True))


def _equal(a: Any, b: Any) -> bool:
    """Whether two constants are one: of objects with an identity of their own, it is that which counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (float, complex)):
        return repr(a) == repr(b)  # tells 0.0 from -0.0, and nan from none
    return isinstance(a, _CONSTANTS) and bool(a == b)


_CONSTANTS = (bool, int, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
