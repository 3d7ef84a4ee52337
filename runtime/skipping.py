"""Skipping a module: what the program gives becomes its output, and its forward is not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.assignments import described
from nnsight_compiler.runtime.observation import Event, Kind, Observation
from nnsight_compiler.runtime.runs import RECORDER


@final
@dataclass(frozen=True, slots=True)
class Skipped:
    """What a site function at `skip` returns where the module is skipped: its output, and the line that says so."""

    value: Any
    where: str


@final
@dataclass(frozen=True, slots=True)
class Left:
    """What a call that may be skipped does in the model, as observed.

    kind: what it returns; `None` where nothing was observed.
    given, dtype: the dtypes of its first argument and of what it returns, where these are tensors.
    inner: how often each module runs inside of it.
    path: of the module.
    """

    kind: Kind | None
    given: torch.dtype | None
    dtype: torch.dtype | None
    inner: Mapping[str, int]
    path: str

    @classmethod
    def of(cls, seen: Observation, path: str, call: int) -> Left:
        """What was seen of a call."""
        before, after = seen.shape.get(Event(path, "input", call)), seen.shape.get(Event(path, "output", call))
        given, dtype = (None if each is None else getattr(torch, each.dtype or "", None) for each in (before, after))
        return cls(seen.kind.get(Event(path, "output", call)), given, dtype, seen.within(path, call), path)

    def output(self, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> Any:
        """The value as the module's output. A tensor goes to the device of the module's first tensor, and has the dtype
        that the module returns where its argument has the one that it had. The record of the run says that it did not
        run.

        Raises:
            RunError: the model could not go on with it.
        """
        if self.kind == "tensor" and not (isinstance(value, torch.Tensor)):
            raise RunError(f"{where}: the module returns a tensor, but {described(value)} is given in its place")
        if self.kind in ("tuple", "mapping") and isinstance(value, (torch.Tensor, int, float)):
            raise RunError(
                f"{where}: the module returns a {self.kind}, but {described(value)} is given in its place\n"
                f"  way out: give a whole {self.kind}, with all that the module returns"
            )
        RECORDER.skip(self.path)
        first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
        if not isinstance(value, torch.Tensor) or first is None:
            return value
        same = self.dtype is not None and first.dtype == self.given and not torch.is_autocast_enabled(first.device.type)
        return value.to(device=first.device, dtype=self.dtype if same else value.dtype)
