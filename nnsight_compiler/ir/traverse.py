"""Walking and rewriting ops of any kind, through the roles of their fields (see `ops`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from nnsight_compiler.ir.ops import Argument, Closure, Element, FormatPart, Forward, Handler, Op, Parameter, Region
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value, map_operand, values_in

AnOp = TypeVar("AnOp", bound=Op)


_FieldRoles = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


class _Roles(dict[type[Op], "_FieldRoles"]):
    """Names of the fields that hold results, operands and regions, by the kind of op."""

    def __missing__(self, kind: type[Op]) -> _FieldRoles:
        found = self[kind] = _find_roles(kind)
        return found


_ROLES = _Roles()


def _find_roles(kind: type[Op]) -> _FieldRoles:
    results, operand, region = [], [], []
    for item in fields(kind):
        annotation = str(item.type)
        if item.name in ("result", "results"):
            results.append(item.name)
        elif "Region" in annotation or "Handler" in annotation:
            region.append(item.name)
        elif any(word in annotation for word in ("Operand", "Argument", "Element", "FormatPart", "Module")):
            operand.append(item.name)
        elif annotation == "tuple[Parameter, ...]":
            region.append(item.name)
    return tuple(results), tuple(operand), tuple(region)


def defined(op: Op) -> tuple[Value, ...]:
    """The values that the op itself defines (not those inside its regions)."""
    found: list[Value] = []
    for name in _ROLES[type(op)][0]:
        held = getattr(op, name)
        found.extend(held if isinstance(held, tuple) else (held,))
    return tuple(found)


def operands(op: Op) -> Iterator[Operand]:
    """The op's operands, in the order in which Python evaluates them; regions not included."""
    for name in _ROLES[type(op)][1]:
        yield from _operands_in(getattr(op, name))


def _operands_in(held: object) -> Iterator[Operand]:
    match held:
        case Value() | Literal() | Unbound() | Module() | Slice() | Tuple():
            yield held
        case tuple():
            for part in held:
                yield from _operands_in(part)
        case Argument(value=value):
            yield value
        case Element(value=value, key=key):
            if key is not None:
                yield key
            yield value
        case FormatPart(value=value, specification=specification):
            yield value
            if specification is not None:
                yield specification


def used(op: Op) -> Iterator[Value]:
    """The values that the op's own operands mention."""
    for operand in operands(op):
        yield from values_in(operand)


def regions(op: Op) -> Iterator[Region]:
    """The op's regions, in source order."""
    for name in _ROLES[type(op)][2]:
        held = getattr(op, name)
        for part in held if isinstance(held, tuple) else (held,):
            match part:
                case Region():
                    yield part
                case Handler(types=types, body=body):
                    if types is not None:
                        yield types
                    yield body


def walk(region: Region) -> Iterator[Op]:
    """Every op in a region and in the regions inside it, outer before inner, in source order."""
    for op in region.ops:
        yield op
        if _ROLES[type(op)][2]:
            for inner in regions(op):
                yield from walk(inner)


def users_by_forward(region: Region) -> dict[str, set[str]]:
    """By the name of each value the forwards whose bodies use it, by the names of their results; an empty name stands
    for all that is outside of them."""
    found: dict[str, set[str]] = {}

    def visit(region: Region, forward: str) -> None:
        for op in region.ops:
            for value in used(op):
                found.setdefault(value.name, set()).add(forward)
            for inner in regions(op):
                visit(inner, op.result.name if isinstance(op, Forward) else forward)

    visit(region, "")
    return found


def definitions(region: Region) -> Iterator[Value]:
    """Every value defined in a region or in the regions inside it: parameters, results, parameters of closures."""
    yield from region.parameters
    for op in region.ops:
        yield from defined(op)
        if isinstance(op, Closure):
            yield from (parameter.value for parameter in op.parameters)
        for inner in regions(op):
            yield from definitions(inner)


def rewrite(
    op: AnOp,
    operand: Callable[[Value], Operand] | None = None,
    region: Callable[[Region], Region] | None = None,
    result: Callable[[Value], Value] | None = None,
) -> AnOp:
    """A copy of the op with its used values, its regions and its results changed. Closure parameters count as results.

    The op itself is returned where nothing changed.
    """
    changes: dict[str, Any] = {}
    result_names, operand_names, region_names = _ROLES[type(op)]
    if result is not None:
        for name in result_names:
            held = getattr(op, name)
            changes[name] = tuple(map(result, held)) if isinstance(held, tuple) else result(held)
    if operand is not None:
        for name in operand_names:
            changes[name] = _map_held(getattr(op, name), operand)
    for name in region_names:
        held = getattr(op, name)
        changes[name] = _map_region(held, region, result)
    changes = {name: new for name, new in changes.items() if new is not getattr(op, name)}
    return replace(op, **changes) if changes else op


def _map_held(held: object, change: Callable[[Value], Operand]) -> object:
    match held:
        case Value() | Literal() | Unbound() | Module() | Slice() | Tuple():
            return map_operand(held, change)
        case tuple():
            return tuple(_map_held(part, change) for part in held)
        case Argument(value=value):
            return replace(held, value=map_operand(value, change))
        case Element(value=value, key=key):
            return replace(
                held, value=map_operand(value, change), key=None if key is None else map_operand(key, change)
            )
        case FormatPart(value=value, specification=specification):
            new = None if specification is None else map_operand(specification, change)
            return replace(held, value=map_operand(value, change), specification=new)
        case _:
            return held


def _map_region(
    held: object, region: Callable[[Region], Region] | None, result: Callable[[Value], Value] | None
) -> object:
    match held:
        case Region():
            return held if region is None else region(held)
        case Handler(types=types, body=body) if region is not None:
            return Handler(None if types is None else region(types), region(body))
        case tuple():
            return tuple(_map_region(part, region, result) for part in held)
        case Parameter(value=value) if result is not None:
            return replace(held, value=result(value))
        case _:
            return held
