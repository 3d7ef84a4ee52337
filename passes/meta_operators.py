"""Python's operators on stand-ins: `UNKNOWN` where nothing can be said."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from nnsight_compiler.passes.meta_torch import broadcast, has_marks, torch_call
from nnsight_compiler.passes.stand_ins import INTEGER, META, PLAIN, UNKNOWN

OPERATORS: Final[Mapping[str, Callable[..., Any]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "**": operator.pow, "@": operator.matmul, "&": operator.and_, "|": operator.or_,
    "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift,
    "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
IN_PLACE: Final[Mapping[str, Callable[..., Any]]] = {
    "+": operator.iadd, "-": operator.isub, "*": operator.imul, "/": operator.itruediv, "//": operator.ifloordiv,
    "%": operator.imod, "**": operator.ipow, "@": operator.imatmul, "&": operator.iand, "|": operator.ior,
    "^": operator.ixor, "<<": operator.ilshift, ">>": operator.irshift,
}  # fmt: skip
_UNARY: Final[Mapping[str, Callable[[Any], Any]]] = {
    "-": operator.neg, "+": operator.pos, "~": operator.invert,
}  # fmt: skip


def apply_operator(sign: str, operands: Sequence[Any], in_place: bool) -> Any:
    """`a + b`, `- a`, `not a`, `a is b`, …"""
    if any(isinstance(operand, torch.Tensor) for operand in operands) and sign not in ("is", "is not", "in", "not in"):
        return _tensor_operator(sign, operands, in_place)
    if sign == "not":
        known = truth(operands[0])
        return UNKNOWN if known is None else not known
    if sign in ("is", "is not"):
        return _identity(sign, *operands)
    if INTEGER in operands and all(operand is INTEGER or type(operand) is int for operand in operands):
        return INTEGER if sign in ("+", "-", "*") else UNKNOWN
    if not all(map(is_small, operands)) or _is_costly(sign, operands):
        return UNKNOWN
    if len(operands) == 1:
        return on_plain(_UNARY[sign], operands) if sign in _UNARY else UNKNOWN
    if in_place and isinstance(operands[0], list):
        return UNKNOWN
    if sign in OPERATORS and sign != "@":
        return on_plain(OPERATORS[sign], operands)
    if sign in ("in", "not in") and isinstance(operands[1], (tuple, list, str, range)):
        held, plain = operands[1], type(operands[0]) in PLAIN
        if plain and (isinstance(held, (str, range)) or all(type(each) in PLAIN for each in held)):
            found = on_plain(operator.contains, (held, operands[0]))
            return found if found is UNKNOWN else found == (sign == "in")
    return UNKNOWN


def _tensor_operator(sign: str, operands: Sequence[Any], in_place: bool) -> Any:
    if sign == "not":
        return UNKNOWN
    if in_place and isinstance(operands[0], torch.Tensor):
        made = _arithmetic(sign, *operands)
        if made is not None and made.shape == operands[0].shape:
            return operands[0]
        if sign in IN_PLACE and not has_marks(operands[1]):
            torch_call(IN_PLACE[sign], (torch.empty_like(operands[0]), operands[1]), {}, writes=True)
        return operands[0] if sign != "@" else UNKNOWN
    function = _UNARY.get(sign) if len(operands) == 1 else OPERATORS.get(sign)
    if function is None:
        return UNKNOWN
    made = _arithmetic(sign, *operands) if len(operands) == 2 else None
    return torch_call(function, tuple(operands), {}) if made is None else made


def _arithmetic(sign: str, first: Any, second: Any) -> torch.Tensor | None:
    """`a + b` and the like on floating point tensors, and numbers, that go together; `None` for anything else.

    Torch would say the same, a hundred times slower.
    """
    if sign not in ("+", "-", "*", "/"):
        return None
    sizes: tuple[int, ...] = ()
    for each in (first, second):
        if isinstance(each, torch.Tensor):
            if not each.dtype.is_floating_point:
                return None
            found = broadcast(sizes, each.shape)
            if found is None:
                return None
            sizes = found
        elif type(each) not in (int, float) or not is_small(each):
            return None
    return torch.empty(sizes, dtype=torch.result_type(first, second), device=META)


def _identity(sign: str, first: Any, second: Any) -> Any:
    """`is` is answered only where one side is `None` and the other is known."""
    if first is UNKNOWN or second is UNKNOWN or (first is not None and second is not None):
        return UNKNOWN
    return (first is second) == (sign == "is")


def truth(value: Any) -> bool | None:
    """Whether a condition holds, where that is known."""
    if value is None or type(value) in (bool, int, float, str, list, tuple, dict, torch.Size):
        return bool(value)
    return None


_LARGE = 2**64
"""No size is as large."""


def is_small(value: Any) -> bool:
    """Whether computing with a plain value, or a sequence, costs nothing."""
    if type(value) in (list, tuple, torch.Size, str, bytes):
        return len(value) <= 100
    return type(value) in (bool, float, type(None), torch.dtype) or (type(value) is int and abs(value) < _LARGE)


def _is_costly(sign: str, operands: Sequence[Any]) -> bool:
    """Whether an operator may make something large, or compares what sequences hold."""
    if sign in ("**", "<<"):
        return type(operands[1]) is not int or not 0 <= operands[1] <= 100
    sequences = [each for each in operands if isinstance(each, (list, tuple, str, bytes))]
    if not sequences:
        return False
    if sign == "*":
        return any(type(each) is int and each > 100 for each in operands)
    return sign == "%" or (sign != "+" and not all(type(part) in PLAIN for each in sequences for part in each))


def on_plain(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """A computation on plain values; what it raises at run time, it raises there."""
    try:
        return function(*operands)
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return UNKNOWN
