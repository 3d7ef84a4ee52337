"""Placing: text in, text out, for a model that runs its modules in a given order; and what cannot be placed."""

from __future__ import annotations

import re
from textwrap import dedent, indent

import pytest

from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.place import place

CALLS = [("h.0", 0), ("h.1", 0), ("shared", 0), ("h.2", 0), ("shared", 1), ("head", 0)]


EVENTS = [
    ("", "input", 0),
    *((path, port, call) for path, call in CALLS for port in ("input", "output")),
    ("", "output", 0),
]


class Order:
    """A model that runs these modules, one after another."""

    def time(self, path: str, port: str, call: int = 0) -> int:
        return EVENTS.index((path, port, call))

    def count(self, path: str) -> int:
        return sum(each == path and port == "output" for each, port, _ in EVENTS)

    def why_not(self, path: str) -> None:
        return None


HEADER = "experiment f(%model, %x, %k)\n"


def placed(body: str, result: str = "None", before: str = "") -> str:
    """A forward that has this body, placed. Its first line is line 1 of `f.py`."""
    lines = [f"{line}  # f.py:{number}" for number, line in enumerate(dedent(body).strip().splitlines(), 1)]
    text = indent("\n".join(lines), "    ")
    program = parse_program(
        f"{HEADER}{indent(before, '  ')}\n  forward %f0 = trace %model(%x)\n{text}\n  return {result}\n"
    )
    verify(program)
    made = place(program, lambda _: Order())
    verify(made)
    return re.sub(r" +# .*", "", str(made)).removeprefix(HEADER)


def becomes(body: str, expected: str, result: str = "None") -> None:
    want = parse_program(HEADER + indent(dedent(expected).strip("\n"), "  ") + "\n")
    verify(want)
    assert placed(body, result) == str(want).removeprefix(HEADER)


def refused(body: str, result: str = "None") -> Diagnostic:
    with pytest.raises(CompileError) as caught:
        placed(body, result)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.file == "f.py"
    assert diagnostic.way_out
    return diagnostic


# --- the order of sites ---


def test_sites_take_the_order_of_the_model() -> None:
    becomes(
        """
        %l = read %model@head output
        %0 = item %l[:, -1]
        %1 = read %model@h.1 output
        set_item %1[:, 0] = 0
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.1 output
            %1 = read %model@h.1 output
            set_item %1[:, 0] = 0
          at %model@head output
            %l = read %model@head output
            %0 = item %l[:, -1]
            %2 = save %0
        return %2
        """,
        "%0",
    )


def test_the_calls_of_a_module_are_sites_of_their_own_and_inputs_come_before_outputs() -> None:
    text = placed(
        """
        %a = read %model@shared output call -1
        %b = read %model@shared output call 0
        %c = read %model@h.0 output
        %d = read %model@h.0 inputs
        %e = read %model@'' input
        """
    )
    assert re.findall(r"at %model@(.*)", text) == [
        "'' input", "h.0 input", "h.0 output", "shared output call 0", "shared output call 1",
    ]  # fmt: skip


def test_the_index_of_the_only_call_is_left_out() -> None:
    assert "at %model@head output\n" in placed("%a = read %model@head output call -1")


def test_what_needs_no_site_runs_before_the_forward() -> None:
    becomes(
        "%h = read %model@h.0 output\n%y = %x * 2\n%z = %h - %y",
        """
        %y = %x * 2
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            %h = read %model@h.0 output
            %z = %h - %y
        return %z
        """,
        "%z",
    )


def test_an_op_runs_at_the_last_of_the_sites_that_it_needs() -> None:
    becomes(
        """
        %b = read %model@h.1 output
        %a = read %model@h.0 output
        %c = %a - %b
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            %a = read %model@h.0 output
            %a.1 = save %a
          at %model@h.1 output
            %b = read %model@h.1 output
            %c = %a.1 - %b
        return %c
        """,
        "%c",
    )


def test_a_method_is_looked_up_where_it_is_called() -> None:
    becomes(
        """
        %l = list []
        %append = attr %l.append
        %a = read %model@h.1 output
        %n = call %append(%a) as method.append
        """,
        """
        %l = list []
        forward %f0 = trace %model(%x)
          at %model@h.1 output
            %append = attr %l.append
            %a = read %model@h.1 output
            %a.1 = save %a
            %n = call %append(%a.1) as method.append
        return %l
        """,
        "%l",
    )


def test_effects_keep_the_order_of_the_source() -> None:
    text = placed(
        """
        %a = read %model@h.1 output
        %p = call %k(%a)
        %b = read %model@h.0 output
        %q = call %k(%b)
        """
    )
    assert text.index("%p = call") < text.index("%q = call %k(%b.1)")
    assert "%b.1 = save %b" in text


