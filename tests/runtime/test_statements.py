"""Generated functions against the Python functions that they were lowered from: values, effects, errors, lines."""

from __future__ import annotations

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from nnsight_compiler.frontend import lower_function
from nnsight_compiler.runtime.functions import generate_function

Log = Callable[..., Any]

setting = 10
counter = 0


class Failing:
    """Raises where it is told to, and says what was asked of it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __bool__(self) -> bool:
        self.log("bool")
        return True

    def __getattr__(self, name: str) -> Any:
        object.__getattribute__(self, "log")(name)
        if name.startswith("bad"):
            raise AttributeError(f"no {name}")
        return self

    def __getitem__(self, index: Any) -> Any:
        self.log(index)
        return index

    def __setitem__(self, index: Any, value: Any) -> None:
        self.log(index, value)

    def __call__(self, *values: Any, **named: Any) -> Any:
        self.log(values, named)
        return self

    def __iadd__(self, other: Any) -> Any:
        self.log("+=", other)
        return self

    def __format__(self, specification: str) -> str:
        self.log("format", specification)
        return f"<{specification}>"


class Context:
    def __init__(self, log: Log, swallow: bool = False) -> None:
        self.log, self.swallow = log, swallow

    def __enter__(self) -> Context:
        self.log("enter")
        return self

    def __exit__(self, kind: Any, *rest: Any) -> bool:
        self.log("exit", kind)
        return self.swallow


# --- the functions ---


def glue(log: Log, n: int) -> Any:
    x = Failing(log)
    y = x.first.second(log(1), log(2), key=log(3))[log(4) : log(5), n]
    x[log(6)] = log(7)
    x.name.other[n].bad  # noqa: B018
    return y


def order(log: Log, n: int) -> Any:
    a, (b, *c), d = log(1), [log(2), log(3), log(4)], log(5)
    first = [log(6), *(log(7), log(8)), log(9)]
    second = {log("k"): log("v"), **{log("a"): log("b")}, "z": n}
    third = {log(1), log(2)}
    return a, b, c, d, first, second, third, (*first, n)


def operators(log: Log, n: int) -> Any:
    x = n
    x += log(2)
    x *= 3
    x -= 1
    x //= 2
    x **= 2
    x %= 7
    x <<= 2
    x |= 1
    x ^= 3
    x &= 15
    x >>= 1
    x /= 2
    items = [1]
    same = items
    items += [n]
    return x, items is same, items, -n, +n, ~n, not n, n @ 2 if n > 100 else 0, -(1**2), 2**-1, -0.0


def comparisons(log: Log, n: int) -> Any:
    return (
        1 < log(n) < log(3) <= log(4),
        n == 2,
        n != 2,
        n is None,
        n is not None,
        n in (1, 2),
        n not in [1, 2],
        n > 1 >= 0,
        log(0) and log(1),
        log(0) or log(5),
        log(1) if n > 2 else log(2),
        not (n and log(n)),
    )


def strings(log: Log, n: int) -> Any:
    width = 8
    text = "é\n'\""
    x = Failing(log)
    return (
        f"{n}",
        f"{text!r:>{width}} {text!s} {text!a}",
        f"{n + 1:0{width}d} {{}} {'a'}",
        f"{n / 3:.2f}{x:{log(3)}}",
        f"{n=}",
        f"",  # noqa: F541
        f"{x!r:.{2}}"[:0],
        "ab",
    )


def branches(log: Log, n: int) -> Any:
    if n == 0:
        x = "zero"
        log(x)
    elif n == 1:
        x = "one"
    elif n == 2:
        return log("early")
    else:
        if log(n):
            x = "many"
    if n > 10:
        pass
    else:
        log(x)
    return x


def sums(log: Log, n: int) -> Any:
    total, last = 0, None
    for i in range(10):
        if i == n:
            continue
        if i > n + 4:
            break
        total, last = total + i, total
        log(total)
    else:
        last = "all"
        log("else")
    return total, last


def nested_loops(log: Log, n: int) -> Any:
    found = []
    for i in range(4):
        for j in range(4):
            if j == n:
                break
            if (i + j) % 3 == 0:
                continue
            found.append((i, j))
        else:
            log(i)
            continue
        if i == 2:
            break
    else:
        found.append("end")
    return found, i, j


def whiles(log: Log, n: int) -> Any:
    a, b = 0, 1
    while a < 100 and log(n) < 3:
        a, b = b, a + b
        if a % 7 == 0:
            log("skip")
            continue
        if a == 34:
            break
    else:
        log("else")
        b = -1
    while (m := log(a) - 1) > 90 or m == n:
        a = m
        if a == 95:
            break
    else:
        log("other")
    k = 0
    while True:
        k += 1
        if k > n:
            return a, b, m, k


def outer_break_in_else(log: Log, n: int) -> Any:
    i = 0
    for i in range(5):
        j = 0
        while (j := j + 1) < 3:
            log(j)
            if j == n:
                break
        else:
            if i == 2:
                break
            continue
        log("after", i)
    return i


def swaps(log: Log, n: int) -> Any:
    a, b, c = 1, 2, 3
    for i in range(n):
        a, b, c = b, c, a
        if i == 3:
            a, b = b, a
            continue
        b = a
    return a, b, c


def finals(log: Log, n: int) -> Any:
    for i in range(4):
        before = i * 10
        try:
            if i == n:
                continue
            if i == n + 1:
                break
            log("body", i)
            if n == 5:
                return log("return")
        finally:
            log("finally", before)
    else:
        log("else")
    try:
        pass
    finally:
        log("done")
    return i


def carried_through_finally(log: Log, n: int) -> Any:
    a = 0
    for i in range(4):
        old = a
        a = a + i
        try:
            if i == n:
                continue
            log("kept", a)
        finally:
            log(old, a)
    return a


def finally_wins(log: Log, n: int) -> Any:
    for i in range(3):
        try:
            return log("no", i)
        finally:
            if i == n:
                break  # noqa: B012
            continue  # noqa: B012
    return "left"


def catches(log: Log, n: int) -> Any:
    result = "none"
    for i in range(4):
        try:
            log("try", i)
            if i == 0:
                [][n]
            elif i == 1:
                {}[n]
            elif i == 2:
                raise ValueError(log("raised")) from None
            result = i
        except IndexError:
            log("index")
        except (KeyError, TypeError if n else OSError) as error:  # noqa: B030
            log(str(error), type(error))
            result = "key"
        except ValueError as error:
            kept = error
            log(kept.args)
            if n == 3:
                raise
            if n == 4:
                raise RuntimeError("other") from error
        else:
            log("else", result)
    return result


def catches_all(log: Log, n: int) -> Any:
    try:
        return 1 / n
    except:  # noqa: E722
        return log("any")


def swallowing(log: Log, n: int) -> Any:
    x = 1
    with Context(log, True) as context, Context(log):
        log(context is not None)
        x = 2
        if n:
            raise ValueError("swallowed")
        x = 3
    with contextlib.suppress(ZeroDivisionError):
        x = x / n
    return x


def unbound(log: Log, n: int) -> Any:
    if n:
        x = 1
    for _ in range(n):
        y = n
    log("before")
    if n == 1:
        del x
    return y, x


def unbound_in_try(log: Log, n: int) -> Any:
    try:
        if n:
            raise ValueError
        z = 1
    except ValueError:
        log("caught")
    return z


def closures(log: Log, n: int) -> Any:
    made = []
    for i in range(3):
        j = i * n

        def add(x: int, *rest: int, k: int = i, y: int = j, **more: int) -> Any:
            return x + i + j + k + y + sum(rest) + len(more)  # noqa: B023

        made.append(add)
        made.append(lambda x, i=i: x + i + n)
    total = 0

    def bump(by: int = 1) -> int:
        nonlocal total
        total += by
        return total

    bump()
    bump(by=4)
    return [f(1) for f in made], made[0](1, 2, z=3), total, bump(), [f.__name__ for f in made]


def same_parameter_names(log: Log, x: int) -> Any:
    y = x
    inner = lambda x: (lambda y: x + y)(y + x)  # noqa: E731
    other = lambda x, *, y=y: (x, y)  # noqa: E731
    return inner(x=3), other(x=4), other(5, y=6)


def loop_variables_by_value(log: Log, n: int) -> Any:
    found = []
    for i in range(n):
        square = i * i
        found.append((lambda: square)())
        found.append(list(map(lambda x: x + square, range(2))))
    return found


def recursive(log: Log, n: int) -> Any:
    def factorial(k: int) -> int:
        return 1 if k < 2 else k * factorial(k - 1)

    return factorial(n + 3)


def generators(log: Log, n: int) -> Any:
    lazy = (log(i) + j for i in range(3) if i != n for j in range(2))
    log("made")
    first = next(lazy)
    return first, list(lazy), sum(x for x in [1, 2, n]), any(log(x) for x in (0, 1, 2))


def comprehensions(log: Log, n: int) -> Any:
    return (
        [log(i) for i in range(4) if i != n],
        {i % 2 for i in range(n + 2)},
        {str(i): j for i in range(2) for j in range(i + n)},
        [[j * i for j in range(2)] for i in range(3)],
        [f() for f in [lambda: k for k in range(3)]],  # noqa: B023
        [a + b for a, b in zip([1, 2], [3, 4], strict=True)],
    )


def globals_and_builtins(log: Log, n: int) -> Any:
    global counter
    counter = counter + n
    import os.path
    import os.path as where
    from math import floor
    from math import sqrt as root

    return setting, counter, len([n]), os.path.join("a", "b"), where.join("c"), floor(root(n + 7.5)), math.pi


def deletions(log: Log, n: int) -> Any:
    items = list(range(6))
    del items[n], items[1:3]
    names = {"a": 1}
    del names["a"]
    x = Context(log)
    del x.swallow
    return items, names, hasattr(x, "swallow"), log([][n:], ...)


def stars(log: Log, n: int) -> Any:
    def f(*a: Any, **k: Any) -> Any:
        return a, k

    return f(log(1), *[log(2)], log(3), k=log(4), *(log(5),), **{"m": log(6)}, z=log(7))  # noqa: B026


def unpacking(log: Log, n: int) -> Any:
    a, *b = range(n + 1)
    (c,) = [a]
    for d, (e, *f) in [(1, "xyz"), (2, "w")]:
        log(d, e, f)
    for g, h in [(1, 2), (3,)]:  # type: ignore[misc]
        log(g, h)
    return a, b, c, d


def raises_in_a_chain(log: Log, n: int) -> Any:
    x = Failing(log)
    return [
        log(1),
        x.good
        .better(log(2))
        .bad_one
        .never(log(3)),
        log(4),
    ]  # fmt: skip


FUNCTIONS = [found for found in list(globals().values()) if inspect.isfunction(found) and "log" in found.__code__.co_varnames[:1]]  # fmt: skip  # noqa: E501


def generated(function: FunctionType) -> FunctionType:
    """The function, through the IR."""
    program = lower_function(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    parameters = inspect.signature(function).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return generate_function(program, function.__globals__, cells, defaults)


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Any], list[Any]]:
    """What a function returns or raises, what it logged, and the lines of this file that its error passes."""
    global counter
    counter = 0
    happened: list[Any] = []

    def log(*values: Any) -> Any:
        happened.append(repr(values))
        return values[0]

    try:
        return repr(function(log, *arguments)).split(" at 0x")[0], happened, []
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        shown = [(frame.filename, frame.lineno, frame.name) for frame in frames if frame.name != "<listcomp>"]
        return (type(error), str(error), repr(error.__cause__), error.__suppress_context__), happened, shown


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_generated_function_does_what_the_function_does(function: FunctionType) -> None:
    made = generated(function)
    for n in (0, 1, 2, 3, 4, 5, 40):
        assert outcome(made, n) == outcome(function, n), f"{n}\n{made.__source__}"  # type: ignore[attr-defined]
