"""How programs are printed, and what the parser says of texts that are none."""

from __future__ import annotations

import re

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import Argument, Parameter, Region
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_op, print_region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.types import Dimension, ModuleType, TensorType
from nnsight_compiler.ir.values import NONE, Literal, Module, Slice, Tuple, Value


def test_a_program_built_by_hand_is_printed_as_designed() -> None:
    model, clean, position, tracer = (Value(name) for name in ("model", "clean", "position", "f0"))
    hidden = Value("2", TensorType("float32", (Dimension(1, "rows"), Dimension(7, "tokens"), Dimension(768))))
    source = Value("source", TensorType("bfloat16"))
    block = Value("1", ModuleType("GPT2Block"))
    body = (
        ops.Attribute(block, model, "layer", span=Span("demo.py", 12)),
        ops.Read(hidden, Module(model, "transformer.h.3"), "output", span=Span("demo.py", 12)),
        ops.Item(source, hidden, Tuple((Slice(), position)), span=Span("demo.py", 13)),
        ops.SetItem(hidden, Tuple((Slice(NONE, Literal(-1)), Literal(0))), source, span=Span("demo.py", 13)),
    )
    program = Program(
        name="patch",
        parameters=(Parameter(model), Parameter(clean), Parameter(position, "keyword_only", optional=True)),
        body=Region((), (ops.Forward(tracer, model, "trace", (Argument(clean),), Region((), body)),)),
        target="GPT2LMHeadModel",
        given=("layer=3", "mode='a b'"),
        passes=("specialise", "place"),
        span=Span("demo.py", 10),
    )
    lines = str(program).splitlines()
    assert [line.split("  #")[0].rstrip() for line in lines] == [
        "experiment patch(%model, %clean, *, %position=...)  for GPT2LMHeadModel  given layer=3, \"mode='a b'\""
        "  after specialise, place",
        "  forward %f0 = trace %model(%clean)",
        "    %1 = attr %model.layer : module GPT2Block",
        "    %2 = read %model@transformer.h.3 output : f32[rows=1, tokens=7, 768]",
        "    %source = item %2[:, %position] : bf16",
        "    set_item %2[:-1, 0] = %source",
    ]
    assert [line.partition("  #")[2].strip() for line in lines] == [
        *("demo.py:10", "<unknown>:0", "demo.py:12", "", "demo.py:13", ""),
    ]


def test_one_op_is_printed_without_its_region() -> None:
    a, f = Value("a"), Value("f")
    op = ops.Forward(f, a, "generate", (Argument(Literal(3), "max_new_tokens"),), Region((), (ops.Stop(f),)))
    assert print_op(op) == "forward %f = generate %a(max_new_tokens=3)"
    assert print_region(op.body) == "stop %f\n"


def test_comments_give_the_place_until_the_next() -> None:
    text = """
    function f(%x)  # a.py:3
      # a.py:99
      %0 = - %x
      %1 = - %0     # 'b c.py':5
      %2 = - %1     # nothing of note
    """
    program = parse_program(text)
    assert program.span == Span("a.py", 3)
    assert [(op.span.file, op.span.line) for op in program.body.ops] == [("a.py", 3), ("b c.py", 5), ("b c.py", 5)]


def test_uses_take_the_type_of_the_definition() -> None:
    program = parse_program("function f(%x: f32[3])\n  %0 = - %x : f32[3]\n  return (%0, %x)\n")
    last = program.body.ops[-1]
    typed = TensorType("float32", (Dimension(3),))
    assert last == ops.Return(Tuple((Value("0", typed), Value("x", typed))))


@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ("", 1, 1, "expected a program, found nothing"),
        ("script f()", 1, 1, "expected `experiment`, `block`, `function` or `stage`"),
        ("function f(%x", 1, 14, "expected `,` before the end of the line"),
        ("function f(%x=3)", 1, 16, "a program's defaults are not part of it: write `=...`"),
        ("function f()\n  %0 = frobnicate %x", 2, 8, "`frobnicate` is no op"),
        ("function f()\n  return %x", 2, 10, "`%x` is not defined before this line"),
        ("function f(%x)\n  return %x %x", 2, 13, "expected the end of the line, not `%x`"),
        ("function f(%x)\n  return (%x)", 2, 13, "a tuple of one part ends in a comma"),
        ("function f(%x)\n   return %x", 2, 4, "expected 2 spaces of indentation, not 3"),
        ("function f(%x)\nreturn %x", 2, 1, "expected the end of the program"),
        ("function f(%x)\n  if %x\n  otherwise", 3, 3, "`otherwise` is no op"),
        ("function f(%x)\n  else", 2, 3, "`else` is no op"),
        ("function f(%x)\n  return $", 2, 10, "no token starts here"),
        ("function f(%x)\n  return 'it\\d'", 2, 10, "no token starts here"),
        (f"function f(%x)\n  return {'9' * 5000}", 2, 10, "spells nothing"),
        ("function f(%x)\n  return b'é'", 2, 10, "expected an operand, not `b`"),
        ("function f(%x)\n  return %'\\ud800\\U00ffffff'", 2, 10, "spells nothing"),
        ("function f(%x)\n  %0 = call %x(%x", 2, 18, "expected `)` before the end of the line"),
        ("function f(%x)\n  %0 = read %x outputs", 2, 3, "`outputs` is none of output, input, inputs"),
        ("function f(%x)\n  %0, %1 = attr %x.y", 2, 21, "2 results, where the op has 1"),
        ("function f(%x)\n  %0 = stop %x", 2, 15, "1 results, where the op has 0"),
        ("function f(%x)\n  grad %x", 2, 10, "0 results, where the op has 1"),
        ("function f(%x)\n  %0, %1 = unpack %x : f32", 2, 27, "1 types for 2 results"),
        ("function f(%x)\n  *%0 = attr %x.y", 2, 3, "only `unpack` has a starred result"),
        ("function f(%x)\n  *%0, *%1 = unpack %x", 2, 8, "a second starred result"),
        ("function f(%x)\n  %0 = %x ? %x", 2, 11, "`?` is no operator"),
        ("function f(%x)\n  %0 = item %x[]", 2, 16, "expected an index"),
        ("function f(%x)\n  at %x output", 2, 3, "expected a module, such as `%model@transformer.h.3`"),
        ("function f(%x)\n  try\n  except\n    yield 1", 4, 5, "`except` without a `handle` after it"),
    ],
)
def test_errors_say_where_and_why(text: str, line: int, column: int, reason: str) -> None:
    with pytest.raises(IRError, match=re.escape(reason)) as caught:
        parse_program(text)
    assert re.match(r"line (\d+), column (\d+)", str(caught.value)).groups() == (str(line), str(column))  # type: ignore[union-attr]


def test_errors_show_the_line_with_a_caret() -> None:
    with pytest.raises(IRError) as caught:
        parse_program("function f(%x)\n  return %y\n")
    assert str(caught.value).splitlines()[1:] == ["      return %y", "             ^"]
