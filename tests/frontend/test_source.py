"""The source of a function is found wherever it stands, and no other function's."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnsight_compiler.frontend import lower_file, lower_function, lower_source
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.values import Literal


def keep(*functions: Any) -> list[Any]:
    return list(functions)


# fmt: off
LAMBDAS: list[tuple[Callable[..., Any], int]] = [
    (lambda: 10, 10), (lambda: 11, 11), (lambda x=1: 12, 12), (lambda: (13), 13), (lambda: (
        14), 14), *[(f, 15) for f in [lambda: 15] if f], ({"k": lambda: 16}["k"], 16), (lambda x=lambda: 1: 17, 17),
    ((lambda: lambda: 18)(), 18), (("ä", lambda: 19)[1], 19), (keep(lambda: 20, lambda: 21)[1], 21),
    (lambda
        : 22, 22),
]
one_line = lambda: 23  # noqa: E731
continued = lambda: \
    24  # noqa: E731
# fmt: on


@pytest.mark.parametrize(("function", "value"), [*LAMBDAS, (one_line, 23), (continued, 24)])
def test_lambda_is_told_from_others(function: Any, value: int) -> None:
    program = lower_function(function)
    (op,) = program.body.ops
    assert op.value == Literal(value)  # type: ignore[attr-defined]  # a return
    assert op.span.file == __file__
    lines = Path(__file__).read_text().splitlines()
    assert lines[op.span.line - 1][op.span.column : op.span.end_column] == str(value)


def test_lambda_is_told_from_others_without_columns(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "from nnsight_compiler.frontend import lower_function\n"
        "f = lambda x: x + 30\n"
        "print(str(lower_function(f)).count('+ 30'))\n"
        "g = [lambda: 1, lambda: 2]\n"
        "print(lower_function(g[1]).body.ops[0].value.value)\n"
        "h = [(lambda k: [lambda: k * 2, lambda: k * 2])(3)][0]\n"
        "try:\n    lower_function(h[0])\nexcept Exception as e: print(type(e).__name__)\n"
    )
    command = [sys.executable, "-X", "no_debug_ranges", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "SourceNotFoundError"]


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *args: function(*args))


def outer() -> Any:
    kept = 1
    if kept:

        @decorator
        @decorator  # a comment
        def inner(x: int) -> int:

            # a comment at the margin
            text = """
def inner(x): not this
"""
            return kept + len(text) + x
            # a comment at the end

    return inner


def one_liner():
    return 40


def follows() -> None:
    """Stands right after a function."""


def test_whole_function_and_no_more() -> None:
    program = lower_function(outer())
    assert program.name == "inner"
    assert "%kept = free kept" in str(program)
    assert [type(op).__name__ for op in program.body.ops][-1] == "Return"
    assert lower_function(one_liner).body.ops[0].value == Literal(40)  # type: ignore[attr-defined]
    assert lower_function(follows).body.ops == ()


def test_function_of_python_c() -> None:
    code = "from nnsight_compiler.frontend import lower_function\ndef f(x): return x\nprint(lower_function(f).name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "f\n"


TEXT = """
from nnsight_compiler import intervene as experiment
import nnsight_compiler as nc

def helper(model): pass

@experiment
def first(model):
    with model.trace("a"):
        h = model.x.output
    return h

class Study:
    @nc.intervene(cache=False)
    def second(self, __x):
        return __x

def plain(model, prompt):
    scale = 2
    with model.trace(prompt) as t:
        h = model.x.output * scale + OUTSIDE
    def deep():
        k = 1
        @nc.intervene
        def third(): return k, scale, OUTSIDE
        return third
    return h

with model.generate("a") as t:
    h = model.x.output
"""


def test_file_is_read_without_being_run(tmp_path: Path) -> None:
    path = tmp_path / "study.py"
    path.write_text(TEXT)
    programs = lower_file(path)
    assert [(each.kind, each.name) for each in programs] == [
        ("experiment", "first"), ("experiment", "second"), ("block", "plain"), ("experiment", "third"),
        ("block", "block"),
    ]  # fmt: skip
    _, second, plain, third, top = programs
    assert [each.value.name for each in second.parameters] == ["self", "_Study__x"]
    assert [each.value.name for each in plain.parameters] == ["model", "args", "kwargs", "scale"]
    assert "global OUTSIDE" in str(plain)
    assert "free k\n" in str(third)
    assert "free scale" in str(third)
    assert top.exports == ("t", "h")
    assert "generate %model" in str(top)


def test_function_is_chosen_by_name() -> None:
    assert lower_source(TEXT, name="Study.second").name == "second"
    assert "free scale" in str(lower_source(TEXT, name="plain.deep.third"))
    assert lower_source("    def f(): pass\n", first_line=5).span.line == 5
    for arguments in ({}, {"name": "none"}):
        with pytest.raises(CompileError):
            lower_source(TEXT, **arguments)


def test_lowering_is_quick_and_linear() -> None:
    def time_of(count: int) -> float:
        body = "".join(f"    if model:\n        x{n} = model.a[{n}].output\n    y{n} = x{n}\n" for n in range(count))
        text = f"def f(model):\n{body}"
        lower_source(text)
        start = time.process_time()
        lower_source(text)
        return time.process_time() - start

    small, large = min(time_of(20) for _ in range(3)), min(time_of(320) for _ in range(3))
    assert large < 16 * small * 4
