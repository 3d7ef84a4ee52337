"""Where stages begin, and how the rest of a region is cut off: text in, text out."""

from __future__ import annotations

import random
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight
from nnsight_compiler.compilation import save
from nnsight_compiler.frontend import lower_function
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.specialise import Specialised, specialise
from nnsight_compiler.passes.subject import Subject
from nnsight_compiler.runtime.support import UNBOUND


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.h:
            x = layer(x)
        return x


def choose() -> int:
    return 1


def changed() -> None:
    """Unknown code, as far as the compiler is told."""


GLOBALS = {"choose": [choose].pop, "changed": [changed].pop, "random": random, "LAYER": 1, "LAYERS": [0, 1]}


def run(text: str, **arguments: Any) -> Specialised:
    given = {"model": NNsight(Net()), "x": torch.ones(1, 4), **arguments}
    program = parse_program(dedent(text))
    verify(program)
    found = specialise(program, Subject(given, GLOBALS, {}, lower_function, save, UNBOUND))
    verify(found.program)
    assert parse_program(print_program(found.program)) == found.program
    return found


def body(text: str) -> str:
    return text.split("\n", 1)[1]


def becomes(before: str, after: str, **arguments: Any) -> None:
    signature = ", ".join(f"%{name}" for name in ("model", "x", *arguments))
    header = f"experiment f({signature})\n"
    found = run(header + indent(dedent(before), "  "), **arguments)
    want = parse_program(header + indent(dedent(after), "  "))
    assert body(print_program(found.program)) == body(print_program(want))


def test_what_needs_to_know_a_value_of_the_run_and_all_after_it_is_a_stage() -> None:
    becomes(
        """
        %choose = global choose
        %layer = call %choose()
        forward %0 = trace %model(%x)
          %1 = attr %model.h
          %2 = item %1[%layer]
          %h = read %2 output
        %3 = %h * 2
        return %3
        """,
        """
        %choose = global choose
        %layer = call %choose()
        %stage = stage 'which module this is'
          stage f(%model, %x, %layer)
            forward %0 = trace %model(%x)
              %1 = attr %model.h
              %2 = item %1[%layer]
              %h = read %2 output
            %3 = %h * 2
            return (%3,)
        %0 = call %stage(%model, %x, %layer)
        %1 = unpack %0
        return %1
        """,
    )


def test_the_ways_out_of_the_part_that_is_cut_off_become_a_part_of_its_result() -> None:
    becomes(
        """
        %choose = global choose
        %n = for %step in (1, 2) carry %count = 0
          %layer = call %choose()
          forward %0 = trace %model(%x)
            %1 = attr %model.h
            %2 = item %1[%layer]
            %h = read %2 output
          %large = %h > 1
          if %large
          then
            break %count
          else
            yield
          %none = %h is None
          if %none
          then
            return %h
          else
            yield
          %more = %count + 1
          continue %more
        return %n
        """,
        """
        %choose = global choose
        %n = for %step in (1, 2) carry %count = 0
          %layer = call %choose()
          %stage = stage 'which module this is'
            stage f(%model, %x, %layer, %count)
              forward %0 = trace %model(%x)
                %1 = attr %model.h
                %2 = item %1[%layer]
                %h = read %2 output
              %large = %h > 1
              if %large
              then
                return (1, %count)
              else
                yield
              %none = %h is None
              if %none
              then
                return (2, %h)
              else
                yield
              %more = %count + 1
              return (0, %more)
          %0 = call %stage(%model, %x, %layer, %count)
          %way = item %0[0]
          %left = %way == 1
          if %left
          then
            %value = item %0[1]
            break %value
          else
            yield
          %left.1 = %way == 2
          if %left.1
          then
            %value.1 = item %0[1]
            return %value.1
          else
            yield
          %more = item %0[1]
          continue %more
        return %n
        """,
    )


def test_a_loop_over_modules_that_only_a_run_ends_is_kept() -> None:
    becomes(
        """
        %blocks = attr %model.h
        for %block in %blocks
          forward %0 = trace %model(%x)
            %h = read %block output
          %large = %h > 1
          if %large
          then
            break
          else
            yield
          continue
        return None
        """,
        """
        for %block in %blocks
          %stage = stage 'what this round of the loop is for'
            stage f(%model, %x, %block)
              forward %0 = trace %model(%x)
                %h = read %block output
              %large = %h > 1
              if %large
              then
                return (1,)
              else
                yield
              return (0,)
          %0 = call %stage(%model, %x, %block)
          %way = item %0[0]
          %left = %way == 1
          if %left
          then
            break
          else
            yield
          continue
        return None
        """.replace("for %block in %blocks", "%module = item %model['h']\n        for %block in %module"),
    )


