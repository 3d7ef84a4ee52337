"""A job: an experiment as code and data, in one safetensors file.

code        the experiment's document (see `nnsight_compiler.files`): programs, libraries and modules by name
arguments   a node for each parameter of the program: plain data, with a table of objects of its own
tensors     those of the code are named `code.N`, those of the data `data.N`; large ones may be left out and named by
            the hash of a file that was sent before
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nnsight_compiler.files.document import KEY, array, fields, mapping, parse, refuse, string, truth, whole
from nnsight_compiler.files.format import dtype_name
from nnsight_compiler.files.saving import producer
from nnsight_compiler.files.tensors import read_dtype
from nnsight_compiler.files.values import Node
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.options import OPTIMISATIONS, Options
from nnsight_compiler.remote.random_state import KEY as RANDOM

FORMAT = "nnsight-compiler-job"
VERSIONS = (1,)
"""The versions that are read: the last is the one that is written."""
_FIELDS = (
    "format", "version", "producer", "model", "rename", "edits", "code", "arguments", "objects", "attributes",
    "gradients", "options", "grad_enabled", "default_dtype", "blobs",
)  # fmt: skip


@final
@dataclass(frozen=True)
class Job:
    """What a service is asked to run.

    model: the name of the model there; empty where it has one.
    code: the document of the experiment or the block. arguments, objects: its data.
    rename: names of the caller's own for modules. edits: the document of the model's edits, where it has some.
    attributes: of the objects that the code has, those that are data, by the objects' numbers in the code's table.
    gradients: the `.grad` of tensors among the objects that have one, by their numbers.
    tensors: those of the code, of the edits, of the data, and the state of the random generator, where it is wanted.
    grad_enabled, default_dtype: whether torch records gradients where the experiment was called, and what it makes of
        numbers.
    """

    model: str
    code: dict[str, Any]
    arguments: dict[str, Node]
    objects: list[Node]
    tensors: Mapping[str, torch.Tensor]
    attributes: dict[int, dict[str, Node]] = field(default_factory=dict)
    gradients: dict[int, Node] = field(default_factory=dict)
    rename: Mapping[str, str | list[str]] = field(default_factory=dict)
    edits: dict[str, Any] | None = None
    options: Options = field(default_factory=Options)
    grad_enabled: bool = True
    default_dtype: torch.dtype = torch.float32

    def of(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of the `code`, of the `edits`, or of the `data`."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(f"{part}.")}

    @cached_property
    def view(self) -> str:
        """A hash of what the job makes of its model: names of its own, and edits."""
        return self._hash([self.model, self.rename, self.edits], self.of("edits"))

    @cached_property
    def digest(self) -> str:
        """A hash of the code and the options: jobs that have it in common are compiled once."""
        options = [sorted(self.options.without), self.options.memory_budget, self.options.padding]
        modes = [self.grad_enabled, dtype_name(self.default_dtype)]
        return self._hash([self.view, self.code, options, modes], self.of("code"))

    @staticmethod
    def _hash(document: object, tensors: Mapping[str, torch.Tensor]) -> str:
        made = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            made.update(name.encode() + blob(tensor))
        return made.hexdigest()


def blob(tensor: torch.Tensor) -> bytes:
    """A file of one tensor, which can be sent by itself."""
    return save({"tensor": tensor.contiguous()})


def tensor_of(content: bytes) -> torch.Tensor:
    """The tensor of a file that `blob` made.

    Raises:
        FileError: it is not one file of one tensor.
    """
    try:
        held = load(content)
    except (SafetensorError, ValueError, TypeError) as error:
        raise FileError(f"an uploaded tensor is damaged: {error}") from None
    if set(held) != {"tensor"}:
        raise FileError("an uploaded file holds one tensor, called `tensor`")
    return held["tensor"]


def pack(job: Job, sent: Mapping[str, str] | None = None) -> bytes:
    """The file of a job.

    Args:
        sent: the tensors that the service has, by the hashes of their files: they are left out.
    """
    sent = sent or {}
    document = {
        "format": FORMAT,
        "version": VERSIONS[-1],
        "producer": producer(),
        "model": job.model,
        "rename": job.rename,
        "edits": job.edits,
        "code": job.code,
        "arguments": job.arguments,
        "objects": job.objects,
        "attributes": [[number, held] for number, held in job.attributes.items()],
        "gradients": [[number, node] for number, node in job.gradients.items()],
        "options": {
            "without": sorted(job.options.without),
            "memory_budget": job.options.memory_budget,
            "padding": job.options.padding,
        },
        "grad_enabled": job.grad_enabled,
        "default_dtype": dtype_name(job.default_dtype),
        "blobs": dict(sent),
    }
    kept = {name: tensor.contiguous() for name, tensor in job.tensors.items() if name not in sent}
    return packed(document, kept)


def packed(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A document and its tensors as one file. Those that share memory, such as one that both an edit and the experiment
    mention, are written one by one."""
    seen: set[tuple[torch.device, int]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = tensor.device, tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return save(kept, metadata={KEY: json.dumps(document, allow_nan=False, separators=(",", ":"))})


def unpacked(data: bytes) -> tuple[object, dict[str, torch.Tensor]]:
    """The document and the tensors of a file.

    Raises:
        FileError: it is none, or damaged.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]) if 2 <= length <= len(data) - 8 else None
        text = header["__metadata__"][KEY] if header else None
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"this is no safetensors file of ours, or it is damaged: {error}") from None
    if type(text) is not str:
        raise FileError("this is no safetensors file of ours, or it is cut off")
    return parse(text), tensors


def unpack(data: bytes, blobs: Callable[[str], torch.Tensor] | None = None) -> Job:
    """The job in a file.

    Args:
        blobs: gives the tensors that were sent before, by their hash. It raises `FileError` for one that it has not.

    Raises:
        FileError: the file is damaged, of another version, or says what no job may say.
    """
    document, tensors = unpacked(data)
    held = fields(versioned(document, FORMAT), _FIELDS, "")
    string(held["producer"], "producer")
    for name, sha in mapping(held["blobs"], "blobs").items():
        if name in tensors or blobs is None:
            refuse(f"blobs.{name}", "this tensor is in the file" if name in tensors else "nothing was sent before")
        tensors[name] = blobs(string(sha, f"blobs.{name}"))
    for name in tensors:
        if not name.startswith(("code.", "edits.", "data.")) and name != RANDOM:
            refuse("", f"no tensor of a job is called {name!r:.80}")
    default = read_dtype(held["default_dtype"], "default_dtype")
    if default not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        refuse("default_dtype", "torch makes no such tensors of numbers by default")
    return Job(
        string(held["model"], "model"),
        mapping(held["code"], "code"),
        mapping(held["arguments"], "arguments"),
        array(held["objects"], "objects"),
        tensors,
        _numbered(held, "attributes"),
        _numbered(held, "gradients"),
        _rename(held["rename"]),
        None if held["edits"] is None else mapping(held["edits"], "edits"),
        _options(held["options"]),
        truth(held["grad_enabled"], "grad_enabled"),
        default,
    )


def versioned(document: object, expected: str) -> dict[str, Any]:
    """The fields of a document of this format, in a version that is known."""
    data = mapping(document, "")
    if data.get("format") != expected:
        refuse("format", f"expected {expected!r}")
    if type(data.get("version")) is not int or data["version"] not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        refuse("version", f"this is version {data.get('version')!r:.20}, and {known} is known to this release")
    return data


def _numbered(held: Mapping[str, Any], part: str) -> dict[int, dict[str, Any]]:
    """What a job says of objects, by their numbers."""
    made = {}
    for number, pair in enumerate(array(held[part], part)):
        which, said = array(pair, f"{part}[{number}]", 2)
        made[whole(which, f"{part}[{number}]")] = mapping(said, f"{part}[{number}]")
    return made


def _rename(data: object) -> dict[str, str | list[str]]:
    made: dict[str, str | list[str]] = {}
    for path, names in mapping(data, "rename").items():
        where = f"rename.{path}"
        made[path] = [string(name, where) for name in names] if type(names) is list else string(names, where)
    return made


def _options(data: object) -> Options:
    held = fields(data, ("without", "memory_budget", "padding"), "options")
    without = [string(name, "options.without") for name in array(held["without"], "options.without")]
    budget = held["memory_budget"]
    for name in without:
        if name not in OPTIMISATIONS:
            refuse("options.without", f"there is no optimisation {name!r:.40}")
    return Options(
        frozenset(without),
        None if budget is None else whole(budget, "options.memory_budget", 1),
        truth(held["padding"], "options.padding"),
    )
