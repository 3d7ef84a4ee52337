"""Gives the values of a specialised program their types, and finds mistakes of shape before the run.

    %h = read %model@transformer.h.3 output       %h = read %model@transformer.h.3 output : f32[rows=1, tokens=7, 768]
    %last = item %h[:, -1]                   ──▶  %last = item %h[:, -1] : f32[rows=1, 768]

The program is run on tensors without data (`meta_run`), at the size of this call and at some that are larger. From how
a dimension grows follows what it counts: rows, tokens, both, or neither. It is not told from sizes, which may coincide.

What of a type holds for what: the program serves every call for which its guards hold, so also other prompts, and other
values of arguments that are not guarded on. The sizes of `rows` and `tokens` are this call's, and so is whatever rests
on an argument. At a read of a site, the dtype, the number of dimensions, the named axes, and the sizes without a name
are the model's. Passes that rely on more must guard on it.

A mistake is reported only where it is sure: the line runs whatever the model computes, and torch refuses the same
shapes on real tensors. It is a mistake of this call's: nothing is remembered of it, so that a later call with other
arguments compiles.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Op, Read, Region, Steps
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import definitions, rewrite, walk
from nnsight_compiler.ir.types import Dimension, TensorType, Type
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.meta_run import MetaRun, only_first
from nnsight_compiler.passes.meta_values import Found, Restart, Shape, Size, Source
from nnsight_compiler.passes.shapes import Extent, Extents, Surroundings
from nnsight_compiler.passes.sites import forwards

_GRID = ((67, 509), (71, 547))
"""Rows and tokens at which axes are told apart: prime, and the same for all programs, so that what is computed for one
serves others."""
_SOME, _OTHERS = (3, 13), (5, 29)
"""Rows and tokens of a forward whose size only the run can tell, in two runs at the size of the call."""

_lock = threading.Lock()
"""Held while warnings are switched off: what torch warns of, it says again when the program runs."""


def infer(program: Program, surroundings: Surroundings, extents: Extents) -> Program:
    """The program with the types of its values, for this call.

    Raises:
        CompileError: with every mistake of shape that was found.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return program  # results would have other dtypes than those found here
    found = {op.result.name: extents(op) for op in forwards(program.body)}
    found |= {op.result.name: extents(op) for op in walk(program.body) if isinstance(op, ops.Invoke)}
    known = {name: extent for name, extent in found.items() if extent is not None}
    exact = all(extent.exact for extent in known.values())
    settings = list(_settings(known, exact)) if known else [{}]
    opaque: set[str] = set()
    source = Source(program)
    while True:
        try:
            runs = [_run(source, surroundings, setting, opaque) for setting in settings]
            break
        except Restart:
            continue
    types = dict(_types([run.shapes for run in runs], settings, exact))
    if exact and runs[0].mistakes:
        raise CompileError([_told(mistake, types) for mistake in runs[0].mistakes])
    return _typed(program, _of_steps(program, types))


def _settings(known: Mapping[str, Extent], exact: bool) -> Iterator[dict[str, Size]]:
    """The size of each forward in each of the runs: as in the call, larger where it is not known, and on the grid."""
    for rows, tokens in (_SOME,) if exact else (_SOME, _OTHERS):
        yield {
            name: Size(
                each.sites,
                rows if each.rows is None else each.rows,
                tokens if each.tokens is None else each.tokens,
                each.varies,
            )
            for name, each in known.items()
        }
    least_rows = min((each.rows for each in known.values() if each.rows is not None), default=0)
    least_tokens = min((each.tokens for each in known.values() if each.tokens is not None), default=0)
    for rows, tokens in _GRID:
        yield {
            name: Size(
                each.sites,
                _on_grid(rows, each.rows, least_rows, "rows" in each.varies),
                _on_grid(tokens, each.tokens, least_tokens, "tokens" in each.varies),
                each.varies,
            )
            for name, each in known.items()
        }


def _on_grid(place: int, size: int | None, least: int, varies: bool) -> int:
    """A size of a forward on the grid; forwards of different sizes keep their differences."""
    if size is None:
        return place
    return place + size - least if varies else size


