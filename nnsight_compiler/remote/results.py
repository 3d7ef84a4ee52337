"""What a run gave: its value, and what it changed of the objects that it was given.

Objects that were sent are mentioned by their numbers: those of the data first, then those of the code. So what the
run returns of them, or puts into them, is the caller's own object again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from inspect import getattr_static
from typing import Any, NamedTuple, NoReturn, final

import torch

from nnsight_compiler.block import Unsaved
from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.classes import is_plain
from nnsight_compiler.files.document import array, fields, refuse, string, whole
from nnsight_compiler.files.kinds import is_instance
from nnsight_compiler.files.saving import producer
from nnsight_compiler.files.values import Node
from nnsight_compiler.ir.errors import FileError, RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.remote.data import DataReader, DataWriter, Seen, constant
from nnsight_compiler.remote.job import VERSIONS, packed, unpacked, versioned
from nnsight_compiler.remote.random_state import KEY as RANDOM
from nnsight_compiler.remote.random_state import checked
from nnsight_compiler.runtime.support import UNBOUND

FORMAT = "nnsight-compiler-result"
_CARRIED = (torch.Tensor, torch.nn.Parameter, list, dict, set, OrderedDict, Counter, defaultdict, deque)
"""What a run may change of what it is given, besides numpy's arrays."""


@final
class _Writer(DataWriter):
    """Writes a result. `given`: the objects that were sent, by number."""

    def __init__(self, given: Mapping[int, Any], count: int) -> None:
        super().__init__("result")
        self.count = count
        self.objects = [{} for _ in range(count)]
        self.held = [given.get(number) for number in range(count)]
        self._numbers = {id(held): number for number, held in given.items()}
        self._given = given
        self._storages: dict[object, int] = {}
        for number, held in given.items():
            if isinstance(held, torch.Tensor) and held.numel():
                self._storages.setdefault(_memory(held), number)

    def other(self, held: Any, path: str) -> Node | None:
        if held is UNBOUND:
            return {"unbound": None}
        if isinstance(held, Unsaved):
            span: Span = held._span
            return {"unsaved": [span.file, span.line, span.column]}
        return None

    def inside(self, held: Any, name: str) -> Node:
        """The node of an attribute that the run has set."""
        return self._within(held, f".{name}", "changed")

    def entry(self, held: Any, path: str) -> Node:
        if isinstance(held, torch.Tensor) and held.grad_fn is not None:
            plain = held.detach()
            self.keep(plain)
            return {"kind": "attached", "tensor": self.value(plain, path)}
        if isinstance(held, torch.Tensor) and (held.is_conj() or held.is_neg()):
            held = held.resolve_conj().resolve_neg()
        entry = super().entry(held, path)
        if isinstance(held, torch.Tensor) and self._numbers.get(id(held), self.count) >= self.count:
            number = self._storages.get(_memory(held))
            if number is not None:
                return _view(held, self._given[number], number, entry)
        return entry


def _memory(held: torch.Tensor) -> tuple[torch.device, int, torch.dtype] | None:
    return (held.device, held.untyped_storage().data_ptr(), held.dtype) if held.numel() else None


def _view(held: torch.Tensor, given: torch.Tensor, number: int, entry: Node) -> Node:
    """The entry of a tensor that shares the memory of one that was given: for the caller it does too, if that one is
    laid out there as it is here."""
    offset = held.storage_offset() - given.storage_offset()
    return {"kind": "view", "tensor": entry, "of": number, "stride": list(given.stride()), "offset": offset}


