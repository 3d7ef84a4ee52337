"""Accesses to modules that do not run, or not as often as asked for, and writes that nothing can notice."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.check_sites import check_sites

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


def check(body: str, result: str = "None") -> tuple[Diagnostic, ...]:
    """What is wrong with a forward that has this body, whose first line is line 1 of `f.py`."""
    lines = [f"{line}  # f.py:{number}" for number, line in enumerate(dedent(body).strip().splitlines(), 1)]
    text = indent("\n".join(lines), "    ")
    program = parse_program(
        f"experiment f(%model, %x, %k)\n  forward %f0 = trace %model(%x)\n{text}\n  return {result}\n"
    )
    verify(program)
    try:
        assert check_sites(program, lambda _: Order()) is program
    except CompileError as error:
        return error.diagnostics
    return ()


@pytest.mark.parametrize(
    ("access", "reason"),
    [
        ("gone output", "`gone` is never called in this forward"),
        ("h output", "`h` is never called in this forward"),
        ("shared output", "`shared` is called 2 times in one forward"),
        ("shared input", "`shared` is called 2 times in one forward"),
        ("shared output call 2", "`shared` is called 2 times in one forward; there is no call 2"),
        ("shared output call -3", "`shared` is called 2 times in one forward; there is no call -3"),
        ("head input call 1", "`head` is called 1 times in one forward; there is no call 1"),
    ],
)
def test_sites_that_do_not_exist_are_refused(access: str, reason: str) -> None:
    (read,) = check(f"%a = read %model@head output\n%b = read %model@{access}")
    assert (read.reason, read.span.file, read.span.line) == (reason, "f.py", 2)
    assert read.way_out
    (write,) = check(f"write %model@{access} = 0\n%a = read %model@'' output")
    assert (write.reason, write.span.line) == (reason, 1)


def test_the_way_out_names_the_calls() -> None:
    (found,) = check("%a = read %model@shared input")
    assert found.way_out == "say which call is meant: `.calls[0].input` to `.calls[1].input`"


@pytest.mark.parametrize(
    "access",
    ["h.0 output", "'' output", "'' inputs", "h.0 output call 0", "shared output call 1", "shared input call -2"],
)
def test_sites_that_exist_are_not_refused(access: str) -> None:
    assert check(f"%a = read %model@{access}") == ()


def test_every_mistake_is_found_at_once() -> None:
    found = check("%a = read %model@gone output\n%b = read %model@shared output\n%c = read %model@h.1 output call 5")
    assert [each.span.line for each in found] == [1, 2, 3]


NOTICED = [
    ("write %model@h.1 output = 0\n%a = read %model@head output", "None"),
    ("%a = read %model@head output\nwrite %model@h.1 output = 0", "None"),  # sites have the order of the model
    ("write %model@h.1 output = 0\n%a = read %model@h.1 output", "None"),
    ("write %model@h.1 input = 0\n%a = read %model@h.1 output", "None"),
    ("write %model@shared input call 0 = 0\n%a = read %model@h.2 input", "None"),
    ("%a = read %model@h.0 output\nset_item %a[0] = 1", "%a"),
    ("%a = read %model@h.0 output\nset_item %a[0] = 1\n%b = read %model@h.1 output", "None"),
    ("%a = read %model@h.0 output\nset_item %a[0] = 1\n%s = save %a", "%s"),
    ("%a = read %model@h.0 output\n%v = item %a[0]\n%w = %v += 1", "%a"),
    ("if %k\nthen\n  write %model@h.1 output = 0\n  yield\nelse\n  yield\n%a = read %model@head output", "None"),
    (
        "for %i in %k\n  %a = read %model@h.0 output\n  set_item %a[%i] = 1\n  continue\n%b = read %model@h.1 input",
        "None",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "result"), NOTICED)
def test_a_write_that_something_notices(body: str, result: str) -> None:
    assert check(body, result) == ()


UNNOTICED = [
    ("%a = read %model@h.0 output\nwrite %model@h.1 output = 0", "%a", 2),
    ("write %model@h.1 output = 0\n%a = read %model@h.0 output", "%a", 1),
    ("write %model@head output = 0\n%a = read %model@h.2 output", "%a", 1),
    ("%a = read %model@h.1 output\nwrite %model@shared input call 1 = 0\n%b = read %model@h.2 output", "%b", 2),
    ("%a = read %model@h.0 output\nset_item %a[0] = 1", "None", 2),
    ("%a = read %model@h.0 output\n%s = save %a\nset_item %a[0] = 1", "%s", 3),
    ("%a = read %model@h.0 output\n%z = attr %a.zero_\n%n = call %z() as torch.Tensor.zero_", "None", 3),
    ("if %k\nthen\n  write %model@h.1 output = 0\n  yield\nelse\n  yield", "None", 3),
    ("for %i in %k\n  %a = read %model@h.0 output\n  set_item %a[%i] = 1\n  continue", "None", 3),
]


@pytest.mark.parametrize(("body", "result", "line"), UNNOTICED)
def test_a_write_that_nothing_notices_is_refused(body: str, result: str, line: int) -> None:
    (found,) = check(body, result)
    assert found.reason == "this write can reach nothing: nothing is read from the model after it"
    assert found.span.line == line


def test_forwards_are_looked_at_one_by_one() -> None:
    program = parse_program(
        dedent(
            """
            experiment f(%model, %x)
              forward %f0 = trace %model(%x)
                %a = read %model@head output
              forward %f1 = trace %model(%x)
                write %model@h.0 output = 0    # f.py:5
              return %a
            """
        ).lstrip()
    )
    with pytest.raises(CompileError) as caught:
        check_sites(program, lambda _: Order())
    assert [each.span.line for each in caught.value.diagnostics] == [5]


def test_a_write_through_a_site_to_a_value_that_is_used_again() -> None:
    """In torch the value would change; the site has a copy of its own, so the program is refused rather than wrong."""
    text = """def use(model, x):
    v = torch.ones(1, 4)
    with model.trace(x):
        model[0].output = v
        model[0].output[:, 0] += 1
        out = model.output
    return {}
