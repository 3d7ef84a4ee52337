"""Random programs with code of the client's, split, against Python itself.

Each program is written twice from one tree: as an experiment, and as plain Python in which a forward is a run of the
plain module under hooks. What is returned or raised, what is printed, what the client's objects were told, and what is
in the lists that were given, must be the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from torch import nn
from two_sides import TwoSides

from nnsight_compiler import NNsight
from nnsight_compiler.ir.verifier import verify

LAYERS, WIDTH = 3, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


class Log:
    """An object that no job can hold."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.layer = 1

    def add(self, line: Any) -> int:
        self.lines.append(line.detach().clone() if isinstance(line, torch.Tensor) else line)
        return len(self.lines)

    def __enter__(self) -> int:
        return self.add("enter")

    def __exit__(self, *error: object) -> None:
        self.add("exit")


host = eval("lambda x: int(x.detach().abs().sum() * 10)")  # a function without source


def plain_run(net: Net, inputs: torch.Tensor, read: str, written: str | None, value: Any) -> torch.Tensor:
    """What the module `read` gives, where the output of the module `written` is filled with a value."""
    found: list[torch.Tensor] = []
    hooks = []
    if written is not None:

        def fill(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            changed[:] = value
            return changed

        hooks.append(net.get_submodule(written).register_forward_hook(fill))
    hooks.append(net.get_submodule(read).register_forward_hook(lambda module, args, output: found.append(output)))
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0].clone()


# --- programs, each statement as lines of both texts ---

Lines = list[tuple[str, str]]
"""Lines of the experiment, and of plain Python."""


def both(*lines: str) -> Lines:
    return [(line, line) for line in lines]


def indented(lines: Lines) -> Lines:
    return [(f"    {one}" if one else "", f"    {other}" if other else "") for one, other in lines]


TENSORS, NUMBERS = ("a", "b", "c"), ("m", "n")
tensors, numbers = st.sampled_from(TENSORS), st.sampled_from(NUMBERS)
layers = st.integers(0, LAYERS - 1)


@st.composite
def forwards(draw: st.DrawFn) -> Lines:
    """One forward, which reads one module, and may write another."""
    target, source = draw(tensors), draw(tensors)
    layer = draw(st.sampled_from(["0", "1", "2", "log.layer", "m % 3"]))
    written = draw(st.sampled_from([None, "number", "tensor", "client"]))
    if written is None:
        return [
            (f"with model.trace({source}):", f"{target} = plain({source}, 'layers.' + str({layer}), None, None)"),
            (f"    {target} = model.layers[{layer}].output.save()", ""),
        ]
    value = {"number": "n", "tensor": draw(tensors), "client": "log.layer"}[written]
    at = draw(layers)
    return [
        (f"with model.trace({source}):", f"{target} = plain({source}, 'head', 'layers.{at}', {value})"),
        (f"    model.layers[{at}].output[:] = {value}", ""),
        (f"    {target} = model.head.output.save()", ""),
    ]


@st.composite
def plain_statements(draw: st.DrawFn) -> Lines:
    t, u, n = draw(tensors), draw(tensors), draw(numbers)
    return both(
        draw(
            st.sampled_from(
                [
                    f"{n} = host({t})",
                    f"log.add({t})",
                    f"log.add({n})",
                    f"{n} = log.add('x') + {n}",
                    f"log.layer = {n} % 3",
                    f"{t} = ({t} + {u}).softmax(-1)",
                    f"{t} = {t}[:1].expand(2, 4) * 2",
                    f"{n} = {n} + 1",
                    f"{t} += 1",
                    f"{t}[0] = {n}",
                    f"acts.append({t})",
                    f"acts.append(({n}, {t}.clone()))",
                    f"print({n}, len(acts))",
                    f"print(round({t}.sum().item(), 2))",
                    f"{t} = function({t})",
                    f"{t} = mixed({t}, log)",
                    f"{t} = inner({t})",
                    f"{n} = sum(host(function(x)) for x in ({t}, {u}))",
                    f"{t} = torch.stack([function(x) for x in ({t}, {u})]).mean(0)",
                    f"acts += [{t}]",
                    f"if {n} % 4 == 0: raise ValueError({n})",
                ]
            )
        )
    )


CONDITIONS = ["n % 2 == 0", "host(a) % 2 == 1", "a.sum() > b.sum()", "len(acts) > 2", "log.add('c') % 2 == 0"]


@st.composite
def blocks(draw: st.DrawFn, depth: int, loop: bool) -> Lines:
    found: Lines = []
    for _ in range(draw(st.integers(1, 4))):
        found += draw(statements(depth, loop))
    return found


