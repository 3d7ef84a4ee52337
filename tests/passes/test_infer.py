"""Inferring types: text in, text with types out, for a model whose sites have given shapes; and mistakes of shape."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import pytest
import torch

from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.infer import infer
from nnsight_compiler.passes.shapes import Extent, Surroundings
from nnsight_compiler.passes.stand_ins import UNKNOWN


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Sites:
    """A model of width 8 with modules of several kinds."""

    def value(self, path: str, port: str, call: int, rows: int, tokens: int) -> Any:
        if port == "inputs":
            return (self.value(path, "input", call, rows, tokens),), {"mask": None}
        match path:
            case "embed" if port == "input":
                return empty(rows, tokens, dtype=torch.int64)
            case "flat":
                return empty(rows * tokens, 8)
            case "turned":
                return empty(tokens, rows, 8)
            case "positions":
                return empty(1, tokens, 8)
            case "pair":
                return empty(rows, tokens, 8), empty(rows, 2, tokens, tokens)
            case "mapping":
                return {"hidden": empty(rows, tokens, 8), "norm": empty(rows, tokens)}
            case "heads":
                return empty(rows, tokens, 2, 4, dtype=torch.bfloat16)
            case "hidden":
                return UNKNOWN
            case "head":
                return empty(rows, tokens, 20)
        return empty(rows, tokens, 8)


PARAMETERS = ("model", "x", "a", "b")


def inferred(body: str, size: tuple[int | None, int | None] = (2, 7), **arguments: Any) -> str:
    """A program of this body with types. Its first line is line 1 of `f.py`; it ends in a return of nothing."""
    lines = [f"{line}  # f.py:{number}" for number, line in enumerate(dedent(body).strip("\n").splitlines(), 1)]
    names = ", ".join(f"%{name}" for name in PARAMETERS)
    program = parse_program(f"experiment f({names})\n" + indent("\n".join(lines), "  ") + "\n  return None\n")
    verify(program)
    surroundings = Surroundings({"x": "text", **arguments}, {"torch": torch, **GLOBALS}, {})
    made = infer(program, surroundings, lambda _: Extent(Sites(), *size))
    verify(made)
    text = re.sub(r" +# .*", "", str(made)).partition("\n")[2]
    return dedent(text.removesuffix("  return None\n"))


GLOBALS: dict[str, Any] = {}


def becomes(body: str, expected: str, **more: Any) -> None:
    assert inferred(body, **more) == dedent(expected).lstrip("\n")


def typed(body: str, **more: Any) -> dict[str, str]:
    """The types of the values of a body, by name, where there is one."""
    found = re.findall(r"^ *%(\S+) = .* : (.*)$", inferred(body, **more), re.MULTILINE)
    return dict(found)


def in_forward(body: str) -> str:
    return "forward %f0 = trace %model(%x)\n" + indent(dedent(body).strip("\n"), "  ")


def refused(body: str, **more: Any) -> Diagnostic:
    """The one mistake in a forward of this body. Its first line is line 2."""
    with pytest.raises(CompileError) as caught:
        inferred(in_forward(body), **more)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.file == "f.py"
    assert diagnostic.way_out
    return diagnostic


def accepted(body: str, **more: Any) -> dict[str, str]:
    return typed(in_forward(body), **more)


# --- sites and axes ---


def test_reads_items_and_writes() -> None:
    becomes(
        """
        forward %f0 = trace %model(%x)
          %h = read %model@h.1 output
          %source = item %h[:, %a]
          %0 = %source * 2.0
          set_item %h[:, -1] = %0
          %logits = read %model@head output
          %1 = attr %logits.softmax
          %2 = call %1(-1) as torch.Tensor.softmax
        """,
        """
        forward %f0 = trace %model(%x)
          %h = read %model@h.1 output : f32[rows=2, tokens=7, 8]
          %source = item %h[:, %a] : f32[rows=2, 8]
          %0 = %source * 2.0 : f32[rows=2, 8]
          set_item %h[:, -1] = %0
          %logits = read %model@head output : f32[rows=2, tokens=7, 20]
          %1 = attr %logits.softmax
          %2 = call %1(-1) as torch.Tensor.softmax : f32[rows=2, tokens=7, 20]
        """,
        a=3,
    )


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("%model@h.0 output", "f32[rows=2, tokens=7, 8]"),
        ("%model@h.0 input", "f32[rows=2, tokens=7, 8]"),
        ("%model@embed input", "i64[rows=2, tokens=7]"),
        ("%model@flat output", "f32['rows*tokens'=14, 8]"),
        ("%model@turned output", "f32[tokens=7, rows=2, 8]"),
        ("%model@positions output", "f32[1, tokens=7, 8]"),
        ("%model@heads output", "bf16[rows=2, tokens=7, 2, 4]"),
    ],
)
def test_sites(site: str, expected: str) -> None:
    assert accepted(f"%h = read {site}") == {"h": expected}


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (8, 1), (1, 8), (20, 2)])
def test_axes_are_not_told_from_sizes_that_coincide(size: tuple[int, int]) -> None:
    rows, tokens = size
    found = accepted("%h = read %model@h.0 output\n%p = read %model@positions output", size=size)
    assert found == {"h": f"f32[rows={rows}, tokens={tokens}, 8]", "p": f"f32[1, tokens={tokens}, 8]"}


def test_what_computing_does_to_axes() -> None:
    found = accepted(
        """
        %h = read %model@h.0 output
        %0 = attr %h.transpose
        %turned = call %0(0, 1) as torch.Tensor.transpose
        %1 = attr %h.mean
        %mean = call %1(1) as torch.Tensor.mean
        %part = item %h[0, 1:]
        %torch = global torch
        %2 = attr %torch.cat
        %longer = call %2([%h, %h], dim=1) as torch.cat
        %3 = attr %h.reshape
        %flat = call %3(-1, 8) as torch.Tensor.reshape
        %own = call %3(2, 7, 2, 4) as torch.Tensor.reshape
        %shape = attr %h.shape
        %rows, %tokens, %width = unpack %shape
        %4 = attr %torch.zeros
        %zeros = call %4(%tokens, %width) as torch.zeros
        """.replace("[%h, %h]", "(%h, %h)")
    )
    assert found == {
        "h": "f32[rows=2, tokens=7, 8]",
        "turned": "f32[tokens=7, rows=2, 8]",
        "mean": "f32[rows=2, 8]",
        "part": "f32[6, 8]",
        "longer": "f32[rows=2, 14, 8]",
        "flat": "f32['rows*tokens'=14, 8]",
        "own": "f32[2, 7, 2, 4]",
        "zeros": "f32[tokens=7, 8]",
    }


def test_a_prompt_that_only_the_run_knows_gives_axes_without_sizes() -> None:
    found = accepted("%h = read %model@h.0 output\n%last = item %h[:, -1]", size=(None, None))
    assert found == {"h": "f32[rows, tokens, 8]", "last": "f32[rows, 8]"}


def test_sites_of_other_kinds() -> None:
    found = accepted(
        """
        %pair = read %model@pair output
        %0 = item %pair[0]
        %1, %2 = unpack %pair
        %mapping = read %model@mapping output
        %3 = item %mapping['norm']
        %all = read %model@h.0 inputs
        %4 = item %all[0]
        %5 = item %4[0]
        %hidden = read %model@hidden output
        %6 = %hidden + 1
        """
    )
    assert found == {
        "0": "f32[rows=2, tokens=7, 8]",
        "3": "f32[rows=2, tokens=7]",
        "5": "f32[rows=2, tokens=7, 8]",
    }


# --- mistakes ---


def test_an_index_beyond_a_dimension() -> None:
    found = refused("%h = read %model@h.0 output\n%0 = item %h[:, 9]")
    assert found.span.line == 3
    assert found.reason == "index 9 is out of range: this dimension (tokens) has 7 entries"
    assert found.way_out == "use an index from -7 to 6"


@pytest.mark.parametrize("index", ["[0, 0, 8]", "[..., 8]", "[0, :, -9]"])
def test_an_index_beyond_a_dimension_without_a_name(index: str) -> None:
    number = re.findall(r"-?\d+", index)[-1]
    found = refused(f"%h = read %model@h.0 output\n%0 = item %h{index}")
    assert found.reason == f"index {number} is out of range: this dimension has 8 entries"


def test_an_argument_as_index() -> None:
    body = "%h = read %model@h.0 output\n%0 = item %h[:, %a]"
    assert refused(body, a=7).reason == "index 7 is out of range: this dimension (tokens) has 7 entries"
    assert accepted(body, a=6)["0"] == "f32[rows=2, 8]"
    assert accepted(body, a=-7)["0"] == "f32[rows=2, 8]"
    assert accepted(body, a=torch.tensor(3))["0"] == "f32[rows=2, 8]"
    assert accepted(body, a=torch.tensor([3, 9]))["0"] == "f32[rows=2, 2, 8]"  # what is in it is not looked at
    assert accepted(body, a=slice(0, 3))["0"] == "f32[rows=2, 3, 8]"
    assert "0" not in accepted(body, a=object())


def test_too_many_indices() -> None:
    found = refused("%h = read %model@h.0 output\n%0 = item %h[0, 0, 0, 0]")
    assert found.reason == "4 dimensions are indexed, but this tensor has 3 dimensions: [2, 7, 8]"


def test_an_index_beyond_a_list_of_the_program_is_left_to_python() -> None:
    assert "0" not in accepted("%h = read %model@h.0 output\n%l = list [%h, %h]\n%0 = item %l[2]")


@pytest.mark.parametrize(("index", "part"), [("[:, 0]", "[2, 8]"), ("[0]", "[7, 8]"), ("[0, 0]", "[8]")])
def test_an_item_assignment_that_does_not_fit(index: str, part: str) -> None:
    found = refused(f"%h = read %model@h.0 output\nset_item %h{index} = %a", a=torch.zeros(3))
    assert found.span.line == 3
    assert found.reason == f"a value of shape [3] is assigned to a part of shape {part}"
    for value in (torch.zeros(8), torch.zeros(1), torch.tensor(1.0), torch.zeros(1, 1, 1, 8), 0, 1.5):
        accepted(f"%h = read %model@h.0 output\nset_item %h{index} = %a", a=value)


def test_a_write_that_does_not_fit() -> None:
    found = refused("write %model@h.0 output = %a", a=torch.zeros(3))
    assert found.span.line == 2
    assert found.reason == "a tensor of shape [3] is assigned where the module gives [2, 7, 8]"
    accepted("write %model@h.0 output = %a", a=torch.zeros(2, 7, 8, dtype=torch.float64))
    accepted("write %model@h.0 output = %a", a=torch.tensor(3))
    accepted("write %model@h.0 output = 0")
    accepted("write %model@h.0 output = %a", a=object())


def test_a_write_of_one_value_for_a_tuple() -> None:
    found = refused("write %model@pair output = 0")
    assert found.reason == "the module gives a tuple of 2, which one value cannot replace"
    assert "`[0]`, `[1]`" in found.way_out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("%0 = %h + %a", "The size of tensor a (8) must match the size of tensor b (3) at non-singleton dimension 2"),
        ("%0 = %h @ %a", "size mismatch, got input (14), mat (14x8), vec (3)"),
        (
            "%1 = attr %h.view\n%0 = call %1(5, 5) as torch.Tensor.view",
            "shape '[5, 5]' is invalid for input of size 112",
        ),
        (
            "%1 = attr %h.softmax\n%0 = call %1(3) as torch.Tensor.softmax",
            "",
        ),
        (
            "%1 = attr %h.mean\n%0 = call %1(3) as torch.Tensor.mean",
            "Dimension out of range (expected to be in range of [-3, 2], but got 3)",
        ),
    ],
)
def test_what_torch_refuses(code: str, reason: str) -> None:
    body = f"%h = read %model@h.0 output\n{code}"
    if reason:
        assert refused(body, a=torch.zeros(3)).reason == reason
    else:
        accepted(body, a=torch.zeros(3))


def test_all_mistakes_at_once() -> None:
    with pytest.raises(CompileError) as caught:
        inferred(in_forward("%h = read %model@h.0 output\n%0 = item %h[9]\n%1 = item %h[:, 9]"))
    assert [each.span.line for each in caught.value.diagnostics] == [3, 4]


# --- what may not run is no mistake ---


@pytest.mark.parametrize(
    "code",
    [
        "if %c\nthen\n  %0 = item %h[9]",
        "if %c\nthen\n  return None\n%0 = item %h[9]",
        "try\n  %0 = item %h[9]\nexcept\n  yield %a\nhandle %e\n  %1 = 1 + 1",
        "for %i in %a\n  %0 = item %h[9]\n  continue",
        "while\n  yield %c\ndo\n  %0 = item %h[9]\n  continue",
        "for %i in (1, 2)\n  if %c\n  then\n    break\n  %0 = item %h[9]\n  continue",
        "%0 = closure 'g'()\n  %1 = item %h[9]",
        "%0 = call %a(%h)\n%1 = item %h[9]",
        "%1 = attr %h.unsqueeze_\n%2 = call %1(0) as torch.Tensor.unsqueeze_\n%3 = item %h[0, 0, 0, 0]",
        "%1 = attr %h.nonzero\n%2 = call %1() as torch.Tensor.nonzero\n%3 = item %2[9]",
        "%1 = %h > 0\n%2 = item %h[%1]\n%3 = item %2[99]",
        "%1 = attr %h.tolist\n%2 = call %1() as torch.Tensor.tolist\n%3 = item %2[99]",
        "%1 = item %a[99]",
    ],
)
def test_what_may_not_run_or_is_not_known(code: str) -> None:
    accepted(f"%h = read %model@h.0 output\n%s = attr %h.sum\n%c = call %s() as torch.Tensor.sum\n{code}")


def test_no_size_is_invented_for_a_prompt_that_only_the_run_knows() -> None:
    accepted("%h = read %model@h.0 output\n%0 = item %h[:, 20]", size=(None, None))
    accepted("%h = read %model@h.0 output\n%0 = %h + %a", size=(None, None), a=torch.zeros(5, 8))


def test_a_branch_that_is_known_not_to_run() -> None:
    body = """
        %h = read %model@h.0 output
        %0 = attr %h.shape
        %1 = item %0[1]
        %2 = %1 > 8
        %3 = if %2
        then
          %4 = item %h[:, 8]
          yield %4
        else
          %5 = item %h[:, 0]
          yield %5
    """
    assert accepted(body)["3"] == "f32[rows=2, 8]"
    assert accepted(body, size=(2, 9))["3"] == "f32[rows=2, 8]"


# --- control flow ---


def test_branches_are_joined() -> None:
    found = accepted(
        """
        %h = read %model@h.0 output
        %s = attr %h.sum
        %c = call %s() as torch.Tensor.sum
        %same, %other = if %c
        then
          %0 = %h + 1
          %1 = item %h[0]
          yield %0, %1
        else
          %2 = %h * 2
          yield %2, %h
        %3 = %same + 1
        %4 = %other + 1
        """
    )
    assert found["3"] == "f32[rows=2, tokens=7, 8]"
    assert "4" not in found


def test_what_a_loop_carries() -> None:
    found = accepted(
        """
        %h = read %model@h.0 output
        %sum, %grown = for %i in %a carry %0 = %h, %1 = %h
          %2 = %0 * 2
          %torch = global torch
          %3 = attr %torch.cat
          %4 = call %3((%1, %h)) as torch.cat
          continue %2, %4
        %5 = %sum + 1
        %6 = %grown + 1
        """,
        a=[1, 2, 3],
    )
    assert found["5"] == found["2"] == "f32[rows=2, tokens=7, 8]"
    assert "6" not in found


def test_entries_of_what_is_iterated() -> None:
    found = accepted(
        """
        %h = read %model@h.0 output
        for %row in %h
          %0 = %row + 1
          continue
        %l = list [%h, %h]
        for %each in %l
          %1 = %each + 1
          continue
        %range = global range
        %2 = call %range(3) as builtins.range
        for %i in %2
          %3 = item %h[:, %i]
          %4 = item %l[%i]
          continue
        %enumerate = global enumerate
        %5 = call %enumerate(%l) as builtins.enumerate
        for %pair in %5
          %n, %e = unpack %pair
          %6 = %e + 1
          %7 = item %h[%n]
          continue
        """
    )
    assert found["0"] == found["7"] == "f32[tokens=7, 8]"
    assert found["1"] == found["4"] == found["6"] == "f32[rows=2, tokens=7, 8]"
    assert found["3"] == "f32[rows=2, 8]"


def test_a_container_that_a_loop_changes_is_not_followed() -> None:
    found = accepted(
        """
        %h = read %model@h.0 output
        %l = list []
        for %i in %a
          %0 = attr %l.append
          %1 = call %0(%h) as method.append
          continue
        %2 = item %l[0]
        """,
        a=[1, 2],
    )
    assert "2" not in found


# --- the user's values stay as they are ---


def test_nothing_of_the_users_is_touched() -> None:
    held, vector = [torch.zeros(8)], torch.ones(8)
    state = torch.random.get_rng_state()
    accepted(
        """
        %h = read %model@h.0 output
        %0 = attr %a.append
        %1 = call %0(%h) as method.append
        %2 = %b += 1
        set_item %b[0] = 5
        %torch = global torch
        %3 = attr %torch.randn
        %4 = call %3(3, 8) as torch.randn
        %5 = attr %torch.nn
        %6 = attr %5.functional
        %7 = attr %6.dropout
        %8 = call %7(%h, 0.5) as torch.nn.functional.dropout
        """,
        a=held,
        b=vector,
    )
    assert len(held) == 1
    assert torch.equal(vector, torch.ones(8))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_host_call_may_change_what_it_can_reach() -> None:
    held = [torch.zeros(8)]
    body = """
        %h = read %model@h.0 output
        %0 = item %a[0]
        %1 = call %b()
        %2 = item %a[0]
        %3 = item %a[1]
        %4 = %h + 1
    """
    found = accepted(body, a=held, b=object())
    assert found["0"] == "f32[8]"
    assert "2" not in found
    assert found["4"] == "f32[rows=2, tokens=7, 8]"
