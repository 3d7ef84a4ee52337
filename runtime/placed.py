"""What a placed program says of its forwards: their sites, what crosses between functions, what they ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nnsight_compiler.ir.ops import (
    At,
    AtGradient,
    Attribute,
    Backward,
    Call,
    Grad,
    Gradients,
    Invoke,
    Op,
    Read,
    Region,
    Require,
    SetGrad,
    Skip,
    Steps,
    Stop,
    Strand,
    Track,
    Write,
)
from nnsight_compiler.ir.ops import Forward as ForwardOp
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Module, Value, values_in
from nnsight_compiler.passes.moments import first_step, last_step
from nnsight_compiler.passes.origins import Origins
from nnsight_compiler.runtime.generation import Wanted


def crossing(program: Program) -> dict[str, Value]:
    """The values that are made in one generated function and used in another. What a strand takes from the function
    around it is looked up there."""
    home: dict[str, object] = {parameter.value.name: None for parameter in program.parameters}
    for where, value in _definitions(program.body, None):
        home[value.name] = where

    def crosses(where: object, value: Value) -> bool:
        made = home.get(value.name, where)
        return made is not where and not (made is None and isinstance(where, Strand))

    return {value.name: value for where, value in _uses(program.body, None) if crosses(where, value)}


def ranges(at: At) -> tuple[tuple[int, int | None], ...]:
    """The steps at which a site does something."""
    return tuple(dict.fromkeys((each.start, each.stop) for _, each in asked(at)))


def wanted_steps(op: ForwardOp) -> tuple[Wanted, ...]:
    """The steps that the program asks a generation for."""
    return tuple(dict.fromkeys(each for at in placed(op) for steps, each in asked(at) if steps.asked))


def asked(at: At) -> Iterator[tuple[Steps, Wanted]]:
    for op in walk(at.body):
        if isinstance(op, Steps):
            last = last_step(op)
            yield op, Wanted(first_step(op), None if last == math.inf else int(last) + 1, op.span)


def _definitions(region: Region, where: object) -> Iterator[tuple[object, Value]]:
    for op in region.ops:
        for value in defined(op):
            yield where, value
        for inner in regions(op):
            for value in inner.parameters:
                yield op if isinstance(op, Steps) else where, value
            yield from _definitions(inner, op if isinstance(op, (At, AtGradient, Steps, Strand)) else where)


def _uses(region: Region, where: object) -> Iterator[tuple[object, Value]]:
    for op in region.ops:
        if isinstance(op, (Read, Write, Skip)):
            held = [] if isinstance(op, Read) else [value for value in used(op) if value is not _model(op)]
            taken = [*held, *(() if op.rows is None else values_in(op.rows))]
        elif isinstance(op, Steps):
            taken = [] if op.rows is None else list(values_in(op.rows))
        elif isinstance(op, (At, Stop, Grad)):
            taken = []
        elif isinstance(op, SetGrad):
            taken = list(values_in(op.gradient))
        else:
            taken = list(used(op))
        for value in taken:
            yield where, value
        for inner in regions(op):
            yield from _uses(inner, op if isinstance(op, (At, AtGradient, Steps, Strand)) else where)


def _model(op: Write | Skip) -> Value | None:
    return op.module.model if isinstance(op.module, Module) else None


def wants_gradients(op: Op) -> bool:
    """Whether an op of a forward's body needs its values to have gradients."""
    if isinstance(op, Call):
        return op.target == "torch.Tensor.requires_grad_"
    return isinstance(op, (Require, Track, Backward, Gradients))


def named_weights(program: Program, origins: Origins) -> tuple[str, ...]:
    """The weights of models whose gradients are asked for, by their paths."""
    asked = (
        op.value if isinstance(op, Track) else op.object
        for op in walk(program.body)
        if isinstance(op, Track) or (isinstance(op, Attribute) and op.name == "grad")
    )
    return tuple(
        f"{op.object.path}.{op.name}".strip(".")
        for op in map(origins.definition, asked)
        if isinstance(op, Attribute) and isinstance(op.object, Module)
    )


def placed(op: ForwardOp) -> Iterator[At]:
    for at in op.body.ops:
        if isinstance(at, Invoke):
            continue
        assert isinstance(at, At), "a program is placed before it is planned"
        yield at


def invoked(op: ForwardOp) -> Iterator[Invoke]:
    """The invokes of a placed forward that bring its input."""
    return (each for each in op.body.ops if isinstance(each, Invoke))


def counted_from_the_end(at: At) -> int | None:
    """How often the module of a site must run for `.calls[-1]` and the like to mean this site."""
    calls = (op.call for op in walk(at.body) if isinstance(op, (Read, Write, Skip)))
    return next(((at.call or 0) - call for call in calls if call is not None and call < 0), None)
