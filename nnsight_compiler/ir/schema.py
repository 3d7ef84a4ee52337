"""What the fields of ops may hold, by their annotations: used by the parser, the verifier and the serial form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from typing import Literal as OneOf

from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Slice, Tuple

_KNOWN: dict[type, dict[str, Any]] = {}


def schema(kind: type) -> Mapping[str, Any]:
    """The annotation of each field of a dataclass, in order, `span` left out."""
    if kind not in _KNOWN:
        hints = get_type_hints(kind, localns={"Program": Program})
        _KNOWN[kind] = {item.name: hints[item.name] for item in fields(kind) if item.name != "span"}
    return _KNOWN[kind]


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation itself where it is none."""
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def conforms(held: object, hint: Any) -> bool:
    """Whether a value is what an annotation says: it looks into tuples and arguments, not into code and operands,
    whose depth is not bounded here."""
    for each in alternatives(hint):
        origin = get_origin(each)
        if origin is tuple:
            part = get_args(each)[0]
            found = isinstance(held, tuple) and all(conforms(one, part) for one in held)
        elif origin is OneOf:
            found = any(held is choice or (type(held) is type(choice) and held == choice) for choice in get_args(each))
        elif each in (str, int, bool, NoneType):
            found = type(held) is each
        elif each is object:
            found = True
        else:
            found = isinstance(held, each) and _parts_conform(held, each)
        if found:
            return True
    return False


def _parts_conform(held: object, kind: type) -> bool:
    if kind in (Region, Slice, Tuple, Program):
        return True
    return all(conforms(getattr(held, name), hint) for name, hint in schema(kind).items())