# --- copies ---


def test_a_copy_is_of_the_version_at_its_use() -> None:
    becomes(
        """
        %a = read %model@h.0 output
        set_item %a[0] = 1
        %b = read %model@h.1 output
        %c = %a - %b
        set_item %a[0] = 2
        %d = %a - %b
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            %a = read %model@h.0 output
            set_item %a[0] = 1
            %a.1 = save %a
            set_item %a[0] = 2
            %a.2 = save %a
          at %model@h.1 output
            %b = read %model@h.1 output
            %c = %a.1 - %b
            %d = %a.2 - %b
        return (%c, %d)
        """,
        "(%c, %d)",
    )


def test_a_save_and_what_follows_stay_in_order() -> None:
    body = "%a = read %model@h.0 output\nset_item %a[0] = 1\n%s = save %a\nset_item %a[0] = 2"
    becomes(
        body,
        f"forward %f0 = trace %model(%x)\n  at %model@h.0 output\n{indent(body, '    ')}\nreturn %s",
        "%s",
    )


def test_what_a_site_holds_may_be_a_tuple_whose_sum_shares_its_parts() -> None:
    assert "return %b\n" in placed("%a = read %model@h.0 output\n%b = %a - %x", "%b")
    assert "return %b.1\n" in placed("%a = read %model@h.0 output\n%b = %a + %x", "%b")


def test_fresh_values_are_not_copied() -> None:
    body = "%a = read %model@h.0 output\n%m = attr %a.softmax\n%b = call %m(-1) as torch.Tensor.softmax\n"
    text = placed(
        body + "%c = read %model@head output\n%n = attr %c.sub\n%d = call %n(%b) as torch.Tensor.sub", "(%b, %d)"
    )
    assert "save" not in text
    assert text.rstrip().endswith("return (%b, %d)")


@pytest.mark.parametrize(
    "into",
    [
        "%l = list [%a]\n%n = call %k(%l)",
        "%l = list []\n%p = attr %l.append\n%n = call %p(%a) as method.append",
        "set_attr %k.held = %a",
        "set_item %k['held'] = %a",
        "%c = cell v = None\nstore %c = %a",
        "set_global held = %a",
        "for %i in %k\n  set_item %k[%i] = %a\n  continue",
    ],
)
def test_a_value_that_is_put_into_something_is_copied(into: str) -> None:
    text = placed("%a = read %model@h.0 output\n" + into)
    assert re.search(r"%a\.1 = save %a\n", text)
    assert len(re.findall(r"%a\b(?!\.1)", text)) == 2  # where it is read, and where it is copied


def test_what_a_write_gives_to_the_model_is_its_own() -> None:
    text = placed("write %model@h.0 output = %x\nwrite %model@h.2 output = %x\n%o = read %model@'' output", "%o")
    assert "%x.1 = save %x\n" in text
    assert "write %model@h.0 output = %x.1\n" in text
    assert "%x.2 = save %x\n" in text
    assert "write %model@h.2 output = %x.2\n" in text


def test_a_value_of_another_forward_leaves_as_a_copy() -> None:
    program = parse_program(
        HEADER
        + "  forward %f0 = trace %model(%x)\n    %a = read %model@h.0 output\n"
        + "  forward %f1 = trace %model(%x)\n    write %model@h.0 output = %a\n    %o = read %model@'' output\n"
        + "  return %o\n"
    )
    made = place(program, lambda _: Order())
    verify(made)
    assert "%a.1 = save %a\n" in str(made)
    assert "output = %a\n" not in str(made)


# --- loops, conditions, contexts ---


def test_reads_leave_a_loop_that_does_not_write_their_site() -> None:
    becomes(
        """
        for %i in (0, 1)
          %a = read %model@h.0 output
          %b = read %model@h.1 output
          set_item %b[%i] = %a
          continue
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            %a = read %model@h.0 output
            %a.1 = save %a
          at %model@h.1 output
            for %i in (0, 1)
              %b = read %model@h.1 output
              set_item %b[%i] = %a.1
              continue
        return None
        """,
    )


def test_a_condition_over_several_sites_is_split() -> None:
    becomes(
        """
        if %k
        then
          write %model@h.0 output = 0
        else
          write %model@h.2 output = 2
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            if %k
            then
              write %model@h.0 output = 0
              yield
            else
              yield
          at %model@h.2 output
            if %k
            then
              yield
            else
              write %model@h.2 output = 2
              yield
        return None
        """,
    )


