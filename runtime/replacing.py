"""Forwards of modules that stand on the instance for a run, in the place of the module's own.

A replacement is one run's own: another thread, a run inside this one, and a module that the body itself calls run the
forward that was there. Where the last run is over, the module is as it was.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, final

from torch import nn

from nnsight_compiler.runtime.active import ACTIVE

Replacement = Callable[..., Any]
"""`(original, *args, **kwargs)`: what runs instead of the module's forward, which it may call."""


@final
class _Switch:
    """Stands as the forward of a module while runs replace it: each run sees its own."""

    def __init__(self, module: nn.Module, slot: str) -> None:
        self.slot, self.own = slot, slot in vars(module)
        self.forward: Callable[..., Any] = getattr(module, slot)
        self.replacements: dict[object, Replacement] = {}
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.replacements.get(ACTIVE.run)
        return self.forward(*args, **kwargs) if found is None else found(self.forward, *args, **kwargs)


_lock = threading.Lock()


def _slot(module: nn.Module) -> str:
    """Where a module holds the forward that it computes with: accelerate puts one of its own around it."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module, without what runs put in its place."""
    found: Any = getattr(module, _slot(module))
    return found.forward if isinstance(found, _Switch) else found


def replace_forward(module: nn.Module, run: object, replacement: Replacement) -> None:
    """Has a run, and only that, run `replacement` instead of the module's forward."""
    slot = _slot(module)
    with _lock:
        found = vars(module).get(slot)
        if not isinstance(found, _Switch):
            found = vars(module)[slot] = _Switch(module, slot)
        found.replacements[run] = replacement


def restore_forward(module: nn.Module, run: object) -> None:
    """Has the run no longer replace the module's forward. Does nothing where it does not."""
    with _lock:
        found = vars(module).get(_slot(module))
        if not isinstance(found, _Switch):
            return
        found.replacements.pop(run, None)
        if not found.replacements:
            if found.own:
                vars(module)[found.slot] = found.forward
            else:
                del vars(module)[found.slot]
