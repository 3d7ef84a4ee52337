"""Which rows of a forward an invoke brought, which of its tokens are its own, and whether they can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.values import Module
from nnsight_compiler.passes.sites import forwards


@final
@dataclass(frozen=True, slots=True)
class Part:
    """What one invoke brought to a forward: the rows from `start` up to `stop`, whose first `padding` positions are
    padding that the longer prompts of other invokes made necessary. `tokens` is its own length.

    lengths: how many tokens each of its rows has, where it is a rectangle of prompts of different lengths.
    """

    start: int
    stop: int
    padding: int = 0
    tokens: int = 1
    lengths: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.stop - self.start


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of several invokes as the arguments of one forward, and the part of each."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: tuple[Part, ...]
    rows: int
    tokens: int


def check_rows(program: Program, undivided: Callable[[ops.Forward, ops.Read | ops.Write], str | None]) -> Program:
    """Refuses accesses in an invoke to sites of which its own rows cannot be told. The program itself is returned.

    Args:
        undivided: says why they cannot; `None` where they can.
    """
    wrong = []
    for forward in forwards(program.body):
        for op in walk(forward.body):
            if not isinstance(op, (ops.Read, ops.Write)) or op.rows is None or op.port == "result":
                continue
            reason = undivided(forward, op)
            if reason is not None:
                assert isinstance(op.module, Module)
                wrong.append(
                    Diagnostic(
                        op.span,
                        f"the rows of this invoke cannot be told apart in the {op.port} of"
                        f" `{op.module.path or 'the model'}`: {reason}",
                        "read it outside of the invokes, where it is that of all rows, or run a `trace` for each input",
                    )
                )
    if wrong:
        raise CompileError(wrong)
    return program
