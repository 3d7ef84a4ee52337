"""Lowered host code means what Python means: the same results, exceptions, and effects in the same order.

Every snippet runs twice: as Python compiles it, and from its IR.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

import pytest

from nnsight_compiler.frontend import lower_function
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.runtime.functions import generate_function

SNIPPETS = r'''
def assignments(log):
    a = b = log(1)
    (c, d), *e = (a, 2), 3, 4
    [f, g] = c, d
    f, g = g, f
    h: int = a + 1
    i: int
    h += 2; h -= 1; h *= 7; h //= 2; h %= 9; h **= 2; h <<= 1; h >>= 1; h |= 8; h &= 15; h ^= 3
    j = 0x1F + 0b11 + 0o17 + 1_000 + 1e3 + 2.5j - -3
    *k, = range(3)
    l, *m = "xyz"
    return a, b, c, d, e, f, g, h, j, k, l, m, -1, - 1.5, +2, ~3, not 4, 2 ** -1, -2 ** 2

def order_of_assignment(log):
    class_ = Recorder(log)
    class_[log("i")] = class_.x = log("value")
    class_[log("j")] += log("more")
    class_.y, class_[log("k")] = log("p"), log("q")
    del class_.x, class_[log("i")]
    log(log("a")) + log("b") * log("c")
    {log("k1"): log("v1"), log("k2"): log("v2")}
    log("f")(log("x"), k=log("k"), *[log("s")], **{"z": log("t")})

def augmented(log):
    a = [1]
    b = a
    a += [2]
    r = Recorder(log)
    r.n = 1
    r.n += 2
    r[0] = [1]
    r[0] += [3]
    m = Matrix(3)
    m @= Matrix(4)
    return a is b, r.n, r[0], (Matrix(2) @ Matrix(5)).n, m.n

def conditions(log, n=3):
    out = []
    for i in range(n):
        if i == 0:
            x = "zero"
        elif i == 1 and log(i):
            x = "one"
        else:
            y = "many"
            x = y + "!"
        out.append(x)
    return out, x, y

def truth_is_asked_once(log):
    t, f = Truth(log, True), Truth(log, False)
    if t and f or t: log("a")
    if not (f or t): log("b")
    x = 1 if f and t else 2
    while f or f and t: pass
    z = [v for v in (1, 2) if t and not f]
    assert t or f
    return x, z, (t and f) is f, (f or t) is t, f or (t and 5)

def early_return(log, x=5):
    if x > 3:
        return log("big")
    log("small")
    return None

def both_return(log, x=1):
    if x:
        return 1
    else:
        return 2
    log("never")

def loops(log):
    total = 0
    for i in range(10):
        if i == 2:
            continue
        if i == 6:
            break
        total += i
    else:
        total = -1
    for j in ():
        pass
    else:
        k = "else"
    n = 0
    while n < 5:
        n += 1
        if n == 3: continue
        log(n)
    else:
        log("done")
    while True:
        n -= 1
        if n < 2:
            found = n
            break
    for a, (b, *c) in [(1, "xyz"), (2, "pq")]:
        pass
    for q in range(3):
        for r in range(3):
            if r == q: break
            if r > q: continue
            last = q, r
        else:
            log("no break")
    return total, i, k, n, found, a, b, c, last, q, r

def nested_breaks(log):
    out = []
    for i in range(4):
        j = 0
        while True:
            j += 1
            if j > i:
                break
            if (i + j) % 3 == 0:
                out.append((i, j))
                continue
            for k in range(j):
                if k == 2:
                    break
            else:
                out.append(k)
    return out, i, j

def loop_else_assigns(log, n=3):
    for x in range(n):
        if x == 5:
            found = x
            break
    else:
        found = None
    return found, x

def item_targets(log):
    d = {}
    r = Recorder(log)
    for d["k"] in (1, 2): log(d["k"])
    for r.x in "ab": pass
    return d, r.x

def unassigned(log, c=0):
    if c:
        x = 1
    log("before")
    return x

def unassigned_after_loop(log):
    for x in []:
        y = 1
    try:
        y
    except NameError as e:
        log(type(e).__name__)
    for z in [1, 2]:
        if z == 2:
            log(w)
        w = z
    del w
    log("deleted")
    w

def deleted(log):
    x = 1
    for i in range(3):
        if i == 1:
            del x
        else:
            log(x)
    return x

def comprehensions(log):
    n = 10
    i = "kept"
    a = [i * n for i in range(4) if i % 2 if i]
    b = {x: y for x in range(2) for y in range(x + 1)}
    c = {len(w) for w in ("a", "bb", "cc")}
    d = [[x + y for x in range(y)] for y in range(3)]
    e = list(x for x in log(range(3)) for _ in range(x) if log(x))
    f = [lambda: z for z in range(3)]
    g = [(last := q) for q in range(4)]
    h = any((hit := q) > 1 for q in range(4))
    k = [fn() for fn in f]
    x, y = 1, 2
    m = [x for x, *y in ["abc", "de"]], [y for x, *y in ["abc", "de"]]
    return a, b, c, d, e, g, h, hit, last, i, k, x, y, m

def lazy_generators(log):
    g = (log(x) for x in (1, 2, 3))
    log("made")
    a = next(g)
    base = 10
    h = (x + base for x in (1, 2))
    base = 20
    return a, list(h), sum(g), tuple(y for y in ())

def generator_first_iterable(log):
    g = (x + y for x in log([1, 2]) for y in log([10]))
    log("later")
    return list(g)

def conditional_expressions(log):
    x = log(1) if log(0) else log(2)
    y = (z := 5) if x else (z := 6)
    a = log(0) and log(1) or log(2)
    b = log(0) or log("") or log([])
    return x, y, z, a, b, (w := 3) and w + 1

def chains(log):
    a = log(1) < log(3) < log(2) < log(9)
    b = 1 < log(2) <= 2 != 3
    if log(1) < log(5) > log(2): log("yes")
    if log(9) < log(5) < log(2): log("no")
    return a, b, 1 in [1] in [[1]], 2 not in [1], None is None, 1 is not None, 1 == 1.0

def fstrings(log):
    w, x, name = 10, 3.14159, "n"
    a = f"{x:{w}.{2}f}|{name!r:>{w}}|{x = }|{name=!s}|{w + 1 = :>5}|{{literal}}"
    b = f"a{1}" "b\n" f"c{2}\t" 'd'
    c = "plain" 'joined'
    d = f"{log('p')}{log('q')}"
    changing = []
    e = f"{changing}{changing.append(1)}{changing}"
    g = rf"\d{w}\n", f"""tri
    ple {w}"""
    return a, b, c, d, e, g, f"", f"{w!a}", f"{Formatted(log):x{w}}{log(1)}", b"a" b"b", "\N{DASH SYMBOL}\x41\
more"

def slices(log):
    s = Shower()
    n = 2
    return s[1:2], s[:], s[::n], s[..., None], s[1:n, ::-1, 0], s[1,], s[()], s[*(1, 2), 3], s[n:], s[-1], s[(1, 2)]

def evaluation_order_of_slices(log):
    Shower()[log(1):log(2):log(3), log(4)]

def lambdas(log):
    add = lambda x, y=2, *a, k=4, **kw: (x, y, a, k, kw)
    curry = lambda x: lambda y: lambda z: (x, y, z)
    return add(1), add(1, 2, 3, k=5, z=6), curry(1)(2)(3), (lambda: log("ran"))(), (lambda *, a: a)(a=1)

def functions(log):
    def fact(n):
        "docstring"
        return 1 if n < 2 else n * fact(n - 1)
    def even(n): return True if n == 0 else odd(n - 1)
    def odd(n): return False if n == 0 else even(n - 1)
    def deco(f):
        log("deco")
        def inner(*a, **k):
            return "wrapped", f(*a, **k)
        return inner
    @deco
    @deco
    def g(a, /, b=log("default"), *, c=log("kw")) -> int:
        return a, b, c
    def nothing(): pass
    return fact(5), even(10), g(1), g(1, 2, c=3), nothing(), fact.__name__, (lambda: 0).__name__

def recorded_order_of_decorators(log):
    def show(x):
        log(("got", x))
        return lambda f: log(("apply", x)) and f or f
    @show(log("first"))
    @show(log("second"))
    def f(a=log("default")): return a
    return f()

def closures(log):
    fs = []
    for i in range(3):
        j = i * 10
        fs.append(lambda: (i, j))
        fs.append(lambda i=i: i)
    count = 0
    def bump():
        nonlocal count
        count += 1
        return count
    bump(); bump()
    late = lambda: after
    after = "after"
    const = 5
    def reads(): return const + count
    def shadow(const): return const
    return [f() for f in fs], count, late(), reads(), shadow(1)

def closure_before_assignment(log):
    f = lambda: x
    try:
        f()
    except NameError as e:
        log("name error")
    x = 1
    return f()

def nested_nonlocal(log):
    x = 0
    def outer():
        def inner():
            nonlocal x
            x += 1
        inner()
        y = x
        def deeper():
            nonlocal y
            y = [y]
            return lambda: (x, y)
        return deeper()
    return outer()(), x

def deletes_nonlocal(log):
    x = 1
    def f():
        nonlocal x
        del x
    f()
    return x

def globals_too(log):
    global COUNTER
    COUNTER = 5
    COUNTER += 1
    def read(): return COUNTER
    def write():
        global COUNTER
        COUNTER = "w"
    before = read()
    write()
    return before, COUNTER, len("abc"), [COUNTER for _ in range(1)]

def missing_global(log):
    log("before")
    return not_defined_anywhere

def parameters(log, a=1, *args, b=2, **kwargs):
    a += 1
    args = args + (a,)
    kwargs["x"] = b
    return a, args, kwargs

def starred_calls(log):
    def f(*a, **k): return a, k
    a, k = (1, 2), {"x": 3}
    r = f(*a, 4, *a, y=5, **k, **{"z": 6})
    noisy = Noisy(log)
    f(*noisy, log("after"))
    [*noisy, log("after list")]
    {**{"a": log("x")}, "b": log("y"), **k}
    {*noisy, log("after set")}
    return r, [*a, 3, *a], (*a,), {*a, 9}, {**k, "w": 1}

def duplicate_keyword(log):
    def f(**k): return k
    return f(a=1, **{"a": 2})

def contexts(log):
    with Context(log, "a") as a, Context(log, "b") as b:
        log((a, b))
        x = 1
    with (Context(log, "c"), Context(log, "d") as d):
        y = d
    with Context(log, "e") as (first, *rest):
        pass
    return x, y, first, rest

def swallowing(log):
    x = 0
    with Context(log, "a", swallow=True):
        x = 1
        log(1 / 0)
        x = 2
    with Context(log, "b", swallow=True):
        raise ValueError
    with Context(log, "c", swallow=True):
        return x

def return_in_context(log):
    for i in range(3):
        with Context(log, i):
            if i == 0: continue
            if i == 1: break
    with Context(log, "r"):
        return i

def exceptions(log):
    out = []
    for kind in (ValueError, KeyError, None, TypeError):
        try:
            log("try")
            if kind: raise kind("x")
        except ValueError as e:
            out.append(repr(e))
            value = "v"
        except (KeyError, IndexError):
            value = "k"
            continue
        except TypeError as e:
            value = e.args
            break
        else:
            value = "none"
        finally:
            log("finally")
        out.append(value)
    return out, value

def exception_name_is_deleted(log):
    e = 1
    try:
        raise ValueError
    except ValueError as e:
        pass
    return e

def partial_assignment(log):
    x = y = "old"
    try:
        x = "new"
        log(1 / 0)
        y = "new"
    except ZeroDivisionError:
        pass
    return x, y

def try_in_a_loop(log):
    n = 0
    seen = []
    while n < 5:
        try:
            n += 1
            if n % 2: raise ValueError
            seen.append(n)
        except ValueError:
            m = n
    return n, seen, m

def try_keeps_between_rounds(log):
    for i in range(3):
        try:
            if i:
                log(kept)
            kept = i
        finally:
            pass

def finally_returns(log):
    def f(x):
        try:
            if x: return log("body")
            raise ValueError
        finally:
            log("cleanup")
    def g():
        for i in range(2):
            try:
                return 1
            finally:
                continue
        return 2
    a = f(1)
    try:
        f(0)
    except ValueError:
        a = a, "caught"
    return a, g()

def raising(log):
    try:
        try:
            raise KeyError("a")
        except KeyError as error:
            raise RuntimeError("b") from error
    except RuntimeError as outer:
        log(type(outer.__cause__))
    try:
        try:
            raise KeyError("c")
        except KeyError:
            log("again")
            raise
    except KeyError as again:
        log(again.args)
    raise ValueError("end") from None

def handler_types_are_lazy(log):
    try:
        log("ok")
    except log("not evaluated"):
        pass
    try:
        raise KeyError
    except (log("evaluated") and ValueError, KeyError):
        log("handled")

def asserting(log):
    assert log(1), log("not evaluated")
    assert log(0), log("message")

def assert_without_message(log):
    assert not log(1)

def importing(log):
    import os.path
    import os.path as p
    import math, itertools as it
    from math import pi, floor as fl
    from os import path
    return os.path is p, p is path, math.pi == pi, fl(2.5), list(it.islice(it.count(), 2)), os.__name__

def failing_import(log):
    from math import nothing_by_this_name

def walrus(log):
    if (n := log(3)) > 2 and (m := n + 1):
        log(m)
    while (n := n - 1) > 0:
        log(n)
    print_ = (k := 1, k := 2) if False else k if (k := 4) else 0
    return n, m, k, print_

def walrus_in_comprehension(log):
    total = 0
    partial = [total := total + v for v in range(5)]
    for _ in range(2):
        found = [y for x in range(3) if (y := x + total)]
    return partial, total, found, y

def maybe_walrus(log, c=0):
    c and (x := 1)
    return x

def deletions(log):
    a, b = [1, 2, 3], {"x": 1}
    del a[0], b["x"]
    r = Recorder(log)
    r.x = 1
    del r.x
    (x, y) = 1, 2
    del (x, [y])
    return a, b, x

def docstring_and_pass(log):
    """A docstring
