"""Effects that later calls depend on without sharing storage with them: seeds, settings, iterators, aliases."""

from __future__ import annotations

import pytest

from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from nnsight_compiler.passes.memory import Memory

HEADER = "experiment f(%model, %prompt, %x, %g)\n"


def program(*lines: str) -> Program:
    return parse_program(HEADER + "".join(f"  {line}\n" for line in lines))


def op_of(made: Program, name: str) -> Op:
    return next(op for op in made.walk() if any(value.name == name for value in defined(op)))


def test_a_setting_is_written_before_what_goes_by_it() -> None:
    made = program("%s = call %g(%x) as torch.set_default_dtype", "%z = call %g(3) as torch.zeros", "return %z")
    memory = Memory(made)
    assert memory.conflict(op_of(made, "s"), op_of(made, "z"))
    plain = program("%s = call %g(%x) as torch.abs", "%z = call %g(3) as torch.zeros", "return %z")
    assert not Memory(plain).conflict(op_of(plain, "s"), op_of(plain, "z"))


def test_nothing_is_shared_across_a_setting() -> None:
    made = program(
        "%a = call %g(%x) as torch.relu",
        "%b = %a + 1",
        "%s = call %g(False) as torch.set_grad_enabled",
        "%c = call %g(%x) as torch.relu",
        "%d = %c + 1",
        "return (%b, %d)",
    )
    assert eliminate_common_subexpressions(made) is made


def test_unary_plus_of_a_tensor_is_the_tensor() -> None:
    made = program("%y = + %x", "%z = - %x", "return (%y, %z)")
    memory = Memory(made)
    x, y, z = (next(v for v in values if v.name == name) for name, values in _values(made).items())
    assert memory.may_alias(x, y)
    assert not memory.may_alias(x, z)


def _values(made: Program) -> dict[str, list]:  # type: ignore[type-arg]
    every = [parameter.value for parameter in made.parameters]
    every += [value for op in made.walk() for value in defined(op)]
    return {name: [value for value in every if value.name == name] for name in ("x", "y", "z")}


@pytest.mark.parametrize("reading", ["%a = list [*%it]", "%a = 1 in %it"])
def test_reading_an_iterator_changes_it(reading: str) -> None:
    made = program("%it = call %g(%x, %x) as builtins.zip", reading, "%b = list [*%it]", "return (%a, %b)")
    memory = Memory(made)
    assert memory.conflict(op_of(made, "a"), op_of(made, "b"))
