"""Generated functions as objects: their globals, cells, signatures and names, their text, their lines, their memory."""

from __future__ import annotations

import ast
import inspect
import linecache
import traceback
import types
import weakref
from typing import Any

import pytest

from nnsight_compiler.frontend import lower_source
from nnsight_compiler.ir.errors import IRError
from nnsight_compiler.ir.ops import (
    Argument,
    Bound,
    Build,
    Call,
    Cell,
    Closure,
    Element,
    Format,
    FormatPart,
    Global,
    Handler,
    If,
    Item,
    Load,
    Op,
    Operator,
    Parameter,
    Raise,
    Region,
    Return,
    Save,
    SetGlobal,
    Store,
    Try,
    Unpack,
    Yield,
)
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import NONE, UNBOUND, Literal, Slice, Tuple, Value
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.runtime.functions import generate_function

A, B, C, X = Value("a"), Value("b"), Value("c"), Value("x")


def program(*ops: Op, parameters: tuple[Parameter, ...] = (Parameter(A), Parameter(B))) -> Program:
    made = Program("f", parameters, Region((), ops), kind="function")
    verify(made)
    return made


def source(text: str, globals_: dict[str, Any] | None = None) -> str:
    """The generated text of a function given as text."""
    return str(generate_function(lower_source(text), globals_ or {}).__source__)  # type: ignore[attr-defined]


# --- globals and cells ---


def test_globals_are_the_users_own_and_nothing_is_added_to_them() -> None:
    globals_: dict[str, Any] = {"n": 1}
    f = generate_function(program(Global(X, "n"), Return(X)), globals_)
    assert f.__globals__ is globals_
    assert f(0, 0) == 1
    globals_["n"] = 2
    assert f(0, 0) == 2
    del globals_["n"]
    with pytest.raises(NameError, match=r"^name 'n' is not defined$"):
        f(0, 0)
    assert globals_ == {}


def test_free_variables_are_the_users_own_cells() -> None:
    cell = types.CellType(1)
    f = generate_function(
        program(Global(X, "n", "free"), Operator(C, "+", (X, A)), SetGlobal("n", C, "free"), Return(C)), {}, {"n": cell}
    )
    assert f(1, 0) == 2
    assert cell.cell_contents == 2
    cell.cell_contents = 10
    assert f(1, 0) == 11
    del cell.cell_contents
    with pytest.raises(NameError, match="cannot access free variable 'n' where it is not associated with a value"):
        f(1, 0)


@pytest.mark.parametrize("scope", ["global", "free"])
def test_a_name_from_outside_that_a_parameter_hides(scope: Any) -> None:
    """Inlining a function that reads a global of the name of a parameter leads to this."""
    made = program(Global(X, "a", scope), SetGlobal("a", B, scope), Return(Tuple((A, X))))
    globals_: dict[str, Any] = {"a": "outside"}
    cell = types.CellType("outside")
    f = generate_function(made, globals_, {"a": cell})
    assert f(1, "changed") == (1, "outside")
    assert (globals_["a"] if scope == "global" else cell.cell_contents) == "changed"


def test_a_global_and_a_free_variable_of_one_name() -> None:
    made = program(Global(X, "n"), Global(C, "n", "free"), Return(Tuple((X, C))))
    assert generate_function(made, {"n": 1}, {"n": types.CellType(2)})(0, 0) == (1, 2)


def test_two_threads_worth_of_functions_share_nothing() -> None:
    made = program(Cell(C, "c", A), Store(C, B), Load(X, C, "c"), Return(X))
    f, g = generate_function(made, {}), generate_function(made, {})
    assert (f(1, 2), g(3, 4), f(5, 6)) == (2, 4, 6)


# --- signatures ---


def test_the_signature_is_the_programs() -> None:
    parameters = (
        Parameter(Value("a"), "positional_only"),
        Parameter(Value("b"), optional=True),
        Parameter(Value("c"), "var_positional"),
        Parameter(Value("d"), "keyword_only"),
        Parameter(Value("e"), "keyword_only", optional=True),
        Parameter(Value("g"), "var_keyword"),
    )
    result = Tuple(tuple(parameter.value for parameter in parameters))
    default = object()
    f = generate_function(program(Return(result), parameters=parameters), {}, None, {"b": default, "e": 5})
    assert str(inspect.signature(f)).replace(str(default), "o") == "(a, /, b=o, *c, d, e=5, **g)"
    assert f(1, d=2) == (1, default, (), 2, 5, {})
    assert f(1, 2, 3, d=4, e=5, h=6) == (1, 2, (3,), 4, 5, {"h": 6})
    with pytest.raises(TypeError, match=r"^f\(\) missing 1 required positional argument: 'a'$"):
        f(d=1)