def _run(source: Source, surroundings: Surroundings, sizes: Mapping[str, Size], opaque: set[str]) -> MetaRun:
    run = MetaRun(source, surroundings, sizes, opaque)
    with computed():
        run.run()
    return run


@contextmanager
def computed() -> Iterator[None]:
    """Where torch computes on tensors without data: it warns of nothing, and records no gradients."""
    with _lock, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


# --- from shapes to types ---


def _types(
    shapes: Sequence[dict[str, Shape | None]], settings: Sequence[Mapping[str, Size]], exact: bool
) -> Iterator[tuple[str, TensorType]]:
    """The type of each value, from its shapes in all runs. Those on the grid may differ, or fail: then sizes are all
    that is known."""
    axes = _axes(settings)
    for name, shape in shapes[0].items():
        others = [each.get(name) for each in shapes[1:]]
        if shape is None or (not exact and not _alike(shape, others[0])):
            continue
        dtype, sizes = shape
        found = [[each[1][number] for each in others if _alike(shape, each)] for number in range(len(sizes))]  # type: ignore[index]
        dimensions = [
            Dimension(size if exact or larger[0] == size else None, axes.get((size, *larger)))
            for size, larger in zip(sizes, found, strict=True)
        ]
        yield name, TensorType(str(dtype).removeprefix("torch."), tuple(dimensions))


def _alike(first: Shape, second: Shape | None) -> bool:
    return second is not None and first[0] == second[0] and len(first[1]) == len(second[1])


def _axes(settings: Sequence[Mapping[str, Size]]) -> dict[tuple[int, ...], str]:
    """What a dimension counts, by its size in each of the runs: one that is not here does not follow the size of a
    forward in all of them. Of two forwards that would tell it differently the first does."""
    found: dict[tuple[int, ...], str] = {}
    for name, each in settings[0].items():
        rows = tuple(setting[name].rows for setting in settings)
        tokens = tuple(setting[name].tokens for setting in settings)
        if "rows" in each.varies:
            found.setdefault(rows, "rows")
        if "tokens" in each.varies:
            found.setdefault(tokens, "tokens")
        if len(each.varies) == 2:
            found.setdefault(tuple(row * token for row, token in zip(rows, tokens, strict=True)), "rows*tokens")
    return found


def _of_steps(program: Program, types: dict[str, TensorType]) -> dict[str, TensorType]:
    """The types without what does not hold for later steps of a generation: there, prompts are of one token, or of
    any number."""
    found = dict(types)
    for steps in program.walk():
        if not isinstance(steps, Steps) or only_first(steps):
            continue
        for value in definitions(steps.body):
            found.pop(value.name, None)
        for op in walk(steps.body):
            if isinstance(op, Read) and op.result.name in types:
                found[op.result.name] = at_later_steps(types[op.result.name])
    return found


Known = TypeVar("Known", bound=Type)


def at_later_steps(known: Known) -> Known:
    """The type of what a site gives, without how many tokens the first step has."""
    if not isinstance(known, TensorType) or known.shape is None:
        return known
    return replace(
        known,
        shape=tuple(replace(each, size=None) if "tokens" in (each.axis or "") else each for each in known.shape),
    )


def _typed(program: Program, types: dict[str, TensorType]) -> Program:
    """The program with these types at every definition and use."""

    def value(held: Value) -> Value:
        found = types.get(held.name)
        return held if found is None else Value(held.name, found)

    def change(op: Op) -> Op:
        return rewrite(op, operand=value, region=inside, result=value)

    def inside(region: Region) -> Region:
        return Region(tuple(map(value, region.parameters)), tuple(map(change, region.ops)))

    parameters = tuple(replace(parameter, value=value(parameter.value)) for parameter in program.parameters)
    return replace(program, parameters=parameters, body=inside(program.body))


# --- mistakes ---


def _told(mistake: Found, types: dict[str, TensorType]) -> Diagnostic:
    """The diagnostic, which names the axis where there is one."""
    axis = None
    if mistake.value is not None and mistake.dimension is not None and mistake.value in types:
        axis = (types[mistake.value].shape or ())[mistake.dimension].axis
    text = mistake.diagnostic.reason.replace("{axis}", f" ({axis})" if axis else "")
    return replace(mistake.diagnostic, reason=text)
