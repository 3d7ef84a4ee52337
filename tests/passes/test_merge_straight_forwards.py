"""`merge_straight_forwards`: placed programs in, programs out, and what keeps forwards apart."""

from __future__ import annotations

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.merge_straight_forwards import merge_straight_forwards
from nnsight_compiler.passes.remarks import Remarks


def forward(name: str, given: str, *body: str, model: str = "%model", end: str = "") -> str:
    """A forward that saves what it reads, with these lines before."""
    lines = [f"forward %{name} = trace {model}({given}){end}", f"  at {model}@h.1 output"]
    lines += [
        f"    %{name}h = read {model}@h.1 output : f32[rows=1, tokens=4, 8]",
        *(f"    {line}" for line in body),
        f"    %{name}s = save %{name}h",
    ]
    return "\n".join(f"  {line}" for line in lines)


def run(*parts: str, why_not: str | None = None) -> tuple[list[str], list[str], list[str]]:
    """The program's lines without forwards' bodies, what was done, and what was not."""
    lines = [part if part.startswith(" ") else f"  {part}" for part in parts]
    text = "\n".join(["experiment f(%model, %other, %x, %y, %z, %v, %log, %call)", *lines])
    program = parse_program(text + "\n")
    verify(program)
    remarks = Remarks()
    made = merge_straight_forwards(program, lambda _: why_not, lambda *_: False, remarks)
    verify(made)
    assert parse_program(print_program(made)) == made
    if not any(remark.fired for remark in remarks.made):
        assert made is program
    lines = [
        line for line in print_program(made).splitlines()[1:] if not line.lstrip().startswith(("at", "%as", "%bs"))
    ]
    shown = [line[2:] for line in lines if " read " not in line and "save" not in line]
    done = [remark.what for remark in remarks.made if remark.fired]
    return shown, done, [remark.what for remark in remarks.made if not remark.fired]


def test_neither_needs_the_other() -> None:
    shown, done, _ = run(forward("a", "%x"), "%1 = %as + 1", forward("b", "%y"), "%2 = %1 + %bs", "return %2")
    assert shown == [
        "strands",
        "  strand",
        "    forward %a = trace %model(%x)",
        "    %1 = %as + 1",
        "  strand",
        "    forward %b = trace %model(%y)",
        "%2 = %1 + %bs",
        "return %2",
    ]
    assert done == ["runs as rows of one with the forward of line 0"]


def test_one_that_needs_another_waits_for_it() -> None:
    shown, *_ = run(
        forward("a", "%x"), forward("b", "%y", "set_item %bh[0] = %as"), forward("c", "%z", "set_item %ch[0] = %as"),
        "return %cs",
    )  # fmt: skip
    assert shown[:7] == [
        "forward %a = trace %model(%x)",
        "strands",
        "  strand",
        "    forward %b = trace %model(%y)",
        "        set_item %bh[0] = %as",
        "  strand",
        "    forward %c = trace %model(%z)",
    ]


def test_two_chains_run_side_by_side() -> None:
    shown, done, _ = run(
        forward("a", "%x"), forward("b", "%y", "set_item %bh[0] = %as"),
        forward("c", "%z"), forward("d", "%v", "set_item %dh[0] = %cs"), "return %ds",
    )  # fmt: skip
    strands = [line for line in shown if "strand" in line or "forward" in line]
    assert strands == [
        "strands",
        "  strand",
        "    forward %a = trace %model(%x)",
        "    forward %b = trace %model(%y)",
        "  strand",
        "    forward %c = trace %model(%z)",
        "    forward %d = trace %model(%v)",
    ]
    assert done


def test_what_comes_late_has_a_strand_of_its_own() -> None:
    """`%2` needs the first forward and stands behind what the second is given."""
    shown, *_ = run(
        forward("a", "%x"), "%1 = item %y[0]", "%2 = %as + 1", forward("b", "%1"), "%3 = %2 + %bs", "return %3"
    )
    assert shown[:8] == [
        "strands",
        "  strand",
        "    forward %a = trace %model(%x)",
        "  strand",
        "    %1 = item %y[0]",
        "  strand after 1",
        "    %2 = %as + 1",
        "  strand",
    ]


def test_effects_leave_a_forward_and_keep_their_order() -> None:
    inside = ("%1 = attr %kept.append", "%2 = call %1(%ah) as method.append")
    again = ("%3 = attr %kept.append", "%4 = call %3(%bh) as method.append")
    shown, done, _ = run("%kept = list []", forward("a", "%x", *inside), forward("b", "%y", *again), "return %kept")
    assert done
    assert shown == [
        "%kept = list []",
        "strands",
        "  strand",
        "    forward %a = trace %model(%x)",
        "    %1 = attr %kept.append",
        "    %2 = call %1(%ah.1) as method.append",
        "  strand",
        "    forward %b = trace %model(%y)",
        "    %3 = attr %kept.append",
        "    %4 = call %3(%bh.1) as method.append",
        "return %kept",
    ]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((forward("a", "%x"), "%1 = call %call()", forward("b", "%y")), "a call is not known"),
        (
            (forward("a", "%x"), "%t = global torch", "%1 = call %t(3) as torch.rand", forward("b", "%y")),
            "a call draws random numbers",
        ),
        ((forward("a", "%x"), "set_item %y[0] = 1", forward("b", "%y")), "what stands between them must come after"),
        ((forward("a", "%x"), "set_global n = 1", forward("b", "%y")), "assigns variables that others see"),
        ((forward("a", "%x"), "%1 = import torch.nn", forward("b", "%y")), "the code between has a `import`"),
        ((forward("a", "%x"), forward("b", "%y", "stop %b")), "the forward stopped"),
        ((forward("a", "%x"), forward("b", "%y, grad=True")), "gradients for all weights"),
    ],
)  # fmt: skip
def test_what_keeps_them_apart(parts: tuple[str, ...], reason: str) -> None:
    shown, done, refused = run(*parts, "return %bs")
    assert not done
    assert "strands" not in shown
    assert len(refused) == 1
    assert refused[0].startswith("it runs apart from the forward before it: ")
    assert reason in refused[0]


@pytest.mark.parametrize(
    "parts",
    [
        (forward("a", "%x"), forward("b", "%y", model="%other")),
        (forward("a", "%x"), forward("b", "%y", "set_item %bh[0] = %as")),
        (forward("a", "%x"), "%1 = %as + 1", forward("b", "%1")),
        (forward("b", "%x"),),
    ],
)
def test_what_no_one_would_have_merged_is_not_told(parts: tuple[str, ...]) -> None:
    _, done, refused = run(*parts, "return %bs")
    assert (done, refused) == ([], [])


def test_the_model_may_forbid_it() -> None:
    _, done, refused = run(
        forward("a", "%x"), forward("b", "%y"), "return %bs", why_not="the model is in training mode"
    )
    assert not done
    assert refused == ["it runs apart from the forward before it: the model is in training mode"]


def test_replays_of_one_prefix_run_together_and_those_of_two_do_not() -> None:
    base = "%p = prefix %model(%x) holds ('h.0',)"
    from_base = " from %p replaying ('h.0',)"
    both = (base, forward("a", "%x", end=from_base), forward("b", "%x", end=from_base), "release %p", "return %bs")
    shown, done, _ = run(*both)
    assert done
    assert shown[-2:] == ["release %p", "return %bs"]
    assert not run(base, forward("a", "%x", end=from_base), forward("b", "%y"), "release %p", "return %bs")[1]
