"""Fresh names, open regions, substitution and renaming."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from random_examples import examples

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program, print_region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.substitute import rename_fresh, substitute
from nnsight_compiler.ir.traverse import definitions
from nnsight_compiler.ir.types import ModuleType
from nnsight_compiler.ir.values import Literal, Module, Slice, Value
from nnsight_compiler.ir.verifier import verify


def test_names_are_numbered_from_their_hint() -> None:
    builder = Builder()
    assert [builder.fresh(hint).name for hint in ("h", "h", "", "h.1", "", "7", "h")] == [
        *("h", "h.1", "0", "h.2", "1", "2", "h.3"),
    ]


def test_taken_names_are_left_alone() -> None:
    builder = Builder(["h", "h.1", "0"])
    builder.take(["h.3"])
    assert [builder.fresh("h").name, builder.fresh("h").name, builder.fresh().name] == ["h.2", "h.4", "1"]


@given(
    st.lists(st.sampled_from(["", "h", "h.1", "h.1.1", "1", "x"])), st.lists(st.sampled_from(["h", "h.1", "0", "2"]))
)
def test_fresh_names_never_repeat(hints: list[str], taken: list[str]) -> None:
    builder = Builder(taken)
    names = [builder.fresh(hint).name for hint in hints]
    assert len({*names, *taken}) == len(names) + len(set(taken))


def test_ops_go_to_the_innermost_open_region() -> None:
    builder = Builder()
    value = builder.fresh("x", ModuleType("GPT2"))
    first = builder.emit(ops.Stop(value))
    with builder.region() as outer:
        second = builder.emit(ops.Stop(value))
        with builder.region() as inner:
            third = builder.emit(ops.Stop(value))
        fourth = builder.emit(ops.Stop(value))
    assert (builder.ops, outer, inner) == ([first], [second, fourth], [third])


def test_a_region_is_closed_when_its_code_fails() -> None:
    builder = Builder()

    def fail() -> None:
        with builder.region():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    op = builder.emit(ops.Raise())
    assert builder.ops == [op]


TEXT = """\
function f(%a, %b)
  %x = item %a[%b:, (%a,)]
  %y = read %a@h.3 output
  %f = closure f(%p, %q=%a)
    %z = call %p(%a, k=%b)
    return %z
  for %i in %a carry %c = %b
    continue %a
"""


def test_substitution_reaches_every_use() -> None:
    program = parse_program(TEXT.replace("for", "%r = for"))
    changed = substitute(program, {Value("a"): Value("m"), Value("b"): Literal(3)})
    assert (
        print_program(changed)
        == """\
function f(%a, %b)
  %x = item %m[3:, (%m,)]
  %y = read %m@h.3 output
  %f = closure f(%p, %q=%m)
    %z = call %p(%m, k=3)
    return %z
  %r = for %i in %m carry %c = 3
    continue %m
"""
    )
    assert substitute(changed.body, {Value("m"): Value("a"), Value("z"): Value("w")}) != changed.body


def test_substituting_a_module_extends_its_path() -> None:
    region = Region((), (ops.Read(Value("r"), Module(Value("block"), "attn"), "output"),))
    changed = substitute(region, {Value("block"): Module(Value("model"), "h.3")})
    assert changed.ops == (ops.Read(Value("r"), Module(Value("model"), "h.3.attn"), "output"),)


def test_renaming_keeps_what_comes_from_outside() -> None:
    program = parse_program(TEXT.replace("for", "%r = for"))
    region = rename_fresh(program.body, Builder(value.name for value in program.values()), {Value("b"): Slice()})
    assert (
        print_region(region)
        == """\
%x.1 = item %a[slice(:):, (%a,)]
%y.1 = read %a@h.3 output
%f.1 = closure f(%p.1, %q.1=%a)
  %z.1 = call %p.1(%a, k=slice(:))
  return %z.1
%r.1 = for %i.1 in %a carry %c.1 = slice(:)
  continue %a
"""
    )


@examples(30)
@given(data=st.data())
def test_a_renamed_copy_can_stand_beside_the_original(programs: SearchStrategy[Program], data: DataObject) -> None:
    program = data.draw(programs)
    names = [value.name for value in program.values()]
    assert len(set(names)) == len(names)
    copy = rename_fresh(program.body, Builder(names))
    assert not {value.name for value in definitions(copy)} & set(names)
    there = {new: old for old, new in zip(definitions(program.body), definitions(copy), strict=True)}
    assert rename_fresh(copy, _Given([value.name for value in there.values()])) == program.body
    verify(Program("copy", program.parameters, copy, program.kind, exports=program.exports))


class _Given(Builder):
    """Hands out the names that it was given, in order."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = iter(names)

    def fresh(self, hint: str = "", type: object = None) -> Value:
        return Value(next(self.names), type)  # type: ignore[arg-type]
