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


def cannot_stand_for(held: Any, new: Any) -> tuple[str, str] | None:
    """Why `new` cannot be the output of a module that does not run, and a way out; `held` is what it would return."""
    scalar = isinstance(new, (int, float, complex)) or (isinstance(new, torch.Tensor) and not new.ndim)
    if isinstance(held, torch.Tensor) and held.ndim and scalar:
        return (
            "a number is given for a module that does not run, so that there is no tensor to fill",
            "give the whole tensor: `torch.zeros_like(…)`, `torch.full_like(…)`, or the module's `.input`",
        )
    wrong = misfit(held, new)
    kind = "tensor" if isinstance(held, torch.Tensor) else type(held).__name__
    return wrong and (wrong[0], f"give a whole {kind}, as the module returns it")


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
