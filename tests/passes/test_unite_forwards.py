"""Forwards that give the same as one: text in, text out, where they must stay apart, and what runs, counted."""

from __future__ import annotations

from textwrap import dedent, indent
from time import perf_counter

import pytest
import torch
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, intervene
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.remarks import Remarks
from nnsight_compiler.passes.unite_forwards import unite_forwards

HEADER = "experiment f(%model, %x, %y, %k)\n"


def program_of(body: str, result: str = "None") -> Program:
    text = f"{HEADER}{indent(dedent(body).strip(), '  ')}\n  return {result}\n"
    lines = [f"{line}  # f.py:{number}" for number, line in enumerate(text.splitlines())]
    program = parse_program("\n".join(lines) + "\n")
    verify(program)
    return program


def united(body: str, result: str = "None", why_not: str | None = None) -> tuple[Program, Program, list[str]]:
    """The program before and after the pass, and what the pass says of it."""
    program, remarks = program_of(body, result), Remarks()
    made = unite_forwards(program, remarks, lambda _: why_not)
    verify(made)
    assert unite_forwards(made, Remarks(), lambda _: why_not) is made
    return program, made, [f"{each.span.line}: {each.what}" for each in remarks.made]


def becomes(body: str, expected: str, result: str = "None") -> None:
    _, made, (remark,) = united(body, result)
    assert made == program_of(expected, result)
    assert "runs in the place of" in remark


def stays(body: str, *remarks: str, result: str = "None", why_not: str | None = None) -> None:
    before, after, made = united(body, result, why_not)
    assert after is before
    assert made == list(remarks)


FIRST = "forward %f0 = trace %model(%x)\n  %h = read %model@h output\n"
SECOND = "forward %f1 = trace %model(%x)\n  %g = read %model@h output\n"


def test_the_later_forward_joins_the_first() -> None:
    becomes(
        """
        forward %f0 = trace %model(%x, 3)
          %h = read %model@h output
        forward %f1 = trace %model(%y)
          write %model@h output = %h
        forward %f2 = trace %model(%x, 3)
          %g = read %model@head output
          %l = item %g[:, -1]
        %n = %l + 1
        """,
        """
        forward %f0 = trace %model(%x, 3)
          %h = read %model@h output
          %g = read %model@head output
          %l = item %g[:, -1]
        forward %f1 = trace %model(%y)
          write %model@h output = %h
        %n = %l + 1
        """,
    )


def test_names_and_constants_are_the_same_arguments() -> None:
    becomes(
        """
        %a = global PROMPT
        forward %f0 = trace %model(%a, mask=(1, 2))
          %h = read %model@h output
        %b = global PROMPT
        forward %f1 = trace %model(%b, mask=(1, 2))
          %g = read %model@head output
        """,
        """
        %a = global PROMPT
        forward %f0 = trace %model(%a, mask=(1, 2))
          %h = read %model@h output
          %g = read %model@head output
        %b = global PROMPT
        """,
    )


def test_what_has_effects_or_needs_later_values_stays_where_it_was() -> None:
    becomes(
        """
        %l = list []
        forward %f0 = trace %model(%x)
          %h = read %model@h output
        %p = %k + 1
        forward %f1 = trace %model(%x)
          %g = read %model@h output : f32[8, 4]
          %i = item %g[%p]
          %print = global print
          %n = call %print(%i) as builtins.print
          %j = %g * 2
        """,
        """
        %l = list []
        forward %f0 = trace %model(%x)
          %h = read %model@h output
          %g = read %model@h output : f32[8, 4]
          %print = global print
          %j = %g * 2
        %p = %k + 1
        %i = item %g[%p]
        %n = call %print(%i) as builtins.print
        """,
    )


def test_what_is_kept_is_saved_by_itself() -> None:
    becomes(
        FIRST + SECOND,
        """
        forward %f0 = trace %model(%x)
          %h = read %model@h output
          %0 = read %model@h output
          %g = save %0
        """.replace("%0", "%g.1"),
        "(%h, %g)",
    )
    becomes(
        "%l = list []\n" + FIRST + SECOND + "%m = attr %l.append\n%n = call %m(%g) as method.append",
        """
        %l = list []
        forward %f0 = trace %model(%x)
          %h = read %model@h output
          %g.1 = read %model@h output
          %g = save %g.1
        %m = attr %l.append
        %n = call %m(%g) as method.append
        """,
    )


def test_a_write_to_a_site_is_none_to_the_input() -> None:
    between = "forward %f9 = trace %model(%x)\n  %0 = read %model@h output : f32[8, 4]\n  set_item %0[:] = 1\n"
    _, made, (remark,) = united(FIRST + between + SECOND)
    assert str(made).count("forward") == 2
    assert remark == "1: runs in the place of another forward on the same input"


