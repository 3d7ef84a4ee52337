"""Calls of one module as one: text in, text out, and what must stay several."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.fuse_calls import fuse_calls
from nnsight_compiler.passes.parts import Positionwise
from nnsight_compiler.passes.remarks import Remarks

KINDS = {"norm": Positionwise(8, 8, "float32", "float32"), "head": Positionwise(8, 20, "float32", "float32")}
H = ": f32[rows=2, tokens=5, 8]"
V = ": f32[rows=2, 8]"


def kind(forward: ops.Forward, path: str) -> Positionwise | str:
    return KINDS.get(path, "it has hooks")


def fused(body: str, result: str = "%l", call: str = "trace %model(%x)") -> tuple[str, list[str], list[str]]:
    """A program of a forward with this body, and what was done and refused."""
    text = f"experiment f(%model, %x, %a, %b)\n  %l = list []\n  forward %f0 = {call}\n"
    program = parse_program(text + indent(dedent(body).strip("\n"), "    ") + f"\n  return {result}\n")
    verify(program)
    remarks, relied = Remarks(), dict[str, object]()
    made = fuse_calls(program, kind, {"a": 1, "b": 2}, remarks, relied.__setitem__)
    verify(made)
    done = [remark.what for remark in remarks.made if remark.fired]
    assert done or made is program
    return str(made), done, [remark.what for remark in remarks.made if not remark.fired]


def lens(between: str = "", module: str = "head", first: str = "[:, -1]", second: str = "[:, -1]") -> str:
    parts = [
        f"%h = read %model@h.0 output {H}\n%x0 = item %h{first} {V}",
        f"%y0 = call %model@{module}(%x0) as torch.nn.Module.__call__",
        "%0 = attr %l.append\n%1 = call %0(%y0) as method.append",
        between,
        f"%h.1 = read %model@h.1 output {H}\n%x1 = item %h.1{second} {V}",
        f"%y1 = call %model@{module}(%x1) as torch.nn.Module.__call__",
        "%2 = attr %l.append\n%3 = call %2(%y1) as method.append",
    ]
    return "\n".join(part for part in parts if part)


def test_what_uses_the_results_waits() -> None:
    made, done, _ = fused(lens("%p = global print\n%4 = call %p(1) as builtins.print"))
    assert done == ["`head` is called once on 2 values"]
    assert made.count("call %model@head") == 1
    assert made.index("builtins.print") < made.index("call %model@head") < made.index("(%y0) as method.append")
    assert made.index("(%y0) as method.append") < made.index("(%y1) as method.append")


def test_chains_take_the_stack_as_it_is() -> None:
    body = lens("", "norm")
    for number in (0, 1):
        body = body.replace(f"(%y{number}) as method", f"(%z{number}) as method").replace(
            f"%y{number} = call %model@norm(%x{number}) as torch.nn.Module.__call__",
            f"%y{number} = call %model@norm(%x{number}) as torch.nn.Module.__call__ {V}\n"
            f"%z{number} = call %model@head(%y{number}) as torch.nn.Module.__call__",
        )
    made, done, _ = fused(body)
    assert done == [f"`{name}` is called once on 2 values" for name in ("norm", "head")]
    assert made.count("as torch.stack") == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [("[:, -1]", "[0]"), ("[0, :2]", "[0, :2]"), ("[:, %x]", "[:, %x]"), ("[:]", "[:]"), ("[-1]", "[0]")],
)
def test_shapes_that_differ_or_are_not_known(first: str, second: str) -> None:
    assert fused(lens(first=first, second=second))[1] == []


def test_whole_numbers_of_any_kind_take_one_position() -> None:
    assert fused(lens(first="[:, %a]", second="[:, -1]"))[1] == ["`head` is called once on 2 values"]


def test_modules_that_are_not_proved() -> None:
    assert fused(lens(module="other")) == (fused(lens(module="other"))[0], [], [])


@pytest.mark.parametrize(
    ("between", "why"),
    [
        ("set_item %h[0] = 0", "cannot wait for the last of the calls"),
        ("set_item %x0[0] = 0", "cannot wait for the last of the calls"),
        ("set_item %y0[0] = 0", "cannot wait for the last of the calls"),
        ("%4 = call %a(%y0)", "cannot wait for the last of the calls"),
        ("%4 = call %a(%l)", "cannot wait for the last of the calls"),
        ("stop %f0", "comes between"),
        ("if %a\nthen\n  return None", "comes between"),
    ],
)
def test_what_comes_between(between: str, why: str) -> None:
    _, done, refused = fused(lens(between))
    assert done == []
    assert refused == [f"`head` is called each time: line 0 {why}"]


def test_a_call_on_what_another_gave() -> None:
    body = f"%h = read %model@h.0 output {H}\n%x0 = item %h[:, -1] {V}\n"
    body += f"%y0 = call %model@norm(%x0) as torch.nn.Module.__call__ {V}\n"
    body += "%y1 = call %model@norm(%y0) as torch.nn.Module.__call__"
    assert fused(body, "(%y0, %y1)")[1] == []


def test_where_gradients_are_asked_for_and_in_generations() -> None:
    assert fused(lens(), call="generate %model(%x)")[1] == []
    loss = "%s = attr %y0.sum\n%loss = call %s() as torch.Tensor.sum\nbackward %loss()\n  %g = grad %x0"
    assert fused(f"{lens()}\n{loss}")[1] == []


# --- what results keep alive ---

KEPT = """
%h = read %model@h.0 output : f32[rows=2, tokens=5, 8]
%x0 = item %h[:, -1] : f32[rows=2, 8]
%y0 = call %model@head(%x0) as torch.nn.Module.__call__
%x1 = item %h[:, 0] : f32[rows=2, 8]
%y1 = call %model@head(%x1) as torch.nn.Module.__call__
"""


@pytest.mark.parametrize(
    ("uses", "result", "copied"),
    [
        ("", "(%y0, %y1)", 2),
        ("%0 = attr %y0.sum\n%1 = call %0() as torch.Tensor.sum", "(%1, %y1)", 1),
        ("%0 = attr %l.append\n%1 = call %0(%y0) as method.append", "(%l, %y1)", 2),
        ("%0 = attr %l.append\n%1 = call %0(%y0) as method.append", "%l", 1),
        ("%v = item %y0[0]\n%0 = attr %l.append\n%1 = call %0(%v) as method.append", "%l", 1),
        ("%0 = %y0 - %y1", "%0", 0),
    ],
)
def test_a_result_that_is_kept_by_itself_is_copied(uses: str, result: str, copied: int) -> None:
    made, done, _ = fused(KEPT + uses, result)
    assert done
    assert made.count("= save ") == copied


def test_results_that_one_list_keeps_are_parts_of_one() -> None:
    made, _, _ = fused(lens())
    assert "save" not in made


def test_a_list_that_gives_one_of_them_away_keeps_copies() -> None:
    body = lens() + "\n%one = item %l[0]"
    made, _, _ = fused(body, "%one")
    assert made.count("= save ") == 2
