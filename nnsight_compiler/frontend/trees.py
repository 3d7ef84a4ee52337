"""Small questions about libcst nodes: parameters, arguments in the order of evaluation, clauses of comprehensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import libcst as cst

from nnsight_compiler.ir.ops import ParameterKind

CONSTANTS: dict[str, bool | None] = {"True": True, "False": False, "None": None}
"""Names that libcst does not tell from variables."""


@final
@dataclass(frozen=True, slots=True)
class DeclaredParameter:
    """A parameter as the source declares it."""

    node: cst.Param
    kind: ParameterKind


def parameters_of(parameters: cst.Parameters) -> Iterator[DeclaredParameter]:
    """The parameters, in the order of the signature."""
    for node in parameters.posonly_params:
        yield DeclaredParameter(node, "positional_only")
    for node in parameters.params:
        yield DeclaredParameter(node, "positional_or_keyword")
    if isinstance(parameters.star_arg, cst.Param):
        yield DeclaredParameter(parameters.star_arg, "var_positional")
    for node in parameters.kwonly_params:
        yield DeclaredParameter(node, "keyword_only")
    if parameters.star_kwarg is not None:
        yield DeclaredParameter(parameters.star_kwarg, "var_keyword")


def arguments_in_order(arguments: Sequence[cst.Arg]) -> list[cst.Arg]:
    """The arguments of a call as Python evaluates them: positional ones and `*` before keywords and `**`."""
    return sorted(arguments, key=lambda argument: argument.keyword is not None or argument.star == "**")


def comprehension_clauses(first: cst.CompFor) -> list[cst.CompFor]:
    """The `for` clauses of a comprehension, outer first."""
    clauses = [first]
    while clauses[-1].inner_for_in is not None:
        clauses.append(clauses[-1].inner_for_in)
    return clauses


def dotted_name(node: cst.BaseExpression | None) -> str:
    """`a.b.c` of a chain of attributes; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return ""
    return ".".join([node.value, *reversed(parts)])
