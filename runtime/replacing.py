"""Another `forward` for a module, for one run.

What stands in for a module's forward while runs replace it looks up the run that acts in this thread: any other run,
and a plain call of the module, get the module's own forward, also where that was set on the instance (as accelerate
does). The last run that ends takes it away.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Protocol, final

from torch import nn

Replacement = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""`(plain, args, kwargs) -> output`: what is done in the place of `plain(*args, **kwargs)`."""


class Acting(Protocol):
    """What says which run acts in this thread."""

    run: object


_lock = threading.Lock()


@final
class _StandIn:
    """The `forward` of a module that some runs replace.

    own: what was set on the instance before, if anything.
    runs: the replacements of each run, the innermost first.
    """

    def __init__(self, module: Any, acting: Acting) -> None:
        self.module, self.acting = module, acting
        self.own = vars(module).get("forward")
        self.plain: Callable[..., Any] = module.forward
        self.runs: dict[int, tuple[Replacement, ...]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.plain
        for replacement in self.runs.get(id(self.acting.run), ()):
            forward = _around(replacement, forward)
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model that is made meanwhile is a plain one."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return MethodType(type(self.module).forward, memo[id(self.module)])


def _around(replacement: Replacement, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: replacement(forward, args, kwargs)


@final
class Replaced:
    """A replacement that is in place. `remove` puts back what was there."""

    def __init__(self, module: Any, acting: Acting, run: object, replacement: Replacement) -> None:
        """Has `replacement` called in the place of the module's forward, in `run` alone."""
        self.run, self.replacement = run, replacement
        with _lock:
            held = vars(module).get("forward")
            if not isinstance(held, _StandIn):
                held = vars(module)["forward"] = _StandIn(module, acting)
            self.stand_in = held
            held.runs[id(run)] = (*held.runs.get(id(run), ()), replacement)

    def remove(self) -> None:
        held, run = self.stand_in, id(self.run)
        with _lock:
            left = tuple(each for each in held.runs[run] if each is not self.replacement)
            if left:
                held.runs[run] = left
                return
            del held.runs[run]
            own = vars(held.module)
            if not held.runs and own.get("forward") is held:
                if held.own is None:
                    del own["forward"]
                else:
                    own["forward"] = held.own


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward that a module computes with: without what runs have put in its place, or accelerate around it."""
    found: Any = vars(module).get("_old_forward") or module.forward
    return found.plain if isinstance(found, _StandIn) else found
