"""Common subexpressions: text in, text out, and what must stay two."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions


def same(text: str, expected: str) -> None:
    program = parse_program(dedent(text))
    verify(program)
    result = eliminate_common_subexpressions(program)
    verify(result)
    assert str(result) == str(parse_program(dedent(expected)))
    assert eliminate_common_subexpressions(result) is result, "a second run finds more"


def stays(text: str) -> None:
    program = parse_program(dedent(text))
    verify(program)
    assert eliminate_common_subexpressions(program) is program


def test_reads_and_what_is_computed_from_them() -> None:
    same(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %0 = item %a[:, -1]
            %1 = %0 * 2
            %s = save %1
            %b = read %model@h.3 output
            %2 = item %b[:, -1]
            %3 = %2 * 2
            %4 = %3 + 1
            %t = save %4
          return (%s, %t)
        """,
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %0 = item %a[:, -1]
            %1 = %0 * 2
            %s = save %1
            %4 = %1 + 1
            %t = save %4
          return (%s, %t)
        """,
    )


def test_callees_of_calls_that_go_go_too() -> None:
    same(
        """
        experiment f(%x)
          %t1 = global torch
          %a1 = attr %t1.softmax
          %0 = call %a1(%x, -1) as "torch.softmax"
          %t2 = global torch
          %a2 = attr %t2.softmax
          %1 = call %a2(%x, -1) as "torch.softmax"
          %2 = %0 + %1
          return %2
        """,
        """
        experiment f(%x)
          %t1 = global torch
          %a1 = attr %t1.softmax
          %0 = call %a1(%x, -1) as "torch.softmax"
          %2 = %0 + %0
          return %2
        """,
    )


def test_what_stands_before_serves_inside() -> None:
    same(
        """
        experiment f(%model, %x, %p)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %r = if %p
            then
              %b = read %model@h.3 output
              %s = save %b
              yield %s
            else
              yield None
          return %r
        """,
        """
        experiment f(%model, %x, %p)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %r = if %p
            then
              %s = save %a
              yield %s
            else
              yield None
          return %r
        """,
    )


BETWEEN_READS = [
    "write %model@h.3 output = 0",
    "write %model@h.3 input = 0",
    "skip %model@h.3 = %x",
    "set_item %a[0] = 1",  # the value of the site may be a tuple, whose item this replaces
]


@pytest.mark.parametrize("between", BETWEEN_READS)
def test_a_read_after_a_replacement_stays(between: str) -> None:
    stays(
        f"""
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %s = save %a
            {between}
            %b = read %model@h.3 output
            %t = save %b
          return (%s, %t)
        """
    )


@pytest.mark.parametrize("between", ["write %model@h.4 output = 0", "set_item %a[:, 0] = 1", "%e = %a += 1"])
def test_a_read_after_an_in_place_write_goes_but_not_what_is_computed(between: str) -> None:
    same(
        f"""
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output : f32[2, 3, 4]
            %0 = %a * 2.0
            %s = save %0
            {between}
            %b = read %model@h.3 output : f32[2, 3, 4]
            %1 = %b * 2.0
            %t = save %1
          return (%s, %t)
        """,
        f"""
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output : f32[2, 3, 4]
            %0 = %a * 2.0
            %s = save %0
            {between}
            %1 = %a * 2.0
            %t = save %1
          return (%s, %t)
        """,
    )


def test_reads_of_two_forwards_and_of_two_invokes_stay() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %a = read %model@h.3 output
            %s = save %a
          forward %f1 = trace %model(%x)
            %b = read %model@h.3 output
            %t = save %b
          forward %f2 = trace %model()
            invoke %i0 = %f2("a")
              %c = read %model@h.3 output
              %u = save %c
            invoke %i1 = %f2("b")
              %d = read %model@h.3 output
              %v = save %d
          return (%s, %t, %u, %v)
        """
    )


def twice(computation: str, uses: str, result: str = "None") -> str:
    """A program that computes something as %a and again as %b, and then uses both."""
    body = "\n".join([computation.replace("@", "a"), computation.replace("@", "b"), uses])
    return f"experiment f(%model, %x, %y, %out)\n{indent(body, '  ')}\n  return {result}\n"


