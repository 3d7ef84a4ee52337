"""Jobs as a service reads them, and what one of its tenants may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnsight_compiler import Experiment
from nnsight_compiler.remote.job import Job, pack, unpack
from nnsight_compiler.remote.outside import sent

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Limits:
    wall_seconds: float = 600.0
    memory_bytes: int = 4 * GIB
    forwards: int = 1000
    max_result_bytes: int = 256 * MIB


def job_of(experiment: Experiment, given: dict[str, Any]) -> Job:
    """The job of a call, with the values of the parameters by name."""
    function = experiment._function
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    made = sent(experiment.ir, function.__globals__, closure, given, lambda _: "small", experiment._options)
    return unpack(pack(made.job))