def test_a_closure_is_made_again_where_it_is_used() -> None:
    found = run(
        """
        experiment f(%model, %x)
          %probe = closure probe(%k)
            forward %0 = trace %model(%x)
              %1 = attr %model.h
              %2 = item %1[%k]
              %h = read %2 output
            return %h
          %choose = global choose
          %layer = call %choose()
          forward %3 = trace %model(%x)
            %4 = attr %model.h
            %5 = item %4[%layer]
            %6 = read %5 output
          %7 = call %probe(0)
          return %7
        """
    )
    text = print_program(found.program)
    assert text.count("closure probe") == 1
    assert "stage f(%model, %x, %layer)" in text


def test_code_that_the_model_has_no_part_in_is_moved_ahead() -> None:
    becomes(
        """
        forward %0 = trace %model(%x)
          %choose = global choose
          %layer = call %choose()
          %1 = attr %model.h
          %2 = item %1[%layer]
          %h = read %2 output
        return %h
        """,
        """
        %choose = global choose
        %layer = call %choose()
        %stage = stage 'which module this is'
          stage f(%model, %x, %layer)
            forward %0 = trace %model(%x)
              %1 = attr %model.h
              %2 = item %1[%layer]
              %h = read %2 output
            return (%h,)
        %0 = call %stage(%model, %x, %layer)
        %h = unpack %0
        return %h
        """,
    )


# --- where no stage begins ---


def test_an_effect_on_a_value_of_the_model_holds_what_follows_in_the_body() -> None:
    text = """
        experiment f(%model, %x)
          forward %0 = trace %model(%x)
            %1 = attr %model.h
            %2 = item %1[0]
            %h = read %2 output
            %changed = global changed
            %none = call %changed(%h)
            %choose = global choose
            %layer = call %choose()
            %3 = item %1[%layer]
            %4 = read %3 output
          return %4
        """
    with pytest.raises(CompileError, match="which module this is must be known before the model runs"):
        run(text)


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("%layer = global LAYER", "layer=1"),
        ("%layers = global LAYERS\n%layer = item %layers[0]", "LAYERS[0]=0"),
        ("%state = bound %state as state\n%layer = attr %state.layer", "state.layer=2"),
    ],
    ids=["global", "list", "attribute"],
)
@pytest.mark.parametrize("changes", [False, True])
def test_a_fact_holds_until_unknown_code_runs(before: str, name: str, changes: bool) -> None:
    class State:
        def __init__(self) -> None:
            self.layer = 2

    before = before.replace("bound %state as state", "bound %s as state") if "state" in before else before
    calls = "%changed = global changed\n%none = call %changed()\n" if changes else ""
    rest = """
        forward %0 = trace %model(%x)
          %1 = attr %model.h
          %2 = item %1[%layer]
          %h = read %2 output
        return %h
        """
    text = "experiment f(%model, %x, %s)\n" + indent(calls + before + dedent(rest), "  ")
    found = run(text, s=State())
    stages = "stage 'which module this is'" in print_program(found.program)
    assert stages == changes
    assert bool(found.program.given) != changes


def test_a_list_that_the_program_changes_is_known_to_a_stage_only() -> None:
    text = """
        experiment f(%model, %x, %layers)
          %append = attr %layers.append
          %none = call %append(2)
          forward %0 = trace %model(%x)
            %1 = attr %model.h
            for %layer in %layers
              %2 = item %1[%layer]
              %h = read %2 output
              continue
            %o = attr %model.output
          return %o
        """
    assert "stage 'what this loop goes over'" in print_program(run(text, layers=[0]).program)


def test_what_a_later_round_changes_is_not_relied_on_in_the_first() -> None:
    text = """
        experiment f(%model, %x, %s)
          for %n in (1, 2)
            forward %0 = trace %model(%x)
              %1 = attr %model.h
              %k = attr %s.layer
              %2 = item %1[%k]
              %h = read %2 output
            %3 = %k + 1
            set_attr %s.layer = %3
            continue
          return None
        """

    class State:
        def __init__(self) -> None:
            self.layer = 0

    found = run(text, s=State())
    assert "stage 'which module this is'" in print_program(found.program)
    assert not found.program.given


def test_a_number_that_a_round_counts_down_changes_nothing_else() -> None:
    found = run(
        """
        experiment f(%model, %x, %scale)
          for %n in (1, 2)
            %half = %scale * 0.5
            %less = %half -= 1
            %k = global LAYER
            forward %0 = trace %model(%x)
              %1 = attr %model.h
              %2 = item %1[%k]
              %h = read %2 output
            continue
          return None
        """,
        scale=3.0,
    )
    assert found.program.given == ("LAYER=1",)
