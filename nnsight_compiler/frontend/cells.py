"""Cells of notebooks: their names, and the code that magics such as `%%time` and `%%timeit` compile themselves.

A cell's own code is found as a file's is: IPython gives each cell a file name, and its text to `linecache`. Magics
compile a text under a name that says nothing (`<timed exec>`) and keep it nowhere. But what they were given is known:
it is an argument of the calls that are running, or stands in the history. Code is taken to come from such a text only
where the text compiles to code that does the same.
"""

from __future__ import annotations

import ast
import linecache
import sys
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import CodeType, FrameType
from typing import Any, final

from nnsight_compiler.frontend.codes import alike, codes_of

_MAGICS = ("run_cell_magic", "run_line_magic")
_RECENT = 500
"""How many cells of the history are searched, and how many texts are kept."""
_texts: dict[str, list[str]] = {}
"""The texts that `linecache` has from here, for messages and tracebacks."""
_TIMED: str = vars(timeit)["template"].format(init="", setup="pass", stmt="pass")


@final
@dataclass(frozen=True, slots=True)
class _Magic:
    """A call of a magic: `%name line` in a cell, or `%%name line` with the text below it."""

    cell: int
    name: str
    line: str
    body: str | None


def cell_name(file: str) -> str:
    """The name by which a reader knows a file: a cell's number, as in IPython's own tracebacks, or its own name."""
    naming = getattr(getattr(_shell(), "compile", None), "format_code_name", None)  # since IPython 8
    label = naming(file) if naming is not None else None
    return file if label is None else str(label[1])


def named(file: str, lines: Sequence[str]) -> str:
    """The name of a file as `cell_name` has it, under which `linecache` has the lines."""
    name = cell_name(file)
    return file if name == file else _remembered(name, list(lines))


def _remembered(name: str, lines: list[str]) -> str:
    """The name, or one like it where another text has it, under which `linecache` has the lines from now on."""
    while _texts.get(name, lines) != lines:
        name += "'"  # cells of a notebook that another one runs share a number
    _texts[name] = lines
    while len(_texts) > _RECENT:
        forgotten = next(iter(_texts))
        del _texts[forgotten]
        linecache.cache.pop(forgotten, None)
    linecache.cache[name] = sum(map(len, lines)), None, lines, name
    return name


def _shell() -> Any:
    """The IPython shell, or the kernel of a notebook, that this process is; `None` where it is neither."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def cell_of(code: CodeType) -> tuple[str, list[str], CodeType] | None:
    """The name and the lines of the cell that code comes from, and that code with the positions of these lines."""
    shell = _shell()
    if shell is None:
        return None
    for magic in chain(_running(shell), _entered(shell)):
        for lines, trees in _readings(shell, magic):
            for tree in trees:
                found = next((each for each in codes_of(tree, code) if alike(each, code)), None)
                if found is not None:
                    file = f"In[{magic.cell}]" if magic.body is not None else f"<%{magic.name} in In[{magic.cell}]>"
                    return _remembered(file, lines), lines, found
    return None


def _running(shell: Any) -> Iterator[_Magic]:
    """The magics that are running, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _MAGICS and frame.f_globals.get("__name__") == "IPython.core.interactiveshell":
            given, number = frame.f_locals, len(shell.user_ns.get("_ih", ())) - 1
            yield _Magic(number, given["magic_name"], given["line"], given.get("cell"))
        frame = frame.f_back


def _entered(shell: Any) -> Iterator[_Magic]:
    """The magics of the history, the last first."""
    history = list(enumerate(shell.user_ns.get("_ih", ())))
    for number, text in reversed(history[-_RECENT:]):
        if "_magic(" not in text:
            continue
        for node in ast.walk(_parsed(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MAGICS:
                match [str(each.value) for each in node.args if isinstance(each, ast.Constant)]:
                    case [name, line]:
                        yield _Magic(number, name, line, None)
                    case [name, line, body]:
                        yield _Magic(number, name, line, body)


def _readings(shell: Any, magic: _Magic) -> Iterator[tuple[list[str], Iterator[ast.Module]]]:
    """What a magic may take for its text, with the ways in which it may compile that.

    A line begins with the magic's own options, which only it can tell from the text.
    """
    words = magic.line.split(" ")
    rests = [shell.transform_cell(" ".join(words[number:])) for number in range(len(words))]
    if magic.body is not None:
        head = f"%%{magic.name} {magic.line}".rstrip() + "\n"
        text = shell.transform_cell(magic.body)
        yield [head, *text.splitlines(keepends=True)], _compilations(_parsed("\n" + text), [_parsed(r) for r in rests])
    else:
        for rest in rests:
            yield rest.splitlines(keepends=True), _compilations(_parsed(rest), [])


def _compilations(tree: ast.Module, setups: list[ast.Module]) -> Iterator[ast.Module]:
    """A text as it is, without the expression at its end (whose value is shown), and in the function of `timeit`."""
    if not tree.body:
        return
    yield tree
    if isinstance(tree.body[-1], ast.Expr):
        yield ast.Module(tree.body[:-1], [])
    for setup in [ast.Module([ast.Pass()], []), *setups]:
        timed = ast.parse(_TIMED)
        function = timed.body[0]
        assert isinstance(function, ast.FunctionDef), "the template of timeit is a function"
        loop = function.body[2]
        assert isinstance(loop, ast.For), "the template of timeit loops over its text"
        loop.body, function.body[:1] = tree.body, setup.body
        yield ast.fix_missing_locations(timed)


def _parsed(text: str) -> ast.Module:
    """The tree of a text; an empty one where it is not Python."""
    try:
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(text, "<string>", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
    assert isinstance(tree, ast.Module)
    return tree