def test_closures_keep_their_parameters_names() -> None:
    inner = Closure(
        X, "<lambda>", (Parameter(Value("a.1")), Parameter(Value("b.1"), optional=True)), (B,),
        Region((), (Operator(Value("0"), "-", (Value("a.1"), A)), Return(Tuple((Value("0"), Value("b.1")))))),
    )  # fmt: skip
    f = generate_function(program(inner, Return(X)), {})
    made = f(10, 20)
    assert made(a=13) == (3, 20)
    assert (made.__name__, made.__qualname__) == ("<lambda>", "f.<locals>.<lambda>")


# --- trees ---


def test_names_are_never_keywords_builtins_or_taken() -> None:
    values = [Value(name) for name in ("class", "match", "print", "n", "0", "h", "h.1", "h_1", "_", "ä.2")]
    ops = [Build(value, "list", (Element(Literal(number)),)) for number, value in enumerate(values)]
    f = generate_function(program(Global(X, "n"), *ops, Return(Tuple((X, *values)))), {"n": "global"})
    assert f(0, 0) == ("global", *([number] for number in range(len(values))))


def test_literals() -> None:
    values = [-1, -1.5, -0.0, 0.0, 1e400, -1e400, 2j, -(10**400), True, None, ..., b"\xff", "é'\"\n{}", ""]
    f = generate_function(program(Return(Tuple(tuple(map(Literal, values))))), {})
    assert repr(f(0, 0)) == repr(tuple(values))
    power = program(Operator(X, "**", (Literal(-2), Literal(2))), Return(X))
    assert generate_function(power, {})(0, 0) == 4


def test_slices_stand_anywhere() -> None:
    part = Slice(A, NONE, B)
    f = generate_function(
        program(Build(X, "list", (Element(part),)), Item(C, X, Slice(upper=Literal(1))), Return(Tuple((C, part)))), {}
    )
    assert f(1, 2) == ([slice(1, None, 2)], slice(1, None, 2))


def test_an_expression_moves_only_where_the_order_stays() -> None:
    """`a()` is called before `b()` here, whatever the operands' order says."""
    one, two = Value("0"), Value("1")
    calls = (Call(one, A, ()), Call(two, B, ()))
    for use in (
        Operator(X, "-", (two, one)),
        Build(X, "tuple", (Element(one, starred=True), Element(two))),
        Format(X, (FormatPart(one), FormatPart(two))),
        Call(X, two, (Argument(one),)),
    ):
        happened: list[Any] = []

        class Loud(str):
            def __new__(cls, name: str) -> Any:
                happened.append(name)  # noqa: B023
                return super().__new__(cls, name)

            def __iter__(self) -> Any:
                happened.append("iterated")  # noqa: B023
                return iter(())

            def __format__(self, specification: str) -> str:
                happened.append("formatted")  # noqa: B023
                return ""

            def __sub__(self, other: Any) -> Any:
                return None

            def __call__(self, other: Any) -> None:
                pass

        generate_function(program(*calls, use, Return(X)), {})(lambda: Loud("a"), lambda: Loud("b"))
        assert happened[:2] == ["a", "b"], use


def test_moves_make_python_as_one_would_write_it() -> None:
    text = "def f(h, acts):\n    total = 0\n    for act in acts:\n        total += act.norm(dim=-1)[0]\n"
    text += "    return torch.stack(acts).softmax(-1), total\n"
    expected = "def f(h, acts):\n    total = 0\n    for act in acts:\n        total += act.norm(dim=-1)[0]\n"
    expected += "    return (torch.stack(acts).softmax(-1), total)"
    assert source(text) == expected


def test_a_variable_is_one_variable_again() -> None:
    text = """
def f(n, log):
    x = n
    while x > 1 and log(x):
        if x % 2:
            x = 3 * x + 1
        else:
            x = x // 2
    return x
"""
    assert source(text) == ast.unparse(ast.parse(text))


def test_assignments_at_once() -> None:
    made = parse_program(
        """\
function f(%n)
  %a, %b, %c = for %i in %n carry %a.1 = 1, %b.1 = 2, %c.1 = 3
    continue %b.1, %c.1, %a.1
  return (%a, %b, %c)
"""
    )
    f = generate_function(made, {})
    assert [f(range(n)) for n in range(4)] == [(1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 2, 3)]


def test_values_that_are_needed_later_keep_their_variable() -> None:
    made = program(
        Operator(Value("x.1"), "+", (A, Literal(1))),
        Operator(Value("x.2"), "*", (Value("x.1"), Literal(2))),
        Return(Tuple((Value("x.1"), Value("x.2")))),
    )
    assert generate_function(made, {})(1, 0) == (2, 4)