def test_forwards_of_one_branch_are_one_and_those_of_two_are_two() -> None:
    both = indent(FIRST + SECOND, "  ")
    _, made, _ = united(f"if %k\nthen\n{both}  yield\nelse\n  yield")
    assert str(made).count("forward") == 1
    stays(f"if %k\nthen\n{indent(FIRST, '  ')}  yield\nelse\n{indent(SECOND, '  ')}  yield")
    stays(f"try\n{both}finally\n  %0 = global x")  # what moves may raise earlier


OTHER_INPUT = [
    SECOND.replace("%x", "%y"),
    SECOND.replace("%x", "%x, 1"),
    SECOND.replace("%x", "%x, mask=%x"),
    SECOND.replace("%model(", "%k(").replace("%model@", "%k@"),
    SECOND.replace("trace", "generate"),
]


@pytest.mark.parametrize("second", OTHER_INPUT)
def test_other_forwards_stay(second: str) -> None:
    stays(FIRST + second)


IN_BETWEEN = [
    "%0 = call %k(1)",  # it may be `optimizer.step()`
    "set_attr %k.scale = 1",
    "set_item %x[0] = 1",
    "%0 = %x += 1",
    "%0 = attr %x.zero_\n%1 = call %0() as torch.Tensor.zero_",
    "%0 = attr %k.half\n%1 = call %0() as torch.Tensor.half",
    "%0 = call %k(1) as torch.set_default_dtype",
    "with %0 = %k\n  %1 = attr %x.shape",
    "set_global PROMPT = %k",
    "forward %f9 = trace %model(%y)\n  %0 = read %model@h output\n  %1 = call %k(%0)",
    "for %i in %y\n  %0 = call %k(%i)\n  continue",
]


@pytest.mark.parametrize("between", IN_BETWEEN)
def test_nothing_is_united_across_what_may_change_the_model_or_its_input(between: str) -> None:
    line = 1 + len(FIRST.splitlines())
    second = line + len(between.splitlines())
    line += between.startswith("%0 = attr")
    why = f"line {line} comes between them, and may change the model or its input"
    stays(FIRST + between + "\n" + SECOND, f"{second}: an equal forward runs before it, but {why}")


BODIES = {
    "write %model@h output = 0": None,  # nobody would have hoped for it
    "skip %model@h = 0": None,
    "%0 = %g += 1": None,
    "%0 = call %k(%g)": "line 5 may change a value of it",
    "%0 = call %k(1)": "line 5 runs code that the compiler does not know",
    "%0 = call %k(%g) as torch.rand_like": "line 5 draws at random or sets what others go by",
    "stop %f1": "line 5 is more than a read",
    "%0 = closure u()\n    return %g": "line 5 is more than a read",
    "if %k\n  then\n    %0 = read %model@head output\n    yield\n  else\n    yield": (
        "line 5 needs what is made in between"
    ),
}


@pytest.mark.parametrize(("op", "why"), BODIES.items())
def test_a_forward_that_does_more_than_read_stays(op: str, why: str | None) -> None:
    remarks = [] if why is None else [f"3: an equal forward runs before it, but {why}"]
    stays(FIRST + SECOND + f"  {op}\n", *remarks)


def test_what_is_written_later_stays_apart() -> None:
    stays(FIRST + SECOND + "%0 = %g += 1")
    stays(FIRST + SECOND + "set_item %h[0] = 1")


def test_forwards_stay_where_gradients_are_asked_for() -> None:
    why = "gradients are asked for, and what is recorded of a forward serves one backward pass"
    backward = "%0 = attr %g.sum\n%1 = call %0() as torch.Tensor.sum\nbackward %1()"
    stays(FIRST + SECOND + backward, f"3: an equal forward runs before it, but {why}")
    stays((FIRST + SECOND).replace("(%x)", "(%x, grad=True)"), f"3: an equal forward runs before it, but {why}")


def test_a_model_that_cannot_be_trusted_is_left_alone() -> None:
    why = "the model is in training mode"
    stays(FIRST + SECOND, f"3: an equal forward runs before it, but {why}", why_not=why)


# --- what runs ---


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


def counted(module: nn.Module) -> tuple[list[int], object]:
    count: list[int] = []
    return count, module.register_forward_pre_hook(lambda *_: count.append(1))


@intervene
def patchscope(model, clean, corrupt, layers):
    rows = []
    for i in layers:
        for j in layers:
            with model.trace(clean):
                source = model.layers[i].output[0, -1]
            with model.trace(corrupt):
                model.layers[j].output[0, -1] = source
                logits = model.lm_head.output[0, -1]
            rows.append(logits)
    return torch.stack(rows)


