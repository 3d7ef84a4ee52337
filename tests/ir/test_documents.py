"""The reference of the IR says what the code does: its examples parse, its tables name every op with its effects."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Effect
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_op, print_operand, print_program
from nnsight_compiler.ir.syntax import KEYWORDS
from nnsight_compiler.ir.verifier import verify

TEXT = (Path(__file__).parents[2] / "docs" / "ir.md").read_text()
PROGRAMS = re.findall(r"```ir\n(.*?)```", TEXT, re.DOTALL)
ROWS = re.findall(r"^\| `([A-Z]\w+)` \| ([a-z, ]+) \| `(.+?)` \| (.+) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("text", PROGRAMS)
def test_the_programs_are_well_formed_and_printed_as_the_printer_prints_them(text: str) -> None:
    program = parse_program(text)
    verify(program)
    squeeze = re.compile(r"  +#")
    assert squeeze.sub("  #", print_program(program)) == squeeze.sub("  #", text)


@pytest.mark.parametrize(("name", "effects", "example", "meaning"), ROWS)
def test_the_rows_of_the_tables_are_true(name: str, effects: str, example: str, meaning: str) -> None:
    nested = "\n    stage part(%x)\n      return %x" if name == "Stage" else ""
    (op,) = parse_program(f"function example(%a, %b, %c, %d)\n  {example}{nested}\n").body.ops
    assert type(op).__name__ == name
    assert print_op(op) == example
    declared = Effect.NONE
    for word in effects.split(", "):
        declared |= Effect[word.upper()]
    assert op.effects == declared


def test_every_op_and_every_keyword_is_documented() -> None:
    assert {name for name, *_ in ROWS} == {kind.__name__ for kind in ops.ALL_OPS}
    words = {word for _, _, example, _ in ROWS for word in re.findall(r"\w+", example)}
    assert set(KEYWORDS) <= words


@pytest.mark.parametrize(
    "text",
    re.findall(r"`([^`]+)`", next(line for line in TEXT.splitlines() if line.startswith("| a literal"))),
)
def test_the_literals_are_spelled_as_they_are_printed(text: str) -> None:
    (op,) = parse_program(f"function example()\n  return {text}\n").body.ops
    assert isinstance(op, ops.Return)
    assert print_operand(op.value) == text
