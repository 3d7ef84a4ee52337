"""How much memory a call needs: the bytes of live tensors at their peak, and what the process grows by."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that torch operations make while it is active, until they are freed.

    Storages from before, such as those of weights and inputs, do not count; nor does what a kernel uses inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Peak:
    """Bytes: of live tensors at their peak, of those that were returned, and what the process grew by at its peak, if
    the system tells."""

    tensors: int
    returned: int
    process: int | None


def measure(call: Callable[[], Any]) -> Peak:
    """Calls once, and says what that took."""
    watched = _reset_high_water()
    before = _status("VmRSS") if watched else 0
    with LiveTensors() as tensors:
        result = call()
    process = max(0, _status("VmHWM") - before) if watched else None
    returned = {storage._cdata: storage.nbytes() for storage in _storages(result)}
    return Peak(tensors.peak, sum(returned.values()), process)


def _reset_high_water() -> bool:
    """Starts the process's high-water mark anew; whether the system can do that."""
    if not os.access(CLEAR, os.W_OK):
        return False
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