def test_sources_of_a_patchscope_are_one_forward(tiny: LanguageModel) -> None:
    plain = tiny._ready()
    layers = (0, 1, 2)

    def patched(i: int, j: int) -> torch.Tensor:
        held: list[torch.Tensor] = []
        ids = [tiny._prepare((text,), {})[1]["input_ids"] for text in (CLEAN, CORRUPT)]
        blocks = plain.transformer.h

        def patch(_m: nn.Module, _a: object, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, -1] = held[0]
            return out

        with torch.no_grad():
            keep = blocks[i].register_forward_hook(lambda _m, _a, out: held.append(out[0, -1].clone()))
            plain(ids[0])
            keep.remove()
            change = blocks[j].register_forward_hook(patch)
            logits = plain(ids[1]).logits[0, -1]
            change.remove()
        return logits

    expected = torch.stack([patched(i, j) for i in layers for j in layers])
    patchscope(tiny, CLEAN, CORRUPT, layers)
    only = patchscope.with_options(without=["merge_forwards", "share_prefixes", "narrow"])
    only(tiny, CLEAN, CORRUPT, layers)
    count, handle = counted(plain)
    assert torch.equal(only(tiny, CLEAN, CORRUPT, layers), expected)
    assert len(count) == 10  # nine targets, and one source for all
    count.clear()
    assert torch.equal(patchscope.with_options(without="all")(tiny, CLEAN, CORRUPT, layers), expected)
    assert len(count) == 18
    handle.remove()
    text = str(only.lower(tiny, CLEAN, CORRUPT, layers))
    assert text.count("trace %model(%clean) stops after %model@transformer.h.2 output") == 1


@intervene
def both(model, x):
    with model.trace(x):
        first = model[0].output
    with model.trace(x):
        second = model[0].output
        third = model[1].output * 1
    return first, second, third


def test_results_are_tensors_of_their_own() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    model, x = NNsight(plain), torch.ones(1, 2)
    count, _ = counted(plain)
    both(model, x)
    count.clear()
    first, second, third = both(model, x)
    assert len(count) == 1
    with torch.no_grad():
        expected = plain[0](x)
    first += 1
    assert torch.equal(second, expected)
    assert torch.equal(first, expected + 1)
    assert torch.equal(third, expected.relu())


@intervene
def saved(model, x):
    with model.trace(x):
        first = (model[0].output * 2).save()
    with model.trace(x):
        second = (model[0].output * 2).save()
    return first, second


def test_saves_of_equal_values_are_tensors_of_their_own() -> None:
    plain = nn.Sequential(nn.Linear(2, 2)).eval()
    first, second = saved(NNsight(plain), torch.ones(1, 2))
    first += 1
    with torch.no_grad():
        assert torch.equal(second, plain[0](torch.ones(1, 2)) * 2)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize("why", ["training", "random", "gradient", "without"])
def test_where_two_forwards_may_differ_both_run(why: str) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), Noisy() if why == "random" else nn.ReLU()).train(why == "training")
    model, x = NNsight(plain), torch.ones(1, 2, requires_grad=why == "gradient")
    run = both.with_options(without="unite_forwards" if why == "without" else ())
    count, _ = counted(plain)
    first, second, _ = run(model, x)
    assert len(count) == 2
    if why == "gradient":
        first.sum().backward()
        second.sum().backward()
        torch.testing.assert_close(x.grad, 2 * plain[0].weight.sum(0, keepdim=True).detach())
    reasons = {"training": "in training mode", "random": "draws at random", "gradient": "requires a gradient"}
    remarks = [each.what for each in run.lower(model, x).compile().remarks if each.optimisation == "unite_forwards"]
    assert (why == "without" and not remarks) or (reasons[why] in remarks[0])


def test_an_input_that_requires_a_gradient_later_compiles_anew() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    model = NNsight(plain)
    count, _ = counted(plain)
    both(model, torch.ones(1, 2))
    both(model, torch.ones(1, 2))
    count.clear()
    x = torch.ones(1, 2, requires_grad=True)
    first, second, _ = both(model, x)
    assert len(count) == 2
    first.sum().backward()
    second.sum().backward()
    count.clear()
    both(model, torch.zeros(1, 2))
    assert len(count) == 1


def test_the_time_does_not_grow_with_the_square_of_the_forwards() -> None:
    def taken(count: int) -> float:
        parts = [
            f"forward %f{n} = trace %model(%x)\n  %h{n} = read %model@h.{n % 12} output\n  %i{n} = item %h{n}[:, -1]\n"
            f"forward %t{n} = trace %model(%y)\n  %a{n} = read %model@h.{n % 7} output\n"
            f"  set_item %a{n}[:, -1] = %i{n}\n  %o{n} = read %model@head output\n"
            for n in range(count)
        ]
        program = program_of("".join(parts))
        start = perf_counter()
        made = unite_forwards(program, Remarks(), lambda _: None)
        assert str(made).count("trace %model(%x)") == 1
        return perf_counter() - start

    taken(10)
    assert taken(160) < 16 * max(taken(40), 0.01)
