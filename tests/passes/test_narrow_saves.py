"""What is kept of saved values: text in, text out; and what must be kept whole."""

from __future__ import annotations

from textwrap import dedent, indent
from typing import Any

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.narrow_saves import narrow_saves
from nnsight_compiler.passes.remarks import Remarks

H = ": f32[rows=2, tokens=5, 8]"
SAVED = f"%1 = read %model@h.0 output {H}\n%h = save %1 {H}"
LISTED = f"""
%a = attr %l.append
%1 = read %model@h.0 output {H}
%2 = call %a(%1) as method.append
%b = attr %l.append
%3 = read %model@h.1 output {H}
%4 = call %b(%3) as method.append
"""


def lines(text: str, depth: int) -> str:
    return indent(dedent(text).strip("\n"), "  " * depth) + "\n"


def narrowed(
    body: str, after: str, before: str = "%l = list []", call: str = "trace %model(%x)", **arguments: Any
) -> tuple[str, list[str], list[str], dict[str, object]]:
    """What a program becomes that runs a forward with this body; what was done and refused, and what it rests on."""
    text = "experiment f(%model, %x, %p, %ps)\n"
    text += lines(before, 1) + f"  forward %f0 = {call}\n" + lines(body, 2) + lines(after, 1)
    program = parse_program(text)
    verify(program)
    remarks, relied = Remarks(), dict[str, object]()
    made = narrow_saves(program, {"p": 1, **arguments}, remarks, relied.__setitem__)
    verify(made)
    done = [remark.what for remark in remarks.made if remark.fired]
    assert bool(done) == (made is not program)
    return str(made), done, [remark.what for remark in remarks.made if not remark.fired], relied


# --- what moves ---


def test_an_index_moves_before_the_save() -> None:
    made, done, _, _ = narrowed(SAVED, "%0 = item %h[:, -1] : f32[rows=2, 8]\nreturn %0", "")
    assert made == dedent("""\
        experiment f(%model, %x, %p, %ps)
          forward %f0 = trace %model(%x)
            %1 = read %model@h.0 output : f32[rows=2, tokens=5, 8]
            %2 = item %1[:, -1] : f32[rows=2, 8]
            %0 = save %2 : f32[rows=2, 8]
          return %0
        """)
    assert done == ["of the output of `h.0`, `[:, -1]` alone is kept"]


def test_what_leaves_unsaved_is_reduced_at_the_end_of_the_forward() -> None:
    body = f"%h = read %model@h.0 output {H}\nset_item %h[:, 0] = 1"
    made, _, _, _ = narrowed(body, "%0 = attr %h.mean\n%1 = call %0(1) as torch.Tensor.mean : f32[2, 8]\nreturn %1", "")
    assert made.index("set_item") < made.index("torch.Tensor.mean") < made.index("return")
    assert "    %1 = call" in made


@pytest.mark.parametrize(
    "after",
    [
        "for %e in %l\n  %0 = attr %e.norm\n  %5 = call %0(dim=-1) as torch.Tensor.norm\n  {put}\n",
        "%i = global enumerate\n%n = call %i(%l) as builtins.enumerate\nfor %t in %n\n  %k, %e = unpack %t\n"
        "  %0 = attr %e.norm\n  %5 = call %0(dim=-1) as torch.Tensor.norm\n  {put}\n",
        "%i = global range\n%n = call %i(2) as builtins.range\nfor %k in %n\n  %e = item %l[%k]\n"
        "  %0 = attr %e.norm\n  %5 = call %0(dim=-1) as torch.Tensor.norm\n  {put}\n",
    ],
)
def test_entries_are_reduced_where_they_are_put(after: str) -> None:
    put = "%m = attr %r.append\n  %6 = call %m(%5) as method.append"
    made, done, _, _ = narrowed(LISTED, after.format(put=put) + "return %r", "%l = list []\n%r = list []")
    assert done == ["of each element, `.norm(dim=-1)` alone is kept"]
    assert made.count("torch.Tensor.norm") == 2
    assert "norm" not in made.partition("\n  for ")[2]


def test_a_reduction_of_each_that_is_made_anew_is_copied_where_it_is_used() -> None:
    uses = "%0 = attr %h.sum\n%5 = call %0() as torch.Tensor.sum\n%6 = attr %h.sum\n%7 = call %6() as torch.Tensor.sum"
    made, _, _, _ = narrowed(SAVED, uses + "\nreturn (%5, %7)", "")
    assert made.count("torch.Tensor.sum") == 1
    assert made.count("= save ") == 3


