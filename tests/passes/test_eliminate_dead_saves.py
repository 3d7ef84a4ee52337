"""Dead saves: text in, text out, and what must stay."""

from __future__ import annotations

from textwrap import dedent

import pytest

from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.eliminate_dead_saves import eliminate_dead_saves


def eliminated(text: str, **options: bool) -> str:
    program = parse_program(dedent(text))
    verify(program)
    result = eliminate_dead_saves(program, **options)
    verify(result)
    assert eliminate_dead_saves(result, **options) is result, "a second run finds more"
    return str(result)


def same(text: str, expected: str, **options: bool) -> None:
    assert eliminated(text, **options) == str(parse_program(dedent(expected)))


def stays(text: str, **options: bool) -> None:
    program = parse_program(dedent(text))
    verify(program)
    assert eliminate_dead_saves(program, **options) is program


def test_a_dead_save_goes_with_all_that_only_it_needed() -> None:
    same(
        """
        experiment f(%model, %clean, %corrupt)
          forward %f0 = trace %model(%clean)
            %h = read %model@h.3 output
            %0 = item %h[:, -1]
            %torch = global torch
            %stack = attr %torch.stack
            %1 = call %stack([%0]) as "torch.stack"
            %dead = save %1
            %2 = read %model@lm_head output
            %logits = save %2
          forward %f1 = trace %model(%corrupt)
            %3 = read %model@h.5 output
          return %logits
        """.replace("[%0]", "%0"),
        """
        experiment f(%model, %clean, %corrupt)
          forward %f0 = trace %model(%clean)
            %2 = read %model@lm_head output
            %logits = save %2
          return %logits
        """,
    )


def test_forwards_are_kept_on_request() -> None:
    same(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
          return None
        """,
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
          return None
        """,
        keep_forwards=True,
    )


def test_a_list_that_is_only_filled_goes() -> None:
    same(
        """
        experiment f(%model, %x)
          %acts = list []
          %d = dict {}
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            %s = save %h
            %m = attr %acts.append
            %n = call %m(%s) as "method.append"
            set_item %d[3] = %s
          return 1
        """,
        """
        experiment f(%model, %x)
          return 1
        """,
    )


def test_a_list_that_is_used_keeps_what_fills_it() -> None:
    stays(
        """
        experiment f(%model, %x)
          %acts = list []
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            %s = save %h
            %m = attr %acts.append
            %n = call %m(%s) as "method.append"
          return %acts
        """
    )


def test_unused_results_of_an_if_go() -> None:
    same(
        """
        experiment f(%model, %x, %p)
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            %a, %b = if %p
            then
              %s = save %h
              %t = save %h
              yield %s, %t
            else
              yield None, %h
          return %a
        """,
        """
        experiment f(%model, %x, %p)
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            %a = if %p
            then
              %s = save %h
              yield %s
            else
              yield None
          return %a
        """,
    )


def test_unused_values_that_a_loop_carries_go() -> None:
    same(
        """
        experiment f(%model, %xs)
          %last, %sum = for %x in %xs carry %l = None, %t = 0
            forward %f0 = trace %model(%x)
              %h = read %model@h.3 output
              %s = save %h
              %u = %t + %s
            continue %s, %u
          return %last
        """,
        """
        experiment f(%model, %xs)
          %last = for %x in %xs carry %l = None
            forward %f0 = trace %model(%x)
              %h = read %model@h.3 output
              %s = save %h
            continue %s
          return %last
        """,
    )


def test_a_dead_loop_over_outside_values_stays_empty() -> None:
    same(
        """
        experiment f(%model, %xs)
          for %x in %xs
            forward %f0 = trace %model(%x)
              %h = read %model@h.3 output
              %s = save %h
            continue
          return 1
        """,
        """
        experiment f(%model, %xs)
          for %x in %xs
            continue
          return 1
        """,
    )


def test_a_cell_without_loads_goes() -> None:
    same(
        """
        experiment f(%model, %x)
          %c = cell h = unbound
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            store %c = %h
          return 1
        """,
        """
        experiment f(%model, %x)
          return 1
        """,
    )


