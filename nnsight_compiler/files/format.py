"""The container: a safetensors file whose metadata holds one JSON document. Written whole or not at all, read strictly.

A file is measured before anything of it is read. Tensors are read by safetensors itself, the document by `document.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nnsight_compiler.files.document import KEY, refuse
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.passes.behaviour import words

FORMAT = "nnsight-compiler-experiment"
VERSION = 1

MAX_HEADER = 32 * 2**20
"""Bytes. safetensors itself reads up to 100 MB."""
_NATIVE = frozenset(
    words("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2")
)
"""The dtypes that every version of safetensors which this package accepts can store. Others are stored as bytes."""


@final
@dataclass(frozen=True, slots=True)
class Container:
    """What was read: the text of the document, and the tensors by name."""

    text: str
    tensors: Mapping[str, torch.Tensor]


def write(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the file beside its place and moves it there, so that there never is half a file."""
    target = Path(path)
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    if len(text) > MAX_HEADER // 2:
        raise FileError(
            f"the program and what it holds besides tensors take {len(text) / 2**20:.0f} MiB of JSON, and a file may"
            f" have {MAX_HEADER // 2**21} MiB; put long lists of numbers into tensors"
        )
    if not target.parent.is_dir():
        raise FileError(f"{target} cannot be written: there is no folder {target.parent}")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(beside), metadata={KEY: text})
        beside.chmod(0o666 & ~_umask())
        os.replace(beside, target)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FileError(f"{target} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike[str]) -> Container:
    """The document and the tensors of a file.

    Raises:
        FileError: it is no safetensors file, holds no experiment, or is damaged.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise FileError(f"{file} is no safetensors file, or it is cut off")
    if length > MAX_HEADER:
        raise FileError(f"{file} has a header of {length} bytes, and {MAX_HEADER} are the most that is read")
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            if KEY not in metadata:
                raise FileError(f"{file} is a safetensors file, but holds no experiment")
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise FileError(f"{file} is no safetensors file, or it is damaged: {error}") from None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{file} cannot be read: {error}") from None
    return Container(metadata[KEY], tensors)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors files do. Nothing more is read."""
    try:
        with Path(path).open("rb") as stream:
            start = stream.read(9)
            size = os.fstat(stream.fileno()).st_size
    except (OSError, ValueError):
        return False
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a dtype that safetensors stores, with the same bytes."""
    return tensor if dtype_name(tensor.dtype) in _NATIVE else tensor.reshape(-1).view(torch.uint8)


def restored(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """The tensor that `stored` was given."""
    if dtype_name(dtype) in _NATIVE:
        if tensor.dtype != dtype:
            refuse(where, f"the tensor is {dtype_name(tensor.dtype)}, not {dtype_name(dtype)}")
        return tensor
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() % dtype.itemsize:
        refuse(where, f"the bytes are none of {dtype_name(dtype)}")
    return tensor.clone().view(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
