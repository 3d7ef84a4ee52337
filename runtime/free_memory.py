"""How many bytes of memory are free on a device."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_UNKNOWN = 2**32
"""What is taken to be free where the system does not say."""

_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of a control group (a container), in the two versions of Linux: the files with its limit, with what is used of it,
and with what of that can be dropped, and the name of this last figure."""


def free_memory(device: torch.device | str) -> int:
    """The bytes that new tensors on a device can take: those that the device has free, and those that torch holds
    there for later use. On a CPU, what the system and the container allow."""
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(max(0, min(_of_system(Path("/proc/meminfo")), *_of_groups(Path("/sys/fs/cgroup")))))


def _of_system(meminfo: Path) -> int:
    available = _figure(meminfo, "MemAvailable:")
    if available is not None:
        return available * 1024
    names = getattr(os, "sysconf_names", {})  # Windows has none
    for pages, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):  # where only the whole is told, a half of it
        if pages in names and "SC_PAGE_SIZE" in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // share
    return _UNKNOWN


def _of_groups(root: Path) -> Iterator[float]:
    yield math.inf
    for limit, used, statistics, droppable in _GROUPS:
        try:
            amounts = [(root / name).read_text().strip() for name in (limit, used)]
        except OSError:
            continue
        if all(amount.isdecimal() for amount in amounts):  # `max` means no limit
            yield int(amounts[0]) - int(amounts[1]) + (_figure(root / statistics, droppable) or 0)


def _figure(file: Path, name: str) -> int | None:
    """The number that follows a name at the beginning of a line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:  # the system has no such file
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
