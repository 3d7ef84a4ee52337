"""Narrowing: text in, text out, for a model of a norm and a head; and what must not be narrowed."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.narrow import narrow
from nnsight_compiler.passes.parts import Positionwise
from nnsight_compiler.passes.remarks import Remarks

CALLS = ("h.0", "h.1", "drop", "norm", "head")
EVENTS = [("", "input"), *((path, port) for path in CALLS for port in ("input", "output")), ("", "output")]
GIVERS = {("norm", "input", ""): "h.1", ("head", "input", ""): "norm", ("", "output", "logits"): "head"}
KINDS = {
    "norm": Positionwise(8, 8, "float32", "float32"),
    "head": Positionwise(8, 20, "float32", "float32", linear=True),
    "biased": Positionwise(8, 20, "float32", "float32", linear=True, bias=True),
    "drop": "its forward draws at random (`dropout`)",
}
READ = ": f32[rows=2, tokens=5, 20]"
LOGITS = f"%l = read %model@head output {READ}\n%0 = item %l[0, -1]\n"
PARAMETERS = "%model, %x, %p, %q, %t"


class Order:
    """A model that runs these modules, one after another, and hands on what they give."""

    def time(self, path: str, port: str, call: int = 0) -> int:
        return EVENTS.index((path, port))

    def count(self, path: str) -> int:
        return sum(each == path and port == "output" for each, port in EVENTS)

    def why_not(self, path: str) -> None:
        return None

    def giver(self, path: str, port: str, part: str = "") -> str | None:
        return GIVERS.get((path, port, part))


def kind(forward: ops.Forward, path: str) -> Positionwise | str:
    return KINDS.get(path, "")


def narrowed(
    body: str, result: str, after: str = "", call: str = "trace %model(%x)", **arguments: Any
) -> tuple[str, Remarks, dict[str, object]]:
    """A program of a forward with this body, narrowed."""
    text = f"experiment f({PARAMETERS})\n  forward %f0 = {call}\n" + indent(dedent(body).strip("\n"), "    ") + "\n"
    text += indent(dedent(after).strip("\n"), "  ") + f"\n  return {result}\n"
    program = parse_program(text)
    verify(program)
    remarks, relied = Remarks(), dict[str, object]()
    given = {"p": 1, "q": 2, "t": 3, **arguments}
    made = narrow(program, lambda _: Order(), kind, given, remarks, relied.__setitem__)  # type: ignore[arg-type, return-value]
    verify(made)
    if not any(remark.fired for remark in remarks.made):
        assert made is program
    return str(made), remarks, relied


def becomes(body: str, expected: str, result: str, after: str = "", then: str = "", **more: Any) -> dict[str, object]:
    made, remarks, relied = narrowed(body, result, after, **more)
    want = f"experiment f({PARAMETERS})\n  forward %f0 = {more.get('call', 'trace %model(%x)')}\n"
    want += indent(dedent(expected).strip("\n"), "    ") + "\n"
    want += indent(dedent(then or after).strip("\n"), "  ") + f"\n  return {result}\n"
    assert _untyped(made) == _untyped(str(parse_program(want)))
    assert remarks.made[0].fired
    return relied


def _untyped(text: str) -> str:
    return re.sub(r" : \S*(\[.*?\])?(?=\n)", "", text)


def stays(body: str, result: str, why: str | None, after: str = "", **more: Any) -> None:
    """Nothing is narrowed, and the reason is told; `None` where no one would have hoped for it."""
    _, remarks, relied = narrowed(body, result, after, **more)
    assert [remark.what for remark in remarks.made] == ([] if why is None else [why])
    assert not relied


# --- what fires ---


def test_the_last_position_of_logits() -> None:
    made, remarks, _ = narrowed(f"%l = read %model@head output {READ}\n%0 = item %l[:, -1]\n%s = save %0", "%s")
    assert made == (
        "experiment f(%model, %x, %p, %q, %t)\n"
        "  forward %f0 = trace %model(%x)\n"
        "    %1 = read %model@norm input : f32[rows=2, tokens=5, 8]\n"
        "    %2 = item %1[:, -1] : f32[rows=2, 8]\n"
        "    %3 = call %model@norm(%2) as torch.nn.Module.__call__ : f32[rows=2, 8]\n"
        "    %4 = call %model@head(%3) as torch.nn.Module.__call__ : f32[rows=2, 20]\n"
        "    %s = save %4\n"
        "  return %s\n"
    )
    assert [remark.what for remark in remarks.made] == ["`norm`, `head` for [:, -1] alone"]


def test_single_entries_are_products_with_rows_of_the_weight() -> None:
    relied = becomes(
        f"%l = read %model@head output {READ}\n%0 = item %l[0, -1, %t]\n%1 = item %l[0, -1, 7]\n%2 = %0 - %1",
        """
        %3 = read %model@norm input
        %4 = item %3[0, -1]
        %5 = call %model@norm(%4) as torch.nn.Module.__call__
        %6 = attr %model@head .weight
        %7 = attr %6.detach
        %weight = call %7() as torch.Tensor.detach
        %8 = item %weight[%t]
        %0 = %5 @ %8
        %9 = item %weight[7]
        %1 = %5 @ %9
        %2 = %0 - %1
        """,
        "%2",
    )
    assert relied == {"t.__class__": int}


def test_a_bias_is_added() -> None:
    becomes(
        """
        %h = read %model@h.0 output : f32[rows=2, tokens=5, 8]
        %l = call %model@biased(%h) as torch.nn.Module.__call__
        %0 = item %l[0, -1, 7]
        """,
        """
        %h = read %model@h.0 output
        %1 = item %h[0, -1]
        %2 = attr %model@biased .weight
        %3 = attr %2.detach
        %weight = call %3() as torch.Tensor.detach
        %4 = attr %model@biased .bias
        %5 = attr %4.detach
        %bias = call %5() as torch.Tensor.detach
        %6 = item %weight[7]
        %7 = %1 @ %6
        %8 = item %bias[7]
        %0 = %7 + %8
        """,
        "%0",
    )


def test_entries_that_are_no_single_one_are_taken_of_what_the_positions_give() -> None:
    becomes(
        f"%l = read %model@head output {READ}\n%0 = item %l[:, 2:, 3:7]\n%1 = item %l[0, -1, %x]",
        """
        %2 = read %model@norm input
        %3 = item %2[:, 2:]
        %4 = call %model@norm(%3) as torch.nn.Module.__call__
        %5 = call %model@head(%4) as torch.nn.Module.__call__
        %6 = item %2[0, -1]
        %7 = call %model@norm(%6) as torch.nn.Module.__call__
        %8 = call %model@head(%7) as torch.nn.Module.__call__
        %0 = item %5[:, :, 3:7]
        %1 = item %8[%x,]
        """,
        "(%0, %1)",
    )


def test_one_entry_at_all_positions() -> None:
    becomes(
        f"%l = read %model@head output {READ}\n%0 = item %l[..., 7]",
        """
        %1 = read %model@norm input
        %2 = call %model@norm(%1) as torch.nn.Module.__call__
        %3 = attr %model@head .weight
        %4 = attr %3.detach
        %weight = call %4() as torch.Tensor.detach
        %5 = item %weight[7]
        %0 = %2 @ %5
        """,
        "%0",
    )


@pytest.mark.parametrize("part", ["attr %o.logits", "item %o['logits']"])
def test_the_logits_of_the_output_are_those_of_the_head(part: str) -> None:
    made, _, relied = narrowed(f"%o = read %model@'' output\n%l = {part} {READ}\n%0 = item %l[0, %p]", "%0")
    assert "read %model@norm input" in made
    assert "%model@'' output" not in made
    assert relied == {"p.__class__": int}


def test_calls_in_the_body_are_narrowed_with_what_precedes_them() -> None:
    body = """
        %h = read %model@h.0 output : f32[rows=2, tokens=5, 8]
        %n = call %model@norm(%h) as torch.nn.Module.__call__
        %l = call %model@head(%n) as torch.nn.Module.__call__
        %0 = item %l[:, %p]
        %s = save %0
    """
    becomes(
        body,
        """
        %h = read %model@h.0 output
        %1 = item %h[:, %p]
        %2 = call %model@norm(%1) as torch.nn.Module.__call__
        %3 = call %model@head(%2) as torch.nn.Module.__call__
        %s = save %3
        """,
        "%s",
    )


def test_a_call_on_what_a_site_gives() -> None:
    made, _, _ = narrowed(
        "%n = read %model@norm output : f32[rows=2, tokens=5, 8]\n"
        "%l = call %model@head(%n) as torch.nn.Module.__call__\n%0 = item %l[:, -1]\n%s = save %0",
        "%s",
    )
    assert "read %model@norm input" in made
    assert "output" not in made


def test_a_write_before_the_modules_is_kept() -> None:
    made, _, _ = narrowed(
        f"%h = read %model@h.1 output\nset_item %h[:, %p] = 0\n{LOGITS}",
        "%0",
    )
    assert made.index("set_item %h[:, %p] = 0") < made.index("read %model@norm input")


def test_what_is_used_after_the_forward() -> None:
    made, _, _ = narrowed(f"%l = read %model@head output {READ}", "%0", after="%0 = item %l[0, -1, %t]")
    assert "read %model@norm input" in made
    assert made.index("torch.Tensor.detach") < made.index("@ ")


@pytest.mark.parametrize(
    ("loop", "taken"),
    [("%range = global range\n%r = call %range(3) as builtins.range\nfor %i in %r", {}),
     ("for %i in %q", {"q.__class__ is list and all(each.__class__ is int for each in q)": True})],
)  # fmt: skip
def test_entries_in_a_loop(loop: str, taken: dict[str, object]) -> None:
    body = f"%l = read %model@head output {READ}\n{loop}\n  %0 = item %l[0, -1, %i]\n  continue"
    made, _, relied = narrowed(body, "None", q=[3, 4])
    assert "call %model@norm" in made.partition("for %i")[0]
    assert re.search(r"for %i.*\n.*item %weight\[%i\]\n.*%0 = ", made)
    assert relied == taken


OF_PAIRS = (
    "q.__class__ is {kind} and all(each.__class__ is tuple and {size} and each[{place}].__class__ is int for each in q)"
)
OUTER = "%enumerate = global enumerate\n%zip = global zip\n"


@pytest.mark.parametrize(
    ("loop", "size", "place"),
    [
        ("for %e in %q\n  %a, %i = unpack %e", "len(each) == 2", 1),
        ("backward %x()\nfor %e in %q\n  %a, %i = unpack %e", "len(each) == 2", 1),
        ("for %e in %q\n  %i = item %e[1]", "-len(each) <= 1 < len(each)", 1),
        ("for %e in %q\n  %i = item %e[-1]", "-len(each) <= -1 < len(each)", -1),
        (f"{OUTER}%r = call %enumerate(%q) as builtins.enumerate\nfor %e in %r\n  %n, %u = unpack %e\n"
         "  %a, %i = unpack %u", "len(each) == 2", 1),
        (f"{OUTER}%r = call %zip(%x, %q) as builtins.zip\nfor %e in %r\n  %n, %u = unpack %e\n"
         "  %a, %i = unpack %u", "len(each) == 2", 1),
    ],
)  # fmt: skip
def test_entries_that_are_parts_of_a_loops_items(loop: str, size: str, place: int) -> None:
    body = f"%l = read %model@head output {READ}\n{loop}\n  %0 = item %l[0, -1, %i]\n  continue"
    for pairs, kind in (([("a", 3), ("b", 4)], "list"), (((None, 3),), "tuple")):
        made, _, relied = narrowed(body, "None", q=pairs)
        assert re.search(r"item %weight\[%i\]\n.*%0 = ", made)
        assert relied == {OF_PAIRS.format(kind=kind, size=size, place=place): True}


def test_entries_of_lists_that_a_loop_takes_side_by_side() -> None:
    body = (
        f"%l = read %model@head output {READ}\n%zip = global zip\n%r = call %zip(%x, %q) as builtins.zip\n"
        "for %e in %r\n  %n, %i = unpack %e\n  %0 = item %l[0, -1, %i]\n  continue"
    )
    made, _, relied = narrowed(body, "None", q=[3, 4])
    assert "item %weight[%i]" in made
    assert relied == {"q.__class__ is list and all(each.__class__ is int for each in q)": True}
    assert "weight" not in narrowed(body, "None", q=[3, "4"])[0]


# --- what must not fire ---


@pytest.mark.parametrize(
    "pairs",
    [[("a", 3), ("b", True)], [("a", 3), ["b", 4]], [("a", 3, 1)], [("a", [3])], iter([("a", 3)]), {("a", 3)}, "ab"],
)
def test_parts_of_a_loops_items_that_are_no_whole_numbers(pairs: Any) -> None:
    for loop in ("%a, %i = unpack %e", "%i = item %e[1]") if pairs != [("a", 3, 1)] else ("%a, %i = unpack %e",):
        body = f"%l = read %model@head output {READ}\nfor %e in %q\n  {loop}\n  %0 = item %l[0, -1, %i]\n  continue"
        assert "weight" not in narrowed(body, "None", q=pairs)[0]


@pytest.mark.parametrize(
    "loop",
    [
        "for %e in %q\n  %a, %i = unpack %e\n  set_item %q[0] = %x",
        "for %e in %q\n  %a, *%i = unpack %e",
        "backward %x()\n  set_item %q[0] = %x\nfor %e in %q\n  %a, %i = unpack %e",
        "%zip = global zip\n%r = call %zip(%q) as builtins.zip\nfor %e in %r\n  %a, %i = unpack %e",
        "%s = call %x(%q)\nfor %e in %s\n  %a, %i = unpack %e",
    ],
)
def test_parts_of_items_that_cannot_be_told(loop: str) -> None:
    body = f"%l = read %model@head output {READ}\n{loop}\n  %0 = item %l[0, -1, %i]\n  continue"
    assert "weight" not in narrowed(body, "None", q=[("a", 3)])[0]


@pytest.mark.parametrize(
    "body",
    [
        "%o = read %model@'' output\n%s = save %o",
        "%n = read %model@norm output\nset_item %n[0] = 0",
        "write %model@norm output = 0",
        "write %model@head output = 0",
        "write %model@norm input = 0",
        "skip %model@norm = %x",
        "%n = read %model@norm input\nset_item %n[0] = 0",
        "%n = read %model@norm input\n%n.1 = %n += 1",
        "%n = read %model@head input\n%1 = attr %n.mul_\n%2 = call %1(2) as torch.Tensor.mul_",
    ],
)
def test_what_stands_between_is_respected(body: str) -> None:
    """A program that reads or changes anything from the norm on keeps the norm where it is."""
    made, _, _ = narrowed(LOGITS + body, "%0")
    assert "call %model@norm" not in made
    if "head input" in body or "head output" in body or "''" in body:
        assert "call" not in made.replace("%2 = call %1(2)", "")


def test_the_head_alone_where_the_norm_is_needed() -> None:
    made, _, _ = narrowed(LOGITS + "%n = read %model@norm output\n%s = save %n", "(%0, %s)")
    assert "read %model@head input" in made


def test_parts_that_are_written() -> None:
    stays(f"{LOGITS}set_item %0[3] = 0", "%0", "`head` is run for all positions: what it gives is written to")


def test_a_value_that_is_used_whole() -> None:
    stays(f"{LOGITS}%s = save %l", "(%0, %s)", None)
    stays(LOGITS, "(%0, %l)", None)
    stays(f"{LOGITS}%1 = attr %l.shape", "(%0, %1)", None)
    stays(f"%l = read %model@head output {READ}\n%0 = item %l[:]", "%0", None)
    stays(f"%l = read %model@head output {READ}\n%0 = item %l[:, -1]\n%1 = item %l[..., 3:5]", "(%0, %1)", None)


def test_a_position_that_is_known_only_later() -> None:
    why = "`head` is run for all positions: that `i` is used is known only after it has run"
    stays(
        f"%l = read %model@head output {READ}\n%range = global range\n%r = call %range(3) as builtins.range\n"
        "for %i in %r\n  %0 = item %l[0, %i]\n  continue",
        "None",
        why,
    )


@pytest.mark.parametrize("given", ["last", slice(0, 2), (0, 1), True, [0, 1]])
def test_a_position_that_is_no_whole_number(given: Any) -> None:
    why = "`head` is run for all positions: `%p` is not known to be a whole number"
    stays(f"%l = read %model@head output {READ}\n%0 = item %l[0, %p]", "%0", why, p=given)


def test_a_list_of_positions_that_the_program_changes() -> None:
    made, _, _ = narrowed(
        f"%l = read %model@head output {READ}\n"
        "for %i in %q\n  %0 = item %l[0, -1, %i]\n  set_item %q[0] = 'x'\n  continue",
        "None",
        q=[3, 4],
    )
    assert "weight" not in made


def test_a_module_that_is_not_proved() -> None:
    why = "`drop` is run for all positions: its forward draws at random (`dropout`)"
    stays("%l = read %model@drop output : f32[rows=2, tokens=5, 8]\n%0 = item %l[:, -1]", "%0", why)
    stays("%l = read %model@h.0 output : f32[rows=2, tokens=5, 8]\n%0 = item %l[:, -1]", "%0", None)


def test_a_generation_runs_all_modules_anyway() -> None:
    stays(LOGITS, "%0", None, call="generate %model(%x)")


def test_a_part_that_is_not_what_a_module_gave() -> None:
    stays(
        f"%o = read %model@'' output\n%l = attr %o.scores {READ}\n%0 = item %l[0, -1]",
        "%0",
        "`scores` is not the very output of a module",
    )


def test_an_argument_that_may_decide_what_is_handed_on() -> None:
    made, _, _ = narrowed(LOGITS, "%0", call="trace %model(%x, logits_to_keep=%p)")
    assert "read %model@head input" in made
    assert "norm" not in made


def test_many_parts_by_themselves() -> None:
    items = "\n".join(f"%{n} = item %l[0, {n}]" for n in range(9))
    stays(
        f"%l = read %model@head output {READ}\n{items}",
        f"({', '.join(f'%{n}' for n in range(9))})",
        "`head` is run for all positions: more than 8 parts of it are used, each by itself",
    )


def test_a_value_that_is_used_again_is_computed_once() -> None:
    body = """
        %h = read %model@h.0 output : f32[rows=2, tokens=5, 8]
        %n = call %model@norm(%h) as torch.nn.Module.__call__
        %l = call %model@head(%n) as torch.nn.Module.__call__
        %0 = item %l[:, %p]
        %s = save %n
    """
    made, _, _ = narrowed(body, "(%0, %s)")
    assert made.count("call %model@norm") == 1
    assert "item %n[:, %p]" in made


def test_calls_with_other_arguments() -> None:
    for call in ("%model@head(%h, %x)", "%model@head(%h, hook=True)", "%model@head(*%h)"):
        body = f"%h = read %model@h.0 output : f32[rows=2, tokens=5, 8]\n%l = call {call} as torch.nn.Module.__call__"
        stays(f"{body}\n%0 = item %l[:, -1]", "%0", None)
