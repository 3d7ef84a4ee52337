"""Specialising: text in, text out, for a small model; what is guarded on, what stays, and what is refused."""

from __future__ import annotations

import importlib
import linecache
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, save
from nnsight_compiler.frontend import lower_function, lower_source
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.specialise import Specialised, specialise
from nnsight_compiler.passes.subject import Subject

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, deep: bool = False) -> torch.Tensor:
        for layer in self.h:
            x = layer(x)
        return self.head(x)


def tqdm(items):
    return items


def ablate(module):
    module.output = 0


def double(x):
    return x * 2


def recursive(model):
    recursive(model)


X = torch.ones(1, 4)
MODEL, OTHER = NNsight(Net()), NNsight(Net())
GLOBALS: dict[str, Any] = {
    "ablate": ablate, "double": double, "other": OTHER, "recursive": recursive, "save": save,
    "torch": torch, "tqdm": tqdm,
}  # fmt: skip
LENGTH = "len(model._root._module.get_submodule('h'))=3"


def run(program: str, **arguments: Any) -> Specialised:
    source = parse_program(dedent(program))
    verify(source)
    given = {"model": MODEL, "x": X, **arguments}
    result = specialise(source, Subject(given, GLOBALS, {}, lower_function, save))
    verify(result.program)
    assert parse_program(str(result.program)) == result.program
    return result


def experiment(body: str, names: tuple[str, ...] = (), inside: bool = True) -> str:
    """A program with this body, in a forward of the model or before any."""
    parameters = ", ".join(f"%{name}" for name in ("model", "x", *names))
    body = dedent(body).strip("\n")
    if inside:
        *lines, last = body.splitlines()
        body = "forward %f0 = trace %model(%x)\n" + indent("\n".join(lines), "  ") + f"\n{last}"
    return f"experiment f({parameters})\n{indent(body, '  ')}\n"


def becomes(body: str, expected: str, *guards: str, inside: bool = True, **arguments: Any) -> None:
    """Specialising the first gives the second, under exactly these guards on values and lengths."""
    found = run(experiment(body, tuple(arguments), inside), **arguments)
    want = parse_program(experiment(expected, tuple(arguments), inside))
    assert str(found.program).split("\n", 1)[1] == str(want).split("\n", 1)[1]
    assert tuple(str(guard) for guard in found.guards if guard.kind in ("value", "length")) == guards
    assert found.program.given == guards


# --- modules ---


@pytest.mark.parametrize(
    ("body", "expected", "guards", "arguments"),
    [
        ("%0 = attr %model.h\n%1 = item %0[%layer]\n%2 = attr %1.output", "h.1 output", ("layer=1",), {"layer": 1}),
        ("%0 = attr %model.h\n%1 = item %0[-1]\n%2 = attr %1.output", "h.2 output", (LENGTH,), {}),
        ("%0 = item %model['h.0']\n%2 = attr %0.input", "h.0 input", (), {}),
        ("%0 = attr %model.head\n%2 = attr %0.inputs", "head inputs", (), {}),
        ("%2 = attr %model.output", "'' output", (), {}),
        ("%2 = attr %f0.result", "'' output", (), {}),
        ("%0 = attr %model.head\n%1 = attr %0.calls\n%3 = item %1[0]\n%2 = attr %3.input", "head input call 0", (), {}),
        ("%2 = read %model@h.0 output", "h.0 output", (), {}),
    ],
)  # fmt: skip
def test_accesses_become_reads(body: str, expected: str, guards: tuple[str, ...], arguments: dict[str, Any]) -> None:
    becomes(f"{body}\nreturn %2", f"%0 = read %model@{expected}\nreturn %0", *guards, **arguments)


def test_assignments_become_writes() -> None:
    becomes(
        "%0 = attr %model.head\nset_attr %0.output = 0\n%1 = attr %model.output\nreturn %1",
        "write %model@head output = 0\n%0 = read %model@'' output\nreturn %0",
    )


def test_weights_and_calls_of_modules_are_no_accesses() -> None:
    becomes(
        """
        %0 = attr %model.head
        %w = attr %0.weight
        %o = attr %0.output
        %y = call %0(%o)
        %z = %y @ %w
        return %z
        """,
        """
        %w = attr %model@head .weight
        %o = read %model@head output
        %y = call %model@head(%o) as torch.nn.Module.__call__
        %z = %y @ %w
        return %z
        """,
    )


