"""What ops and values of a program become, noted op by op and done at once."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.ir.values import Operand, Value


@final
class Replacements:
    """Changes of one program, by the ids of its ops and the names of its values.

    instead: what stands in the place of an op. starts: what comes first in the program.
    ends: what comes last in the body of a forward.
    changes: what an op alone takes in the place of values; becomes: what every op takes.
    """

    def __init__(self, program: Program) -> None:
        self.original = program
        self.builder = Builder(value.name for value in program.values())
        self.instead: dict[int, list[Op]] = {}
        self.starts: list[Op] = []
        self.ends: dict[int, list[Op]] = {}
        self.changes: dict[int, dict[str, Value]] = {}
        self.becomes: dict[str, Value] = {}
        self._retyped: dict[str, Value] = {}

    def retype(self, value: Value) -> None:
        """Gives a value, wherever it is defined and used, this type."""
        self._retyped[value.name] = self.becomes[value.name] = value

    def program(self) -> Program:
        """The program with all changes done."""
        body = self._region(self.original.body)
        return replace(self.original, body=replace(body, ops=(*self.starts, *body.ops)))

    def _region(self, region: Region) -> Region:
        made = tuple(self._op(new, op) for op in region.ops for new in self.instead.get(id(op), [op]))
        return Region(tuple(map(self._result, region.parameters)), made)

    def _op(self, new: Op, old: Op) -> Op:
        changes = self.changes.get(id(old), {}) if new is old else {}

        def operand(value: Value) -> Operand:
            return changes.get(value.name) or self._final(value)

        made = rewrite(new, operand=operand, region=self._region, result=self._result)
        ends = self.ends.get(id(old)) if new is old else None
        if ends and isinstance(made, ops.Forward):
            last = tuple(rewrite(op, operand=self._final, result=self._result) for op in ends)
            listed = made.body.ops
            at = len(listed) - bool(listed and isinstance(listed[-1], ops.TERMINATORS))
            made = replace(made, body=replace(made.body, ops=(*listed[:at], *last, *listed[at:])))
        return made

    def _result(self, value: Value) -> Value:
        return self._retyped.get(value.name, value)

    def _final(self, value: Value) -> Value:
        found = self.becomes.get(value.name)
        return value if found is None else found if found.name == value.name else self._final(found)
