"""What may be assigned to a site, and why not: said once, for the compiler and for the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def misfit(held: Any, new: Any) -> tuple[str, str] | None:
    """Why `new` cannot replace what a site holds, and a way out; `None` where it can."""
    if not isinstance(held, torch.Tensor):
        if isinstance(new, (torch.Tensor, int, float, complex)):
            return (
                f"the module gives {described(held)}, which one value cannot replace",
                f"assign one of its items ({_names(held)}), or a whole {type(held).__name__}",
            )
        if isinstance(held, tuple) and isinstance(new, (tuple, list)) and len(held) != len(new):
            return f"the module gives a tuple of {len(held)}, but {len(new)} values are assigned", ""
        return None
    if isinstance(new, torch.Tensor):
        if new.shape != held.shape and new.ndim:
            return (
                f"a tensor of shape {list(new.shape)} is assigned where the module gives {list(held.shape)}",
                "write to a part of it in place (`[…] = …`, which broadcasts), or make the shapes equal",
            )
        return None
    if isinstance(new, (bool, int, float, complex)):
        return None
    return f"{described(new)} is assigned where the module gives a tensor of shape {list(held.shape)}", ""


def described(value: Any) -> str:
    """A value in words: what kind it is, and how large."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def _names(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"`[{name!r}]`" for name in value)
    if isinstance(value, (tuple, list)):
        return ", ".join(f"`[{index}]`" for index in range(len(value)))
    return "none"
