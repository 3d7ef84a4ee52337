"""`merge_forwards` and `sink`: placed programs in, programs out, and every reason for leaving a loop as it is."""

from __future__ import annotations

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.merge_forwards import merge_forwards
from nnsight_compiler.passes.remarks import Remarks

HEAD = """experiment f(%model, %prompt, %prompts, %source, %log)
  %scores = list []
"""
TRACE = """
    forward %1 = trace %model(%prompt)
      at %model@h.3 output
        %2 = read %model@h.3 output : f32[rows=1, tokens=4, 8]
        set_item %2[:, %p] = %source
      at %model@lm_head output
        %3 = read %model@lm_head output : f32[rows=1, tokens=4, 8]
        %4 = item %3[0, -1]
"""


def run(text: str, why_not: str | None = None) -> tuple[str, Remarks]:
    program = parse_program(text)
    verify(program)
    remarks = Remarks()
    made = merge_forwards(program, lambda _: why_not, lambda *_: False, remarks)
    verify(made)
    if not any(remark.fired for remark in remarks.made):
        assert made is program
    return print_program(made), remarks


def loop(after: str, inside: str = "", before: str = "", end: str = "    continue") -> str:
    """A loop over prompts with these lines around its forward, and inside of it."""
    body = "\n".join(
        [HEAD.rstrip(), "  for %p in %prompts", *filter(None, [before, TRACE.strip("\n"), inside, after]), end]
    )
    return f"{body}\n  return %scores\n"


def test_the_effects_of_a_body_move_behind_its_forward() -> None:
    inside = "        %5 = attr %scores.append\n        %6 = call %5(%4) as method.append"
    text, remarks = run(loop("", inside))
    assert [remark.fired for remark in remarks.made] == [True]
    expected = """
  together %p in %prompts
    forward %1 = trace %model(%prompt)
      at %model@h.3 output
        %2 = read %model@h.3 output : f32[rows=1, tokens=4, 8]
        set_item %2[:, %p] = %source
      at %model@lm_head output
        %3 = read %model@lm_head output : f32[rows=1, tokens=4, 8]
        %4 = item %3[0, -1]
        %0 = save %4
    %5 = attr %scores.append
    %6 = call %5(%0) as method.append
    continue
"""
    assert expected.strip("\n") in text


PRINT = "    %7 = global print\n    %8 = call %7({0}) as builtins.print"
PRINT_AGAIN = "    %9 = global print\n    %10 = call %9({0}) as builtins.print"


def test_what_is_printed_before_a_forward_waits_for_it() -> None:
    text, _ = run(loop(PRINT_AGAIN.format("%p"), before=PRINT.format("%p")))
    assert "together" in text
    assert text.index("forward %1") < text.index("call %7(%p)") < text.index("call %9(%p)")


def test_what_is_shown_before_a_line_that_may_fail_is_postponed() -> None:
    write = "        set_item %2[:, %p] = %source"
    shown = f"        %7 = global print\n        %8 = call %7(%2) as builtins.print\n{write}"
    text, _ = run(loop("", before=PRINT_AGAIN.format("%p")).replace(write, shown))
    expected = """
    %9 = global print
    %reached.1 = keep True
    forward %1 = trace %model(%prompt)
      at %model@h.3 output
        %2 = read %model@h.3 output : f32[rows=1, tokens=4, 8]
        %7 = global print
        %0 = save %2
        %reached = keep True
        set_item %2[:, %p] = %source
      at %model@lm_head output
        %3 = read %model@lm_head output : f32[rows=1, tokens=4, 8]
        %4 = item %3[0, -1]
    postponed %reached.1
      %10 = call %9(%p) as builtins.print
    postponed %reached
      %8 = call %7(%0) as builtins.print
    continue
"""
    assert expected.strip("\n") in text


def test_what_only_the_program_has_moves_as_it_is() -> None:
    inside = "        %5 = attr %scores.append\n        %6 = call %5(%4) as method.append"
    text, _ = run(loop("", inside, before="    %7 = attr %scores.append\n    %8 = call %7(1) as method.append"))
    assert "together" in text
    assert "postponed" not in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            loop("", before=PRINT.format("%p")).replace("= %source", "= %8"),
            "a round may fail after the next one changed or showed something",
        ),
        (loop("    %7 = global unknown\n    %8 = call %7(%4)"), "a call is not known, and may change or see anything"),
        (
            loop("    %7 = global torch\n    %9 = attr %7.rand\n    %8 = call %9(3) as torch.rand"),
            "a call draws random numbers, in the order of the program",
        ),
        (loop("    break", end=""), "a round may end the loop"),
        (loop("    return %4", end=""), "a round may leave the loop"),
        (
            loop("    %9 = attr %log.append\n    %10 = call %9(%p) as method.append"),
            "a round may change what the loop goes over",
        ),
        (
            loop(
                "    %9 = attr %scores.append\n    %10 = call %9(1) as method.append",
                before="    %7 = global len\n    %8 = call %7(%scores) as builtins.len",
            ),
            "a round changes what the next one looks at before that",
        ),
        (
            loop("    try\n      %8 = item %scores[0]\n    finally\n      %9 = item %scores[0]"),
            "a round has a `try`",
        ),
        (
            loop("").replace("trace %model(%prompt)", "trace %model(%prompt, grad=True)"),
            "the forward records gradients for all weights",
        ),
        (
            loop("").replace("%3 = read %model@lm_head output", "%3 = read %model@'' output").replace(
                "at %model@lm_head output", "at %model@'' output"
            ),
            "what the whole model returns, or is given, is not one tensor",
        ),
        (
            loop("", "        %5 = attr %log.pop\n        %6 = call %5() as method.pop\n        set_item %3[0] = %6"),
            "what is written to the model depends on what a round does outside of it",
        ),
    ],
)  # fmt: skip
def test_loops_that_stay(text: str, reason: str) -> None:
    made, remarks = run(text)
    assert "together" not in made
    (remark,) = remarks.made
    assert remark.optimisation == "merge_forwards"
    assert reason in remark.what


def test_the_model_may_forbid_it() -> None:
    made, remarks = run(loop(""), "the model is in training mode")
    assert "together" not in made
    assert [remark.what for remark in remarks.made] == ["the model is in training mode"]


def test_a_value_that_rounds_hand_on_is_used_in_the_last_part_alone() -> None:
    late = """experiment f(%model, %prompt, %prompts, %source, %log)
  %end = for %p in %prompts carry %total = 0
    forward %1 = trace %model(%prompt)
      at %model@lm_head output
        %3 = read %model@lm_head output : f32[rows=1, tokens=4, 8]
        %4 = item %3[0, -1]
    %5 = %total + 1
    continue %5
  return %end
"""
    assert "together" in run(late)[0]
    early = late.replace("    forward", "    %6 = %total * 2\n    forward")
    made, remarks = run(early)
    assert "together" not in made
    assert "a round needs before its forward what the round before it gives after its own" in remarks.made[0].what
