"""Captured tensors: what shares storage is stored once, and strides are kept where that costs nothing.

W = torch.randn(4, 4); row = W[0]        tensors   W: float32[16]
tied = W.T                          ──▶  objects   W, row, tied: {data: W, shape, stride, offset, dtype, …}
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, final

import torch

from nnsight_compiler.files.document import array, fields, refuse, string, truth, whole
from nnsight_compiler.files.format import dtype_name, restored, stored

MAX_AXES = 64


@final
class TensorStore:
    """Collects tensors while an experiment is captured. The entries are filled in by `finish`, when it is known which
    of them share storage.

    prefix: where it is given, tensors are named by it and a number, not by where they were found.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.found: list[tuple[str, torch.Tensor, dict[str, Any]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """The entry of a tensor, complete after `finish`."""
        entry: dict[str, Any] = {"kind": "tensor"}
        self.found.append((name, tensor.detach(), entry))
        entry["dtype"] = dtype_name(tensor.dtype)
        entry["device"] = str(tensor.device)
        entry["parameter"] = isinstance(tensor, torch.nn.Parameter)
        entry["requires_grad"] = tensor.requires_grad
        return entry

    def finish(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, by name."""
        storages: dict[tuple[Any, ...], list[tuple[str, torch.Tensor, dict[str, Any]]]] = defaultdict(list)
        for name, tensor, entry in self.found:
            alone = tensor.numel() == 0
            key = (name, len(storages)) if alone else (tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype)
            storages[key].append((name, tensor, entry))
        made: dict[str, torch.Tensor] = {}
        for group in storages.values():
            data = f"{self.prefix}.{len(made)}" if self.prefix else self._free(group[0][0], made)
            made[data] = self._stored(data, group)
        return made

    @staticmethod
    def _free(name: str, taken: dict[str, torch.Tensor]) -> str:
        number, free = 0, name
        while free in taken:
            number += 1
            free = f"{name}.{number}"
        return free

    @staticmethod
    def _stored(data: str, group: list[tuple[str, torch.Tensor, dict[str, Any]]]) -> torch.Tensor:
        first = group[0][1]
        low = min(tensor.storage_offset() for _, tensor, _ in group)
        high = max(tensor.storage_offset() + _extent(tensor) for _, tensor, _ in group)
        plain = len(group) == 1 and (first.is_contiguous() or _extent(first) > first.numel())
        if plain:
            flat = first.contiguous()
        else:
            # A copy: what lies between the views of one storage goes along, but nothing before or after them.
            flat = first.as_strided((high - low,), (1,), low).clone()
        for _, tensor, entry in group:
            strides = list(flat.stride()) if plain else list(tensor.stride())
            offset = 0 if plain else tensor.storage_offset() - low
            entry.update(data=data, shape=list(tensor.shape), stride=strides, offset=offset)
        return stored(flat.cpu())


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of its storage lie between a tensor's first and last, these included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


TENSOR_FIELDS = ("kind", "dtype", "device", "parameter", "requires_grad", "data", "shape", "stride", "offset")


@final
class TensorSource:
    """The tensors of a file, as the entries of its document want them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self._restored: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def make(self, data: object, where: str) -> torch.Tensor:
        """The tensor of an entry."""
        entry = fields(data, TENSOR_FIELDS, where)
        dtype = read_dtype(entry["dtype"], f"{where}.dtype")
        name = string(entry["data"], f"{where}.data")
        if name not in self.tensors:
            refuse(f"{where}.data", f"the file has no tensor {name!r:.80}")
        self.used.add(name)
        flat = self._restored.get((name, dtype))
        if flat is None:
            flat = restored(self.tensors[name], dtype, where).reshape(-1)
            self._restored[name, dtype] = flat
        shape, stride = (
            [
                whole(each, f"{where}.{word}[{axis}]", 0, 2**40)
                for axis, each in enumerate(array(entry[word], f"{where}.{word}"))
            ]
            for word in ("shape", "stride")
        )
        offset = whole(entry["offset"], f"{where}.offset", 0, 2**40)
        if len(shape) != len(stride) or len(shape) > MAX_AXES:
            refuse(where, "the shape and the strides do not go together")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= flat.numel():
            refuse(where, f"the tensor reaches past the {flat.numel()} elements that are stored")
        device = string(entry["device"], f"{where}.device")
        parameter, learns = (truth(entry[word], f"{where}.{word}") for word in ("parameter", "requires_grad"))
        if (learns or parameter) and (learns and not (dtype.is_floating_point or dtype.is_complex)):
            refuse(where, f"a tensor of {dtype_name(dtype)} has no gradients")
        try:
            made = flat.as_strided(shape, stride, offset)
            if device.partition(":")[0] == "cuda" and torch.cuda.is_available():
                made = made.to(device)
        except RuntimeError as error:
            refuse(where, f"no tensor is like this: {str(error).splitlines()[0]}")
        return torch.nn.Parameter(made, requires_grad=learns) if parameter else made.requires_grad_(learns)

    def finish(self) -> None:
        """Refuses tensors that nothing mentions."""
        for name in self.tensors:
            if name not in self.used:
                refuse("objects", f"nothing mentions the tensor {name!r:.80} of the file")


def read_dtype(data: object, where: str) -> torch.dtype:
    """A dtype by its name."""
    name = string(data, where)
    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        refuse(where, f"{name!r:.80} is no dtype")
    return found


def why_not(tensor: torch.Tensor) -> str | None:
    """The reason why a tensor cannot be stored; `None` where it can."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"it is a {type(tensor).__name__}, not a plain tensor"
    if tensor.is_meta:
        return "its weights are not loaded"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "it is sparse or quantized"
    if tensor.grad_fn is not None:
        return "it was computed from tensors that require gradients, and is attached to them"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a conjugate view of another"
    return None


__all__ = ["TensorSource", "TensorStore", "read_dtype", "why_not"]
