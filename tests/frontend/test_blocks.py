"""Undecorated blocks: found through the frame that enters them, and equal to the body that Python runs after it."""

from __future__ import annotations

import contextlib
import copy
import linecache
import subprocess
import sys
from typing import Any

import pytest

from nnsight_compiler.frontend import Block, lower_block
from nnsight_compiler.ir.errors import CompileError, SourceNotFoundError
from nnsight_compiler.ir.verifier import verify


class Tracer:
    pass


class Model:
    """Lowers each block that traces it, and then lets Python run it."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.frames: list[dict[str, Any]] = []
        self.arguments: tuple[Any, ...] = ()
        self.tracer = Tracer()

    def trace(self, *args: Any, **kwargs: Any) -> Model:
        self.arguments = (args, kwargs)
        return self

    def __enter__(self) -> Tracer:
        frame = sys._getframe(1)
        block = lower_block(frame)
        verify(block.program)
        self.blocks.append(block)
        self.frames.append(dict(frame.f_locals))
        return self.tracer

    def __exit__(self, *error: object) -> None:
        pass


def exported(model: Model, interpret: Any, nothing: Any, namespace: dict[str, Any]) -> dict[str, Any]:
    """What the block's program gives back, when it is run on the frame as it was."""
    block, before = model.blocks[-1], model.frames[-1]
    reads = [copy.deepcopy(before[name]) if name in before else nothing for name in block.reads]
    values = interpret(block.program, namespace, {})(model, *model.arguments, *reads)
    return {n: v for n, v in zip(block.program.exports, values, strict=True) if v is not nothing}


def assignments(model: Model, x: int = 2) -> dict[str, Any]:
    y = [1]
    unused = 0
    with model.trace("a", x, key=y) as t:
        z = x + 1
        x = z
        y.append(x)
        if x > 10:
            maybe = 1
        for i in range(3):
            y.append(i)
        q, (r, *s) = 1, (2, 3)
        (w := 5)
        import math  # noqa: F401

        def helper(n: int) -> int:
            return n + x

        total = [helper(n) for n in range(2)]
    return locals()


def deletes(model: Model) -> dict[str, Any]:
    a, b = 1, 2
    with model.trace():
        del a
        if b > 5:
            del b
    return locals()


def keeps_outer_value(model: Model) -> dict[str, Any]:
    a = 1
    with model.trace():
        if a > 5:
            a = 2
        b: int  # noqa: F842  # an annotation assigns nothing
    return locals()


def cells(model: Model) -> dict[str, Any]:
    a, c = 1, 5
    with model.trace() as t:
        with contextlib.suppress(ZeroDivisionError):
            a = 2
            b = 1 / 0
            c = 3
        count = 0

        def bump() -> None:
            nonlocal count
            count += a

        bump()
        bump()
    del bump
    return locals()


def further_items(model: Model) -> dict[str, Any]:
    with contextlib.nullcontext(1), model.trace() as t, contextlib.nullcontext("after") as n:
        x = n
    return locals()


def on_one_line(model: Model) -> dict[str, Any]:
    x = 3
    with model.trace(): y = x; z = y  # fmt: skip  # noqa: E701, E702
    return locals()


def long_header(model: Model) -> dict[str, Any]:
    with (
        contextlib.nullcontext(),
        model.trace(
            """a prompt
with a line that looks like a with:
"""
        ) as t,
    ):
        x = 1
    return locals()


def in_a_finally(model: Model) -> dict[str, Any]:
    try:
        x = 1
    finally:
        with contextlib.nullcontext(), model.trace() as t:
            y = x
    return locals()


def first_statement_is_decorated(model: Model) -> dict[str, Any]:
    with model.trace():
        global SOMETHING

        @lambda f: 3
        def x() -> None: ...

    return locals()


FUNCTIONS = [assignments, deletes, keeps_outer_value, cells, further_items, on_one_line, long_header, in_a_finally,
             first_statement_is_decorated]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_exports_are_what_python_assigns(function: Any, interpret: Any, nothing: Any) -> None:
    model = Model()
    after = function(model)
    found = exported(model, interpret, nothing, function.__globals__)
    block, before = model.blocks[-1], model.frames[-1]
    expected = {**before, **found}
    for name in block.program.exports:
        if name not in found:
            expected.pop(name, None)
    for names in (expected, after):
        names.pop("helper", None)
        names.pop("bump", None)
    assert {n: v for n, v in expected.items() if n != "y"} == {n: v for n, v in after.items() if n != "y"}


def lines_of(function: Any) -> Block:
    model = Model()
    function(model)
    return model.blocks[-1]


def test_reads_and_exports_of_a_block() -> None:
    block = lines_of(assignments)
    assert block.reads == ("x", "y", "maybe", "i")
    assert set(block.program.exports) == {*"tzxiqrsw", "maybe", "math", "helper", "total"}
    assert [p.value.name for p in block.program.parameters] == ["model", "args", "kwargs", *block.reads]
    assert [p.optional for p in block.program.parameters] == [False] * 3 + [True] * 4


