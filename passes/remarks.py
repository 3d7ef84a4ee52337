"""What optimisations say of what they did, or did not do and why: `explain` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from nnsight_compiler.ir.span import Span


@final
@dataclass(frozen=True, slots=True)
class Remark:
    """One thing that an optimisation did (`fired`), or the reason why it did not. `what` is a phrase that can follow
    the name of the optimisation."""

    optimisation: str
    fired: bool
    span: Span
    what: str


@final
class Remarks:
    """The remarks of one compilation, in the order in which they are made."""

    def __init__(self) -> None:
        self.made: list[Remark] = []

    def fired(self, optimisation: str, span: Span, what: str) -> None:
        self._add(Remark(optimisation, True, span, what))

    def refused(self, optimisation: str, span: Span, why: str) -> None:
        self._add(Remark(optimisation, False, span, why))

    def _add(self, remark: Remark) -> None:
        if remark not in self.made:
            self.made.append(remark)
