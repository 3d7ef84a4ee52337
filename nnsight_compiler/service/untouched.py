"""Whether a job left the model as it was: the next one, another tenant's, is to find the same.

Programs that are seen to write to weights are refused before they run. What is left are ways on which nothing can be
seen: a list of weights, a method of a module that has a tensor's name, memory that an array shares. What can be undone
is undone, and what cannot ends the process, after which another is forked from the one that no job runs in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from operator import is_
from typing import Any, final

import torch

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.models import LanguageModel
from nnsight_compiler.passes.behaviour import words

_UNCOUNTED = frozenset(
    words("data numpy array asarray asanyarray ascontiguousarray from_dlpack from_numpy memoryview frombuffer")
)
"""Names by which memory of a tensor is had without its count of writes."""
_PLAIN = (type(None), bool, int, float, str, bytes, list, dict, tuple, set)


@final
class Untouched:
    """A model as it was before any job."""

    def __init__(self, model: LanguageModel) -> None:
        self._module = model._ready()
        self._tokenizer = _tokenizer(model)
        self._flags = [(module, module.training) for module in self._module.modules()]
        self._wanted = [(tensor, tensor.requires_grad) for _, tensor in self._tensors()]
        self._parts = dict(self._state())
        self._held, self._counts = self._quick()
        self._belongings = deepcopy(dict(self._belonging()))
        self._content = {name: _digest(tensor) for name, tensor in self._tensors()}

    def restore(self) -> None:
        """Undoes what can be undone: gradients, and which tensors want some; which modules train."""
        for tensor, wanted in self._wanted:
            tensor.grad = None
            if tensor.requires_grad != wanted:
                tensor.requires_grad_(wanted)
        for module, training in self._flags:
            module.training = training

    def change(self, programs: list[Program]) -> str | None:
        """What is no more as it was, in words, after a job of these programs; `None` where all is."""
        held, counts = self._quick()
        if counts != self._counts or len(held) != len(self._held) or not all(map(is_, held, self._held)):
            now = dict(self._state())
            for name in self._parts.keys() | now.keys():
                if self._parts.get(name) != now.get(name):
                    return f"`{name}` of the model"
        belongings = dict(self._belonging())
        for name in self._belongings.keys() | belongings.keys():
            if name not in belongings or name not in self._belongings or self._belongings[name] != belongings[name]:
                return f"`{name}`"
        if any(getattr(op, "name", None) in _UNCOUNTED for program in programs for op in program.walk()):
            for name, tensor in self._tensors():
                if self._content[name] != _digest(tensor):
                    return f"`{name}` of the model"
        return None

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._module.named_parameters()
        yield from self._module.named_buffers()

    def _state(self) -> Iterator[tuple[str, Any]]:
        """The parts of each module, by identity, and its tensors by what a write changes."""
        for path, module in self._module.named_modules():
            stem = f"{path}." if path else ""
            for name, held in vars(module).items():
                if not name.startswith("_") and name != "training":
                    yield stem + name, held if isinstance(held, (bool, int, float, str)) else id(held)
            for name, part in module._modules.items():
                yield stem + name, id(part)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                told = None if tensor is None else (id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype)
                yield stem + name, told

    def _quick(self) -> tuple[list[Any], list[tuple[int, int, torch.dtype]]]:
        """All that the modules hold, in order, and what a write changes of their tensors. Where none of it is another
        object than before, the state is what it was; where one is, it may be an equal one."""
        held: list[Any] = []
        counts = []
        for module in self._module.modules():
            own = vars(module)
            held += own
            held += own.values()
            for part in (module._modules, module._parameters, module._buffers):
                held += part
                held += part.values()
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        counts.append((tensor._version, tensor.data_ptr(), tensor.dtype))
        return held, counts

    def _belonging(self) -> Iterator[tuple[str, Any]]:
        """What models have besides modules, as plain values."""
        for owner, held in (
            ("model.config", getattr(self._module, "config", None)),
            ("model.generation_config", getattr(self._module, "generation_config", None)),
            ("model.tokenizer", self._tokenizer),
        ):
            for name, value in vars(held).items() if hasattr(held, "__dict__") else ():
                if isinstance(value, _PLAIN):
                    yield f"{owner}.{name}", value


def _digest(tensor: torch.Tensor) -> bytes:
    """The hash of what a tensor holds."""
    if tensor.is_meta:
        return b""
    held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(held.numpy().data).digest()


def _tokenizer(model: LanguageModel) -> Any:
    """The model's tokenizer; `None` where it comes without one."""
    try:
        return model.tokenizer
    except ModelError:
        return None
