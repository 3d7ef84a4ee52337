"""Random host programs mean the same as Python's own compilation of them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples

from nnsight_compiler.frontend import lower_source
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.runtime.functions import generate_function

NAMES = st.sampled_from(["a", "b", "c", "d"])
STEPS = 60
"""How many effects a program may have before it is stopped: some loop for ever."""


class EndlessError(Exception):
    pass


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


@st.composite
def expressions(draw: Any, depth: int = 2) -> str:
    simple = st.one_of(NAMES, NAMES, st.integers(-3, 4).map(str))
    if not depth:
        return str(draw(simple))
    inner = expressions(depth - 1)
    kind = draw(st.integers(0, 15))
    if kind < 4:
        return str(draw(simple))
    one, two, three, name = draw(inner), draw(inner), draw(inner), draw(NAMES)
    return [
        f"log({one})",
        f"({one} - {two})",
        f"({one} and {two})",
        f"({one} or {two} or {three})",
        f"({one} if {two} else {three})",
        f"({one} < {two} <= {three})",
        f"({name} := {one})",
        f"[{name} for {name} in items({one}) if {two}]",
        f"[{name} := {one} for e in items({two})]",
        f"(lambda: {one})()",
        f"(lambda {name}={one}: {two})()",
        f"sum(e - number({one}) for e in items({two}))",
    ][kind - 4]


@st.composite
def blocks(draw: Any, depth: int, in_loop: bool, prefix: str) -> list[str]:
    lines: list[str] = []
    for number in range(draw(st.integers(1, 3))):
        lines += draw(statements(depth, in_loop, f"{prefix}{number}"))
    return lines


@st.composite
def statements(draw: Any, depth: int, in_loop: bool, prefix: str) -> list[str]:
    one, two = draw(expressions()), draw(expressions(1))
    name, other = draw(NAMES), draw(NAMES)
    kind = draw(st.integers(0, 19 if depth else 8))
    if kind < 4:
        return [f"{name} = {one}"]
    match kind:
        case 4:
            return [f"{name} -= {one}"]
        case 5:
            return [f"log({one})"]
        case 6:
            return [f"{name}, {other} = {one}, {two}"]
        case 7:
            jump = draw(st.sampled_from([f"return {one}", f"raise ValueError({one})", "break", "continue"]))
            return [jump] if in_loop or jump not in ("break", "continue") else [f"del {name}"]
        case 8:
            return [f"fs.append(lambda: {one})"]
    inner = blocks(depth - 1, in_loop, prefix)
    body = _indented(draw(inner))
    orelse = _indented(draw(inner))
    looped = _indented(draw(blocks(depth - 1, True, prefix)))
    match kind:
        case 9 | 10 | 11:
            return [f"if {one}:", *body, *draw(st.sampled_from([[], ["else:", *orelse], [f"elif {two}:", *orelse]]))]
        case 12 | 13:
            return [f"for {name} in items({two}):", *looped, *draw(st.sampled_from([[], ["else:", *orelse]]))]
        case 14:
            return [f"while log({one}):", *looped, *draw(st.sampled_from([[], ["else:", *orelse]]))]
        case 15:
            return ["while True:", "    log(0)", *looped]
        case 16:
            named = draw(st.sampled_from(["", f" as {name}"]))
            last = draw(st.sampled_from([[], ["else:", *orelse], ["finally:", "    log('finally')"]]))
            return ["try:", *body, f"except (ValueError, NameError){named}:", "    log('caught')", *orelse, *last]
        case 17:
            return [f"with context(log({two})) as {name}:", *body]
        case 18:
            function = f"f{prefix}"
            declared = draw(st.sampled_from([[], [f"    nonlocal {other}"]]))
            own = _indented(draw(blocks(0, False, prefix)))
            return [f"def {function}({name}={two}):" if name != other or not declared else f"def {function}():",
                    *declared, *own, f"log({function}())"]  # fmt: skip
        case _:
            return ["try:", *body, "finally:", f"    log({two})"]


@st.composite
def programs(draw: Any) -> str:
    body = [f"d = {draw(expressions(0))}" if draw(st.booleans()) else "pass", *draw(blocks(3, False, "_"))]
    return "\n".join(["def program(log, a, b, c=2):", "    fs = []", *_indented(body),
                      "    return a, b, c, d, [f() for f in fs]"]) + "\n"  # fmt: skip


class _Context:
    def __init__(self, swallow: Any) -> None:
        self.swallow = bool(swallow)

    def __enter__(self) -> int:
        return 7

    def __exit__(self, kind: Any, *rest: Any) -> bool:
        return self.swallow and kind is ValueError


def _items(value: Any) -> list[Any]:
    return list(range(value % 4)) if isinstance(value, int) else [1, 2]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 1


NAMESPACE = {"items": _items, "number": _number, "context": _Context}


def _outcome(function: Any, *args: Any) -> Any:
    logged: list[str] = []

    def log(value: Any) -> Any:
        if len(logged) > STEPS:
            raise EndlessError
        logged.append(repr(value) if not isinstance(value, Exception) else type(value).__name__)
        return value

    try:
        result = repr(function(log, *args))
        if "Error" in result or "0x" in result:
            result = "not comparable"
        return "returned", result, logged
    except RecursionError:
        return "recursion"
    except EndlessError:
        return "endless", logged
    except Exception as error:
        kind = NameError if isinstance(error, NameError) else type(error)
        return "raised", kind.__name__, logged


@examples(25)
@given(programs())
def test_random_program_means_what_python_means(interpret: Any, text: str) -> None:
    namespace: dict[str, Any] = dict(NAMESPACE)
    try:
        exec(compile(text, "<random>", "exec", dont_inherit=True), namespace)
    except SyntaxError:
        return  # a name that is both a parameter and nonlocal, or a walrus on a comprehension's own variable
    program = lower_source(text)
    assert parse_program(str(program)) == program
    interpreted = interpret(program, namespace, {}, {"c": 2})
    generated = generate_function(program, namespace, {}, {"c": 2})
    for args in ((0, 1), (3, 0)):
        expected = _outcome(namespace["program"], *args)
        assert _outcome(interpreted, *args) == expected
        assert _outcome(generated, *args) == expected
