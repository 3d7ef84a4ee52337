"""Broken programs are refused, by the rule that they break and the op that breaks it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import Argument, Element, FormatPart, Handler, Op, Parameter, Region
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Module, Slice, Tuple, Value
from nnsight_compiler.ir.verifier import verify

A, B, C = Value("a"), Value("b"), Value("c")
ONE = Literal(1)

TEXTS = [
    # Values.
    ("%b = bound %a as a\n%b = bound %a as a", "%b is defined twice", "%b = bound %a as a"),
    ("%a = bound 1 as a", "%a is defined twice", "%a = bound 1 as a"),
    ("if %a\nthen\n  %b = - %a\nreturn %b", "%b is not visible here", "return %b"),
    ("%b = if %a\nthen\n  yield %b\nelse\n  yield 1", "%b is not defined before it", "yield %b"),
    ("for %i in %a\n  continue\nelse\n  %x = - %i", "%i is not visible here", "%x = - %i"),
    ("while\n  %x = - %a\n  yield %x\ndo\n  %y = - %x", "%x is not visible here", "%y = - %x"),
    ("try\n  %x = - %a\nfinally\n  return %x", "%x is not visible here", "return %x"),
    ("%f = closure f(%x)\n  return %x\nreturn %x", "%x is not visible here", "return %x"),
    ("%f = closure f()\n  return %f", "%f is not defined before it", "return %f"),
    # Terminators.
    ("return %a\n%b = - %a", "code follows what ends its region", "return %a"),
    ("raise\nraise", "code follows what ends its region", "raise"),
    ("yield", "there is no region to hand values to", "yield"),
    ("break", "there is no loop around it", "break"),
    ("for %i in %a\n  %f = closure f()\n    continue", "there is no loop around it", "continue"),
    ("while\n  break\ndo\n  break", "there is no loop around it", "break"),
    ("for %i in %a\n  break\nelse\n  continue", "there is no loop around it", "continue"),
    ("for %i in %a\n  yield", "there is no region to hand values to", "yield"),
    ("%b = for %i in %a carry %c = 1\n  continue", "it hands over 0 values, where 1 are expected", "continue"),
    ("for %i in %a\n  forward %f = trace %a()\n    break 1", "it hands over 1 values, where 0 are expected", "break 1"),
    ("%b = if %a\nthen\n  yield 1\nelse\n  yield 1, 2", "it hands over 2 values, where 1 are expected", "yield 1, 2"),
    ("%b = if %a\nthen\n  yield 1", "a region falls off its end, where it must hand over 1 values", "%b = if %a"),
    ("%b = for %i in %a carry %c = 1", "a region falls off its end, where it must hand over 1 values", "%b = for"),
    ("while\ndo\n  break", "a region falls off its end, where it must hand over 1 values", "while"),
    ("try\nexcept\nhandle %e", "a region falls off its end, where it must hand over 1 values", "try"),
    ("with %w = %a\n  yield 1", "it hands over 1 values, where 0 are expected", "yield 1"),
    ("emit %a", "`emit` stands in a generator only", "emit %a"),
    ("%g = generator g(%i)\n  %f = closure f()\n    emit 1", "`emit` stands in a generator only", "emit 1"),
    ("%g = generator g(%i)\n  return %i", "a generator does not return", "return %i"),
    # Parameters of regions.
    ("%b = if %a\nthen %x\n  yield %x\nelse\n  yield 1", "a region takes 0 parameters here, not 1", "%b = if %a"),
    ("try\nhandle", "a region takes 1 parameters here, not 0", "try"),
    ("for %i in %a\n  break\nelse %x", "a region takes 0 parameters here, not 1", "for %i in %a"),
    # Unbound.
    ("return unbound", "`unbound` may stand only where paths merge", "return unbound"),
    ("return (unbound, 1)", "`unbound` may stand only where paths merge", "return (unbound, 1)"),
    ("store unbound = %a", "`unbound` may stand only where paths merge", "store unbound = %a"),
    ("for %i in unbound", "`unbound` may stand only where paths merge", "for %i in unbound"),
    ("%b = item %a[unbound:]", "`unbound` may stand only where paths merge", "%b = item %a[unbound:]"),
    ("%b = bound (unbound,) as b", "`unbound` may stand only where paths merge", "%b = bound (unbound,) as b"),
    # Models.
    ("%b = read %a@h output", "it stands outside any forward", "%b = read %a@h output"),
    ("write %a@h output = 1", "it stands outside any forward", "write %a@h output = 1"),
    ("skip %a@h = 1", "it stands outside any forward", "skip %a@h = 1"),
    ("stop %a", "it stands outside any forward", "stop %a"),
    ("strand", "a strand stands in a `strands`, and waits a number of times", "strand"),
    ("strands\n  strand\n    strand", "a strand stands in a `strands`, and waits a number of times", "strand"),
    ("strands\n  strand after -1", "a strand stands in a `strands`, and waits a number of times", "strand after -1"),
    ("postponed %a", "it stands outside any loop whose rounds run together", "postponed %a"),
    ("for %i in %a\n  postponed %i", "it stands outside any loop whose rounds run together", "postponed %i"),
    (
        "together %i in %a\n  postponed %i\n    if %a\n    then\n      return %a",
        "what is postponed does not leave the program",
        "postponed %i",
    ),
    ("together %i in %a\n  postponed %i\n    break", "there is no loop around it", "break"),
    ("strands\n  %b = - %a", "its region holds strands, and nothing else", "strands"),
    ("strands\n  strand\n    if %a\n    then\n      return %a", "a strand does not leave the program", "strand"),
    ("for %i in %a\n  strands\n    strand\n      break", "there is no loop around it", "break"),
    ("invoke %i = %a()", "it stands outside any forward", "invoke %i = %a()"),
    ("steps %i in %a[:]", "it stands outside any forward", "steps %i in %a[:]"),
    ("at %a@h output", "it stands outside any forward", "at %a@h output"),
    ("forward %f = trace %a()\n  %b = grad %a", "it stands outside any backward", "%b = grad %a"),
    ("set_grad %a = 1", "it stands outside any backward", "set_grad %a = 1"),
    # What Python could not say.
    ("%b = call %a(k=1, k=2)", "a keyword is given twice", "%b = call %a(k=1, k=2)"),
    ("%b = list [1, 2]\ntry", "a `try` has a handler or a `finally`", "try"),
    ("%f = closure f(%x=1, %y)", "no function has these parameters in this order", "Closure"),
    ("%f = closure f(**%x, %y)", "no function has these parameters in this order", "Closure"),
    ("%f = closure f(*%x, *%y)", "no function has these parameters in this order", "Closure"),
    ("%g = generator g(%x, %y)", "a generator has one parameter, its first iterable", "%g = generator g(%x, %y)"),
]


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize(("text", "reason", "shown"), TEXTS)
def test_broken_texts_are_refused(text: str, reason: str, shown: str) -> None:
    program = parse_program(f"experiment broken(%a)\n{indented(text)}")
    with pytest.raises(IRError, match=re.escape(reason)) as caught:
        verify(program)
    assert str(caught.value).splitlines()[-1].strip().startswith(shown)


BUILT: list[tuple[Op, str]] = [
    (ops.Return(B), "%b is not defined before it"),
    (ops.Return(Value("a", TensorType("float32"))), "%a is f32 here, and any where it is defined"),
    (ops.Return(1), "the field `value` holds 1"),  # type: ignore[arg-type]
    (ops.Return(Tuple((1,))), "1 is no operand"),  # type: ignore[arg-type]
    (ops.Return(Literal([1])), "list is no type of a literal"),
    (ops.Return(Slice(NONE, NONE, Literal(range(2)))), "range is no type of a literal"),
    (ops.Read(B, A, "outputs"), "the field `port` holds 'outputs'"),  # type: ignore[arg-type]
    (ops.Read(B, A, "output", True), "the field `call` holds True"),
    (ops.At(A, "output", None, Region()), "the field `module` holds Value"),  # type: ignore[arg-type]
    (ops.Yield([A]), "the field `values` holds"),  # type: ignore[arg-type]
    (ops.Call(B, A, (Argument(1),)), "the field `arguments` holds"),  # type: ignore[arg-type]
    (ops.Call(B, A, (Argument(A, "k", "*"),)), "an argument is either starred or has a keyword"),
    (ops.Import(B, "", None), "no import statement says this"),
    (ops.Import(B, "torch", None, 1), "no import statement says this"),
    (ops.Import(B, "torch", "nn", leaf=True), "no import statement says this"),
    (ops.Delete(A, None), "either an index or a name is deleted"),
    (ops.Delete(A, ONE, "x"), "either an index or a name is deleted"),
    (ops.Build(B, "list", (Element(A, ONE),)), "stand in a dict, and nothing else does"),
    (ops.Build(B, "dict", (Element(A),)), "stand in a dict, and nothing else does"),
    (ops.Build(B, "dict", (Element(A, ONE, True),)), "stand in a dict, and nothing else does"),
    (ops.Format(B, (FormatPart(A, "x"),)), "the field `parts` holds"),  # type: ignore[arg-type]
    (ops.Unpack((B,), A, 1), "there is no result number 1"),
    (ops.Operator(B, "<", (A, A), True), "'<' is no operator on 2 operands"),
    (ops.Operator(B, "~", (A, A)), "'~' is no operator on 2 operands"),
    (ops.Operator(B, "+", (A, A, A)), "'+' is no operator on 3 operands"),
    (ops.Operator(B, "-", (A,), True), "'-' is no operator on 1 operands"),
    (ops.For((), A, (ONE,), Region((B, C))), "it has 0 results and carries 1 values"),
    (ops.Closure(B, "f", (Parameter(C, optional=True),), (), Region()), "1 parameters have a default, and 0 defaults"),
    (ops.Closure(B, "f", (), (), Region((C,))), "a region takes 0 parameters here, not 1"),
    (ops.Raise(None, A), "a cause without an exception"),
    (ops.Try(Region(), (Handler(None, Region()),)), "a region takes 1 parameters here, not 0"),
    (ops.Bound(Value(""), A, "x"), "a value has no name"),
    (ops.If((), A, Region(ops=[]), Region()), "a region's parameters and ops are tuples"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("op", "reason"), BUILT)
def test_broken_ops_are_refused(op: Op, reason: str) -> None:
    program = Program("broken", (Parameter(A),), Region((), (op,)), "function")
    with pytest.raises(IRError, match=re.escape(reason)):
        verify(program)


def test_what_is_no_op_is_refused() -> None:
    class Own(Op):
        pass

    with pytest.raises(IRError, match="Own is no op of the IR"):
        verify(Program("broken", (), Region((), (Own(),))))


PROGRAMS: list[tuple[dict[str, Any], str]] = [
    ({"body": Region((A,))}, "a region takes 0 parameters here, not 1"),
    ({"exports": ("x",)}, "only a block has exports"),
    ({"kind": "block", "exports": ("x",)}, "a block with exports must end in a `return` of them"),
    ({"kind": "script"}, "the field `kind` holds 'script'"),
    ({"parameters": (Parameter(A), Parameter(A))}, "%a is defined twice"),
    ({"parameters": (Parameter(A, "keyword_only"), Parameter(B))}, "no function has these parameters in this order"),
    (
        {"kind": "block", "exports": ("x", "y"), "body": Region((), (ops.Return(ONE),))},
        "a block returns a tuple of its 2 exports, not 1",
    ),
]


@pytest.mark.parametrize(("fields", "reason"), PROGRAMS)
def test_broken_programs_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(IRError, match=re.escape(reason)):
        verify(Program(**{"name": "broken", "parameters": (), "body": Region(), **fields}))


ACCEPTED = [
    "forward %f = trace %a()\n  %x = read %a@h output\nreturn %x",
    "with %w = %a\n  %x = - %w\nreturn %x",
    "backward %a()\n  %x = grad %a\nreturn %x",
    "%f = closure f()\n  %x = read %a@h output\n  %y = grad %x\n  return %y",
    "%b = for %i in %a carry %c = unbound\n  with %w = %i\n    break %i\nreturn %b",
    "%b = if %a\nthen\n  raise\nelse\n  if %a\n  then\n    return 1\n  else\n    raise",
    "%b = if %a\nthen\n  try\n    return 1\n  handle %e\n    raise\nelse\n  yield unbound",
    "forward %f = generate %a()\n  steps %s in %f[1:]\n    %x = - %s\n  %y = - %x",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_rules_do_not_refuse_too_much(text: str) -> None:
    verify(parse_program(f"experiment sound(%a)\n{indented(text)}"))


def test_a_block_may_return_what_it_did_not_assign() -> None:
    verify(Program("b", (), Region((), (ops.Return(Tuple((UNBOUND, ONE))),)), "block", exports=("x", "y")))


def test_a_helper_may_hold_ops_of_a_forward() -> None:
    verify(Program("f", (Parameter(A),), Region((), (ops.Read(B, Module(A, "h"), "output"),)), "function"))


def test_the_error_names_the_source_line() -> None:
    op = ops.Stop(A, span=Span("demo.py", 12, 4))
    with pytest.raises(IRError, match=r"demo\.py:12:5: it stands outside any forward\n    stop %a"):
        verify(Program("broken", (Parameter(A),), Region((), (op,))))


def test_too_deep_programs_are_refused() -> None:
    region, operand = Region(), A
    for _ in range(150):
        region, operand = Region((), (ops.If((), A, region, Region()),)), Tuple((operand,))  # type: ignore[assignment]
    with pytest.raises(IRError, match="regions are nested more than 100 deep"):
        verify(Program("broken", (Parameter(A),), region))
    with pytest.raises(IRError, match="operands are nested more than 100 deep"):
        verify(Program("broken", (Parameter(A),), Region((), (ops.Return(operand),))))
