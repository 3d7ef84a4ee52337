"""Why a value has no form in a file."""

from __future__ import annotations

WAY_OUT = "pass it to the experiment as an argument, which may be anything"


class CannotCaptureError(Exception):
    """A value has no form in a file. `trail` says where in the value it is: `['scale'][0]`."""

    def __init__(self, reason: str, way_out: str = WAY_OUT, trail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.way_out, self.trail = reason, way_out, trail
