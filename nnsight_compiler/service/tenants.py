"""Tenants of the service, and what each may ask for."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import final

from nnsight_compiler.ir.errors import ExperimentError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MIB, GIB = 2**20, 2**30


class TenantError(ExperimentError):
    """A tenant that cannot be: a name that is none, or a limit that allows nothing."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}; {way_out}")
        self.reason, self.way_out = reason, way_out


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant may ask for.

    max_queued: jobs that wait at once. max_body: bytes of one request. max_result_bytes: bytes of one result.
    stored_bytes: of its results, uploads and events together; the oldest go first. wall_seconds, memory_bytes and
    forwards: of one job.
    """

    max_queued: int = 256
    max_body: int = 64 * MIB
    max_result_bytes: int = 256 * MIB
    stored_bytes: int = 2 * GIB
    wall_seconds: float = 600.0
    memory_bytes: int = 4 * GIB
    forwards: int = 100_000

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not math.isfinite(value) or value <= 0:
                raise TenantError(f"{each.name} is {value}", "a limit is a number above 0")

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """Reads what `as_json` wrote. A limit that was not known then has its default."""
        return cls(**json.loads(text))


@final
@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a key stands for. `weight` is its share of the service beside the others'."""

    name: str
    weight: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise TenantError(
                f"{self.name!r} is no name of a tenant",
                "use up to 64 letters, digits, '_', '.' and '-', the first a letter or a digit",
            )
        if not 0.001 <= self.weight <= 1000:
            raise TenantError(f"the weight of {self.name} is {self.weight}", "a weight is a number from 0.001 to 1000")