def test_exception_types_that_take_statements_are_computed_when_needed() -> None:
    types_ = Region(
        (), (Call(Value("0"), B, ()), Unpack((Value("t"), Value("u")), Value("0")), Yield((Value("t"),)))
    )  # fmt: skip
    made = program(
        Try(Region((), (Call(Value("1"), A, ()),)), (Handler(types_, Region((Value("e"),), (Return(Value("e")),))),)),
        Return(Literal("none")),
    )
    f = generate_function(made, {})
    asked: list[int] = []

    def kinds() -> tuple[type[Exception], int]:
        asked.append(1)
        return (KeyError, 0)

    def fails() -> None:
        raise error

    error: Exception = KeyError("k")
    assert f(lambda: None, kinds) == "none"
    assert asked == []
    assert f(fails, kinds) is error
    assert asked == [1]
    error = ValueError("v")
    with pytest.raises(ValueError, match="v"):
        f(fails, kinds)


def test_a_variable_without_a_value() -> None:
    merge = If((X,), A, Region((), (Yield((B,)),)), Region((), (Yield((UNBOUND,)),)))
    f = generate_function(program(merge, Bound(C, X, "user"), Return(C)), {})
    assert f(True, 5) == 5
    with pytest.raises(UnboundLocalError) as raised:
        f(False, 5)

    def python(a: bool) -> int:
        if a:
            user = 5
        return user

    with pytest.raises(UnboundLocalError) as expected:
        python(False)
    assert str(raised.value) == str(expected.value)


def test_a_cell_that_only_closures_assign() -> None:
    setter = Closure(X, "g", (), (), Region((), (Store(C, A), Return(NONE))))
    made = program(
        Cell(C, "n", UNBOUND),
        setter,
        If((), B, Region((), (Call(Value("0"), X, ()), Yield())), Region((), (Yield(),))),
        Load(Value("1"), C, "n"),
        Return(Value("1")),
    )
    f = generate_function(made, {})
    assert f(3, True) == 3
    with pytest.raises(UnboundLocalError, match="cannot access local variable 'n' where it is not"):
        f(3, False)


@pytest.mark.parametrize("name", ["n", "a"])
def test_a_loop_makes_a_new_cell_each_time(name: str) -> None:
    """Its variable may bear its own name or, where that is taken, another."""
    made = parse_program(
        f"""\
function f(%a)
  %made = list []
  for %i in %a
    %c = cell {name} = unbound
    %g = closure g()
      %0 = load %c as {name}
      return %0
    %1 = attr %made.append
    %2 = call %1(%g)
    if %i
    then
      store %c = %i
      yield
    else
      yield
    continue
  return %made
"""
    )
    first, second, third = generate_function(made, {})([1, 0, 2])
    assert (first(), third()) == (1, 2)
    with pytest.raises(
        NameError, match=f"cannot access free variable '{name}' where it is not associated with a value"
    ):
        second()


def test_ops_of_a_model_have_no_place_here() -> None:
    with pytest.raises(IRError, match="Save stands in code that runs no model"):
        generate_function(program(Save(X, A), Return(X)), {})


# --- lines ---


def test_errors_show_the_users_file_line_and_columns() -> None:
    text = "def f(a, b):\n    ä = a.b; return ä.c(\n        b.d,\n    )\n"
    linecache.cache["<lines>"] = (len(text), None, text.splitlines(keepends=True), "<lines>")
    namespace: dict[str, Any] = {}
    exec(compile(text, "<lines>", "exec"), namespace)
    f = generate_function(lower_source(text, "<lines>"), {})
    one = types.SimpleNamespace(b=types.SimpleNamespace(c=lambda x: x))
    for arguments in ((1, 2), (types.SimpleNamespace(b=1), 2), (one, 2)):
        shown = []
        for function in (f, namespace["f"]):
            with pytest.raises(AttributeError) as raised:
                function(*arguments)
            frame = traceback.extract_tb(raised.value.__traceback__)[-1]
            shown.append((frame.filename, frame.name, frame.lineno, frame.end_lineno, frame.colno, frame.end_colno))
        assert shown[0] == shown[1]


def test_a_span_that_lies_backwards_is_no_obstacle() -> None:
    raised = Raise(A, span=Span("<nowhere>", 3, 9, 3, 2))
    with pytest.raises(KeyError) as error:
        generate_function(program(raised), {})(KeyError(), 0)
    assert traceback.extract_tb(error.value.__traceback__)[-1].lineno == 3


# --- memory ---


def test_a_value_is_free_when_its_variable_is_assigned_again() -> None:
    class Tensor:
        pass

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: list[int] = []

    def step(before: Tensor | None) -> Tensor:
        made = Tensor()
        alive.add(made)
        most.append(len(alive))
        return made

    text = "def f(step):\n    h = None\n" + "    h = step(h)\n" * 20 + "    return h\n"
    generate_function(lower_source(text), {})(step)
    assert max(most) == 2
