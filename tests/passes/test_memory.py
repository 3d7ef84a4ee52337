"""The memory analysis: roots, liveness, effects. Random programs are in `test_eliminate_random_programs`."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.values import Value
from nnsight_compiler.ir.verifier import verify
from nnsight_compiler.passes.memory import Fresh, Memory, Outside, Root, Site, Weight


def memory_of(text: str) -> Memory:
    program = parse_program(dedent(text))
    verify(program)
    return Memory(program)


def in_trace(body: str, after: str = "", model: str = "%model(%prompt)") -> Memory:
    lines = f"forward %f = trace {model}\n{indent(dedent(body).strip(), '  ')}\n{after}\nreturn None"
    return memory_of(f"experiment e(%model, %prompt, %v, %w)\n{indent(lines, '  ')}\n")


def op_of(memory: Memory, name: str) -> ops.Op:
    definition = memory.origins.definition(Value(name))
    assert definition is not None
    return definition


def site(module: str, port: str = "output", forward: str = "f", rows: str = "") -> Site:
    return Site(module, port, None, forward, rows)


H = "%h = read %model@h.3 output"


@pytest.mark.parametrize(
    ("line", "roots"),
    [
        ("%r = item %h[:, -1]", {site("h.3")}),
        ("%r = attr %h.T", {site("h.3")}),
        ("%r = attr %h.shape", set()),
        ("%r = %h + 1.0", {Fresh("r")}),
        ("%r = %h is None", set()),
        ("%r = save %h", {Fresh("r")}),
        ("%r = keep %h", {Fresh("r"), site("h.3")}),
        ("%r = read %model@h.3 input", {site("h.3", "input")}),
        ("%r = list [%h]", {Fresh("r")}),
        ("%l = list [%h]\n%r = item %l[0]", {Fresh("l"), site("h.3")}),
        ("%r = attr %model@lm_head .weight", {Weight("model", "lm_head.weight")}),
        ("%r = global torch", {Outside("global torch")}),
        ('%m = attr %h.view\n%r = call %m(-1) as "torch.Tensor.view"', {Fresh("r"), site("h.3")}),
        ('%m = attr %h.sum\n%r = call %m(-1) as "torch.Tensor.sum"', {Fresh("r")}),
        ('%m = attr %h.item\n%r = call %m() as "torch.Tensor.item"', set()),
        ('%r = call %w(%h) as "torch.relu"', {Fresh("r")}),
        ("%r = if %w\nthen\n  yield %h\nelse\n  yield %v", {site("h.3"), Outside("v")}),
        ("%r = for %i in %w carry %c = %v\n  continue %h", {site("h.3"), Outside("v")}),
        ("%c = cell c = %v\nstore %c = %h\n%r = load %c as c", {site("h.3"), Outside("v")}),
        ("%g = closure g()\n  return %h\n%r = call %g()", {Fresh("r"), site("h.3")}),
    ],
)
def test_roots(line: str, roots: set[Root]) -> None:
    assert in_trace(f"{H}\n{line}").roots(Value("r")) == roots


def test_a_host_call_may_keep_and_give_back_anything_it_was_given() -> None:
    memory = in_trace(f"{H}\n%x = %h + 1.0\n%r = call %w(%x)\n%s = call %w()")
    assert Fresh("x") in memory.roots(Value("r"))
    assert Fresh("x") in memory.roots(Value("s")), "a later call may give back what an earlier one kept"
    assert Fresh("x") in memory.writes(op_of(memory, "s"))
    assert site("h.3") not in memory.writes(op_of(memory, "s"))
    assert memory.escaped(Value("x"))
    assert not memory.escaped(Value("h"))


@pytest.mark.parametrize(
    ("line", "live"),
    [
        ("%r = item %h[0]", True),
        ("%r = %h + 1.0", False),
        ("%r = %h + 1.0\nwrite %model@h.4 output = %r", True),
        ("%r = %h + 1.0\n%k = item %r[0]\nskip %model@h.4 = %k", True),
        ("%r = save %h", False),
        ("%r = list [%h]", True),
        ("%s = save %h\n%r = list [%s]", False),
        ("%r = attr %h.shape", False),
        ("%r = item %v[0]", False),
        ("%r = item %prompt[0]", True),
    ],
)
def test_live(line: str, live: bool) -> None:
    assert in_trace(f"{H}\n{line}").live(Value("r")) is live


def test_sites_of_one_forward_may_be_one_storage_but_are_told_apart() -> None:
    memory = memory_of(
        """
        experiment e(%model, %a, %b)
          forward %f = trace %model(%a)
            %h = read %model@h.3 output
            %i = read %model@h.4 input
          forward %g = trace %model(%b)
            %j = read %model@h.3 output
          return None
        """
    )
    h, i, j = (Value(name) for name in "hij")
    assert memory.may_alias(h, i)
    assert memory.roots(h) != memory.roots(i)
    assert not memory.may_alias(h, j)


def test_rows_of_two_invokes_are_apart() -> None:
    memory = memory_of(
        """
        experiment e(%model)
          forward %f = trace %model()
            invoke %i0 = %f("a")
              %a = read %model@h output of %i0
            invoke %i1 = %f("b")
              %b = read %model@h output of %i1
            %c = read %model@h output
          return None
        """
    )
    a, b, c = (Value(name) for name in "abc")
    assert not memory.may_alias(a, b)
    assert memory.may_alias(a, c)
    assert memory.may_alias(b, c)


def test_a_value_written_to_a_site_is_what_later_sites_may_hold() -> None:
    memory = in_trace(f"{H}\n%x = %h + 1.0\nwrite %model@h.4 output = %x\n%i = read %model@h.5 output\n%y = %h + 2.0")
    assert memory.may_alias(Value("x"), Value("i"))
    assert not memory.may_alias(Value("y"), Value("i"))


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("%r = %h + 1.0", set()),
        ("%r = %h += 1.0", {site("h.3")}),
        ("set_item %h[0] = %v", {site("h.3")}),
        ("%k = item %h[0]\nset_item %k[:, 0] = %v", {site("h.3")}),
        ("write %model@h.4 output = %v", {site("h.4")}),
        ("skip %model@h.4 = %v", {site("h.4", "skip")}),
        ('%m = attr %h.mul_\n%r = call %m(2) as "torch.Tensor.mul_"', {site("h.3")}),
        (
            '%t = global torch\n%T = attr %t.Tensor\n%m = attr %T.mul_\n%r = call %m(%h, %v) as "torch.Tensor.mul_"',
            {site("h.3")},
        ),
        ('%x = %h + 1.0\n%r = call %w(%x, inplace=True) as "torch.nn.functional.relu"', {Fresh("x")}),
        ('%x = %h + 1.0\n%r = call %w(%h, 1, out=%x) as "torch.add"', {Fresh("x")}),
        ('%l = list []\n%m = attr %l.append\n%r = call %m(%h) as "method.append"', {Fresh("l")}),
        ('%r = call %w(%h) as "builtins.print"', set()),
        ("%g = closure g(%p)\n  set_item %p[0] = 1\n  return None\n%r = call %g(%h)", {site("h.3")}),
        ("if %w\nthen\n  set_item %h[0] = %v\n  yield\nelse\n  yield", {site("h.3")}),
    ],
)
def test_writes(line: str, writes: set[Root]) -> None:
    memory = in_trace(f"{H}\n{line}")
    forward = op_of(memory, "f")
    assert memory.writes(forward) == writes


def test_reads_of_a_list_take_in_what_it_holds() -> None:
    memory = in_trace(f'{H}\n%l = list [%h]\n%r = call %w(%l) as "torch.stack"\n%s = item %l[0]')
    assert site("h.3") in memory.reads(op_of(memory, "r"))
    assert site("h.3") not in memory.reads(op_of(memory, "s")), "taking out an item does not look into it"


def test_conflicts_need_a_write() -> None:
    memory = in_trace(f"{H}\n%a = %h + 1.0\n%b = %h + 2.0\n%c = %h += 1.0\n%d = %a += 1.0")
    a, b, c, d = (op_of(memory, name) for name in "abcd")
    assert not memory.conflict(a, b)
    assert memory.conflict(a, c)
    assert memory.conflict(c, b)
    assert memory.conflict(a, d) is False, "the order of a definition and its use is no matter of memory"
    assert not memory.conflict(c, d)


def test_an_iterator_changes_when_it_is_read() -> None:
    memory = memory_of(
        """
        experiment e(%xs)
          %z = call %xs(%xs) as "builtins.zip"
          %a = call %xs(%z) as "builtins.list"
          %b = call %xs(%z) as "builtins.list"
          return (%a, %b)
        """
    )
    assert memory.conflict(op_of(memory, "a"), op_of(memory, "b"))


def test_a_tuple_of_sites_that_is_put_together_anew_holds_them() -> None:
    memory = in_trace(f"{H}\n%rest = item %h[1:]\n%n = %h * 0.5\n%new = (%n) + %rest".replace("(%n)", "(%n,)"))
    assert memory.may_alias(Value("new"), Value("h"))
    assert memory.may_alias(Value("new"), Value("n"))


def test_a_shared_op_stands_at_every_place() -> None:
    memory = memory_of(
        """
        experiment e(%model, %x)
          forward %f = trace %model(%x)
            write %model@h output = 0
          forward %g = trace %model(%x)
            write %model@h output = 0
          return None
        """
    )
    first, second = (op for op in memory.program.walk() if isinstance(op, ops.Write))
    assert memory.writes(first) == {site("h", forward="f")}
    assert memory.writes(second) == {site("h", forward="g")}


def test_a_closure_that_calls_itself() -> None:
    memory = memory_of(
        """
        experiment e(%x, %n)
          %c = cell g = unbound
          %g = closure g(%k)
            set_item %x[%k] = 0
            %self = load %c as g
            %r = call %self(%k)
            return %r
          store %c = %g
          %s = call %g(%n)
          return %s
        """
    )
    assert Outside("x") in memory.writes(op_of(memory, "s"))


def test_a_type_that_rests_on_an_argument_rules_nothing_out() -> None:
    """The next call may bring a list of tensors, of which the sum holds the same tensors again."""
    text = (
        "experiment f(%v: f32[2, 4])\n  %both = %v + %v : f32[2, 4]\n  %part = item %both[0] : f32[4]\n  return %part\n"
    )
    assert Memory(parse_program(text)).may_alias(Value("part"), Value("v"))
