"""Many jobs with the same code as one program: a loop over their data, whose rounds `merge_forwards` makes rows.

    experiment steer(prompt, vector, layer):            experiment steer(jobs, layer):
      with model.trace(prompt): …                 ──▶     results = []
      return logits                                       for prompt, vector in jobs:
                                                            with model.trace(prompt): …
                                                            results.append(logits)
                                                          return results

What the program was specialised on, such as the layer, is equal in all of them and stays a parameter. Legal, since a
job shares no object with another: its data is its own, and what its code holds is not changed by it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Op, Parameter, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions
from nnsight_compiler.ir.values import Literal, Operand, Tuple, Unbound, Value
from nnsight_compiler.passes.facts import Guard

_SHOWS = frozenset({"builtins.print"})


def guarded(program: Program, guards: Iterable[Guard]) -> frozenset[str]:
    """The parameters whose values a compiled program rests on."""
    words = {word for guard in guards for word in re.findall(r"\w+", guard.text)}
    return frozenset(parameter.value.name for parameter in program.parameters) & words


def shows(program: Program) -> bool:
    """Whether a specialised program prints, so that whose text it is could not be told in a loop."""
    return any(isinstance(op, ops.Call) and op.target in _SHOWS for op in program.walk())


def looped(program: Program, common: Collection[str], specialised: Program) -> Program | None:
    """The program of a loop over jobs; `None` where a job may return from within.

    Args:
        common: the parameters that all jobs have in common.
        specialised: the program of one job, which says what of a block is kept.
    """
    *body, last = program.body.ops
    if not isinstance(last, ops.Return) or any(isinstance(op, ops.Return) for op in _inside(body)):
        return None
    span = program.span
    builder = Builder(value.name for value in program.values())
    own = [parameter for parameter in program.parameters if parameter.value.name not in common]
    jobs, item, results, append, appended = (
        Value(_name("jobs", program)),
        *(builder.fresh(hint) for hint in ("job", "results", "append", "appended")),
    )
    value: Operand = last.value
    if program.kind == "block":
        value = _kept(value, specialised.body.ops[-1])
    round_: list[Op] = [ops.Unpack(tuple(each.value for each in own), item, span=span)] if own else []
    round_ += [
        *body,
        ops.Attribute(append, results, "append", span=last.span),
        ops.Call(appended, append, (ops.Argument(value),), span=last.span),
        ops.Continue((), span=last.span),
    ]
    made = (
        ops.Build(results, "list", (), span=span),
        ops.For((), jobs, (), Region((item,), tuple(round_)), span=span),
        ops.Return(results, span=last.span),
    )
    kept = tuple(parameter for parameter in program.parameters if parameter.value.name in common)
    return replace(program, parameters=(Parameter(jobs), *kept), body=Region((), made), kind="experiment", exports=())


def _kept(written: Operand, end: Op) -> Operand:
    """What a block returns, without the values that it does not keep, and what only it could hold."""
    if not (isinstance(end, ops.Return) and isinstance(end.value, Tuple) and isinstance(written, Tuple)):
        return written
    pairs = zip(written.parts, end.value.parts, strict=True)
    return Tuple(tuple(kept if isinstance(kept, (Literal, Unbound)) else part for part, kept in pairs))


def _inside(body: Iterable[Op]) -> Iterable[Op]:
    """The ops of a function's own body: those of closures return from the closure."""
    for op in body:
        yield op
        if not isinstance(op, ops.Closure):
            for region in regions(op):
                yield from _inside(region.ops)


def _name(stem: str, program: Program) -> str:
    taken = {value.name for value in program.values()}
    taken |= {op.name for op in program.walk() if isinstance(op, (ops.Global, ops.SetGlobal))}
    while stem in taken:
        stem += "_"
    return stem


def constant(value: Any) -> Any:
    """What a value that a program was specialised on is, as something whose text tells it from others. Objects with an
    identity of their own are told by it: no two jobs have one in common."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [constant(each) for each in value]
    return value if isinstance(value, (type(None), bool, int, float, str, bytes)) else id(value)