def test_a_piece_of_a_condition_hands_its_values_to_the_next() -> None:
    becomes(
        """
        %a = read %model@h.0 output
        %b = read %model@h.1 output
        %r = if %k
        then
          %s = %a * 2
          yield %s
        else
          yield %b
        %c = %r + 1
        """,
        """
        forward %f0 = trace %model(%x)
          at %model@h.0 output
            %a = read %model@h.0 output
            %s.1 = if %k
            then
              %s = %a * 2
              %s.2 = save %s
              yield %s.2
            else
              yield unbound
          at %model@h.1 output
            %b = read %model@h.1 output
            %r = if %k
            then
              yield %s.1
            else
              yield %b
            %c = %r + 1
        return %c
        """,
        "%c",
    )


def test_a_read_under_a_condition_that_is_known_only_later_is_made_in_any_case() -> None:
    text = placed(
        """
        %b = read %model@h.1 output
        %big = %b > 0
        if %big
        then
          %c = read %model@h.0 output
          set_item %b[0] = %c
        """,
        "%b",
    )
    first, second = text.split("at %model@h.1 output")
    assert "%c = read" in first
    assert "if" not in first
    assert "set_item %b[0] = %c.1" in second.split("if %big")[1]


@pytest.mark.parametrize("name", ["no_grad", "enable_grad", "inference_mode", "autocast"])
def test_a_grad_mode_covers_each_piece(name: str) -> None:
    text = placed(
        f"""
        %t = global torch
        %n = attr %t.{name}
        %g = call %n() as torch.{name}
        with %w = %g
          %a = read %model@h.0 output
          %b = read %model@h.1 output
        """
    )
    assert text.count("= %g\n") == 2


def test_another_context_covers_one_site_only() -> None:
    assert placed("%g = call %k()\nwith %w = %g\n  %a = read %model@h.0 output").count("with") == 1
    found = refused(
        "%g = call %k()\nwith %w = %g\n  write %model@h.0 output = 0\n  write %model@h.1 output = 0\n"
        "%o = read %model@'' output"
    )
    assert found.reason.startswith("this context would have to be entered several times")
    assert found.span.line == 2
    assert [span.line for span, _ in found.related] == [3, 4]


# --- what cannot be placed ---


def test_a_write_that_needs_a_later_site_is_refused_with_both_lines() -> None:
    found = refused("%a = read %model@h.1 output\n%b = %a * 2\nwrite %model@h.0 output = %b")
    assert found.reason == (
        "this changes the output of `h.0`, but needs the output of `h.1`, which the same forward computes only later:"
        " line 3 needs line 2 needs line 1, and the model needs line 3 before that"
    )
    assert found.span.line == 3
    assert [(span.line, remark) for span, remark in found.related] == [(1, "the output of `h.1` is read here")]


@pytest.mark.parametrize(
    "body",
    [
        "%a = read %model@h.1 output\n%b = read %model@h.0 output\nset_item %b[0] = %a",
        "%a = read %model@h.1 output\nwrite %model@h.1 input = %a",
        "%a = read %model@shared output call 1\nwrite %model@shared output call 0 = %a",
        "%a = read %model@h.1 output\nif %a\nthen\n  write %model@h.0 output = 0",
        "%l = list []\n%a = read %model@h.1 output\n%p = attr %l.append\n%n = call %p(%a) as method.append\n"
        "%f = item %l[0]\nwrite %model@h.0 output = %f",
        "%a = read %model@h.1 output\n%p = call %k(%a)\n%b = read %model@h.0 output\n%q = call %k(%b)\n"
        "write %model@h.0 output = %q",
    ],
)
def test_each_way_to_need_a_later_site_is_refused(body: str) -> None:
    found = refused(body)
    assert "which the same forward computes only later" in found.reason
    assert found.related


def test_a_loop_that_writes_to_several_sites_is_refused() -> None:
    found = refused(
        "for %i in (0, 1)\n  write %model@h.0 output = %i\n  write %model@h.1 output = %i\n  continue\n"
        "%c = read %model@'' output"
    )
    assert found.reason == "each round of this loop writes to several sites (`h.0`, `h.1`)"
    assert found.span.line == 1


def test_an_in_place_write_to_one_of_two_sites_is_refused() -> None:
    found = refused(
        "%a = read %model@h.1 output\n%b = read %model@h.0 output\n%u = if %k\nthen\n  yield %a\nelse\n  yield %b\n"
        "set_item %u[0] = 1"
    )
    assert found.reason == "this writes in place to what may be a value of `h.0` or of `h.1`"
    assert found.span.line == 8
