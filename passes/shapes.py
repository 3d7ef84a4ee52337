"""What an inference is given: what stands at a model's sites, for any number of rows and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any, Protocol, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Port


class Sites(Protocol):
    """The shapes of a model's sites."""

    def value(self, path: str, port: Port, call: int, rows: int, tokens: int) -> Any:
        """What stands at a site in a forward of so many rows and tokens: tensors on the meta device, in the tuples,
        mappings and other objects around them. `stand_ins.UNKNOWN` where that cannot be told."""


@final
@dataclass(frozen=True, slots=True)
class Extent:
    """The size of a forward: how many rows and tokens its input has; `None` where only the run can tell.

    varies: which of `rows` and `tokens` the shapes at the sites are known to follow; the others stay as they are.
    """

    sites: Sites
    rows: int | None = None
    tokens: int | None = None
    varies: frozenset[str] = frozenset({"rows", "tokens"})

    @property
    def exact(self) -> bool:
        return self.rows is not None and self.tokens is not None


Extents = Callable[[ops.Forward | ops.Invoke], Extent | None]
"""Gives the extent of a forward, or of an invoke's part of it; `None` where nothing is known of its model's shapes."""


@final
@dataclass(frozen=True, slots=True)
class Surroundings:
    """The values around a program at one call: its arguments, globals and closure."""

    arguments: Mapping[str, Any]
    globals: Mapping[str, Any]
    closure: Mapping[str, CellType]
