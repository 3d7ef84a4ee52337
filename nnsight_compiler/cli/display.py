"""How `nnsightc run` shows what an experiment returned: for people, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch

IN_FULL = 64
"""Tensors of up to this many elements are shown whole."""


def readable(value: object, indent: int = 0) -> str:
    """The value in a few lines: containers one item a line, tensors by dtype, shape and range, small ones in full."""
    pad = " " * (indent + 2)
    match value:
        case torch.Tensor():
            return _tensor(value, indent)
        case Mapping() if value:
            lines = [f"{pad}{key!r}: {readable(item, indent + 2)}" for key, item in value.items()]
            return "\n".join([f"{_name(value)} of {len(value)}:", *lines])
        case list() | tuple() | set() | frozenset() if any(_is_large(item) for item in value):
            lines = [f"{pad}[{index}] {readable(item, indent + 2)}" for index, item in enumerate(value)]
            return "\n".join([f"{_name(value)} of {len(value)}:", *lines])
        case _ if is_dataclass(value) and not isinstance(value, type):
            lines = [
                f"{pad}{field.name}: {readable(getattr(value, field.name), indent + 2)}" for field in fields(value)
            ]
            return "\n".join([f"{_name(value)}:", *lines])
        case _:
            return repr(value)


def as_json(value: object) -> str:
    """The value as one JSON document. A tensor becomes an object with `dtype`, `shape` and nested `values`; infinities
    and NaN become strings; what JSON has no form for becomes an object with its `repr`."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=2)


def _name(value: object) -> str:
    return type(value).__name__


def _is_large(value: object) -> bool:
    """Whether a value wants a line of its own."""
    return not isinstance(value, (bool, int, float, complex, str, bytes, type(None)))


def _tensor(tensor: torch.Tensor, indent: int) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"
    device = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    tensor = tensor.detach().cpu()
    if tensor.numel() <= IN_FULL:
        text = _numbers(tensor)
        return f"{kind}{device} {text}" if "\n" not in text else f"{kind}{device}\n{_indented(text, indent + 2)}"
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return f"{kind}{device}"
    floats = tensor.double()
    finite = floats[floats.isfinite()]
    if finite.numel() == 0:
        return f"{kind}{device}, no finite element"
    odd = floats.numel() - finite.numel()
    remark = f", {odd} not finite" if odd else ""
    return f"{kind}{device}, mean {finite.mean():.4g}, from {finite.min():.4g} to {finite.max():.4g}{remark}"


def _numbers(tensor: torch.Tensor) -> str:
    """The elements, as torch prints them, without its `tensor(…)` around them."""
    text = repr(tensor).removeprefix("tensor(")
    # What follows the last bracket (`, dtype=…)`) is said already; a scalar has no bracket.
    return text[: text.rindex("]") + 1].replace("\n       ", "\n") if "]" in text else repr(tensor.item())


def _indented(text: str, indent: int) -> str:
    return "\n".join(" " * indent + line for line in text.splitlines())


def _plain(value: object) -> object:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case torch.Tensor():
            tensor = value.detach().cpu()
            dtype = str(tensor.dtype).removeprefix("torch.")
            return {"dtype": dtype, "shape": list(tensor.shape), "values": _plain(tensor.tolist())}
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        case _:
            return {"repr": repr(value)}