@pytest.mark.parametrize(
    ("computation", "uses", "result"),
    [
        ("%@ = %x * 2", "%w = %a += 1", "%b"),
        ("%@ = %x * 2", "", "(%a, %b)"),
        ("%@ = %x * 2", "%c = %a is %b", "%c"),
        ("%@ = %x * 2", "%l = list [%a, %b]", "%l"),
        ("%@ = %x * 2", "%h = call %out(%a, %b)", "None"),
        ("%@ = %x * 2", "set_attr %out.a = %a\nset_attr %out.b = %b", "None"),
        ("%@ = %x * 2", "%v = item %a[0]\nset_item %v[0] = 1", "%b"),
        ("%@ = list []", "", "(%a, %b)"),
        ('%@ = call %out(3) as "torch.zeros"', "set_item %a[0] = 1", "%b"),
        ('%@ = call %out(3) as "torch.rand"', "%c = %a / %b", "%c"),
        ('%@ = call %out(%x) as "builtins.zip"', "", "(%a, %b)"),
        ("%@ = call %out(%x)", "%c = %a / %b", "%c"),
        ("%@ = attr %x.shift", "%c = %a / %b", "%c"),
        ("%@ = item %x[0]", "%c = %a / %b", "%c"),
        ("%@ = %x / 2\nset_item %x[0] = 1", "%c = %a / %b", "%c"),
        ("%@ = global v\nset_global v = 3", "%c = %a / %b", "%c"),
        ("%@ = global v\n%n@ = call %out()", "%c = %a / %b", "%c"),
        (
            "forward %f@ = trace %model(%x)\n  %@ = %y * 2\n  write %model@h output = %@".replace("model@", "model\0"),
            "",
            "None",
        ),
    ],
)
def test_stays_two(computation: str, uses: str, result: str) -> None:
    stays(twice(computation, uses, result).replace("\0", "@"))


@pytest.mark.parametrize(
    ("computation", "uses", "result"),
    [
        ("%@ = %x * 2", "%c = %a / %b", "%c"),
        ("%@ = %x * 2", "%c = save %a\n%d = save %b", "(%c, %d)"),
        ('%@ = call %out(3) as "torch.zeros"', "%c = %a / %b", "%c"),
        ('%@ = call %out(%x) as "builtins.len"', "", "(%a, %b)"),
        ("%@ = attr %x.shape", "", "(%a, %b)"),
        ("%@ = global v", "", "(%a, %b)"),
        ("%@ = attr %model@h.3 .weight".replace("model@", "model\0"), "", "(%a, %b)"),
        ('%m@ = attr %x.sum\n%@ = call %m@(-1) as "torch.Tensor.sum"', "%c = %a / %b", "%c"),
    ],
)
def test_becomes_one(computation: str, uses: str, result: str) -> None:
    program = parse_program(twice(computation, uses, result).replace("\0", "@"))
    verify(program)
    after = eliminate_common_subexpressions(program)
    verify(after)
    assert "%b" in str(program)
    assert "%b" not in str(after)


@pytest.mark.parametrize(
    "region",
    [
        "with %w = %mode\n  %b = %x * 2\n  %s = save %b",
        "%g = closure g()\n  %b = %x * 2\n  return %b",
        "for %i in %out\n  %b = %x * 2\n  set_item %x[0] = %b\n  continue",
    ],
)
def test_regions_that_run_otherwise_compute_anew(region: str) -> None:
    stays(
        'experiment f(%x, %out)\n  %nograd = global no_grad\n  %mode = call %nograd() as "torch.no_grad"\n'
        f"  %a = %x * 2\n  %s0 = save %a\n{indent(region, '  ')}\n  return %s0\n"
    )


def test_steps_of_a_generation_read_anew() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = generate %model(%x)
            %a = read %model@h.3 output
            %s = save %a
            steps %i in %f0[0:3]
              %b = read %model@h.3 output
              %t = save %b
          return %s
        """
    )
