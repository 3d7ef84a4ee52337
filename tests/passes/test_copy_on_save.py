"""Which saves keep the value itself, and which copy: text in, text out."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.copy_on_save import copy_on_save

FRESH = "%m = attr %a.softmax\n%b = call %m(-1) as torch.Tensor.softmax\n"
"""A tensor that the program makes of what it read."""


def after(body: str, result: str = "%s", rest: str = "") -> str:
    """A forward that reads %a and then does this, after the pass."""
    inner = indent("%a = read %model@h output\n" + dedent(body), "      ")
    program = parse_program(
        "experiment f(%model, %x, %k)\n  forward %f0 = trace %model(%x)\n    at %model@h output\n"
        f"{inner}\n{indent(rest, '  ')}\n  return {result}\n"
    )
    verify(program)
    made = copy_on_save(program)
    verify(made)
    assert str(made).replace("keep %", "save %") == str(program)
    assert copy_on_save(made) == made
    return str(made)


KEPT = [
    (FRESH + "%s = save %b", "%s"),
    (FRESH + "%s = save %b", "(%s, %s)"),
    (FRESH + "%t = %b * 2\n%s = save %t", "%s"),
    (FRESH + "%s = save %b\n%v = item %s[0]", "%v"),
    (FRESH + "%l = list []\n%s = save %l", "%s"),
    (FRESH + "%s = save %b\n%r = if %k\nthen\n  yield %s\nelse\n  yield None", "%r"),
    (FRESH + "set_item %a[0] = 1\n%s = save %b", "%s"),  # another storage is written
    ("%m = attr %x.sum\n%b = call %m() as torch.Tensor.sum\n%s = save %b", "%s"),
]


@pytest.mark.parametrize(("body", "result"), KEPT)
def test_what_nothing_can_change_is_kept(body: str, result: str) -> None:
    text = after(body, result)
    assert "keep" in text
    assert "save" not in text


COPIED = [
    "%s = save %a",  # the model holds it
    "%s = save %x",  # the caller holds it
    "%v = item %a[0]\n%s = save %v",  # so do its views
    FRESH + "%v = item %b[0]\n%s = save %v",  # keeps its base alive
    FRESH + "%s = save %b\nset_item %b[0] = 1",
    FRESH + "set_item %b[0] = 1\n%s = save %b",
    FRESH + "%s = save %b\n%c = %b += 1",
    FRESH + "%s = save %b\n%v = item %b[0]\n%z = attr %v.zero_\n%n = call %z() as torch.Tensor.zero_",
    FRESH + "%s = save %b\nset_item %s[0] = 1",  # the name that the value has besides may be used
    FRESH + "%s = save %b\nwrite %model@h output = %b",  # the model gets it
    FRESH + "%s = save %b\nwrite %model@h output = %s",
    FRESH + "%l = list [%b]\n%s = save %b",
    FRESH + "%c = cell v = %b\n%s = save %b",
    FRESH + "set_attr %k.held = %b\n%s = save %b",
    FRESH + "%g = closure g()\n  return %b\n%s = save %b",
    FRESH + "%q = call %k(%b)\n%s = save %b",
    "%b = call %k(%a)\n%s = save %b",  # host code may have kept it
    "%t = %a * 2\n%s = save %t",  # what a site holds may be a tuple, twice over
    FRESH + "%s = if %k\nthen\n  %t = save %a\n  yield %t\nelse\n  yield None",
]


@pytest.mark.parametrize("body", COPIED)
def test_what_something_may_change_is_copied(body: str) -> None:
    text = after(body)
    assert "save" in text
    assert "keep" not in text


def test_of_several_saves_of_one_value_one_keeps_it() -> None:
    text = after(FRESH + "%s = save %b\n%t = save %b", "(%s, %t)")
    assert (text.count("keep %b"), text.count("save %b")) == (1, 1)
    assert "keep" not in after(FRESH + "%s = save %b", "(%s, %b)")


@pytest.mark.parametrize(
    ("method", "fresh"),
    [
        ("clone()", True), ("sum(-1)", True), ("softmax(-1)", True), ("add(1)", True), ("argmax()", True),
        ("detach()", False), ("contiguous()", False), ("to(%k)", False), ("float()", False), ("reshape(-1)", False),
        ("expand(2, 2)", False), ("squeeze()", False), ("type_as(%x)", False), ("transpose(0, 1)", False),
    ],
)  # fmt: skip
def test_methods_that_may_give_back_what_they_are_given_are_views(method: str, fresh: bool) -> None:
    name, arguments = method.split("(", 1)
    body = f"{FRESH}%q = attr %b.{name}\n%c = call %q({arguments} as torch.Tensor.{name}\n%s = save %c"
    assert ("keep" in after(body)) == fresh


def test_a_later_forward_counts_too() -> None:
    rest = "forward %f1 = trace %model(%x)\n  at %model@h output\n    write %model@h output = %s"
    assert "save %b" in after(FRESH + "%s = save %b", rest=rest)
    rest = "forward %f1 = trace %model(%s)\n  at %model@h output\n    %c = read %model@h output"
    assert "save %b" in after(FRESH + "%s = save %b", rest=rest)
    rest = "forward %f1 = trace %model(%x)\n  at %model@h output\n    write %model@h output = 0"
    assert "keep %b" in after(FRESH + "%s = save %b", rest=rest)