@st.composite
def statements(draw: st.DrawFn, depth: int, loop: bool) -> Lines:
    kinds = ["forward"] * 4 + ["plain"] * 5
    if depth:
        kinds += ["if", "if", "for", "for", "while", "try", "with", "session"]  # none stands inside another
    if loop:
        kinds += ["jump"]
    match draw(st.sampled_from(kinds)):
        case "forward":
            return draw(forwards())
        case "plain":
            return draw(plain_statements())
        case "jump":
            jump = draw(st.sampled_from(["break", "continue", "return a"]))
            return both(f"if {draw(st.sampled_from(CONDITIONS))}: {jump}")
        case "if":
            test = draw(st.sampled_from(CONDITIONS))
            made = [*both(f"if {test}:"), *indented(draw(blocks(depth - 1, loop)))]
            if draw(st.booleans()):
                made += [*both("else:"), *indented(draw(blocks(depth - 1, loop)))]
            return made
        case "for":
            head = draw(
                st.sampled_from(
                    ["for i in range(2):", "for i, c in enumerate([a, b]):", "for b in list(zip([a, b], 'xy'))[0][:1]:"]
                )
            )
            made = [*both(head), *indented(draw(blocks(depth - 1, True)))]
            if draw(st.booleans()):
                made += [*both("else:"), *indented(draw(blocks(depth - 1, loop)))]
            return made
        case "while":
            test = draw(st.sampled_from(["", " and host(a) > 3", " and function(a).sum() < 1000"]))
            body = indented(draw(blocks(depth - 1, True)))
            return [*both("steps = 0", f"while (steps := steps + 1) < 3{test}:"), *body]
        case "try":
            made = [*both("try:"), *indented(draw(blocks(depth - 1, loop)))]
            made += both("except ValueError as error:", "    log.add(str(error))")
            if draw(st.booleans()):
                made += [*both("else:"), *indented(draw(blocks(depth - 1, loop)))]
            if draw(st.booleans()):
                made += [*both("finally:"), *indented(draw(plain_statements()))]
            return made
        case "with":
            head = draw(st.sampled_from(["with torch.no_grad():", "with log as n:"]))
            return [*both(head), *indented(draw(blocks(depth - 1, loop)))]
        case "session":
            return [("with model.session():", "if True:"), *indented(draw(blocks(0, loop)))]
    raise AssertionError


HELPERS = [
    ("def function(x):", "def function(x):"),
    ("    with model.trace(x):", ""),
    ("        y = model.layers[1].output.save()", "    y = plain(x, 'layers.1', None, None)"),
    ("    return y * 2", "    return y * 2"),
    ("", ""),
    ("def mixed(x, log):", "def mixed(x, log):"),
    ("    number = log.add(x)", "    number = log.add(x)"),
    ("    with model.trace(x):", ""),
    ("        y = model.head.output.save()", "    y = plain(x, 'head', None, None)"),
    ("    return y + host(y) + number", "    return y + host(y) + number"),
    ("", ""),
]
INNER = [
    *both("def inner(x):", "    nonlocal m"),
    ("    with model.trace(x):", ""),
    ("        y = model.layers[0].output.save()", "    y = plain(x, 'layers.0', None, None)"),
    *both("    m = m + log.add('inner')", "    return y - 1"),
]


def texts(body: Lines) -> tuple[str, str]:
    head = both("def program(model, a, b, acts, log):", "    c, m, n = a * 2, 1, 2")
    whole = [*HELPERS, *head, *indented(INNER), *indented(body), *both("    return a, b, c, m, n, acts")]
    return tuple("\n".join(text for text in side if text) + "\n" for side in zip(*whole, strict=True))  # type: ignore[return-value]


# --- running them ---


def outcome(function: Any, model: Any, acts: list[Any], log: Log) -> tuple[Any, ...]:
    """What a program does: its result or error, what it printed, and what became of its arguments."""
    a, b = torch.linspace(-1, 1, 8).reshape(2, 4), torch.linspace(0, 2, 8).reshape(2, 4)
    shown = io.StringIO()
    result, error = None, None
    with contextlib.redirect_stdout(shown):
        try:
            result = function(model, a, b, acts, log)
        except (ValueError, UnboundLocalError, TypeError) as raised:
            error = type(raised).__name__, str(raised)
    return result, error, shown.getvalue(), a, b, acts, log.lines, log.layer


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True):
            yield f"{where}: {one} and {other}"
    elif type(one) is not type(other):
        yield f"{where}: {one!r} and {other!r}"
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {one} and {other}"
        for number, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from differences(left, right, f"{where}[{number}]")
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


torch.manual_seed(0)
NET = Net()


@examples(12)
@given(blocks(2, False))
def test_split_programs_do_what_python_does(body: Lines) -> None:
    split_text, plain_text = texts(body)
    file = "<random split program>"
    linecache.cache[file] = len(split_text), None, split_text.splitlines(keepends=True), file
    client = NNsight(copy.deepcopy(NET).to("meta"))
    worker = NNsight(NET)
    sides = TwoSides(client, worker)
    scope: dict[str, Any] = {"__name__": "users", "torch": torch, "host": host, "model": client}
    exec(compile(split_text, file, "exec"), scope)
    plain_scope: dict[str, Any] = {"torch": torch, "host": host, "plain": lambda *given: plain_run(NET, *given)}
    exec(compile(plain_text, "<plain>", "exec"), plain_scope)

    expected = outcome(plain_scope["program"], None, [], Log())
    found = outcome(lambda *given: sides.call(scope["program"], *given[1:]), client, [], Log())
    assert list(differences(found, expected)) == [], split_text
    made = sides.split(scope["program"], client, torch.ones(2, 4), torch.ones(2, 4), [], Log())
    assert made is not None
    verify(made.program)
