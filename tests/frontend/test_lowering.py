"""The shape of lowered programs: forwards and their sites, what loops carry, what is a cell, what stays immediate."""

from __future__ import annotations

import textwrap

import pytest

from nnsight_compiler.frontend import lower_source
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Literal, Slice, Tuple
from nnsight_compiler.ir.verifier import verify


def lower(text: str) -> Program:
    program = lower_source(textwrap.dedent(text))
    verify(program)
    assert parse_program(str(program)) == program
    return program


def found(program: Program, kind: type[ops.Op]) -> list[ops.Op]:
    return [op for op in program.walk() if isinstance(op, kind)]


def printed(text: str) -> str:
    """The IR without the comments that name source lines."""
    lines = [line.split("  #")[0].rstrip() for line in str(lower(text)).splitlines()]
    return "\n".join(lines) + "\n"


def test_activation_patching() -> None:
    text = """
    def patch(model, clean, corrupt, layer, position):
        with model.trace(clean):
            source = model.layers[layer].output[:, position]
        with model.trace(corrupt) as t:
            model.layers[layer].output[:, position] = source
            model.layers[-1].mlp.input += 1
            logits = model.lm_head.output[:, -1].save()
        return logits.softmax(-1)
    """
    assert printed(text) == textwrap.dedent(
        """\
        experiment patch(%model, %clean, %corrupt, %layer, %position)
          forward %0 = trace %model(%clean)
            %1 = attr %model.layers
            %2 = item %1[%layer]
            %3 = read %2 output
            %source = item %3[:, %position]
          forward %t = trace %model(%corrupt)
            %4 = attr %model.layers
            %5 = item %4[%layer]
            %6 = read %5 output
            set_item %6[:, %position] = %source
            %7 = attr %model.layers
            %8 = item %7[-1]
            %9 = attr %8.mlp
            %10 = read %9 input
            %11 = %10 += 1
            write %9 input = %11
            %12 = attr %model.lm_head
            %13 = read %12 output
            %14 = item %13[:, -1]
            %logits = save %14
          %15 = attr %logits.softmax
          %16 = call %15(-1)
          return %16
        """
    )


def test_independent_iterations_carry_nothing() -> None:
    text = """
    def run(model, prompts):
        out = []
        for prompt in prompts:
            with model.trace(prompt):
                h = model.layers[0].output
                if h.sum() > 0:
                    h = h * 2
            out.append(h)
        return out
    """
    (loop,) = found(lower(text), ops.For)
    assert isinstance(loop, ops.For)
    assert loop.results == loop.initial == ()
    assert not found(lower(text), ops.Cell)
    assert not found(lower(text), ops.Bound)


def test_only_what_is_live_is_carried() -> None:
    text = """
    def run(xs):
        total = 0
        last = None
        for x in xs:
            scratch = x * 2
            total += scratch
            last = x
        return total, last
    """
    (loop,) = found(lower(text), ops.For)
    assert isinstance(loop, ops.For)
    assert [value.name.split(".")[0] for value in loop.results] == ["total", "last"]
    assert loop.initial == (Literal(0), Literal(None))


@pytest.mark.parametrize(
    ("port", "store"),
    [("output", "model.a.output = 0"), ("input", "model.a.input = 0"), ("inputs", "model.a.inputs = 0")],
)
def test_sites_are_sites_inside_a_forward_only(port: str, store: str) -> None:
    read = f"x = model.a.{port}"
    inside = lower(f"def f(model):\n    with model.trace():\n        {store}\n        {read}\n")
    assert [op.port for op in found(inside, ops.Read) + found(inside, ops.Write)] == [port, port]  # type: ignore[attr-defined]
    outside = lower(f"def f(model):\n    {store}\n    {read}\n")
    assert not found(outside, ops.Read) + found(outside, ops.Write)
    assert (len(found(outside, ops.SetAttribute)), len(found(outside, ops.Attribute))) == (1, 3)


def test_nested_functions_in_a_forward_take_part_in_it() -> None:
    program = lower(
        """
        def f(model):
            with model.trace():
                a = [m.output for m in model.layers]
                get = lambda m: m.output.save()
                def change(m): m.output *= 2
            late = lambda m: m.output.save()
        """
    )
    assert len(found(program, ops.Read)) == 3
    assert len(found(program, ops.Write)) == len(found(program, ops.Save)) == 1


