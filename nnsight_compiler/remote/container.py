"""The header of a safetensors file, read strictly and without its tensors: what a service believes of an upload.

    8 bytes: 63            {"data.0": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    63 bytes of JSON  ──▶  Header(tensors={"data.0": Entry("F32", (2, 3), 0, 24)}, metadata={}, size=95)
    24 bytes of data

The library that reads safetensors accepts names that are paths, keys that stand twice and empty tensors of any size,
and takes seconds over a header of many entries. Here a header is measured before it is parsed, and then has to say
exactly one thing about every byte that follows it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from nnsight_compiler.files.document import KEY, array, depth, fields, mapping, parse, refuse, skeleton, string, whole
from nnsight_compiler.ir.errors import FileError

MAX_HEADER = 4 * 2**20
"""Bytes of JSON, the document in its metadata included."""
MAX_ENTRIES = 2**20
"""Characters of JSON outside of strings: what describes the tensors, without their names."""
MAX_TENSORS = 4096
MAX_AXES = 64
MAX_ELEMENTS = 2**31
"""The product of the sizes of an empty tensor, its zeros left out. Those of others are bounded by the file."""
ITEM_SIZES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
    "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of an element, by the dtypes that are stored; tensors of other dtypes are stored as bytes."""
JOB_FORMAT = "nnsight-compiler-job"
SUPPORTED = (1,)
"""The versions of jobs that are read: the newest, and the one before it."""
MAX_MODEL_NAME = 256