def write_result(
    value: Any, data: Seen, code: Seen, counts: tuple[int, int], random: torch.Tensor | None = None
) -> bytes:
    """The file of a result.

    Args:
        data, code: the objects of the job, as they were before the run.
        counts: how many objects the tables of data and of code have.
        random: the state of torch's generator after the run, where the job brought one.

    Raises:
        FileError: a part of it cannot be sent back.
    """
    first = counts[0]
    given = {**data.held, **{first + number: held for number, held in code.held.items()}}
    writer = _Writer(given, sum(counts))
    try:
        node = writer.value(value, "result")
        changed = []
        for number in (*data.changed(), *(first + number for number in code.changed())):
            held = given[number]
            if is_instance(held):
                set_, deleted = code.attributes(number - first)
                nodes = [[name, writer.inside(value, name)] for name, value in set_.items()]
                changed.append([number, {"kind": "attributes", "set": nodes, "deleted": deleted}, None])
                continue
            if type(held) not in _CARRIED and not _is_array(held):
                raise CannotCaptureError(
                    f"a {type(held).__name__} that was given was changed in place, which cannot be carried back",
                    "return what is new of it, or change tensors, arrays, lists, dicts and sets",
                )
            gradient = held.grad if isinstance(held, torch.Tensor) and held.is_leaf else None
            changed.append(
                [
                    number,
                    writer.entry(held, "changed"),
                    None if gradient is None else writer.value(constant(gradient), "gradient"),
                ]
            )
    except CannotCaptureError as error:
        raise FileError(f"the result{error.trail}: {error.reason}\n  way out: {error.way_out}") from None
    document = {
        "format": FORMAT,
        "version": VERSIONS[-1],
        "producer": producer(),
        "value": node,
        "given": writer.count,
        "objects": writer.objects[writer.count :],
        "changed": changed,
    }
    tensors = writer.tensors.finish()
    return packed(document, tensors if random is None else {**tensors, RANDOM: random})


@final
class _Reader(DataReader):
    def __init__(
        self, entries: object, tensors: Mapping[str, torch.Tensor], given: Sequence[object], model: Any
    ) -> None:
        super().__init__([*([None] * len(given)), *array(entries, "objects")], tensors, model)
        self.made.update(enumerate(given))
        self.count = len(given)

    def other(self, kind: str, held: object, where: str, depth: int) -> tuple[Any] | None:
        match kind:
            case "unbound":
                return (UNBOUND,)
            case "unsaved":
                file, line, column = array(held, where, 3)
                return (_Unsaved(Span(string(file, where), whole(line, where), whole(column, where))),)
        return None

    def other_entry(self, kind: object, data: object, where: str) -> Any:
        if kind == "view":
            return self._view(fields(data, ("kind", "tensor", "of", "stride", "offset"), where), where)
        if kind == "attributes":
            held = fields(data, ("kind", "set", "deleted"), where)
            pairs = [array(each, f"{where}.set", 2) for each in array(held["set"], f"{where}.set")]
            new = {string(name, f"{where}.set"): self.value(node, f"{where}.{name}") for name, node in pairs}
            return _Attributes(new, [string(each, where) for each in array(held["deleted"], f"{where}.deleted")])
        if kind != "attached":
            return super().other_entry(kind, data, where)
        plain = self.value(fields(data, ("kind", "tensor"), where)["tensor"], where)
        if not isinstance(plain, torch.Tensor) or not (plain.is_floating_point() or plain.is_complex()):
            refuse(where, "what is attached is a tensor of real or complex numbers")
        return _Attached.apply(plain.detach().requires_grad_())  # type: ignore[no-untyped-call]

    def _view(self, entry: dict[str, Any], where: str) -> torch.Tensor:
        plain = self.tensors.make(entry["tensor"], f"{where}.tensor")
        own = self.numbered(whole(entry["of"], where, 0, self.count - 1), where)
        stride = [whole(each, where) for each in array(entry["stride"], where)]
        if not isinstance(own, torch.Tensor) or list(own.stride()) != stride or own.dtype != plain.dtype:
            return plain
        offset = own.storage_offset() + whole(entry["offset"], where, -(2**40), 2**40)
        last = offset + sum((size - 1) * step for size, step in zip(plain.shape, plain.stride(), strict=True))
        if offset < 0 or last >= own.untyped_storage().nbytes() // own.element_size():
            refuse(where, "this is no part of the tensor that was sent")
        made = own.detach().as_strided(plain.shape, plain.stride(), offset)
        if isinstance(plain, torch.nn.Parameter):
            return torch.nn.Parameter(made, plain.requires_grad)
        return made.requires_grad_(plain.requires_grad)


