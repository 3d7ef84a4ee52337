"""Facts that decide how regions become Python: who leaves a loop, who assigns a value again, who captures it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nnsight_compiler.ir.jumps import jumps
from nnsight_compiler.ir.ops import Break, Closure, Continue, For, Region, Steps, Try, While, Yield
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Value

_SUFFIX = re.compile(r"(\.\d+)+$")


def stem(name: str) -> str:
    """A value's name without the suffix that makes it unique."""
    return _SUFFIX.sub("", name)


def breaks(region: Region) -> bool:
    """Whether a `break` of the loop whose body this is stands in it."""
    return any(isinstance(op, Break) for op, _ in jumps(region, False))


def continues_through_finally(region: Region) -> bool:
    """Whether a `finally` may still run in this round after the loop's `continue` handed over its values."""
    return any(isinstance(op, Continue) and guarded for op, guarded in jumps(region, False))


def assigned_again(program: Program) -> frozenset[str]:
    """The values whose Python variables may be assigned or deleted while the function that defines them goes on."""
    return frozenset(_assigned_again(program.body, False))


def _assigned_again(region: Region, looped: bool) -> Iterator[str]:
    if looped:
        yield from (value.name for value in region.parameters)
    for op in region.ops:
        if looped:
            yield from (value.name for value in defined(op))
        match op:
            case Closure():
                yield from _assigned_again(op.body, False)
            case For() | While() | Steps():
                for inner in regions(op):
                    yield from _assigned_again(inner, True)
            case Try(handlers=handlers):
                for handler in handlers:
                    yield from (value.name for value in handler.body.parameters)
                for inner in regions(op):
                    yield from _assigned_again(inner, looped)
            case _:
                for inner in regions(op):
                    yield from _assigned_again(inner, looped)


def captured(closure: Closure) -> list[Value]:
    """The values that the body of a closure takes from around it, in the order of their first use."""
    inside = {parameter.value.name for parameter in closure.parameters}
    inside.update(value.name for value in closure.body.parameters)
    for op in walk(closure.body):
        inside.update(value.name for value in defined(op))
        for region in regions(op):
            inside.update(value.name for value in region.parameters)
        if isinstance(op, Closure):
            inside.update(parameter.value.name for parameter in op.parameters)
    found: dict[str, Value] = {}
    for op in walk(closure.body):
        for value in used(op):
            if value.name not in inside:
                found.setdefault(value.name, value)
    return list(found.values())


def yields(region: Region) -> bool:
    """Whether a region ends in a `yield`, and so computes values."""
    return bool(region.ops) and isinstance(region.ops[-1], Yield)
