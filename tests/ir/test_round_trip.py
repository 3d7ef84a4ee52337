"""Every program survives the text form and the serial form, and nothing read from outside does harm."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from random_examples import examples

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import from_json, to_json
from nnsight_compiler.ir.syntax import FORMS
from nnsight_compiler.ir.verifier import verify

Programs = SearchStrategy[Program]
data = st.data()


def places(program: Program) -> list[tuple[str, int]]:
    return [(program.span.file, program.span.line), *((op.span.file, op.span.line) for op in program.walk())]


@examples(60)
@given(data=data)
def test_text_and_json_give_the_program_back(programs: Programs, data: DataObject) -> None:
    program = data.draw(programs)
    verify(program)

    text = print_program(program)
    parsed = parse_program(text)
    assert parsed == program
    assert places(parsed) == places(program)
    assert print_program(parsed) == text

    stored = json.dumps(to_json(program), allow_nan=False)
    loaded = from_json(json.loads(stored))
    assert loaded == program
    assert [op.span for op in loaded.walk()] == [op.span for op in program.walk()]
    assert json.dumps(to_json(loaded), allow_nan=False) == stored


def test_the_strategy_makes_every_op_in_every_form(programs: Programs) -> None:
    seen: set[type] = set()
    forms: set[str] = set()

    @examples(150)
    @given(program=programs)
    def collect(program: Program) -> None:
        for op in program.walk():
            seen.add(type(op))
            forms.update(
                form.keyword
                for form in FORMS
                if form.op is type(op) and all(getattr(op, name) == value for name, value in form.fixed.items())
            )

    collect()
    assert seen == set(ops.ALL_OPS)
    assert forms == {form.keyword for form in FORMS}


def test_every_op_has_a_form() -> None:
    assert {form.op for form in FORMS} | {ops.Operator} == set(ops.ALL_OPS)
    assert len({form.keyword for form in FORMS}) == len(FORMS)


@examples(60)
@given(data=data)
def test_damaged_text_is_refused_or_still_a_program(programs: Programs, data: DataObject) -> None:
    text = print_program(data.draw(programs))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(st.text(alphabet="%@()[]{}:=,.*#'\"\\ \n0aex-é", max_size=4)) + text[end:]
    try:
        program = parse_program(text)
    except IRError:
        return
    assert parse_program(print_program(program)) == program


def nodes(found: Any) -> Iterator[Any]:
    """Every object and array that holds something, inside out or not."""
    if isinstance(found, dict | list) and found:
        yield found
        for inner in found.values() if isinstance(found, dict) else found:
            yield from nodes(inner)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(["x", "model", "0", "Yield", "trace", ""]),
)
junk = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(["op", "tuple", "int", "module", "constant", "float"]), scalars, max_size=2),
)


@examples(80)
@given(data=data)
def test_damaged_json_is_refused_or_still_a_program(programs: Programs, data: DataObject) -> None:
    stored: Any = copy.deepcopy(to_json(data.draw(programs)))
    for _ in range(data.draw(st.integers(1, 3))):
        every = list(nodes(stored))
        victim = every[data.draw(st.integers(0, len(every) - 1))]
        keys = list(victim) if isinstance(victim, dict) else list(range(len(victim)))
        key = keys[data.draw(st.integers(0, len(keys) - 1))]
        other = every[data.draw(st.integers(0, len(every) - 1))]
        match data.draw(st.integers(0, 4)):
            case 0:
                del victim[key]
            case 1:
                victim[key] = data.draw(junk)
            case 2 if isinstance(victim, dict):
                victim[data.draw(st.sampled_from(["op", "span", "extra", "value"]))] = data.draw(junk)
            case 3:
                victim[key] = copy.deepcopy(other)
            case _ if isinstance(victim, list):
                victim.append(copy.deepcopy(victim[key]))
    try:
        program = from_json(stored)
    except IRError:
        return
    verify(program)
    assert from_json(to_json(program)) == program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "at version: this is version 2, and only 1 is known"),
        ({"version": True}, "at version"),
        ({"format": "onnx"}, "at format: expected 'nnsight-compiler-ir'"),
        ({"extra": 0}, "at the top: unknown field 'extra'"),
        ({"files": [3]}, r"at files\[0\]: expected a string"),
        ({"program": 3}, "at program: expected an object"),
    ],
)
def test_damaged_heads_are_refused_with_the_path(change: dict[str, Any], message: str) -> None:
    stored = to_json(parse_program("function f(%x)\n  return %x\n"))
    with pytest.raises(IRError, match=message):
        from_json({**stored, **change})


@pytest.mark.parametrize(
    ("path", "held", "message"),
    [
        (("op",), "Exec", r"at program.body.ops\[0\]: 'Exec' is no op"),
        (("value",), "y", r"at program.body.ops\[0\].value: the value 'y' is not defined before it is used"),
        (("value",), {"eval": "1"}, r"at program.body.ops\[0\].value: 'eval' does not hold '1'"),
        (("value",), {"int": "0x1_0"}, r"'int' does not hold '0x1_0'"),
        (("value",), {"int": True}, r"'int' does not hold True"),
        (("value",), {"float": "1e5"}, r"expected a number, 'nan', 'inf' or '-inf'"),
        (("value",), {"float": float("nan")}, r"expected a number, 'nan', 'inf' or '-inf'"),
        (("value",), {"bytes": "_w=="}, r"'bytes' does not hold"),
        (("value",), None, r"ops\[0\].value: this may not be null"),
        (("span",), [0, 1, 0, 0], r"ops\[0\].span: expected an array of 5"),
        (("span",), [7, 1, 0, 0, 0], r"ops\[0\].span: no such place"),
        (("extra",), 1, r"ops\[0\]: unknown field 'extra'"),
    ],
)
def test_damaged_ops_are_refused_with_the_path(path: tuple[str, ...], held: Any, message: str) -> None:
    stored = to_json(parse_program("function f(%x)\n  return %x\n"))
    stored["program"]["body"]["ops"][0][path[0]] = held
    with pytest.raises(IRError, match=message):
        from_json(stored)


@pytest.mark.parametrize("depth", [150, 2000])
def test_deep_nesting_is_refused_everywhere(depth: int) -> None:
    with pytest.raises(IRError, match="nested more than 100 deep"):
        parse_program("function f(%x)\n  return " + "(" * depth + "%x" + ",)" * depth + "\n")
    lines = [f"{'  ' * level}if %x\n{'  ' * level}then\n" for level in range(1, depth)]
    with pytest.raises(IRError, match="nested more than 100 deep"):
        parse_program(f"function f(%x)\n{''.join(lines)}{'  ' * depth}raise\n")

    operand: Any = "x"
    for _ in range(depth):
        operand = {"tuple": [operand]}
    stored = to_json(parse_program("function f(%x)\n  return %x\n"))
    stored["program"]["body"]["ops"][0]["value"] = operand
    with pytest.raises(IRError, match="operands are nested"):
        from_json(stored)

    stored = to_json(parse_program("function f(%x)\n  if %x\n  then\n    raise\n"))
    region = stored["program"]["body"]
    for _ in range(depth):
        region = {"parameters": [], "ops": [{**stored["program"]["body"]["ops"][0], "then": region}]}
    stored["program"]["body"] = region
    with pytest.raises(IRError, match="regions are nested more than 100 deep"):
        from_json(stored)


def test_reading_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = to_json(parse_program("function f(%x)\n  %0 = import os\n  %1 = call %0(%x) as os.system\n  return %1\n"))

    def refuse(*args: object) -> None:
        raise AssertionError("something was imported")

    monkeypatch.setattr("builtins.__import__", refuse)
    from_json(stored)
