"""Putting operands in the place of values, and giving the values of a region fresh names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import definitions, rewrite
from nnsight_compiler.ir.values import Operand, Value

Code = TypeVar("Code", Program, Region)


def substitute(code: Code, mapping: Mapping[Value, Operand]) -> Code:
    """The program or region with operands put in the place of values wherever those are used.

    Values are told apart by name. Definitions stay, so a value that code inside defines should not be in the mapping.
    """
    by_name = {value.name: operand for value, operand in mapping.items()}

    def change(value: Value) -> Operand:
        return by_name.get(value.name, value)

    def change_op(op: Op) -> Op:
        return rewrite(op, operand=change, region=change_region)

    def change_region(region: Region) -> Region:
        return replace(region, ops=tuple(map(change_op, region.ops)))

    if isinstance(code, Program):
        return replace(code, body=change_region(code.body))
    return change_region(code)


def rename_fresh(region: Region, builder: Builder, mapping: Mapping[Value, Operand] | None = None) -> Region:
    """A copy of the region in which every value that it defines has a fresh name, so that it can stand beside the
    original. Values from outside stay what they are, or become what the mapping says: an inlined function's parameters.
    """
    fresh = {value.name: builder.fresh(value.name, value.type) for value in definitions(region)}
    outside = {value.name: operand for value, operand in (mapping or {}).items()}

    def use(value: Value) -> Operand:
        return fresh.get(value.name) or outside.get(value.name, value)

    def define(value: Value) -> Value:
        return fresh[value.name]

    def change_op(op: Op) -> Op:
        return rewrite(op, operand=use, region=change_region, result=define)

    def change_region(inner: Region) -> Region:
        return Region(tuple(map(define, inner.parameters)), tuple(map(change_op, inner.ops)))

    return change_region(region)