def test_a_loaded_cell_keeps_its_stores() -> None:
    stays(
        """
        experiment f(%model, %x)
          %c = cell h = unbound
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            %s = save %h
            store %c = %s
          %r = load %c as h
          return %r
        """
    )


@pytest.mark.parametrize(
    "effect",
    [
        "write %model@h.4 output = %h",
        "skip %model@h.3 = %h",
        "set_item %h[0] = 1",
        "%e = %h += 1",
        '%p = global print\n%e = call %p(%h) as "builtins.print"',
        "%p = global metric\n%e = call %p(%h)",
        '%m = attr %h.zero_\n%e = call %m() as "torch.Tensor.zero_"',
        '%m = attr %h.bernoulli\n%e = call %m() as "torch.Tensor.bernoulli"',
        '%m = attr %out.append\n%e = call %m(%h) as "method.append"',
        "set_attr %out.h = %h",
        "set_global found = %h",
    ],
)
def test_effects_stay(effect: str) -> None:
    lines = "\n".join(f"            {line}" for line in effect.split("\n"))
    stays(
        f"""
        experiment f(%model, %x, %out)
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
{lines}
          return None
        """
    )


@pytest.mark.parametrize(
    "computation",
    [
        "%e = item %table[%name]",
        '%i = global int\n%e = call %i(%name) as "builtins.int"',
        "%e = %table + %name",
        "%a, %b = unpack %table",
        '%m = attr %table.cuda\n%e = call %m() as "torch.Tensor.cuda"',
    ],
)
def test_what_might_raise_on_values_from_outside_stays(computation: str) -> None:
    lines = "\n".join(f"          {line}" for line in computation.split("\n"))
    stays(
        f"""
        experiment f(%table, %name)
{lines}
          return None
        """
    )


def test_what_might_raise_in_a_try_stays() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %h = read %model@h.3 output
            try
              %i = item %h[99]
            handle %e
              %p = global print
              %n = call %p(%e) as "builtins.print"
          return None
        """
    )


def test_a_generation_that_may_sample_stays() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = generate %model(%x)
          return None
        """
    )
    same(
        """
        experiment f(%model, %x)
          forward %f0 = generate %model(%x, do_sample=False)
          return None
        """,
        """
        experiment f(%model, %x)
          return None
        """,
    )


@pytest.mark.parametrize("argument", ["on_token=%y", "streamer=%y", "logits_processor=%y", "**%y"])
def test_a_generation_that_is_looked_on_stays(argument: str) -> None:
    stays(
        f"""
        experiment f(%model, %x, %y)
          forward %f0 = generate %model(%x, do_sample=False, {argument})
          return None
        """
    )
    same(
        """
        experiment f(%model, %x, %y)
          forward %f0 = generate %model(%x, do_sample=False, on_token=None, streamer=None)
          return None
        """,
        """
        experiment f(%model, %x, %y)
          return None
        """,
    )


def test_invokes_stay_with_their_forward() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model()
            invoke %i0 = %f0("a")
              %h = read %model@h.3 output
              %s = save %h
            invoke %i1 = %f0("b")
          return %s
        """
    )


def test_a_tracer_that_is_used_keeps_its_forward() -> None:
    stays(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
          %r = attr %f0.result
          return %r
        """
    )


def test_a_closure_goes_unless_it_is_called() -> None:
    same(
        """
        experiment f(%x)
          %g = closure g(%a)
            %p = global print
            %n = call %p(%a) as "builtins.print"
            return None
          return %x
        """,
        """
        experiment f(%x)
          return %x
        """,
    )
    stays(
        """
        experiment f(%x)
          %g = closure g(%a)
            %p = global print
            %n = call %p(%a) as "builtins.print"
            return None
          %r = call %g(%x)
          return %x
        """
    )


def test_an_early_exit_keeps_its_loop() -> None:
    stays(
        """
        experiment f(%xs)
          %n = for %x in %xs carry %k = 0
            %c = %x > 3
            if %c
            then
              break %k
            %j = %k + 1
            continue %j
          return %n
        """
    )


def test_a_store_to_a_cell_from_outside_stays() -> None:
    program = parse_program("stage f(%cell)\n  store %cell = 1\n  return None\n")
    assert eliminate_dead_saves(program) == program
