"""`share_prefixes`: placed programs in, programs out, and every reason for computing alike things again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.share_prefixes import share_prefixes
from nnsight_compiler.runtime.observation import Event, Observation

EVENTS = (
    ("", "input"), ("embed", "input"), ("embed", "output"),
    ("h.0", "input"), ("h.0.mlp", "input"), ("h.0.mlp", "output"), ("h.0", "output"),
    ("h.1", "input"), ("h.1.mlp", "input"), ("h.1.mlp", "output"), ("h.1", "output"),
    ("head", "input"), ("head", "output"), ("", "output"),
)  # fmt: skip


def order(how: Any = "fake", effects: frozenset[str] = frozenset(), draws: str = "", twice: str = "") -> Observation:
    """A model of two blocks with a part each, as it was seen to run."""
    events = tuple(Event(path, port, 0) for path, port in EVENTS)  # type: ignore[arg-type]
    calls = {path: 1 + (path == twice) for path, _ in EVENTS}
    return Observation(events, calls, how, effects=effects, draws=draws)


@dataclass(frozen=True)
class Made:
    text: str
    remarks: list[tuple[bool, str]]


def run(body: str, seen: Observation | None = None, why_not: str | None = None) -> Made:
    program = parse_program(f"experiment f(%model, %x, %y, %v, %items, %call)\n{body}")
    verify(program)
    remarks = Remarks()
    made = share_prefixes(program, lambda _: seen or order(), lambda _: why_not, remarks)
    verify(made)
    assert parse_program(print_program(made)) == made
    if not any(remark.fired for remark in remarks.made):
        assert made is program
    return Made(print_program(made), [(remark.fired, remark.what) for remark in remarks.made])


def writes(name: str, site: str = "h.1 output", given: str = "%x", indent: str = "  ") -> str:
    """A forward that writes at a site, and reads the head."""
    lines = (
        f"forward %{name} = trace %model({given})", f"  at %model@{site}", f"    %{name}h = read %model@{site}",
        f"    set_item %{name}h[:, 0] = %v", "  at %model@head output", f"    %{name}l = read %model@head output",
        f"    %{name}s = save %{name}l",
    )  # fmt: skip
    return "".join(f"{indent}{line}\n" for line in lines)


def replayed(made: Made) -> list[str]:
    """What each forward replays, in their order."""
    lines = (line for line in made.text.splitlines() if "forward %" in line)
    return [line.partition(" replaying ")[2].strip() for line in lines]


def test_two_writes_start_from_one_run() -> None:
    made = run(writes("a") + writes("b", "h.0 output") + "  return (%as, %bs)\n")
    lines = made.text.splitlines()
    assert lines[1] == "  %base = prefix %model(%x) holds ('embed', 'h.0', 'h.1')"
    assert replayed(made) == ["('embed', 'h.0', 'h.1')", "('embed', 'h.0')"]
    assert lines[-2:] == ["  release %base", "  return (%as, %bs)"]
    [(fired, what)] = made.remarks
    assert fired
    assert "starts from one run of the model on its input" in what


def test_a_loop_shares_with_itself_and_holds_the_prefix_for_as_long() -> None:
    made = run("  for %v.1 in %items\n" + writes("a", indent="    ") + "    continue\n  return %v\n")
    lines = made.text.splitlines()
    assert [lines[1].split("(")[0], lines[2], lines[-2]] == [
        "  %base = prefix %model", "  for %v.1 in %items", "  release %base",
    ]  # fmt: skip


def test_what_a_loop_gives_is_shared_inside_of_it() -> None:
    forwards = writes("a", given="%x.1", indent="    ") + writes("b", "h.0 output", "%x.1", indent="    ")
    lines = run("  for %x.1 in %items\n" + forwards + "    continue\n  return %v\n").text.splitlines()
    assert lines[2].startswith("    %base = prefix %model(%x.1)")
    assert lines[-3:-1] == ["    release %base", "    continue"]


def test_only_what_is_over_and_holds_no_site_is_replayed() -> None:
    inside = writes("a", "h.1.mlp input") + writes("b", "h.1.mlp output")
    assert replayed(run(inside + "  return (%as, %bs)\n")) == ["('embed', 'h.0')", "('embed', 'h.0', 'h.1.mlp')"]
    reads = "      at %model@h.0.mlp output\n        %r = read %model@h.0.mlp output\n"
    loop = "  for %v.1 in %items\n" + writes("a", indent="    ").replace(
        "      at %model@h.1", f"{reads}      at %model@h.1"
    )
    assert replayed(run(loop + "    continue\n  return %v\n")) == ["('embed', 'h.0.mlp', 'h.1')"]


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (order(effects=frozenset({"h.0"})), "('embed', 'h.0.mlp', 'h.1')"),
        (order(effects=frozenset({"h.0.mlp"})), "('embed', 'h.1')"),
        (order(twice="embed"), "('h.0', 'h.1')"),
        (order(draws="h.0"), ""),
        (order("registered"), ""),
    ],
)
def test_modules_that_do_more_than_return_run(seen: Observation, wanted: str) -> None:
    assert replayed(
        run("  for %v.1 in %items\n" + writes("a", indent="    ") + "    continue\n  return %v\n", seen)
    ) == [wanted]


READ = """  forward %{0} = trace %model({1})
    at %model@head output
      %{0}l = read %model@head output
      %{0}s = save %{0}l
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (writes("a"), None),  # there is nothing to share with
        (writes("a") + writes("b", given="%y"), None),  # another input
        (READ.format("a", "%x") + READ.format("b", "%x"), None),  # such forwards are united
        (writes("a") + "  set_item %x[0] = 1\n" + writes("b"), "may change the input in between"),
        (writes("a") + "  %0 = call %call(1)\n" + writes("b"), "is not known, and may change the model or its input"),
        (writes("a", given="%x, grad=True") + writes("b", given="%x, grad=True"), "gradients of all weights"),
        (writes("a", given="%x, use_cache=True") + writes("b", given="%x, use_cache=True"), "cached keys and values"),
        ((writes("a") + writes("b")).replace("head output", "'' output"), "what the whole model returns is looked at"),
        ((writes("a") + writes("b")).replace("    %al", "    require %ah\n      %al"), "gradients are asked for"),
    ],
)
def test_what_is_not_shared(body: str, reason: str | None) -> None:
    made = run(body + "  return %v\n")
    assert "prefix" not in made.text
    if reason is not None:
        assert any(not fired and reason in what for fired, what in made.remarks)


def test_a_reason_from_outside_is_told() -> None:
    made = run(writes("a") + writes("b") + "  return %v\n", why_not="the model is in training mode")
    assert set(made.remarks) == {(False, "the model is in training mode")}
