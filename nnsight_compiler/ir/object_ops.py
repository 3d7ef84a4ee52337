"""Ops of objects: attributes, items, displays, operators, calls, functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final
from typing import Literal as OneOf

from nnsight_compiler.ir.op import Argument, Effect, Element, FormatPart, Op, Parameter, Region
from nnsight_compiler.ir.values import Operand, Value

if TYPE_CHECKING:
    from nnsight_compiler.ir.program import Program


@final
@dataclass(frozen=True, slots=True)
class Attribute(Op):
    """`object.name`."""

    effects = Effect.READS
    result: Value
    object: Operand
    name: str


@final
@dataclass(frozen=True, slots=True)
class SetAttribute(Op):
    """`object.name = value`."""

    effects = Effect.WRITES
    object: Operand
    name: str
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Item(Op):
    """`object[index]`. On a tensor that is plain indexing, often a view."""

    effects = Effect.READS
    result: Value
    object: Operand
    index: Operand


@final
@dataclass(frozen=True, slots=True)
class SetItem(Op):
    """`object[index] = value`. On a value read from a site and found to be a tuple or a `ModelOutput`, replaces that
    item at the site."""

    effects = Effect.WRITES
    object: Operand
    index: Operand
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Delete(Op):
    """`del object[index]`, or `del object.name` where `index` is `None`."""

    effects = Effect.WRITES
    object: Operand
    index: Operand | None
    name: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Build(Op):
    """A display: a new list, set or dict, or a tuple with starred parts."""

    result: Value
    kind: OneOf["tuple", "list", "set", "dict"]
    elements: tuple[Element, ...]


@final
@dataclass(frozen=True, slots=True)
class Format(Op):
    """An f-string: literal text and replacement fields, joined."""

    result: Value
    parts: tuple[str | FormatPart, ...]


@final
@dataclass(frozen=True, slots=True)
class Unpack(Op):
    """`a, *b, c = value`. `star` is the place of the starred result, -1 where there is none."""

    effects = Effect.CALLS
    results: tuple[Value, ...]
    value: Operand
    star: int = -1


@final
@dataclass(frozen=True, slots=True)
class Operator(Op):
    """A unary, binary or comparison operator, by Python's own sign: `+`, `-`, `not`, `<=`, `is not`, `in`, …
    With `in_place`, the augmented assignment (`+=`), which may change its first operand and returns it."""

    effects = Effect.READS
    result: Value
    operator: str
    operands: tuple[Operand, ...]
    in_place: bool = False


@final
@dataclass(frozen=True, slots=True)
class Call(Op):
    """`function(arguments)`. `target` is the name of the callee in the table of known calls (`torch.Tensor.softmax`),
    set by `specialise`; after that pass a call without a target is a host op."""

    effects = Effect.CALLS
    result: Value
    function: Operand
    arguments: tuple[Argument, ...] = ()
    target: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Closure(Op):
    """A lambda, a nested function, or (`generator`) a generator expression, which is called once with its first
    iterable. `defaults` has one operand for each optional parameter, in order."""

    result: Value
    name: str
    parameters: tuple[Parameter, ...]
    defaults: tuple[Operand, ...]
    body: Region
    generator: bool = False


@final
@dataclass(frozen=True, slots=True)
class Stage(Op):
    """A function that specialises `program` to its arguments when it is called, and then runs it: what depends on
    `needs`, which only a run can give. The program is as the user wrote it, so that no pass looks into it."""

    result: Value
    program: Program
    needs: str