def test_elements_of_known_numbers_are_kept_by_themselves() -> None:
    after = (
        "%5 = item %l[0]\n%6 = item %5[:, 0]\n%7 = item %l[-1]\n%8 = attr %7.sum\n%9 = call %8() as torch.Tensor.sum"
    )
    made, done, _, _ = narrowed(LISTED, after + "\nreturn (%6, %9)")
    assert done == ["of each element, `[:, 0]` alone is kept", "of each element, `.sum()` alone is kept"]
    assert made.index("[:, 0]") < made.index("h.1") < made.index("torch.Tensor.sum")


def test_that_a_loop_has_rounds_is_relied_on() -> None:
    loop = "for %e in %ps\n  %5 = item %h[:, 3]\n  %0 = attr %r.append\n  %6 = call %0(%5) as method.append\nreturn %r"
    _, done, _, relied = narrowed(SAVED, loop, "%r = list []", ps=[1])
    assert done
    assert relied == {"ps.__class__ is list and len(ps) > 0": True}
    _, done, why, relied = narrowed(SAVED, loop, "%r = list []", ps=[])
    assert not done
    assert not relied
    assert len(why) == 1
    assert why[0].startswith("the output of `h.0` is kept whole: whether line")


# --- what must be kept whole ---

HOST = "%g = global look\n%k = call %g(%5)\n"


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ("return %h", ""),
        ("%t = global torch\n%2 = attr %t.rand_like\n%3 = call %2(%h) as torch.rand_like\nreturn %3", ""),
        ("%0 = item %h[:, -1]\nreturn (%0, %h)", "uses all of it"),
        ("%0 = item %h[%ps]\nreturn %0", ""),
        ("%0 = %h * 2\nreturn %0", ""),
        ("for %q in %ps\n  %0 = item %h[:, 0:%q]\nreturn %ps", ""),
        ("%5 = item %h[:, -1]\nset_item %5[0] = 1\n%6 = item %h[:, -1]\nreturn %6", "it is written to later"),
        ("%5 = item %h[:, -1]\n" + HOST + "%6 = item %h[0]\nreturn %6", "it is written to later"),
        ("if %ps\nthen\n  %5 = item %h[:, 3]\n  return %5\nreturn 0", "is known to the run only"),
        ("if %ps\nthen\n  return 0\n%5 = item %h[:, 3]\nreturn %5", "is known to the run only"),
        ("%c = call %ps()\nwith %w = %c\n  %5 = item %h[:, -1]\nreturn %5", "stands in another `with`"),
        ("%0 = closure 'g'()\n  %5 = item %h[:, -1]\n  return %5\nreturn %0", "or in a function"),
    ],
)
def test_what_is_kept_whole(after: str, why: str) -> None:
    made, done, refused, _ = narrowed(SAVED, after, "")
    assert not done
    assert "%h = save %1" in made
    assert [why in each for each in refused] == [True] if why else not refused


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ("%5 = item %l[0]\n%6 = item %5[:, 0]\nreturn (%6, %l)", None),
        ("for %e in %l\n  %5 = item %e[:, 0]\n  %6 = item %e[:, -1]\nreturn 0", "different parts"),
        ("for %e in %l\n  %5 = item %e[:, 0]\n  set_item %5[0] = 0\nreturn 0", "its elements are written to"),
        ("for %e in %l\n  for %q in %p\n    %5 = item %e[:, %q]\nreturn 0", None),
        ("for %e in %l\n  if %ps\n  then\n    break\n  %5 = item %e[:, 3]\nreturn 0", "known to the run only"),
        ("%g = global look\n%5 = call %g(%l)\nfor %e in %l\n  %6 = item %e[:, 0]\nreturn 0", None),
    ],
)
def test_lists_that_are_kept_whole(after: str, why: str | None) -> None:
    made, done, refused, _ = narrowed(LISTED, after)
    assert not done
    assert "call %a(%1) as method.append" in made
    assert [why in each for each in refused] == [True] if why else True


def test_the_last_of_a_list_that_grows_is_another_each_time() -> None:
    one, two = LISTED.strip().split("%b = ")
    body = one + "%9 = item %l[-1]\n%10 = item %9[:, 0]\n%b = " + two
    _, done, refused, _ = narrowed(body, "%5 = item %l[-1]\n%6 = item %5[:, -1]\nreturn (%10, %6)")
    assert not done
    assert refused == ["each element is kept whole: different parts of its elements are used"]


def test_generations_are_left_alone() -> None:
    _, done, _, _ = narrowed(SAVED, "%0 = item %h[:, -1]\nreturn %0", "", call="generate %model(%x)")
    assert not done