def test_save_with_arguments_is_a_call() -> None:
    program = lower(
        "def f(model, torch):\n    with model.trace():\n        torch.save(1, 'p')\n        list().save()\n"
    )
    assert len(found(program, ops.Save)) == 1


def test_invokes_backward_and_contexts() -> None:
    program = lower(
        """
        def f(model, path):
            with model.generate("a", max_new_tokens=3) as tracer, torch.no_grad():
                with tracer.invoke("b"):
                    x = model.a.output
                with tracer.invoke():
                    loss = x.sum()
            with loss.backward(retain_graph=True):
                g = x.grad.save()
                x.grad = g * 2
            with open(path) as file:
                inner = 1
            return g, x.grad
        """
    )
    (forward,) = found(program, ops.Forward)
    assert isinstance(forward, ops.Forward)
    assert (forward.method, forward.arguments[1].keyword) == ("generate", "max_new_tokens")
    assert isinstance(forward.body.ops[-1], ops.With)
    kinds = (ops.Invoke, ops.Backward, ops.Grad, ops.SetGrad, ops.With)
    assert [len(found(program, kind)) for kind in kinds] == [2, 1, 1, 1, 2]
    assert not found(program, ops.Cell)


def test_return_inside_a_forward_ends_the_program() -> None:
    program = lower(
        """
        def f(model):
            with model.trace():
                return model.a.output
                model.b.output = 1
            print("never")
        """
    )
    assert [type(op).__name__ for op in program.walk()] == ["Forward", "Attribute", "Read", "Return"]


def test_immediates_need_no_ops() -> None:
    program = lower("def f(x):\n    a, b = -1, (2, 'c')\n    return x[a:b, ..., None], b, a\n")
    item, returned = program.body.ops
    assert isinstance(item, ops.Item)
    both = Tuple((Literal(2), Literal("c")))
    assert item.index == Tuple((Slice(Literal(-1), both), Literal(...), Literal(None)))
    assert isinstance(returned, ops.Return)
    assert returned.value == Tuple((item.result, both, Literal(-1)))


@pytest.mark.parametrize(
    ("body", "cells"),
    [
        ("x = 1\n    f = lambda: x\n    return f", []),
        ("x = 1\n    x = 2\n    return lambda: x", []),
        ("if p: x = 1\n    else: x = 2\n    return lambda: x", []),
        ("f = lambda: x\n    x = 1\n    return f", ["x"]),
        ("x = 1\n    f = lambda: x\n    x = 2\n    return f", ["x"]),
        ("for x in p: p(lambda: x)", ["x"]),
        ("for x in p: pass\n    return lambda: x", []),
        ("def g(): return g\n    return g", ["g"]),
        ("x = 1\n    def g():\n        nonlocal x\n        x = 2\n    g()\n    return x", ["x"]),
        ("try: x = 1\n    except E: x = 2\n    return x", ["x"]),
        ("try:\n        x = 1\n        p(x)\n    finally: p()", []),
        ("with p(): x = 1\n    return x", ["x"]),
        ("with p() as c: p(c)", []),
        ("with torch.no_grad(): x = 1\n    return x", []),
        ("with p.trace() as t: x = 1\n    return x, t", []),
        ("return [lambda: y for y in p]", ["y"]),
        ("return [y for y in p], sum(y + p for y in p)", []),
    ],
)
def test_cells_stand_only_where_memory_is_needed(body: str, cells: list[str]) -> None:
    program = lower(f"def f(p):\n    {body}\n")
    assert [op.name for op in found(program, ops.Cell)] == cells  # type: ignore[attr-defined]


def test_every_op_has_its_place() -> None:
    program = lower_source(
        "def f(x):\n    y = [a.b for a in x]\n    return y[0](x, k=x + 1)\n", "place.py", first_line=7
    )
    spans = {str(op.span) for op in program.walk()}
    assert spans == {
        "place.py:8:9", "place.py:8:23", "place.py:8:10", "place.py:9:5", "place.py:9:12", "place.py:9:22",
    }  # fmt: skip
    assert {op.span.file for op in program.walk()} == {"place.py"}
