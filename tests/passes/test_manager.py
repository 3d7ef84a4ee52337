"""The pass manager: order, names, verification, observers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, IRError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import NOWHERE
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.manager import DEBUG_VARIABLE, NamedPass, PassResult, print_after, run_passes

PROGRAM = parse_program("experiment f(%x)\n  return %x\n")


def rename(program: Program) -> Program:
    return replace(program, name=program.name + "x")


def break_program(program: Program) -> Program:
    return replace(program, body=replace(program.body, ops=(ops.Return(Value("nowhere")),)))


def keep(program: Program) -> Program:
    return program


def test_passes_run_in_order_and_are_recorded() -> None:
    result = run_passes(PROGRAM, [NamedPass("first", rename), NamedPass("second", keep), NamedPass("third", rename)])
    assert result.name == "fxx"
    assert result.passes == ("first", "second", "third")
    assert PROGRAM.passes == ()


def test_the_verifier_names_the_pass_and_those_before() -> None:
    passes = [NamedPass("first", keep), NamedPass("breaks", break_program), NamedPass("last", keep)]
    with pytest.raises(IRError, match=r"the pass `breaks`, after first, broke the program.*nowhere"):
        run_passes(PROGRAM, passes, verify=True)


def test_without_verification_nothing_is_checked() -> None:
    assert run_passes(PROGRAM, [NamedPass("breaks", break_program)]).passes == ("breaks",)


def test_the_environment_turns_verification_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(IRError, match="the pass `breaks`, the first to run"):
        run_passes(PROGRAM, [NamedPass("breaks", break_program)])


def test_a_broken_input_is_no_pass_s_fault() -> None:
    with pytest.raises(IRError, match="given to the passes"):
        run_passes(break_program(PROGRAM), [NamedPass("first", keep)], verify=True)


def test_observers_see_every_result() -> None:
    seen: list[PassResult] = []
    run_passes(PROGRAM, [NamedPass("first", rename), NamedPass("second", keep)], observer=seen.append)
    assert [(result.name, result.changed, result.program.name) for result in seen] == [
        ("first", True, "fx"),
        ("second", False, "fx"),
    ]
    assert all(result.seconds >= 0 for result in seen)


def test_printing_after_passes() -> None:
    lines: list[str] = []
    passes = [NamedPass("first", rename), NamedPass("second", keep)]
    run_passes(PROGRAM, passes, observer=print_after({"second"}, lines.append))
    assert len(lines) == 1
    assert lines[0].startswith("# after second: ")
    assert "nothing changed" in lines[0]
    assert parse_program(lines[0].split("\n", 1)[1]).name == "fx"
    run_passes(PROGRAM, passes, observer=print_after(None, lines.append))
    assert len(lines) == 3


def test_an_error_in_a_pass_names_it() -> None:
    def fail(program: Program) -> Program:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run_passes(PROGRAM, [NamedPass("first", keep), NamedPass("fails", fail)])
    assert caught.value.__notes__ == ["in the pass `fails`, after first"]


def test_a_mistake_of_the_user_s_is_passed_on_as_it_is() -> None:
    def refuse(program: Program) -> Program:
        raise CompileError([Diagnostic(NOWHERE, "no such module")])

    with pytest.raises(CompileError) as caught:
        run_passes(PROGRAM, [NamedPass("refuses", refuse)])
    assert not hasattr(caught.value, "__notes__")


def test_a_pass_that_makes_an_equal_program_changes_nothing() -> None:
    seen: list[PassResult] = []
    again = NamedPass("again", lambda program: replace(program, parameters=tuple(program.parameters)))
    run_passes(PROGRAM, [again], observer=seen.append)
    assert not seen[0].changed
