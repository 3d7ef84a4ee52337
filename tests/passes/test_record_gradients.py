"""The pass that says where gradients are recorded and arrive: text in, text out."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.record_gradients import record_gradients
from nnsight_compiler.passes.sites import Order
from nnsight_compiler.runtime.observe import observe


class Net(nn.Module):
    """Two layers whose outputs are given to two more, so that their inputs are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.left(h) * self.right(h)


SEEN = observe(Net(), (torch.ones(1, 2),))


def order(_: ops.Forward) -> Order:
    return SEEN


def recorded(text: str) -> str:
    program = record_gradients(parse_program(textwrap.dedent(text).lstrip()), order)
    verify(program)
    return print_program(program)


def expect(before: str, after: str) -> None:
    assert recorded(before) == textwrap.dedent(after).lstrip()


def test_a_program_without_gradients_stays_the_object_it_was() -> None:
    program = parse_program(
        "experiment f(%model, %x)\n  forward %f = trace %model(%x)\n    %h = read %model@first output\n"
    )
    assert record_gradients(program, order) is program


def test_a_tensor_that_was_used_before_its_site_is_recorded_from_where_it_was_made() -> None:
    expect(
        """
        experiment f(%model, %x)
          forward %f = trace %model(%x)
            %h = read %model@right input
            %out = read %model@'' output
            backward %out()
              %g = grad %h
          return %g
        """,
        """
        experiment f(%model, %x)
          forward %f = trace %model(%x)
            %1 = read %model@first input
            require %1 leaf 0
            %2 = read %model@first output
            require %2 leaf 0
            %h = read %model@right input
            require %h
            %out = read %model@'' output
            %0 = track %h
            backward %out() sparing %model
              at_gradient %0
                %g = grad %0
          return %g
        """,
    )


def test_what_a_write_needs_runs_in_the_pass_and_the_rest_after_it() -> None:
    text = recorded(
        """
        experiment f(%model, %x, %scale)
          forward %f = trace %model(%x)
            %h = read %model@first output
            %out = read %model@'' output
            backward %out()
              %g = grad %h
              %kept = save %g
              %double = %scale * 2
              %new = %g * %double
              set_grad %h = %new
              %norm = %kept + 1
          return (%kept, %norm)
        """
    )
    lines = [line.strip() for line in text[text.index("%double =") :].splitlines()]
    assert lines == [
        "%double = %scale * 2", "backward %out() sparing %model", "at_gradient %0", "%g = grad %0", "%kept = save %g",
        "%new = %g * %double", "set_grad %0 = %new", "%norm = %kept + 1", "return (%kept, %norm)",
    ]  # fmt: skip


def test_a_save_before_a_write_in_place_runs_before_it() -> None:
    text = recorded(
        """
        experiment f(%model, %x)
          forward %f = trace %model(%x)
            %h = read %model@first output
            %out = read %model@'' output
            backward %out()
              %g = grad %h
              %kept = save %g
              set_item %g[0] = 0
              %after = save %g
          return (%kept, %after)
        """
    )
    lines = [line.strip() for line in text[text.index("at_gradient") :].splitlines()]
    assert lines == [
        "at_gradient %0", "%g = grad %0", "%kept = save %g", "set_item %g[0] = 0", "%after = save %g",
        "return (%kept, %after)",
    ]  # fmt: skip


def test_a_value_of_the_program_after_the_forward_is_tracked_at_the_end_of_its_body() -> None:
    text = recorded(
        """
        experiment f(%model, %x)
          forward %f = trace %model(%x)
            %h = read %model@first output
            set_item %h[0] = 0
            %out = read %model@'' output
          backward %out()
            %g = grad %h
          return %g
        """
    )
    assert "    %out = read %model@'' output\n    %0 = track %h\n  backward %out() sparing %model\n" in text


def test_weights_are_not_spared_where_the_forward_asks_for_them() -> None:
    text = recorded(
        """
        experiment f(%model, %x)
          forward %f = trace %model(%x, grad=True)
            %out = read %model@'' output
            backward %out()
        """
    )
    assert "backward %out()\n" in text


def test_a_write_that_needs_a_gradient_that_arrives_later_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        recorded(
            """
            experiment f(%model, %x)
              forward %f = trace %model(%x)
                %h = read %model@first output
                %late = read %model@left output
                %out = read %model@'' output
                backward %out()
                  %g = grad %h
                  set_grad %late = %g
            """
        )
    assert "arrives only later" in caught.value.diagnostics[0].reason


def test_one_statement_that_may_write_several_gradients_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        recorded(
            """
            experiment f(%model, %x, %so)
              forward %f = trace %model(%x)
                %h = read %model@first output
                %late = read %model@left output
                %out = read %model@'' output
                backward %out()
                  if %so
                  then
                    set_grad %late = 0
                    set_grad %h = 0
                    yield
                  else
                    yield
            """
        )
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.reason == ("this may write the gradients of several values, which arrive at different times")
    assert diagnostic.way_out == "write each of them by a statement of its own"