class _Attributes(NamedTuple):
    """What a run changed of an object of the caller's: attributes that it set, and names of those that it deleted."""

    set: dict[str, Any]
    deleted: list[str]


@final
class _Unsaved:
    """Stands in a result for a value of the model that was not saved, until its name is known."""

    def __init__(self, span: Span) -> None:
        self.span = span


class _Attached(torch.autograd.Function):
    """The graph of a tensor that was computed elsewhere."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RunError(
            "this value was computed by a service, and its graph stayed there: no gradient goes through it here\n"
            "  way out: call `.backward()` inside the experiment, or `.detach()` the value"
        )


def read_result(data: bytes, given: Sequence[object], model: Any = None, exports: bool = False) -> Any:
    """The value of a result, once what the run changed is changed here.

    Args:
        given: the objects that were sent, in the order of their numbers.
        model: the model, as it is here.
        exports: it is that of a block: a dict of what goes back to the frame.

    Raises:
        FileError: it is damaged, or not the result of this job.
    """
    document, tensors = unpacked(data)
    names = ("format", "version", "producer", "value", "given", "objects", "changed")
    held = fields(versioned(document, FORMAT), names, "")
    if held["given"] != len(given):
        refuse("given", "this is the result of another job")
    random = tensors.pop(RANDOM, None)
    reader = _Reader(held["objects"], tensors, given, model)
    value = reader.value(held["value"], "value")
    changes = []
    for place, each in enumerate(array(held["changed"], "changed")):
        where = f"changed[{place}]"
        number, entry, gradient = array(each, where, 3)
        if not whole(number, where) < len(given):
            refuse(where, "this was not sent")
        new = reader.entry(entry, where)
        if isinstance(new, _Attributes) and is_plain(type(given[number])):
            _check_names(new, given[number], where)
        elif type(new) is not type(given[number]) and not (
            isinstance(new, torch.Tensor) and isinstance(given[number], torch.Tensor)
        ):
            refuse(where, f"a {type(new).__name__} stands where a {type(given[number]).__name__} was sent")
        changes.append((given[number], new, None if gradient is None else reader.value(gradient, where)))
    reader.finish()
    for own, new, gradient in changes:
        _change(own, new, gradient)
    if random is not None:
        torch.set_rng_state(checked(random, RANDOM))
    if exports and type(value) is not dict:
        refuse("value", "expected the names that a block assigned")
    if exports:
        return {name: Unsaved(name, each.span) if isinstance(each, _Unsaved) else each for name, each in value.items()}
    return value


def _check_names(new: _Attributes, own: object, where: str) -> None:
    for name in (*new.set, *new.deleted):
        if not name.isidentifier() or name.startswith("__") or callable(getattr_static(type(own), name, None)):
            refuse(where, f"{name!r:.80} is no name for an attribute")


def _change(own: Any, new: Any, gradient: Any) -> None:
    """Changes an object to what a run made of it, so that all who hold it see it."""
    if isinstance(new, _Attributes):
        held = vars(own)
        for name in new.deleted:
            held.pop(name, None)
        held.update(new.set)
        return
    match own:
        case torch.Tensor():
            with torch.no_grad():
                if own.shape == new.shape and own.dtype == new.dtype:
                    once = tuple(slice(1) if step == 0 else slice(None) for step in own.stride())
                    own[once].copy_(new[once])  # not twice where many places are one
                else:
                    own.data = new.detach().to(own.device)
            if own.is_leaf:
                own.requires_grad_(new.requires_grad)
                own.grad = None if gradient is None else gradient.to(own.device)
        case list():
            own[:] = new
        case deque():
            own.clear()
            own.extend(new)
        case dict() | set():
            own.clear()
            own.update(new)
        case _:  # an array
            own[...] = new


def _is_array(held: object) -> bool:
    return type(held).__module__ == "numpy" and type(held).__name__ == "ndarray"
