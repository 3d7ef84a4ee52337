"""What an op is made of: its effects, its regions, and the parts that several ops have."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto
from typing import ClassVar, final
from typing import Literal as OneOf

from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.values import Operand, Value


class Effect(Flag):
    """What running an op may do besides computing its results."""

    NONE = 0
    READS = auto()
    """Its results depend on memory that can change: a cell, an attribute, a tensor's storage."""
    WRITES = auto()
    """It changes memory: a cell, a container, a tensor."""
    CALLS = auto()
    """It runs code that the compiler may not know."""
    CONTROL = auto()
    """It leaves its region: `return`, `raise`, `break`, …"""
    MODEL = auto()
    """It runs a model, or takes part in its forward."""


Port = OneOf["output", "input", "inputs", "result"]
ParameterKind = OneOf["positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword"]


@final
@dataclass(frozen=True, slots=True)
class Region:
    """A block of ops with parameters. The last op may be a terminator; without one, control falls off the end."""

    parameters: tuple[Value, ...] = ()
    ops: tuple[Op, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an experiment or a closure, as in Python's signature."""

    value: Value
    kind: ParameterKind = "positional_or_keyword"
    optional: bool = False


@final
@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a call: positional, `keyword=value`, `*value` (`star="*"`) or `**value` (`star="**"`)."""

    value: Operand
    keyword: str | None = None
    star: OneOf["", "*", "**"] = ""


@final
@dataclass(frozen=True, slots=True)
class Element:
    """One element of a display: a value, `*value`; in a dict `key: value`, or `**value` with `starred`."""

    value: Operand
    key: Operand | None = None
    starred: bool = False


@final
@dataclass(frozen=True, slots=True)
class FormatPart:
    """One replacement field of an f-string: `{value!conversion:specification}`."""

    value: Operand
    conversion: OneOf["", "r", "s", "a"] = ""
    specification: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Handler:
    """One `except` clause. `types` computes the exception types and yields one operand (`None`: catches all). The
    parameter of `body` is the exception."""

    types: Region | None
    body: Region


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. Equality ignores `span`, so that equal programs written in different places are equal."""

    effects: ClassVar[Effect] = Effect.NONE
    span: Span = field(default=NOWHERE, compare=False, kw_only=True)
