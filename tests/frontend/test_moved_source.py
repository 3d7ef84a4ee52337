"""Code that does not stand where it says: its file has changed, or IPython's autoreload compiled it by itself."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nnsight_compiler.frontend import Block, lower_block, lower_function
from nnsight_compiler.frontend.codes import alike
from nnsight_compiler.ir.errors import SourceNotFoundError

TEXT = """\
def first(model):
    # a comment, which no syntax tree has
    with model.trace("first"):
        a = 1
    with model.trace("second"):
        a = 2


class Study:
    def method(self, model):
        with model.trace("method"):
            c = 3


def last(model):
    with open(__file__), model.trace("last") as tracer:
        b = (4 +
             5)
    return [b for b in (1, 2)]
"""


class Model:
    """Lowers each block that traces it."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def trace(self, *args: Any) -> Model:
        return self

    def __enter__(self) -> Model:
        self.blocks.append(lower_block(sys._getframe(1)))
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    path = tmp_path / "moved.py"
    path.write_text(TEXT)
    specification = importlib.util.spec_from_file_location("moved", path)
    assert specification is not None
    assert specification.loader is not None
    made = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    return made


def rewrite(module: ModuleType, text: str) -> None:
    path = Path(str(module.__file__))
    path.write_text(text)
    os.utime(path, (2_000_000_000, 2_000_000_000))


def arguments(blocks: list[Block]) -> list[tuple[int, str]]:
    """The line of each block, and what is in its text of the four words."""
    words = ("= 1", "= 2", "= 3", "4 + 5", "(1,", "(2,", "(3,", "%b")
    return [(each.program.span.line, next(word for word in words if word in str(each.program))) for each in blocks]


def run_all(module: ModuleType) -> list[tuple[int, str]]:
    model = Model()
    module.first(model)
    module.Study().method(model)
    module.last(model)
    return arguments(model.blocks)


def test_lines_added_above_move_everything(module) -> None:
    before = run_all(module)
    assert [line for line, _ in before] == [3, 5, 11, 16]
    rewrite(module, "# one\n\n# three\n" + TEXT)
    assert run_all(module) == [(line + 3, text) for line, text in before]
    program = lower_function(module.last)
    assert program.span.line == 18
    assert "%b" in str(program)


def test_functions_that_were_compiled_by_themselves(module) -> None:
    before = run_all(module)
    tree = ast.parse(TEXT)
    for node in tree.body:
        alone = compile(ast.parse(ast.unparse(node)), str(module.__file__), "exec", dont_inherit=True)
        exec(alone, module.__dict__)
    assert module.last.__code__.co_firstlineno == 1  # where the file has another function
    assert run_all(module) == before
    assert lower_function(module.last).span.line == 15
    assert lower_function(module.Study.method).span.line == 10


def test_a_function_that_the_file_has_no_more(module) -> None:
    rewrite(module, "# nothing\n" * 30)
    message = (
        rf"{module.__file__}:15 no longer holds 'last': the file has changed since it was imported. Import it again"
    )
    with pytest.raises(SourceNotFoundError, match=message):
        lower_function(module.last)
    with pytest.raises(SourceNotFoundError, match="no longer holds 'first'"):
        module.first(Model())


def test_codes_are_alike_wherever_they_stand_and_only_where_they_do_the_same() -> None:
    def made(text: str) -> Any:
        return next(each for each in compile(text, "<string>", "exec").co_consts if hasattr(each, "co_code"))

    text = "def f(x):\n    g = lambda y: [z for z in (1, y)]\n    return g(x) if x in {1, 2} else 1.0\n"
    assert alike(made(text), made("\n\n# moved\n" + text.replace("(1, y)", "(1,\n\n    y)")))
    for old, new in (("1.0", "1"), ("1.0", "True"), ("(1, y)", "(2, y)"), ("{1, 2}", "{1, 3}"), ("f(x)", "h(x)"),
                     ("g(x)", "g(x) + x"), ("lambda y", "lambda z")):  # fmt: skip
        assert not alike(made(text), made(text.replace(old, new, 1))), new
