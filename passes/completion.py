"""How control leaves what is interpreted, while a program is specialised: at its end, by a jump, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf

from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.facts import Abstract


@dataclass(frozen=True, slots=True)
class Completion:
    """How a region ended. `never`: control does not come out of it, and the terminator has been emitted."""

    kind: OneOf["end", "yield", "break", "continue", "return", "never"]
    values: tuple[Abstract, ...] = ()
    span: Span | None = None


END = Completion("end")


class AccessInClosure(Exception):  # noqa: N818  # control flow, not an error
    """A closure that touches the model cannot stay a function; it is inlined where it is called."""


class Unreachable(Exception):  # noqa: N818  # control flow, not an error
    """An inlined helper raises on every path: control does not come back from the call."""
