"""Errors name the true file, line and column, from wherever the code stands, and all of them at once."""

from __future__ import annotations

import functools
import importlib.util
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnsight_compiler.frontend import lower_file, lower_function, lower_source
from nnsight_compiler.ir.errors import CompileError, Diagnostic, SourceNotFoundError

HERE = Path(__file__)
FILLER = "\n".join(f"filler_{number} = {number}" for number in range(500))


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def at_the_top(model: Any) -> None:
    """Its docstring has a line
    at the left margin."""
    with model.trace("ä") as t:
        match t:  # HERE-match
            case 1:
                pass


def makes_nested() -> Callable[..., Any]:
    def nested(model: Any) -> Any:
        def deeper() -> Any:
            return "ä", (yield model)  # HERE-yield

        return deeper

    return nested


class Holder:
    @staticmethod
    @wrapped
    def method(model: Any) -> None:
        class Inner:  # HERE-class
            pass

    attribute = lambda x: [x, (yield x)]  # HERE-lambda  # noqa: E731


@wrapped
@functools.lru_cache
@wrapped
def decorated(
    model: Any,
) -> None:
    try:
        print(model)
    except* ValueError:  # HERE-star
        pass


def where(mark: str, text: str, source: str | None = None) -> tuple[int, int, int]:
    """The line on which a mark stands, and from where to where a text stands in it."""
    for number, line in enumerate((source or HERE.read_text()).splitlines(), start=1):
        if f"# HERE-{mark}" in line:
            column = line.index(text)
            return number, column, column + len(text)
    raise AssertionError(mark)


def diagnostics_of(call: Callable[[], Any]) -> tuple[Diagnostic, ...]:
    with pytest.raises(CompileError) as caught:
        call()
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("function", "mark", "text", "reason"),
    [
        (at_the_top, "match", "match t:", "the match statement is not supported"),
        (makes_nested(), "yield", "yield model", "a generator function cannot be an experiment"),
        (Holder.method, "class", "class Inner:", "a class cannot be defined inside an experiment"),
        (Holder.attribute, "lambda", "yield x", "a generator function cannot be an experiment"),
        (decorated, "star", "except* ValueError", "except* is not supported"),
    ],
)
def test_place_of_a_bad_construct(function: Any, mark: str, text: str, reason: str) -> None:
    (diagnostic,) = diagnostics_of(lambda: lower_function(function))
    line, column, _ = where(mark, text)
    span = diagnostic.span
    if mark == "star":
        line, column = line - 2, 4  # the whole statement is meant
    assert (span.file, span.line, span.column) == (__file__, line, column)
    assert diagnostic.reason == reason
    assert diagnostic.way_out
    if mark in ("yield", "lambda"):
        assert (span.end_line, span.end_column) == (line, column + len(text))


def test_carets_stand_under_the_construct() -> None:
    with pytest.raises(CompileError) as caught:
        lower_function(makes_nested())
    lines = str(caught.value).splitlines()
    line, column, _ = where("yield", "yield model")
    assert lines[0] == f"{__file__}:{line}:{column + 1}: a generator function cannot be an experiment"
    assert lines[2].index("^") - lines[1].index("yield") == 0
    assert lines[2].count("^") == len("yield model")


def test_all_mistakes_are_collected() -> None:
    text = (
        "def f(m):\n    class A: pass\n    if m:\n        match m:\n          case _: pass\n    await m\n    super()\n"
    )
    found = diagnostics_of(lambda: lower_source(text, "many.py", first_line=100))
    assert [(each.span.line, each.span.column) for each in found] == [(101, 4), (103, 8), (105, 4), (106, 4)]
    assert all(each.span.file == "many.py" for each in found)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("async def g(): pass", "asynchronous"),
        ("async with m: pass", "asynchronous"),
        ("async for x in m: pass", "asynchronous"),
        ("x = await m", "asynchronous"),
        ("x = yield from m", "generator"),
        ("return (lambda: (yield))", "generator"),
        ("return; yield", "generator"),
        ("global g; del g", "cannot be deleted"),
        ("from math import *", "star import"),
        ("super().x", "super()"),
        ("with m.trace() as t:\n        try: x = 1\n        finally: pass", "cannot surround part of a forward"),
        (
            "with m.trace(), m.invoke():\n        for i in m:\n            try: x = 1\n            finally: pass",
            "cannot",
        ),
        ("with m.backward() as b: pass", "no value to bind"),
        ("try: pass\n    except* E: pass", "except*"),
    ],
)
def test_what_is_left_out_is_refused_once(statement: str, reason: str) -> None:
    (diagnostic,) = diagnostics_of(lambda: lower_source(f"def f(m):\n    {statement}\n"))
    assert reason in diagnostic.reason
    assert diagnostic.way_out
    assert diagnostic.span.line >= 2


def test_try_around_a_forward_and_in_a_helper_are_fine() -> None:
    lower_source(
        "def f(m):\n    try:\n        with m.trace() as t:\n            def g():\n                try: return 1\n"
        "                finally: pass\n            x = g()\n    except ValueError: pass\n"
    )


def test_notebook_cell() -> None:
    text = f"{FILLER}\ndef f(model):\n    x = [1,\n         lambda: (await model)]  # HERE-await\n"
    file = "<ipython-input-7-0123>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {}
    runnable = text.replace("await model", "len  (model)")
    exec(compile(runnable, file, "exec"), namespace)
    (diagnostic,) = diagnostics_of(lambda: lower_function(namespace["f"]))
    line, column, end = where("await", "await model", text)
    span = diagnostic.span
    assert (span.file, span.line, span.column, span.end_column) == (file, line, column, end)
    assert line == 503


def test_text_that_does_not_parse() -> None:
    (diagnostic,) = diagnostics_of(lambda: lower_source("def f(m):\n    x = = 1\n", "broken.py", first_line=10))
    assert (diagnostic.span.file, diagnostic.span.line, diagnostic.span.column) == ("broken.py", 11, 8)
    assert "invalid syntax" in diagnostic.reason


def test_indented_text_that_does_not_parse() -> None:
    (diagnostic,) = diagnostics_of(lambda: lower_source("    def f(m):\n        x = = 1\n", "broken.py", first_line=10))
    assert (diagnostic.span.line, diagnostic.span.column) == (11, 12)


def test_file_that_does_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nif x\n    y = 2\n")
    (diagnostic,) = diagnostics_of(lambda: lower_file(path))
    assert (diagnostic.span.file, diagnostic.span.line, diagnostic.span.column) == (str(path), 2, 4)


def test_function_without_source() -> None:
    namespace: dict[str, Any] = {}
    exec("def f(x):\n    return x\n", namespace)
    with pytest.raises(SourceNotFoundError, match=r"intervene\.from_source\(text\)"):
        lower_function(namespace["f"])


def test_file_that_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text("x = 1\n\ndef f(x):\n    return x\n")
    specification = importlib.util.spec_from_file_location("changing", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert lower_function(module.f).name == "f"
    path.write_text("x = 1\ny = 2\nz = 3\ndef g(x):\n    return x\n\n\n")
    with pytest.raises(SourceNotFoundError, match="changed"):
        lower_function(module.f)