at the left margin."""
    pass
    ...
    "another"
    1

def unpack_errors(log):
    a, b = log((1, 2, 3))

def unpack_literal_error(log):
    a, b = 1, 2, 3

def mutable_default(log, acc=[]):
    def f(x, acc=[]):
        acc.append(x)
        return acc
    f(1)
    return f(2)

def carried_unbound(log):
    for i in range(4):
        if i == 2:
            log(seen)
        if i == 1:
            seen = "yes"
    return seen

def swap_in_loop(log):
    a, b = 0, 1
    for _ in range(10):
        a, b = b, a + b
    while a > b or b > 40:
        a, b = b, a - b
        if a < 5:
            break
    else:
        return "else", a, b
    return a, b

def shadowed_builtin(log, len=None):
    list = log
    return list(3), len

def conditional_function(log, c=1):
    if c:
        def f(): return "f"
    else:
        def f(): return "g"
    return f()

def comprehension_sees_outer_changes(log):
    x = 1
    f = [lambda: x for _ in range(2)]
    x = 2
    return [g() for g in f], [x for x in range(3)], x

def string_operations(log):
    s = "a" + "b" * 2
    s += "c" "d"
    return s % (), "%s-%d" % (s, 3), s[1:], s.upper()

def deep_nesting(log):
    if log(1):
        for i in range(2):
            while True:
                if i:
                    try:
                        with Context(log, i):
                            for j in range(3):
                                if j == 1:
                                    return [i + j + k for k in range(2)]
                    finally:
                        log("out")
                break
    return "end"

def raise_in_loop_body(log):
    for i in range(3):
        if i == 1:
            raise ValueError(i)
        log(i)

def loop_variable_after_continue(log):
    for i in range(5):
        if i % 2:
            x = i
            continue
        y = i
    return x, y

def chained_methods(log):
    return "a-b-c".replace("-", "+").split("+")[::-1]

def while_else_break(log):
    n = 0
    while n < 3:
        n += 1
        if n == 2:
            r = "broke"
            break
    else:
        r = "finished"
    while n:
        n -= 1
    else:
        s = n
    return r, s

def no_return_value(log):
    return

def generator_captures_loop_variable(log):
    gens = []
    for i in range(3):
        gens.append(i + x for x in range(2))
    return [list(g) for g in gens]

def nested_generator_walrus(log):
    r = [any((w := x) == y for x in range(3)) for y in range(2)]
    return r, w

def annotation_is_not_evaluated(log):
    x: log("never") = log("value")
    d = {}
    d["k"]: log("never") = 2
    return x, d

def bool_of_numbers(log):
    return True + True, not None, None or False, 1 if ... else 2

def comparison_results(log):
    a = Comparing(log, "a")
    return a < a < a, a == a

def lambda_in_default(log):
    def f(x=lambda y=(lambda: 1): y()): return x()
    return f()
'''


class Recorder:
    """An object whose attributes and items log what is done to them."""

    def __init__(self, log: Any) -> None:
        self.__dict__["_log"] = log
        self.__dict__["_items"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        self._log(("set", name))
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        self._log(("del", name))
        del self.__dict__[name]

    def __getitem__(self, key: Any) -> Any:
        self._log(("get item", key))
        return self._items[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._log(("set item", key))
        self._items[key] = value

    def __delitem__(self, key: Any) -> None:
        self._log(("del item", key))
        del self._items[key]


class Matrix:
    def __init__(self, n: int) -> None:
        self.n = n

    def __matmul__(self, other: Matrix) -> Matrix:
        return Matrix(self.n * other.n)

    def __imatmul__(self, other: Matrix) -> Matrix:
        self.n += other.n
        return self


class Truth:
    def __init__(self, log: Any, value: bool) -> None:
        self.log, self.value = log, value

    def __bool__(self) -> bool:
        self.log(("bool", self.value))
        return self.value


class Formatted:
    def __init__(self, log: Any) -> None:
        self.log = log

    def __format__(self, specification: str) -> str:
        self.log(("format", specification))
        return "F"


class Shower:
    def __getitem__(self, index: Any) -> Any:
        return repr(index)


class Noisy:
    def __init__(self, log: Any) -> None:
        self.log = log

    def __iter__(self) -> Any:
        self.log("iterated")
        return iter((1, 2))


class Comparing:
    def __init__(self, log: Any, name: str) -> None:
        self.log, self.name = log, name

    def __lt__(self, other: Any) -> str:
        self.log("lt")
        return "true"

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        return "eq"


class Context:
    def __init__(self, log: Any, name: Any, swallow: bool = False) -> None:
        self.log, self.name, self.swallow = log, name, swallow

    def __enter__(self) -> str:
        self.log(("enter", self.name))
        return f"as {self.name}"

    def __exit__(self, kind: Any, *rest: Any) -> bool:
        self.log(("exit", self.name, kind))
        return self.swallow


def _namespace(text: str, file: str) -> dict[str, Any]:
    kinds = (Recorder, Matrix, Truth, Formatted, Shower, Noisy, Comparing, Context)
    namespace: dict[str, Any] = {"__name__": "snippet", **{kind.__name__: kind for kind in kinds}}
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    return namespace


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """What a call returns or raises, and what it logs."""
    logged: list[str] = []

    def log(value: Any = None) -> Any:
        logged.append(repr(value))
        return log if value == "f" else value

    try:
        return ("returned", repr(function(log, *args, **kwargs))), logged
    except Exception as error:
        kind = type(error)
        text = str(error.args[:1]) if kind in (KeyError, ValueError, AssertionError) else ""
        if "unpack" in text:
            text = ""
        return ("raised", kind.__name__, text), logged


def _names() -> list[str]:
    return [line[4 : line.index("(")] for line in SNIPPETS.splitlines() if line.startswith("def ")]


@pytest.fixture(scope="module")
def snippets() -> dict[str, Any]:
    return _namespace(SNIPPETS, "<snippets>")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("engine", ["interpreted", "generated"])
@pytest.mark.parametrize("name", _names())
def test_snippet_means_what_python_means(name: str, engine: str, snippets: dict[str, Any], interpret: Any) -> None:
    function = snippets[name]
    program = lower_function(function)
    assert parse_program(str(program)) == program
    assert str(program) == str(lower_function(function)), "the same source gives the same names"
    make = interpret if engine == "interpreted" else generate_function
    defaults = dict.fromkeys([each.value.name for each in program.parameters if each.optional])
    lowered = make(program, function.__globals__, {}, defaults)
    signature = function.__defaults__ or (), function.__kwdefaults__ or {}
    for change in itertools.chain([()], [(each,) for each in (0, 1, 2)] if signature[0] else []):
        args = (*change, *signature[0][len(change) :])
        if name in ("mutable_default", "shadowed_builtin") and change:
            continue
        assert _outcome(lowered, *args, **signature[1]) == _outcome(function, *args)


def test_free_names_come_from_the_closure(interpret: Any) -> None:
    count = 1

    def outer() -> Any:
        kept = [5]

        def inner(x: int) -> Any:
            nonlocal count
            count += x
            return [kept[0] + count for _ in range(2)], lambda: kept

        return inner

    inner = outer()
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__, strict=True))
    values, function = interpret(lower_function(inner), globals(), cells)(2)
    assert values == [8, 8]
    assert function() is inner.__closure__[inner.__code__.co_freevars.index("kept")].cell_contents
    assert count == 3


class __Mangled:  # leading underscores are part of the test
    __secret = 1

    def method(self, __given: int = 2) -> Any:
        self.__other = __given
        local = {"__x": self.__secret}
        __y = 3

        def inner(**keywords: Any) -> Any:
            return sorted(keywords), __y, __module_name__

        return self.__other, local, inner(__k=1)


__module_name__ = "kept as it is"


def test_private_names_are_mangled(interpret: Any) -> None:
    method = vars(globals()["__Mangled"])["method"]
    instance = globals()["__Mangled"]()
    lowered = interpret(lower_function(method), globals(), {})
    assert lowered(instance, 2) == method(instance, 2) == (2, {"__x": 1}, (["__k"], 3, "kept as it is"))
