"""Runs passes one after another, checks what each leaves, and lets an observer look on."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import final

from nnsight_compiler.ir.errors import CompileError, IRError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.verifier import verify as check

DEBUG_VARIABLE = "NNSIGHT_COMPILER_DEBUG"
"""Set to `1` in the environment, it has every program verified after every pass."""


@final
@dataclass(frozen=True, slots=True)
class NamedPass:
    """A pass with the name that dumps, errors and `--print-after` know it by. It never changes its input."""

    name: str
    apply: Callable[[Program], Program]


@final
@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass made, whether that differs from what it was given, and how long it took."""

    name: str
    program: Program
    changed: bool
    seconds: float


Observer = Callable[[PassResult], None]


def run_passes(
    program: Program,
    passes: Sequence[NamedPass],
    *,
    verify: bool = False,
    observer: Observer | None = None,
    refused: Callable[[CompileError], None] | None = None,
) -> Program:
    """The program after all these passes, in order.

    Args:
        verify: check the program before the first pass and after each; also if `NNSIGHT_COMPILER_DEBUG` is `1`.
        observer: is shown the result of each pass, once it was checked.
        refused: is given what a pass refuses; the passes after it then get the program as it was before that pass.

    Raises:
        IRError: a pass left a program that is not well formed; the message names it and those that ran before.
    """
    verify = verify or os.environ.get(DEBUG_VARIABLE) == "1"
    if verify:
        _check(program, "the program that was given to the passes is not well formed")
    for each in passes:
        before = program
        start = perf_counter()
        try:
            program = each.apply(program)
        except CompileError as error:
            if refused is None:
                raise
            refused(error)
            continue
        except Exception as error:
            error.add_note(f"in the pass `{each.name}`, {_after(before)}")
            raise
        seconds = perf_counter() - start
        changed = program is not before and program != before
        program = replace(program, passes=(*before.passes, each.name))
        if verify:
            _check(program, f"the pass `{each.name}`, {_after(before)}, broke the program")
        if observer is not None:
            observer(PassResult(each.name, program, changed, seconds))
    return program


def print_after(names: Collection[str] | None, write: Callable[[str], None] = print) -> Observer:
    """An observer that writes the program after the passes named, or after all of them (`None`)."""

    def observe(result: PassResult) -> None:
        if names is None or result.name in names:
            remark = "" if result.changed else ", nothing changed"
            write(f"# after {result.name}: {result.seconds * 1e3:.1f} ms{remark}\n{result.program}")

    return observe


def _check(program: Program, complaint: str) -> None:
    try:
        check(program)
    except IRError as error:
        raise IRError(f"{complaint}: {error}") from error


def _after(program: Program) -> str:
    return f"after {', '.join(program.passes)}" if program.passes else "the first to run"
