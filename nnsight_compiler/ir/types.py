"""What is known of a value before the run. `ANY` is always right; everything else only helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class AnyType:
    """Nothing is known."""


@final
@dataclass(frozen=True, slots=True)
class Dimension:
    """One axis of a tensor: its size where known, and what it counts (`rows`, `tokens`) where known."""

    size: int | None = None
    axis: str | None = None


@final
@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: its dtype by torch's name (`float32`), its shape where the number of dimensions is known."""

    dtype: str | None = None
    shape: tuple[Dimension, ...] | None = None


@final
@dataclass(frozen=True, slots=True)
class ModuleType:
    """A module of the model, by the name of its class."""

    class_name: str


Type = AnyType | TensorType | ModuleType

ANY = AnyType()
