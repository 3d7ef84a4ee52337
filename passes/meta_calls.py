"""Operators, items, attributes and known calls, computed on stand-ins instead of values.

Each function gives the stand-in of the result, `UNKNOWN` where nothing can be said, and raises `Mistake` where the same
on the values of a run is sure to raise for reasons of shape. What torch says of tensors without data is not taken for
that alone: it must say so of real ones (zeros of the same shapes) too.
"""

from __future__ import annotations

import builtins
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch

from nnsight_compiler.passes.behaviour import Behaviour, KnownCall, words
from nnsight_compiler.passes.known_calls import callable_of
from nnsight_compiler.passes.stand_ins import (
    DEVICE,
    INTEGER,
    META,
    PLAIN,
    UNKNOWN,
    Items,
    Mark,
    Method,
    inside,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

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

RESHAPING = frozenset(
    words(
        "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ moveaxis_ resize_ resize_as_ set_ as_strided_ "
        "sparse_resize_ sparse_resize_and_clear_ swap_tensors"
    )
)
"""Methods that change the shape of a tensor in place."""

_TENSOR_FACTS = frozenset(words("shape ndim dtype itemsize nbytes"))
_TENSOR_VIEWS = frozenset(words("T mT H mH real imag"))
_NUMBERS = frozenset(words("size dim ndimension numel nelement __len__ is_floating_point is_complex element_size"))
"""Methods and functions of torch whose result rests on shape and dtype alone."""
_STAYS = frozenset(words("cpu cuda xpu pin_memory"))
_LISTS = frozenset(words("append extend insert pop get items keys values copy setdefault reverse update"))
"""Methods of containers which only move what they hold."""
_BUILTINS = frozenset(words("len range list tuple dict sum min max abs round int float bool isinstance"))
_LONGEST = 10_000
"""Entries up to which a container is followed."""

_SHAPES = re.compile(
    r"size|shape|dimension|dim\b|\bdims\b|out of (range|bounds)|out-of-(range|bounds)|length|broadcast|square|too many"
    r" indices"
)
_NOT_SHAPES = re.compile(r"stride|not implemented|meta|overflow|scalar type|dtype|contiguous|memory")


class Mistake(Exception):  # noqa: N818  # becomes a diagnostic
    """What is sure to raise at run time, in words, and a way out. `dimension`: the number of the dimension meant, whose
    axis the text names where it says `{axis}`."""

    def __init__(self, reason: str, way_out: str = "", dimension: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.way_out, self.dimension = reason, way_out, dimension


# --- attributes and items ---


def attribute(held: Any, name: str) -> Any:
    """`held.name`, where reading it runs no code of the user's."""
    match held:
        case torch.Tensor():
            return _tensor_attribute(held, name)
        case Mark() | Items() | Method():
            return UNKNOWN
        case list() | dict():
            if type(held) in (list, dict) and name in _LISTS:
                return Method(held, name)
        case tuple() if hasattr(held, "_fields") or type(held).__module__ == "torch.return_types":
            found = getattr(held, name, UNKNOWN)
            return found if isinstance(found, (torch.Tensor, *PLAIN)) else UNKNOWN
        case torch.Size() if name == "numel":
            return Method(held, name)
    if isinstance(held, Mapping) and type(held) is not dict:
        # The outputs of transformers are mappings whose entries are attributes too.
        return held.get(name, UNKNOWN)
    if isinstance(held, type) and issubclass(held, torch.Tensor):
        return vars(held).get(name, getattr(torch._C.TensorBase, name, UNKNOWN))
    if isinstance(held, type(torch)):
        return vars(held).get(name, UNKNOWN)
    return UNKNOWN


def _tensor_attribute(held: torch.Tensor, name: str) -> Any:
    if name in _TENSOR_FACTS:
        return getattr(held, name)
    if name in _TENSOR_VIEWS:
        return torch_call(lambda tensor: getattr(tensor, name), (held,), {})
    if name == "device":
        return DEVICE
    return Method(held, name) if callable(getattr(torch.Tensor, name, None)) else UNKNOWN


def item(held: Any, index: Any) -> Any:
    """`held[index]`."""
    if isinstance(held, torch.Tensor):
        return _tensor_item(held, index)
    if index is UNKNOWN or index is INTEGER or isinstance(held, Mark):
        return UNKNOWN
    if isinstance(held, (list, tuple, range)):
        if type(index) is int and not -len(held) <= index < len(held):
            raise Mistake(*_out_of_range(index, len(held), f"this {type(held).__name__}"))
        if type(index) is int or (isinstance(index, slice) and not _has_marks(index)):
            return held[index]
        return UNKNOWN
    if isinstance(held, Mapping) and type(index) in (str, int):
        if index in held:
            return held[index]
        if type(index) is int and type(held) is not dict and -len(held) <= index < len(held):
            return list(held.values())[index]
    return UNKNOWN


def _out_of_range(index: int, size: int, what: str) -> tuple[str, str]:
    entries = "entry" if size == 1 else "entries"
    way_out = f"use an index from {-size} to {size - 1}" if size else "there is nothing to index"
    return f"index {index} is out of range: {what} has {size} {entries}", way_out


def _tensor_item(held: torch.Tensor, index: Any) -> Any:
    index = concrete_index(index)
    if index is UNKNOWN:
        return UNKNOWN
    check_index(held, index)
    return torch_call(operator.getitem, (held, index), {})


def concrete_index(index: Any) -> Any:
    """An index that gives the shape which this one gives: a number that is not known is taken for 0."""
    if isinstance(index, tuple):
        parts = tuple(map(concrete_index, index))
        return UNKNOWN if any(part is UNKNOWN for part in parts) else parts
    if index is INTEGER:
        return 0
    if isinstance(index, torch.Tensor) and index.ndim == 0:
        return UNKNOWN if index.dtype in (torch.bool, torch.uint8) else 0
    return UNKNOWN if _has_marks(index) else index


def check_index(held: torch.Tensor, index: Any) -> None:
    """Raises `Mistake` where a number in the index is beyond its dimension, or there are more than dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or type(part) in (int, slice) for part in parts):
        return  # torch says itself what is wrong with others
    taken = sum(type(part) in (int, slice) for part in parts)
    if taken > held.ndim:
        noun = "dimension" if held.ndim == 1 else "dimensions"
        raise Mistake(
            f"{taken} dimensions are indexed, but this tensor has {held.ndim} {noun}: {list(held.shape)}",
            "leave out an index",
        )
    dimension = 0
    for part in parts:
        if part is ...:
            dimension += held.ndim - taken
        elif part is not None:
            if type(part) is int and not -held.shape[dimension] <= part < held.shape[dimension]:
                reason, way_out = _out_of_range(part, held.shape[dimension], "this dimension{axis}")
                raise Mistake(reason, way_out, dimension)
            dimension += 1


def check_item_assignment(held: torch.Tensor, index: Any, new: Any) -> None:
    """Raises `Mistake` where `held[index] = new` does not fit."""
    index = concrete_index(index)
    if index is UNKNOWN:
        return
    check_index(held, index)
    part = torch_call(operator.getitem, (held, index), {})
    if not isinstance(part, torch.Tensor) or not isinstance(new, torch.Tensor):
        return

    def assign(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        target[index] = value
        return target

    leading = next((number for number, size in enumerate(new.shape) if size != 1), new.ndim)
    shape = new.shape[min(leading, new.ndim) :]  # torch drops leading dimensions of one entry
    if broadcast(part.shape, shape) != tuple(part.shape) and _raises(assign, (torch.empty_like(held), new), {}):
        raise Mistake(
            f"a value of shape {list(new.shape)} is assigned to a part of shape {list(part.shape)}",
            "make the shapes equal; a dimension of one entry, or a missing first one, is repeated",
        )


# --- operators ---


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
    if not all(map(_is_small, operands)) or _is_costly(sign, operands):
        return UNKNOWN
    if len(operands) == 1:
        return _python(_UNARY[sign], operands) if sign in _UNARY else UNKNOWN
    if in_place and isinstance(operands[0], list):
        return UNKNOWN
    if sign in OPERATORS and sign not in ("**", "<<", "@"):
        return _python(OPERATORS[sign], operands)
    if sign in ("in", "not in") and isinstance(operands[1], (tuple, list, str, range)):
        held, plain = operands[1], type(operands[0]) in PLAIN
        if plain and (isinstance(held, (str, range)) or all(type(each) in PLAIN for each in held)):
            found = _python(operator.contains, (held, operands[0]))
            return found if found is UNKNOWN else found == (sign == "in")
    return UNKNOWN


def _tensor_operator(sign: str, operands: Sequence[Any], in_place: bool) -> Any:
    if sign == "not":
        return UNKNOWN
    if in_place and isinstance(operands[0], torch.Tensor):
        made = _arithmetic(sign, *operands)
        if made is not None and made.shape == operands[0].shape:
            return operands[0]
        if sign in IN_PLACE and not _has_marks(operands[1]):
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
        elif type(each) not in (int, float):
            return None
    return torch.empty(sizes, dtype=torch.result_type(first, second), device=META)


def broadcast(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that both are repeated to; `None` where they do not go together."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    sizes = list(longer)
    for number in range(1, len(shorter) + 1):
        if sizes[-number] == 1:
            sizes[-number] = shorter[-number]
        elif shorter[-number] not in (1, sizes[-number]):
            return None
    return tuple(sizes)


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


def _is_small(value: Any) -> bool:
    """Whether computing with a plain value, or a sequence, costs nothing."""
    if type(value) in (list, tuple, torch.Size, str, bytes):
        return len(value) <= 100
    return type(value) in (bool, float, type(None), torch.dtype) or (type(value) is int and abs(value) < 2**31)


def _is_costly(sign: str, operands: Sequence[Any]) -> bool:
    """Whether an operator on sequences may make something large, or compares what they hold."""
    sequences = [each for each in operands if isinstance(each, (list, tuple, str, bytes))]
    if not sequences:
        return False
    if sign == "*":
        return any(type(each) is int and each > 100 for each in operands)
    return sign == "%" or (sign != "+" and not all(type(part) in PLAIN for each in sequences for part in each))


def _python(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """A computation on plain values; what it raises at run time, it raises there."""
    try:
        return function(*operands)
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return UNKNOWN


# --- calls ---


def call_known(known: KnownCall, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of what is in the table of known calls. `function` is its stand-in: a method, or what it is called by."""
    name = known.target.rpartition(".")[2]
    if isinstance(function, Method):
        if isinstance(function.receiver, torch.Tensor):
            return _tensor_method(function.receiver, function.name, known, args, kwargs)
        if function.name == "numel" and isinstance(function.receiver, torch.Size):
            return function.receiver.numel()
        return _container_method(function, args, kwargs)
    if function is UNKNOWN or known.target.startswith("method."):
        return UNKNOWN
    if known.target.startswith("torch.Tensor."):
        return _tensor_method(args[0], name, known, args[1:], kwargs) if args else UNKNOWN
    if known.target.startswith("builtins."):
        return _builtin(name, args, kwargs)
    called = callable_of(known.target)
    if called is None:
        return UNKNOWN
    if known.target.startswith("math."):
        plain = not kwargs and all(type(each) in (int, float, bool) for each in args) and all(map(_is_small, args))
        return _python(called, args) if plain and name not in ("factorial", "comb", "perm") else UNKNOWN  # type: ignore[arg-type]
    if not known.target.startswith(("torch.", "einops.")) or known.behaviour is Behaviour.HARMLESS:
        return UNKNOWN
    if name in _NUMBERS:
        return _python(called, args)  # type: ignore[arg-type]
    return torch_call(called, args, kwargs, known.behaviour is Behaviour.MUTATES, known.random)  # type: ignore[arg-type]


def _tensor_method(receiver: Any, name: str, known: KnownCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(receiver, torch.Tensor) or name in RESHAPING:
        return UNKNOWN
    if name in _STAYS:
        return receiver
    if name == "to":
        return _moved(receiver, args, kwargs)
    if name in ("clone", "detach") and not args and not kwargs:
        return receiver.detach()
    function = getattr(torch.Tensor, name)
    if name in _NUMBERS:
        return UNKNOWN if any(map(_has_marks, (args, kwargs))) else _checked(function, (receiver, *args), kwargs)
    return torch_call(function, (receiver, *args), kwargs, known.behaviour is Behaviour.MUTATES, known.random)


def _moved(receiver: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`tensor.to(…)`: only the dtype matters here."""
    given = [*args, *(kwargs.get(name) for name in ("dtype", "other"))]
    if any(each is UNKNOWN for each in given):
        return UNKNOWN
    kinds = [each.dtype if isinstance(each, torch.Tensor) else each for each in given]
    kinds = [each for each in kinds if isinstance(each, torch.dtype)]
    return receiver if not kinds or kinds[0] == receiver.dtype else receiver.to(kinds[0])


def _container_method(method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held, name = method.receiver, method.name
    if not isinstance(held, (list, dict)) or name not in _LISTS or len(held) > _LONGEST:
        return UNKNOWN
    if name in ("extend", "update"):
        return UNKNOWN  # the interpreter follows these only where it knows what they take
    try:
        return getattr(held, name)(*args, **kwargs)
    except (TypeError, LookupError):
        return UNKNOWN


def _builtin(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name not in _BUILTINS or kwargs or not args:
        return UNKNOWN
    first = args[0]
    match name:
        case "len":
            if isinstance(first, torch.Tensor):
                return first.shape[0] if first.ndim else UNKNOWN
            return len(first) if isinstance(first, (list, tuple, dict, str, range)) else UNKNOWN
        case "range":
            return _python(range, args) if all(type(each) is int for each in args) else UNKNOWN
        case "list" | "tuple":
            made = list if name == "list" else tuple
            return made(first) if isinstance(first, (list, tuple, range)) and len(first) <= _LONGEST else UNKNOWN
        case "isinstance":
            return UNKNOWN if isinstance(first, Mark) or isinstance(args[1], Mark) else _is_instance(*args)
        case "sum":
            return _sum(*args)
        case "dict":
            return UNKNOWN
    if len(args) == 1 and type(first) in (int, float, bool):
        return _python(getattr(builtins, name), args)
    if name in ("min", "max") and all(type(each) in (int, float, bool) for each in args):
        return _python(getattr(builtins, name), args)
    if name == "abs" and isinstance(first, torch.Tensor):
        return torch_call(torch.abs, (first,), {})
    return UNKNOWN


def _is_instance(held: Any, kind: Any) -> Any:
    known = (torch.Tensor, int, float, bool, str, list, tuple, dict)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not all(each in known for each in kinds) or isinstance(held, (Items, Method, Mark)):
        return UNKNOWN
    return isinstance(held, kinds)


def _sum(held: Any, start: Any = 0) -> Any:
    if not isinstance(held, (list, tuple)) or len(held) > 1000 or any(map(_has_marks, (*held, start))):
        return UNKNOWN
    total = start
    for each in held:
        total = apply_operator("+", (total, each), in_place=False)
    return total


# --- torch ---


def torch_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    writes: bool = False,
    draws: bool = False,
) -> Any:
    """What a function of torch gives on tensors without data."""
    if "out" in kwargs or any(map(_has_marks, (args, kwargs))):
        return UNKNOWN
    kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
    if "device" in kwargs:
        kwargs["device"] = META
    args = tuple(META if each is DEVICE else each for each in args)
    try:
        key = function, torch.get_default_dtype(), *map(_signature, args), *map(_signature, kwargs.items())
    except TypeError:
        return _computed(function, args, kwargs, writes, draws)
    remembered = _results.get(key)
    if remembered is None:
        try:
            remembered = _summary(_computed(function, args, kwargs, writes, draws), args)
        except Mistake as mistake:
            remembered = mistake
        if len(_results) >= _MANY:
            _results.clear()
        _results[key] = remembered
    if isinstance(remembered, Mistake):
        raise Mistake(remembered.reason, remembered.way_out)
    return _again(remembered, args)


_results: dict[Any, Any] = {}
"""What calls gave, by the shapes of their arguments: torch takes its time over tensors without data."""
_MANY = 10_000


def _signature(value: Any) -> Any:
    """What of an argument the shape of a result rests on. `TypeError` where that is more than can be said."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), *map(_signature, value)
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    if isinstance(value, (*PLAIN, torch.device)):
        return type(value), value
    raise TypeError


def _summary(found: Any, args: tuple[Any, ...]) -> Any:
    """A result as it is remembered; the number of an argument where it is that argument."""
    if isinstance(found, torch.Tensor):
        number = next((number for number, each in enumerate(args) if each is found), None)
        return (found.shape, found.stride(), found.dtype) if number is None else number
    if isinstance(found, (tuple, list)):
        return [type(found), *(_summary(each, args) for each in found)]
    return UNKNOWN


def _again(remembered: Any, args: tuple[Any, ...]) -> Any:
    """A result like the one that is remembered."""
    if remembered is UNKNOWN:
        return UNKNOWN
    if isinstance(remembered, tuple):
        shape, stride, dtype = remembered
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)
    if isinstance(remembered, int):
        return args[remembered]
    kind, *parts = remembered
    made = [_again(each, args) for each in parts]
    return kind(*made) if hasattr(kind, "_fields") else kind(made)


def _computed(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool, draws: bool
) -> Any:
    try:
        with nullcontext() if any(isinstance(each, torch.Tensor) for each in args) else META:
            found = function(*args, **kwargs)
    except Exception as error:  # whatever torch, or code of its in Python, makes of tensors without data
        if _of_shapes(error) and not draws:
            raised = _raises(function, args, kwargs, writes)
            if raised is not None:
                raise Mistake(raised, _shapes_of(args, kwargs)) from None
        return UNKNOWN
    return found if _is_known(found) else UNKNOWN


def _checked(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except (TypeError, IndexError, RuntimeError):
        return UNKNOWN


def _of_shapes(error: Exception) -> bool:
    if isinstance(error, NotImplementedError) or not isinstance(error, (IndexError, RuntimeError, ValueError)):
        return False
    text = str(error)
    return bool(_SHAPES.search(text)) and not _NOT_SHAPES.search(text)


def _raises(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool = True
) -> str | None:
    """What a function says of zeros of these shapes, where it does not take them for reasons of shape."""
    memo: dict[int, torch.Tensor] = {}

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in memo:
                large = value.numel() > 2**20
                if large and writes:
                    raise MemoryError
                memo[id(value)] = torch.zeros(1 if large else value.shape, dtype=value.dtype, device="cpu")
                if large:
                    memo[id(value)] = memo[id(value)].expand(value.shape)
            return memo[id(value)]
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(map(real, value))
        return torch.device("cpu") if value == META else value

    try:
        function(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
    except MemoryError:
        return None
    except Exception as error:  # as above
        return str(error).partition("\n")[0].rstrip(". ") if _of_shapes(error) else None
    return None


def _shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = [str(list(each.shape)) for each in inside((*args, *kwargs.values())) if isinstance(each, torch.Tensor)]
    return f"the shapes here are {', '.join(shapes)}" if len(shapes) > 1 else f"the shape here is {''.join(shapes)}"


def _has_marks(value: Any) -> bool:
    """Whether something in a value is not known well enough to compute with it."""
    if isinstance(value, (torch.Tensor, *PLAIN)):
        return False
    return any(each is UNKNOWN or each is INTEGER or isinstance(each, (Items, Method)) for each in inside(value))


def _is_known(found: Any) -> bool:
    """Whether a result rests on shapes alone: a tensor without data, or several."""
    if isinstance(found, torch.Tensor):
        return found.is_meta
    return isinstance(found, (tuple, list)) and all(map(_is_known, found))