_NAME = re.compile(r"[A-Za-z0-9_.]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor: its dtype by the name in the file, and where its bytes begin and end in the
    data that follows the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@final
@dataclass(frozen=True, slots=True)
class Header:
    """A header that was found sound. `size`: of the whole file, in bytes."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int


@final
@dataclass(frozen=True, slots=True)
class JobHeader:
    """What is asked of a job before anything else of it is read.

    model: the name of the model; empty where the service has one.
    blobs: for each tensor whose bytes were uploaded before, the sha256 of that upload.
    """

    version: int
    model: str
    blobs: Mapping[str, str]


def header_bytes(source: Path | bytes) -> tuple[bytes, int]:
    """What a file begins with, up to the end of its header, and the bytes that it has in all.

    Raises:
        FileError: it has no header, or one that is too long.
    """
    start, size = _beginning(source, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise FileError("this is no safetensors file, or it is cut off")
    if length > MAX_HEADER:
        raise FileError(f"the header has {length} bytes, and {MAX_HEADER} are the most that is read")
    return _beginning(source, 8 + length)


def read_header(source: Path | bytes) -> Header:
    """The header of a file, given by its path or its bytes.

    Raises:
        FileError: it is no safetensors file, or one that no writer of jobs makes; with the reason.
    """
    held, size = header_bytes(source)
    try:
        text = held[8:].decode()
    except UnicodeDecodeError as error:
        raise FileError(f"the header is no UTF-8: {error.reason} at byte {error.start}") from None
    bare = skeleton(text)
    if len(bare) > MAX_ENTRIES:
        raise FileError(f"what the header says of tensors takes {len(bare)} characters, and may take {MAX_ENTRIES}")
    if bare.count("{") > MAX_TENSORS + 2:  # the header itself, and the metadata
        raise FileError(f"the header describes more than {MAX_TENSORS} tensors")
    if depth(bare) > 3:
        raise FileError("the header is nested more than 3 deep, and none needs to be")
    if not text.startswith("{"):
        raise FileError("the header does not begin with `{`")
    data = dict(mapping(parse(text), "header"))
    metadata = {
        string(name, "header.__metadata__"): string(value, f"header.__metadata__[{name!r:.80}]")
        for name, value in mapping(data.pop("__metadata__", {}), "header.__metadata__").items()
    }
    if len(data) > MAX_TENSORS:
        raise FileError(f"the header describes more than {MAX_TENSORS} tensors")
    tensors = {name: _entry(name, entry) for name, entry in data.items()}
    _cover(tensors, size - len(held))
    return Header(tensors, metadata, size)


def job_header(header: Header) -> JobHeader:
    """The envelope of a job. The rest of its document is not looked at.

    Raises:
        FileError: it is no job, of a version that is not read, or its envelope is damaged.
    """
    if KEY not in header.metadata:
        raise FileError(f"this is a safetensors file, but holds no job: its metadata has no entry {KEY!r}")
    document = mapping(parse(header.metadata[KEY]), "")
    if document.get("format") != JOB_FORMAT:
        refuse("format", f"expected {JOB_FORMAT!r}")
    version = document.get("version")
    if type(version) is not int or version not in SUPPORTED:
        known = " and ".join(map(str, SUPPORTED))
        refuse("version", f"this is version {version!r:.20}, and this service reads version {known}")
    model = string(document.get("model"), "model")
    if len(model) > MAX_MODEL_NAME or not model.isprintable():
        refuse("model", "this is no name of a model")
    blobs: dict[str, str] = {}
    for name, digest in mapping(document.get("blobs"), "blobs").items():
        _check_name(name, "blobs")
        if not _SHA256.fullmatch(string(digest, f"blobs.{name}")):
            refuse(f"blobs.{name}", "expected the sha256 of a file, as 64 hexadecimal digits")
        if name in header.tensors:
            refuse(f"blobs.{name}", "the tensor is in this file, too")
        blobs[name] = digest
    if len(blobs) + len(header.tensors) > MAX_TENSORS:
        refuse("blobs", f"a job has at most {MAX_TENSORS} tensors")
    return JobHeader(version, model, blobs)


def _beginning(source: Path | bytes, count: int) -> tuple[bytes, int]:
    """The first bytes of a file, and how many it has."""
    if isinstance(source, bytes):
        return source[:count], len(source)
    try:
        with source.open("rb") as stream:
            return stream.read(count), source.stat().st_size
    except OSError as error:
        raise FileError(f"{source} cannot be read: {error.strerror or error}") from None


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        refuse(where, f"{name!r:.80} is no name of a tensor: up to 128 of A-Z, a-z, 0-9, `_` and `.`")


def _entry(name: str, data: object) -> Entry:
    _check_name(name, "header")
    where = f"header.{name}"
    entry = fields(data, ("dtype", "shape", "data_offsets"), where)
    dtype = string(entry["dtype"], f"{where}.dtype")
    if dtype not in ITEM_SIZES:
        refuse(f"{where}.dtype", f"{dtype!r:.80} is no dtype that is stored")
    shape = _sizes(entry["shape"], f"{where}.shape")
    if len(shape) > MAX_AXES:
        refuse(f"{where}.shape", f"a tensor has at most {MAX_AXES} axes")
    start, end = (
        whole(each, f"{where}.data_offsets", 0, 2**62)
        for each in array(entry["data_offsets"], f"{where}.data_offsets", 2)
    )
    if math.prod(shape) * ITEM_SIZES[dtype] != end - start:
        refuse(where, f"{dtype} of shape {list(shape)} does not take the {end - start} bytes that it is given")
    if start == end and math.prod(size for size in shape if size) > MAX_ELEMENTS:
        refuse(f"{where}.shape", "the tensor is empty, and larger than any that is not")
    return Entry(dtype, shape, start, end)


def _sizes(data: object, where: str) -> tuple[int, ...]:
    return tuple(whole(each, where, 0, 2**31 - 1) for each in array(data, where))


def _cover(tensors: Mapping[str, Entry], data: int) -> None:
    """Refuses tensors that overlap, or leave bytes that belong to none."""
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda each: (each[1].start, each[1].end)):
        if entry.start != reached:
            what = "overlaps with another" if entry.start < reached else "leaves bytes before it to no tensor"
            refuse(f"header.{name}.data_offsets", f"the tensor {what}")
        reached = entry.end
    if reached != data:
        what = "is cut off" if reached > data else "has bytes that belong to no tensor"
        raise FileError(f"the file {what}: its tensors take {reached} bytes, and {data} follow the header")


__all__ = ["SUPPORTED", "Entry", "Header", "JobHeader", "header_bytes", "job_header", "read_header"]
