"""Making ops: fresh names, and a stack of the op lists that are being filled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.types import ANY, Type
from nnsight_compiler.ir.values import Value

AnOp = TypeVar("AnOp", bound=Op)
_SUFFIX = re.compile(r"(\.\d+)+$")


class Builder:
    """Collects ops, innermost open region first, and hands out names that nothing else in the program bears.

    ops: the outermost list, which becomes the body of the program.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.ops: list[Op] = []
        self._open: list[list[Op]] = [self.ops]
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def take(self, names: Iterable[str]) -> None:
        """Marks names as used by code that this builder did not make."""
        self._taken.update(names)

    def fresh(self, hint: str = "", type: Type = ANY) -> Value:
        """A value with a name of its own: `h`, `h.1`, `h.2`, … for the hint `h`; `0`, `1`, … without a hint."""
        stem = _SUFFIX.sub("", hint)
        if stem.isdecimal():
            stem = ""
        number = self._next.get(stem, 0)
        name = _numbered(stem, number)
        while name in self._taken:
            number += 1
            name = _numbered(stem, number)
        self._next[stem] = number + 1
        self._taken.add(name)
        return Value(name, type)

    def emit(self, op: AnOp) -> AnOp:
        """Appends an op to the innermost open region, and returns it."""
        self._open[-1].append(op)
        return op

    def open_ops(self, depth: int) -> Iterator[Op]:
        """Every op so far of the open regions, without the outermost `depth` ones."""
        return (op for held in self._open[depth:] for op in walk(Region((), tuple(held))))

    @property
    def depth(self) -> int:
        """How many regions are open, the outermost list included."""
        return len(self._open)

    @contextmanager
    def region(self) -> Iterator[list[Op]]:
        """Opens a nested region: until the end of the `with`, `emit` fills the list that this yields."""
        ops: list[Op] = []
        self._open.append(ops)
        try:
            yield ops
        finally:
            self._open.pop()


def _numbered(stem: str, number: int) -> str:
    if not stem:
        return str(number)
    return f"{stem}.{number}" if number else stem
