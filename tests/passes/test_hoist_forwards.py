"""Forwards that a loop repeats: text in, text out, where they must stay, and what runs, counted."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.hoist_forwards import hoist_forwards
from nnsight_compiler.passes.remarks import Remarks

HEADER = "experiment f(%model, %x, %y, %k)\n"
READ = "forward %f0 = trace %model(%x)\n  %h = read %model@h output : f32[2, 4]\n"
USE = (
    "forward %f1 = trace %model(%p)\n  %g = read %model@h output : f32[2, 4]\n  set_item %g[:] = %h\n"
    "  %o = read %model@head output\n"
)


def program_of(body: str, result: str = "None") -> Program:
    text = f"{HEADER}{indent(dedent(body).strip(), '  ')}\n  return {result}\n"
    lines = [f"{line}  # f.py:{number}" for number, line in enumerate(text.splitlines())]
    program = parse_program("\n".join(lines) + "\n")
    verify(program)
    return program


def hoisted(program: Program, kind: type = list, why_not: str | None = None) -> tuple[Program, list[str]]:
    remarks = Remarks()
    made = hoist_forwards(program, remarks, lambda _: why_not, lambda name: kind if name == "y" else None)
    verify(made)
    again = hoist_forwards(made, Remarks(), lambda _: why_not, lambda name: kind if name == "y" else None)
    assert again is made
    return made, [f"{each.span.line}: {each.what}" for each in remarks.made]


def loop(*parts: str, over: str = "%y") -> str:
    return f"for %p in {over}\n{indent(''.join(parts), '  ')}  continue\n"


def stays(body: str, *remarks: str, result: str = "None", kind: type = list, why_not: str | None = None) -> None:
    program = program_of(body, result)
    assert hoisted(program, kind, why_not) == (program, list(remarks))


def test_a_forward_runs_before_its_loop() -> None:
    made, remarks = hoisted(program_of(loop("%0 = global model\n", READ.replace("(%x)", "(%0)"), USE)))
    assert made == program_of(
        """
        %h = if %y : f32[2, 4]
        then
          %1 = global model
          forward %f0 = trace %model(%1)
            %h.1 = read %model@h output : f32[2, 4]
          yield %h.1
        else
          yield unbound
        for %p in %y
          %0 = global model
          forward %f1 = trace %model(%p)
            %g = read %model@h output : f32[2, 4]
            set_item %g[:] = %h
            %o = read %model@head output
          continue
        """
    )
    assert remarks == ["3: runs once, before the loop of line 1"]


def test_out_of_nested_loops_it_moves_as_far_as_it_may() -> None:
    made, remarks = hoisted(program_of(loop(loop(READ, USE).replace("%p in", "%q in").replace("(%p)", "(%q)"))))
    assert str(made).index("%h = if %y") < str(made).index("for %p in %y")
    assert len(remarks) == 2
    made, remarks = hoisted(program_of(loop(loop(READ.replace("(%x)", "(%p)"), USE).replace("%p in", "%q in"))))
    assert str(made).index("for %p in %y") < str(made).index("%h = if %y") < str(made).index("for %q in %y")
    assert len(remarks) == 1


def test_what_depends_on_the_round_stays_without_a_word() -> None:
    stays(loop(READ.replace("(%x)", "(%p)"), USE))
    stays(loop("%1 = %p + 1\n", READ, "  %i = item %h[%1]\n", USE))
    stays(loop(READ, "  write %model@h output = 0\n"))


LOOPS = {
    "%0 = call %k(%p)\n": "line 4 may change the model or what it is given",
    "set_item %x[0] = 1\n": "line 4 may change the model or what it is given",
    "set_global PROMPT = %p\n": "line 4 may change the model or what it is given",
    "%0 = %h += 1\n": "line 4 may change a value of it",
}


@pytest.mark.parametrize(("op", "why"), LOOPS.items())
def test_nothing_moves_where_a_round_may_change_what_it_gives(op: str, why: str) -> None:
    remarks = [] if "+=" in op else [f"2: it stands in the loop of line 1, but {why}"]
    stays(loop(READ, op), *remarks)


def test_effects_stay() -> None:
    why = "line 5 does more than compute a value"
    printing = "  %print = global print\n  %n = call %print(%h) as builtins.print\n"
    stays(loop(READ, printing), f"2: it stands in the loop of line 1, but {why}")
    why = "line 4 draws at random or sets what others go by"
    stays(loop(READ, "  %n = call %k(%h) as torch.rand_like\n"), f"2: it stands in the loop of line 1, but {why}")


def test_what_a_round_may_not_come_to_stays() -> None:
    leaving = "if %p\nthen\n  continue\nelse\n  yield\n"
    stays(loop(leaving, READ, USE), "7: it stands in the loop of line 1, but a round may end before it comes to it")
    stays(loop("if %p\nthen\n", indent(READ + USE, "  "), "  yield\nelse\n  yield\n"))
    inner = "for %q in %y\n  if %q\n  then\n    break\n  else\n    yield\n  continue\n"
    made, _ = hoisted(program_of(loop(inner, READ, USE)))
    assert "%h = if %y" in str(made)
    stays("try\n" + indent(loop(READ, USE), "  ") + "finally\n  %0 = global x")
    stays(f"while\n  yield %k\ndo\n{indent(READ, '  ')}  continue")


def test_what_cannot_be_asked_for_its_length_is_not_read() -> None:
    why = "whether the loop has a round cannot be asked for without reading what it goes over"
    for kind in (type(iter([])), torch.Tensor, type("List", (list,), {})):
        stays(loop(READ, USE), f"2: it stands in the loop of line 1, but {why}", kind=kind)
    stays(loop(READ, USE, over="%k"), f"2: it stands in the loop of line 1, but {why}")
    ranged = "%r = global range\n%n = call %r(%k) as builtins.range\n" + loop(READ, USE, over="%n")
    assert "%h = if %n" in str(hoisted(program_of(ranged))[0])


def test_what_each_round_keeps_stays() -> None:
    why = "each round keeps a `h` of its own, or changes it"
    kept = "%l = list []\n" + loop(READ, "%m = attr %l.append\n%n = call %m(%h) as method.append\n")
    stays(kept, f"3: it stands in the loop of line 2, but {why}", result="%l")
    stays(loop(READ, USE), "2: it stands in the loop of line 1, but the model is random", why_not="the model is random")


# --- what runs ---


@intervene
def sweep(model, source, inputs, strengths):
    results = []
    for x in inputs:
        for strength in strengths:
            with model.trace(source):
                hidden = model[0].output
            with model.trace(x):
                model[0].output[:] = hidden * strength
                results.append(model[2].output)
    return results


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def network(middle: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), middle or nn.ReLU(), nn.Linear(4, 2)).eval()


ONLY = ["merge_forwards", "share_prefixes", "narrow", "fuse_calls"]


def counted(plain: nn.Module) -> list[int]:
    count: list[int] = []
    plain.register_forward_pre_hook(lambda *_: count.append(1))
    return count


def test_the_source_runs_once_and_the_results_are_the_same() -> None:
    plain = network()
    source, inputs, strengths = torch.randn(2, 3), [torch.randn(2, 3) for _ in range(2)], [0.5, 1.0, 2.0]
    with torch.no_grad():
        expected = [plain[2](plain[1](plain[0](source) * strength)) for _ in inputs for strength in strengths]
    count = counted(plain)
    for without, forwards in ((ONLY, 7), ("all", 12)):
        count.clear()
        found = sweep.with_options(without=without)(NNsight(plain), source, inputs, strengths)
        assert len(count) == forwards
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_without_rounds_nothing_runs() -> None:
    plain = network()
    count, model, source = counted(plain), NNsight(plain), torch.ones(1, 3)
    run = sweep.with_options(without=ONLY)
    assert len(run(model, source, [source], [1.0])) == 1
    count.clear()
    assert run(model, source, [], [1.0]) == run(model, source, [source], []) == []
    assert run(model, torch.ones(5, 7), [], [1.0]) == []  # which the model could not be given
    assert count == []


def test_an_iterable_of_another_kind_is_compiled_for_anew() -> None:
    plain = network()
    count, model, source = counted(plain), NNsight(plain), torch.ones(1, 3)
    run = sweep.with_options(without=ONLY)
    expected = run(model, source, [source], [1.0, 2.0])
    count.clear()
    found = run(model, source, iter([source]), [1.0, 2.0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(count) == 3  # out of the loop over strengths alone
    count.clear()
    assert len(run(model, source, [source], (1.0, 2.0))) == 2
    assert len(count) == 3


@pytest.mark.parametrize("why", ["training", "random", "gradient"])
def test_where_rounds_may_differ_each_has_its_forward(why: str) -> None:
    plain = network(Noisy() if why == "random" else None).train(why == "training")
    count, source = counted(plain), torch.ones(1, 3, requires_grad=why == "gradient")
    run = sweep.with_options(without=ONLY)
    run(NNsight(plain), source, [torch.ones(1, 3)], [1.0, 2.0])
    assert len(count) == 4
    reasons = {"training": "in training mode", "random": "draws at random", "gradient": "requires a gradient"}
    compiled = run.lower(NNsight(plain), source, [torch.ones(1, 3)], [1.0, 2.0]).compile()
    assert any(reasons[why] in each.what for each in compiled.remarks if each.optimisation == "hoist_forwards")
