"""Plain data as nodes of JSON and tensors, and back: numbers, strings, tensors, and containers of these.

    vectors = {"calm": v, "angry": w}             {"object": 0}, {"object": 3}
    both = [v, w]                          ──▶    objects  0: dict of 1 and 2,  1: v,  2: w,  3: list of 1 and 2

Every object that has an identity of its own (a tensor, a list) gets one entry in a table, and is mentioned by its
number, so that what was one object before is one object after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.document import array, fields, mapping, only, refuse, string, whole
from nnsight_compiler.files.format import dtype_name
from nnsight_compiler.files.tensors import TensorSource, TensorStore, read_dtype, why_not
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.serial import literal_from_json, literal_to_json
from nnsight_compiler.ir.values import Literal

_LITERALS = (type(None), bool, int, float, complex, str, bytes, type(...))
MAX_DEPTH = 100
Node = dict[str, Any]


class ValueWriter:
    """Writes values. Subclasses say what there is besides plain data.

    objects: the table, and `held` the objects that it is of. tensors: those of the table's entries, named by `prefix`
        and a number where that is given.
    """

    def __init__(self, prefix: str = "") -> None:
        self.objects: list[Node] = []
        self.held: list[object] = []
        self.tensors = TensorStore(prefix)
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []
        self._open: set[int] = set()

    def other(self, held: Any, path: str) -> Node | None:
        """The node of a value that is no plain data; `None` where it has none, and may have an entry."""
        return None

    def other_entry(self, held: Any, path: str) -> Node:
        """The entry of an object that is no plain data."""
        raise CannotCaptureError(f"it is an object of class `{type(held).__qualname__}`")

    def may_contain_itself(self, held: Any) -> bool:
        """Whether an object may be mentioned inside of itself."""
        return False

    def keep(self, held: object) -> None:
        """Keeps an object alive, so that its `id` stays its own."""
        self._kept.append(held)

    def value(self, held: Any, path: str) -> Node:
        """A value as a node.

        Raises:
            CannotCaptureError: it has none, or something in it has none.
        """
        kind = type(held)
        if kind in _LITERALS:
            return literal_to_json(Literal(held))
        if kind is torch.dtype:
            return {"dtype": dtype_name(held)}
        if kind is torch.device:
            return {"device": str(held)}
        if kind is torch.Size:
            return {"size": list(held)}
        if kind is range:
            return {"range": [self.value(part, path) for part in (held.start, held.stop, held.step)]}
        if kind is slice:
            return {"slice": [self.value(part, path) for part in (held.start, held.stop, held.step)]}
        if kind in (tuple, frozenset):
            return {kind.__name__: [self._within(part, f"[{i}]", path) for i, part in enumerate(_ordered(held))]}
        found = self.other(held, path)
        return {"object": self._object(held, path)} if found is None else found

    def _within(self, part: Any, step: str, path: str) -> Node:
        try:
            return self.value(part, f"{path}{step}")
        except CannotCaptureError as error:
            error.trail = step + error.trail
            raise

    def _object(self, held: Any, path: str) -> int:
        if id(held) in self._numbers:
            number = self._numbers[id(held)]
            if number in self._open and not self.may_contain_itself(held):
                raise CannotCaptureError("it contains itself", "take it apart")
            return number
        number = len(self.objects)
        self._numbers[id(held)] = number
        self.held.append(held)
        self._kept.append(held)  # also where it turns out to have no entry
        self.objects.append({})
        self._open.add(number)
        try:
            self.objects[number] = self.entry(held, path)
        except BaseException:
            # The next mention is refused in its own place, and what only this object held is not mentioned by any.
            del self.objects[number:], self.held[number:]
            self._numbers = {each: known for each, known in self._numbers.items() if known < number}
            raise
        finally:
            self._open.discard(number)
        return number

    def entry(self, held: Any, path: str) -> Node:
        """What the table says of an object."""
        match held:
            case torch.Tensor():
                reason = why_not(held)
                if reason is not None:
                    way_out = "make it a plain tensor first: `.detach().clone()`"
                    raise CannotCaptureError(f"the tensor cannot be stored: {reason}", way_out)
                return self.tensors.add(path, held)
            case list() if type(held) is list:
                return {"kind": "list", "items": [self._within(part, f"[{i}]", path) for i, part in enumerate(held)]}
            case set() if type(held) is set:
                return {"kind": "set", "items": [self._within(part, "[…]", path) for part in _ordered(held)]}
            case dict() if type(held) is dict:
                items = [
                    [self._within(key, f" (the key {key!r:.40})", path), self._within(item, f"[{key!r:.40}]", path)]
                    for key, item in held.items()
                ]
                return {"kind": "dict", "items": items}
            case _:
                return self.other_entry(held, path)


def _ordered(held: Any) -> list[Any]:
    """The items; of sets in an order that does not change from one process to the next."""
    return sorted(held, key=repr) if isinstance(held, (set, frozenset)) else list(held)


class ValueReader:
    """Builds the objects of one table, each once. Subclasses say what there is besides plain data."""

    def __init__(self, entries: object, tensors: Mapping[str, torch.Tensor], where: str = "objects") -> None:
        self.entries = array(entries, where)
        self.where = where
        self.tensors = TensorSource(dict(tensors))
        self.made: dict[int, Any] = {}
        self._open: list[int] = []

    def other(self, kind: str, held: object, where: str, depth: int) -> tuple[Any] | None:
        """The value of a node that is no plain data, in a tuple; `None` where it may be a literal."""
        return None

    def other_entry(self, kind: object, data: object, where: str) -> Any:
        """The object of an entry that is no plain data."""
        refuse(where, f"{kind!r:.80} is no kind of object")

    def mentioned(self, found: Any) -> None:
        """Called with each object that stands in a value."""

    def finish(self) -> None:
        """Builds what nothing has asked for yet, so that all of a file is known to be sound."""
        for number in range(len(self.entries)):
            self.numbered(number, f"{self.where}[{number}]")
        self.tensors.finish()

    def value(self, node: object, where: str, depth: int = 0) -> Any:
        """The value of a node."""
        if depth > MAX_DEPTH:
            refuse(where, f"values are nested more than {MAX_DEPTH} deep")
        kind, held = only(node, where)
        match kind:
            case "object":
                found = self.numbered(whole(held, where), where)
                self.mentioned(found)
                return found
            case "tuple" | "frozenset":
                parts = [self.value(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(array(held, where))]
                return tuple(parts) if kind == "tuple" else frozenset(self._hashable(part, where) for part in parts)
            case "slice":
                return slice(*(self.value(part, where, depth + 1) for part in array(held, where, 3)))
            case "range":
                parts = [self.value(part, where, depth + 1) for part in array(held, where, 3)]
                if not all(type(part) is int for part in parts) or parts[2] == 0:
                    refuse(where, "no range is like this")
                return range(*parts)
            case "size":
                return torch.Size([whole(part, where, 0, 2**48) for part in array(held, where)])
            case "dtype":
                return read_dtype(held, where)
            case "device":
                try:
                    return torch.device(string(held, where))
                except RuntimeError:
                    refuse(where, f"{held!r:.80} is no device")
        other = self.other(kind, held, where, depth)
        if other is not None:
            return other[0]
        try:
            return literal_from_json(kind, held, where).value
        except IRError as error:
            refuse(where, str(error))

    @staticmethod
    def _hashable(value: Any, where: str) -> Any:
        try:
            hash(value)
        except TypeError:
            refuse(where, f"a {type(value).__name__} cannot stand in a set, or be a key")
        return value

    def numbered(self, number: int, where: str) -> Any:
        """The object of a number, made when it is first asked for."""
        if number >= len(self.entries):
            refuse(where, f"there is no object {number}")
        if number in self.made:
            return self.made[number]
        if number in self._open or len(self._open) > MAX_DEPTH:
            refuse(where, f"the object {number} contains itself, or is nested too deeply")
        self._open.append(number)
        made = self.entry(self.entries[number], f"{self.where}[{number}]")
        self._open.pop()
        self.made[number] = made
        return made

    def entry(self, data: object, where: str) -> Any:
        """The object of an entry."""
        kind = mapping(data, where).get("kind")
        match kind:
            case "tensor":
                return self.tensors.make(data, where)
            case "list" | "set":
                items = array(fields(data, ("kind", "items"), where)["items"], f"{where}.items")
                parts = [self.value(part, f"{where}.items[{i}]") for i, part in enumerate(items)]
                return parts if kind == "list" else {self._hashable(part, where) for part in parts}
            case "dict":
                made = {}
                for i, item in enumerate(array(fields(data, ("kind", "items"), where)["items"], f"{where}.items")):
                    at = f"{where}.items[{i}]"
                    key, held = array(item, at, 2)
                    made[self._hashable(self.value(key, at), at)] = self.value(held, at)
                return made
            case _:
                return self.other_entry(kind, data, where)