"""
    model, x = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), torch.ones(1, 4)
    scope = {"torch": torch}
    with pytest.raises(CompileError, match="assigned a value, and the value is used again after it") as found:
        intervene.from_source(text.format("out, v"), scope)(model, x)
    assert found.value.diagnostics[0].span.line == 5
    out = intervene.from_source(text.format("out"), scope)(model, x)
    assert torch.equal(out, model[1](torch.tensor([[2.0, 1, 1, 1]])))


def test_a_write_to_the_input_of_the_forward_that_runs() -> None:
    text = (
        "def use(model, x):\n    with model.trace(x):\n        out = model.output\n        x[:] = 5\n    return out\n"
    )
    model, x = NNsight(nn.Sequential(nn.Linear(4, 4))), torch.ones(1, 4)
    with pytest.raises(CompileError, match="this changes an input of the forward that is running") as found:
        intervene.from_source(text)(model, x)
    assert found.value.diagnostics[0].span.line == 4
    assert torch.equal(x, torch.ones(1, 4))


def test_a_list_that_a_host_call_may_keep_is_no_input_from_outside() -> None:
    """`x` is a global, and `max` with a key is a call that may put the list anywhere; the list is still no input."""
    text = """def use(model):
    with model.trace(x):
        norms = []
        norms.append(float(model[0].output.norm()))
        norms.append(2.5)
        largest = max(norms, key=lambda norm: norm)
    return norms, largest
"""
    model, x = NNsight(nn.Sequential(nn.Linear(4, 4))), torch.ones(1, 4)
    norms, largest = intervene.from_source(text, {"x": x})(model)
    assert norms == [model[0](x).norm().item(), 2.5]
    assert largest == max(norms)