def test_a_returned_module_is_given_as_the_user_holds_it() -> None:
    becomes(
        "%0 = attr %model.head\nreturn (%0, %x)",
        "%module = item %model['head']\nreturn (%module, %x)",
        inside=False,
    )


# --- what is guarded on, and what is not ---


def test_a_value_is_guarded_on_only_where_it_names_a_module() -> None:
    becomes(
        """
        %o = attr %model.output
        %twice = %k * 2
        %w = item %o[%twice]
        return %w
        """,
        """
        %o = read %model@'' output
        %twice = %k * 2
        %w = item %o[%twice]
        return %w
        """,
        k=1,
    )
    becomes(
        """
        %twice = %k * 2
        %h = attr %model.h
        %m = item %h[%twice]
        %o = attr %m.output
        return %o
        """,
        """
        %twice = %k * 2
        %o = read %model@h.2 output
        return %o
        """,
        "(k) * 2=2",
        k=1,
    )


def test_callees_and_the_model_are_guarded_by_what_they_are() -> None:
    found = run(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %t = global torch
            %s = attr %t.softmax
            %o = attr %model.output
            %p = call %s(%o, -1)
          return %p
        """
    )
    assert [str(guard) for guard in found.guards] == ["model is this model", "torch is torch"]
    assert "call %s(%o, -1) as torch.softmax" in str(found.program)


def test_the_input_of_the_forward_is_handed_on_and_not_guarded() -> None:
    found = run(
        "experiment f(%model, %x)\n  forward %f0 = trace %model(%x)\n    %o = attr %model.output\n  return %o\n"
    )
    assert found.inputs == {"f0": ((X,), {})}
    assert found.models == {"f0": MODEL}
    assert [guard.text for guard in found.guards] == ["model"]


def test_switches_among_the_keywords_of_a_forward_are_guarded() -> None:
    text = """
        experiment f(%model, %x, %s)
          forward %f0 = trace %model(%x, deep=%s)
            %o = attr %model.output
          return %o
        """
    assert run(text, s=True).program.given == ("s=True",)
    assert run(text, s=torch.ones(1)).program.given == ()


# --- loops ---


def test_a_loop_over_numbers_stays() -> None:
    becomes(
        """
        %r = global range
        %n = call %r(%k)
        %o = attr %model.output
        for %i in %n
          set_item %o[%i] = 0
        return %o
        """,
        """
        %r = global range
        %o = read %model@'' output
        %n = call %r(%k) as builtins.range
        for %i in %n
          set_item %o[%i] = 0
          continue
        return %o
        """,
        k=2,
    )


UNROLLED = "write %model@h.0 output = 0\nwrite %model@h.1 output = 0"


def test_a_loop_whose_variable_names_a_module_is_unrolled() -> None:
    becomes(
        """
        %r = global range
        %n = call %r(%k)
        %h = attr %model.h
        for %i in %n
          %m = item %h[%i]
          set_attr %m.output = 0
        %o = attr %model.output
        return %o
        """,
        f"%r = global range\n{UNROLLED}\n%o = read %model@'' output\nreturn %o",
        "range(k)=range(0, 2)",
        k=2,
    )


def test_a_loop_that_decides_whether_an_access_happens_is_unrolled() -> None:
    found = run(
        """
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %m = attr %model.head
            for %i in (0, 1, 2)
              %chosen = %i == 1
              if %chosen
              then
                set_attr %m.output = 0
              else
                yield
            %o = attr %model.output
          return %o
        """
    )
    assert [type(op).__name__ for op in found.program.body.ops[0].body.ops] == ["Write", "Read"]  # type: ignore[union-attr]


def test_a_while_loop_that_names_modules_is_unrolled_under_its_conditions() -> None:
    found = run(
        """
        experiment f(%model, %x, %k)
          forward %f0 = trace %model(%x)
            %h = attr %model.h
            %n = while carry %i = 0
              %t = %i < %k
              yield %t, %i
            do %i.1
              %m = item %h[%i.1]
              set_attr %m.output = 0
              %i.2 = %i.1 + 1
              continue %i.2
            %o = attr %model.output
          return %o
        """,
        k=2,
    )
    assert str(found.program).count("write") == 2
    assert found.program.given == ("0 < (k)=True", "1 < (k)=True", "2 < (k)=False")


@pytest.mark.parametrize("items", ["%h", "%call"])
@pytest.mark.parametrize("wrap", ["tqdm", "reversed", "list", "tuple"])
def test_what_wraps_an_iterable_of_modules_is_transparent(wrap: str, items: str) -> None:
    found = run(
        f"""
        experiment f(%model, %x)
          forward %f0 = trace %model(%x)
            %w = global {wrap}
            %h = attr %model.h
            %call = call %w(%h)
            for %m in {items}
              set_attr %m.output = 0
            %o = attr %model.output
          return %o
        """
    )
    layers = [0, 1, 2] if wrap != "reversed" or items == "%h" else [2, 1, 0]
    writes = [line.strip() for line in str(found.program).splitlines() if "write" in line]
    assert writes == [f"write %model@h.{layer} output = 0" for layer in layers]


def test_enumerate_counts_from_where_it_is_told() -> None:
    becomes(
        """
        %e = global enumerate
        %h = attr %model.h
        %pairs = call %e(%h, 1)
        for %pair in %pairs
          %i, %m = unpack %pair
          %v = attr %m.output
          set_item %acts[%i] = %v
        return None
        """,
        """
        %e = global enumerate
        %v = read %model@h.0 output
        set_item %acts[1] = %v
        %v.1 = read %model@h.1 output
        set_item %acts[2] = %v.1
        %v.2 = read %model@h.2 output
        set_item %acts[3] = %v.2
        return None
        """,
        LENGTH,
        acts={},
    )


def test_zip_ends_with_the_shorter_and_takes_the_other_item_by_item() -> None:
    becomes(
        """
        %z = global zip
        %h = attr %model.h
        %pairs = call %z(%h, %vs)
        for %pair in %pairs
          %m, %v = unpack %pair
          set_attr %m.output = %v
        %o = attr %model.output
        return %o
        """,
        """
        %z = global zip
        %item = item %vs[0]
        %item.1 = item %vs[1]
        write %model@h.0 output = %item
        write %model@h.1 output = %item.1
        %o = read %model@'' output
        return %o
        """,
        LENGTH,
        "len(vs)=2",
        vs=[1.0, 2.0],
    )


def test_a_list_of_modules_is_followed() -> None:
    becomes(
        """
        %h = attr %model.h
        %m = item %h[0]
        %head = attr %model.head
        %ms = list [%m, %head]
        %append = attr %ms.append
        %two = item %h[1]
        %none = call %append(%two)
        for %y in %ms
          set_attr %y.output = 0
        %o = attr %model.output
        return %o
        """,
        """
        %module = item %model['h.0']
        %module.1 = item %model['head']
        %ms = list [%module, %module.1]
        %append = attr %ms.append
        %module.2 = item %model['h.1']
        %none = call %append(%module.2) as method.append
        write %model@h.0 output = 0
        write %model@head output = 0
        write %model@h.1 output = 0
        %o = read %model@'' output
        return %o
        """,
    )


# --- conditions ---


def test_a_condition_on_an_argument_is_folded_where_it_decides_on_an_access() -> None:
    body = """
        if %flag
        then
          %m = attr %model.head
          set_attr %m.output = 0
        else
          yield
        %o = attr %model.output
        return %o
        """
    becomes(body, "write %model@head output = 0\n%o = read %model@'' output\nreturn %o", "flag=True", flag=True)
    becomes(body, "%o = read %model@'' output\nreturn %o", "flag=False", flag=False)


@pytest.mark.parametrize("flag", [True, False])
def test_a_condition_that_decides_on_no_access_stays(flag: bool) -> None:
    body = """
        %o = read %model@'' output
        %y = if %flag
        then
          %a = %o * 2
          yield %a
        else
          yield %o
        return %y
        """
    becomes(body, body, flag=flag)


def test_a_condition_on_a_live_value_stays_with_its_accesses() -> None:
    body = """
        %o = read %model@h.0 output
        %big = %o > 1
        if %big
        then
          write %model@head output = 0
        %p = read %model@'' output
        return %p
        """
    becomes(body, body)


def test_a_condition_on_an_argument_is_folded_where_it_leaves_the_body_or_an_unrolled_loop() -> None:
    leaving = """
        %o = read %model@'' output
        if %flag
        then
          return %o
        else
          yield
        %p = %o - 1
        return %p
        """
    text = str(run(experiment(leaving, ("flag",)), flag=True).program)
    assert "if" not in text
    assert "given flag=True" in text
    breaking = """
        %h = attr %model.h
        for %m in %h
          set_attr %m.output = 0
          if %flag
          then
            break
          else
            yield
        %o = read %model@'' output
        return %o
        """
    becomes(
        breaking, "write %model@h.0 output = 0\n%o = read %model@'' output\nreturn %o", LENGTH, "flag=True", flag=True
    )


# --- functions ---


def test_a_helper_that_is_given_a_module_is_inlined() -> None:
    becomes(
        """
        %a = global ablate
        %m = attr %model.head
        %c = call %a(%m)
        %o = attr %model.output
        return %o
        """,
        """
        %a = global ablate
        write %model@head output = 0
        %o = read %model@'' output
        return %o
        """,
    )


def test_a_helper_is_inlined_in_a_forward_and_called_elsewhere() -> None:
    becomes(
        "%d = global double\n%o = attr %model.output\n%c = call %d(%o)\nreturn %c",
        "%d = global double\n%o = read %model@'' output\n%0 = %o * 2\nreturn %0",
    )
    plain = "%d = global double\n%c = call %d(%x)\nreturn %c"
    becomes(plain, plain, inside=False)


def test_the_globals_of_a_helper_from_another_module_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "SCALE = 3.0\n\n\ndef scaled(x):\n    return x * SCALE\n"
    (tmp_path / "module_of_scaled.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(GLOBALS, "scaled", importlib.import_module("module_of_scaled").scaled)
    becomes(
        "%d = global scaled\n%o = attr %model.output\n%c = call %d(%o)\nreturn %c",
        """
        %d = global scaled
        %o = read %model@'' output
        %module = import_leaf module_of_scaled
        %SCALE = attr %module.SCALE
        %0 = %o * %SCALE
        return %0
        """,
    )


@pytest.mark.parametrize("name", ["vars", "print"])
def test_a_function_without_source_is_called_with_the_value(name: str) -> None:
    becomes(
        f"%p = global {name}\n%o = attr %model.output\n%c = call %p(%o)\nreturn %c",
        f"%p = global {name}\n%o = read %model@'' output\n%c = call %p(%o) as builtins.{name}\nreturn %c",
    )


def test_a_function_without_source_is_a_host_op() -> None:
    becomes(
        "%o = attr %model.output\n%c = call %k(%o)\nreturn %c",
        "%o = read %model@'' output\n%c = call %k(%o)\nreturn %c",
        k=eval("lambda value: value"),
    )


def test_a_closure_that_touches_the_model_is_inlined_and_another_kept() -> None:
    found = run(
        experiment(
            """
            %c = closure g(%m)
              set_attr %m.output = 0
              return None
            %h = attr %model.head
            %r = call %c(%h)
            %o = attr %model.output
            return %o
            """
        )
    )
    assert "write %model@head output = 0" in str(found.program)
    assert "call" not in str(found.program)
    kept = "%c = closure g(%m)\n  %m.1 = %m * 2\n  return %m.1\n%r = call %c(%x)\nreturn %r"
    becomes(kept, kept, inside=False)


def test_saves_are_recognised_whichever_way_they_are_written() -> None:
    becomes(
        "%o = attr %model.output\n%s = attr %o.save\n%c = call %s()\nreturn %c",
        "%o = read %model@'' output\n%s = attr %o.save\n%c = save %o\nreturn %c",
    )
    becomes(
        "%s = global save\n%o = attr %model.output\n%c = call %s(%o)\nreturn %c",
        "%s = global save\n%o = read %model@'' output\n%c = save %o\nreturn %c",
    )


# --- blocks ---


def test_a_block_gives_back_what_was_saved_and_names_what_was_not() -> None:
    found = run(
        """
        block f(%model, %x) exports "kept", "gone", "number"     # f.py:1
          forward %f0 = trace %model(%x)                         # f.py:1
            %h = attr %model.head                                # f.py:2
            %gone = attr %h.output
            %s = attr %gone.save                                 # f.py:3
            %kept = call %s()
          return (%kept, %gone, 3)                               # f.py:1
        """
    )
    assert str(found.program).rstrip().splitlines()[-1].split("#")[0].strip() == "return (%kept, unbound, 3)"
    assert {name: span.line for name, span in found.unsaved.items()} == {"gone": 2}
    assert not found.unsure


# --- what is refused ---

REFUSED = [
    ("%0 = attr %model.hh", "Net has no `hh`; did you mean h?"),
    ("%0 = item %layers[7]", "h (ModuleList) holds 3 modules: no index 7 (0 to 2)"),
    ("%0 = item %layers[%x]", "which module this is must be a whole number: only integer tensors of a single element"),
    ("%0 = attr %other.output", "this module belongs to another model than the one that this `with` runs"),
    ("%0 = attr %layers.calls\n%1 = attr %0.output", "`.calls` needs the number of the call"),
    ("set_attr %model.training = True", "`training` of `the model` cannot be assigned in an experiment"),
    ("set_item %layers[0] = %x", "a module cannot be replaced in an experiment"),
    ("%0 = attr %model.trace\n%1 = call %0(%x)", "`.trace(…)` without `with` runs nothing"),
    ("forward %f1 = trace %model(%x)\n  %0 = read %model@'' output", "a forward cannot run inside the body of another"),
    ("invoke %i = %f0(%x)\n  %0 = read %model@'' output", "the trace brings an input of its own, and so does"),
    ("try\n  %0 = read %model@'' output\nfinally\n  %1 = global x", "`try` cannot surround part of a forward"),
    ("%0 = global recursive\n%1 = call %0(%model)", "`recursive` calls itself more than 64 times"),
    (
        "%0 = attr %model.output\n%1 = item %layers[%0]",
        "which module this is must be known before the model runs, but only a run can give it",
    ),
    (
        "%0 = attr %model.output\nif %0\nthen\n  return %0\nelse\n  yield",
        "whether this `return` happens depends on a value of the forward that is running",
    ),
    (
        "for %m in %layers\n  %0 = attr %m.output\n  if %0\n  then\n    break\n  else\n    yield",
        "this `break` depends on a value that only a run can give, but the loop is unrolled",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_what_is_refused_says_where_and_why(body: str, reason: str) -> None:
    text = experiment(f"%layers = attr %model.h\n%other = global other\n{body}\nreturn None")
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if "global other" in line) + 1
    numbered = [f"{line}  # f.py:{number}" if number >= first else line for number, line in enumerate(lines)]
    with pytest.raises(CompileError) as caught:
        run("\n".join(numbered) + "\n")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.reason.startswith(reason)
    if not reason.startswith("`recursive`"):
        assert diagnostic.span.file == "f.py"
        assert first <= diagnostic.span.line < len(lines) - 1
    assert diagnostic.way_out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("%h = attr %model.head\n%0 = attr %h.output", "a module's values exist only while the model runs"),
        ("%h = attr %model.head\nforward %f = trace %h(%x)\n  %0 = read %model@'' output", "only a whole model can be"),
        ("forward %f = trace %x(%x)\n  %0 = read %model@'' output", "`.trace(…)` is called on a `Tensor`"),
    ],
)
def test_what_is_refused_outside_of_a_forward(body: str, reason: str) -> None:
    with pytest.raises(CompileError) as caught:
        run(experiment(f"{body}\nreturn None", inside=False))
    assert caught.value.diagnostics[0].reason.startswith(reason)


def test_an_error_shows_the_user_s_line() -> None:
    text = "def f(model, x):\n    with model.trace(x):\n        return model.layer.output\n"
    linecache.cache["shown.py"] = len(text), None, text.splitlines(keepends=True), "shown.py"
    with pytest.raises(CompileError) as caught:
        specialise(lower_source(text, "shown.py"), Subject({"model": MODEL, "x": X}, {}, {}, lower_function, save))
    span = caught.value.diagnostics[0].span
    assert (span.file, span.line, span.column) == ("shown.py", 3, 15)
    assert "        return model.layer.output\n                   ^^^^^^^^^^^" in str(caught.value)


# --- constants of the program in containers and texts ---


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("if number in (0, 2): model.h[1].output = 0", False),
        ("if number not in [0, 2]: model.h[1].output = 0", True),
        ("if number in {1: 'a', 2: 'b'}: model.h[1].output = 0", True),
        ("held = {}; held[number] = 1\n            if number in held: model.h[1].output = 0", True),
        ("if f'h.{number}' == 'h.1': model.h[1].output = 0", True),
        ("if f'h.{number!r:>2}' == 'h. 1': model.h[1].output = 0", None),
        ("if number in (0, x.shape[0]): model.h[1].output = 0", None),
        ("if number in (0, which): model.h[1].output = 0", None),
    ],
)
def test_conditions_on_constants_are_decided(source: str, left: bool | None) -> None:
    text = f"""
    def f(model, x, which):
        number = 1
        with model.trace(x):
            {source}
            y = model.output
        return y
    """
    program = lower_source(dedent(text), "constants.py")
    given = {"model": MODEL, "x": X, "which": 1}
    found = str(specialise(program, Subject(given, GLOBALS, {}, lower_function, save)).program)
    assert ("if " in found) == (left is None), found
    assert ("write" in found) == (left is not False)