def test_lines_of_blocks() -> None:
    start = assignments.__code__.co_firstlineno
    assert (lines_of(assignments).first_body_line, lines_of(assignments).same_line) == (start + 4, False)
    start = on_one_line.__code__.co_firstlineno
    assert (lines_of(on_one_line).first_body_line, lines_of(on_one_line).same_line) == (start + 2, True)
    assert lines_of(further_items).same_line
    start = long_header.__code__.co_firstlineno
    assert (lines_of(long_header).first_body_line, lines_of(long_header).same_line) == (start + 9, False)
    start = first_statement_is_decorated.__code__.co_firstlineno
    assert lines_of(first_statement_is_decorated).first_body_line == start + 4


def test_header_is_not_evaluated_again() -> None:
    program = lines_of(assignments).program
    assert str(program).splitlines()[1].split("#")[0].rstrip() == "  forward %t = trace %model(*%args, **%kwargs)"


def test_names_that_collide_with_the_three_given() -> None:
    def function(other: Model, model: int = 1, args: int = 2) -> dict[str, Any]:
        with other.trace():
            x = model + args
        return locals()

    block = lines_of(function)
    names = [parameter.value.name for parameter in block.program.parameters]
    assert names == ["model_", "args_", "kwargs", "model", "args"]


MODULE = """
import contextlib
x = 1
with model.trace("p") as t:
    y = x + 1
    x = y * 2
    if y > 100:
        z = 1
    def f(): return counted
    def count():
        global counted
        counted += 1
    counted = 1
    count()
    late = f()
    big = max(y, 3)
"""


def _module(text: str, file: str, model: Model) -> dict[str, Any]:
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace = {"model": model, "__name__": "cell"}
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    return namespace


def test_block_of_a_notebook_cell(interpret: Any, nothing: Any) -> None:
    model = Model()
    namespace = _module(MODULE, "<ipython-input-3-abc>", model)
    block = model.blocks[-1]
    assert block.reads == ("x", "z")
    assert set(block.program.exports) == {"t", "x", "y", "z", "f", "count", "late", "big"}
    before = {**model.frames[-1]}
    reads = [before.get(name, nothing) for name in block.reads]
    values = dict(zip(block.program.exports, interpret(block.program, before, {})(model, (), {}, *reads), strict=True))
    assert values.pop("z") is nothing
    for name in ("t", "x", "y", "late", "big"):
        assert values[name] == namespace[name]
    assert before["counted"] == namespace["counted"] == 2


def test_model_of_the_header_is_the_model_of_the_body() -> None:
    model = Model()
    model.x = 5  # type: ignore[attr-defined]
    _module("with model.trace():\n    h = model.x\n", "<cell-model>", model)
    assert "attr %model.x" in str(model.blocks[-1].program)
    assert model.blocks[-1].reads == ()


@pytest.mark.parametrize(
    ("jump", "word"),
    [("return 1", "return"), ("break", "break"), ("continue", "continue")],
)
def test_jumps_out_of_a_block_are_refused(jump: str, word: str) -> None:
    text = (
        f"def run(model):\n    for i in range(2):\n        with model.trace():\n            x = 1\n            {jump}\n"
    )
    file = f"<jump {word}>"
    model = Model()
    namespace = _module(text, file, model)
    with pytest.raises(CompileError) as caught:
        namespace["run"](model)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.span.file, diagnostic.span.line, diagnostic.span.column) == (file, 5, 12)
    assert diagnostic.reason.startswith(f"{word} cannot leave an undecorated block")
    assert "@intervene" in diagnostic.way_out


def test_loops_inside_a_block_may_jump() -> None:
    text = (
        "with model.trace():\n    for i in range(3):\n        if i: break\n    f = lambda: 1\n    def g(): return 2\n"
    )
    model = Model()
    _module(text, "<inner jump>", model)
    assert len(model.blocks) == 1


def test_context_that_does_not_show_its_model() -> None:
    model = Model()
    with pytest.raises(CompileError, match="does not show which model it traces") as caught:
        _module("c = model.trace()\nwith c as t:\n    x = 1\n", "<hidden>", model)
    assert (caught.value.diagnostics[0].span.line, caught.value.diagnostics[0].span.column) == (2, 5)


def test_block_without_source() -> None:
    with pytest.raises(SourceNotFoundError, match=r"intervene\.from_source\(text\)"):
        exec("with model.trace():\n    x = 1\n", {"model": Model()})


def test_block_of_python_c() -> None:
    code = """
import sys
from nnsight_compiler.frontend import lower_block
class M:
    def trace(self): return self
    def __enter__(self): print(lower_block(sys._getframe(1)).program.exports)
    def __exit__(self, *e): pass
with M().trace():
    found = 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("('found',)", "")
    hidden = code.replace("with M().trace():\n    found = 1", "exec('with M().trace():\\n    found = 1')")
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert "SourceNotFoundError" in done.stderr
