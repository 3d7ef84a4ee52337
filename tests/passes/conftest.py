"""What the tests of the table of known calls share: a real call, held against what its row claims."""

from __future__ import annotations

import contextlib
import io
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import pytest
import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument, Region
from nnsight_compiler.ir.program import Parameter, Program
from nnsight_compiler.ir.values import Literal, Operand, Value
from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place, behaviour_of
from nnsight_compiler.passes.known_calls import METHODS, callable_of
from nnsight_compiler.passes.origins import Origins

PLAIN = (int, float, complex, str, bytes, bool, type(None), type(...), range, slice, Fraction, np.generic, torch.Size)
PLAIN_TYPES = (*PLAIN, type, torch.dtype, torch.device, torch.finfo, torch.iinfo, torch.layout, np.dtype, np.finfo)
Broken = Callable[..., str | None]


def asked(row: KnownCall, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[KnownCall | None, Any]:
    """The row as the passes see it for a call with these arguments, and how they resolve its places."""
    operands: dict[str, Operand] = {}
    method = row.target.startswith(METHODS)
    for place, given in [*enumerate(arguments), *keywords.items()]:
        plain = given is None or isinstance(given, (bool, int, float, str))
        operands[str(place)] = Literal(given) if plain and not (method and place == 0) else Value(f"a{place}")
    made = [Argument(operands[str(place)]) for place in range(len(arguments))]
    made += [Argument(operands[name], keyword=name) for name in keywords]
    function = Value("function")
    lookup: ops.AnyOp = ops.Global(function, "function")
    if method:
        lookup = ops.Attribute(function, made.pop(0).value, row.target.rpartition(".")[2])
    call = ops.Call(Value("result"), function, tuple(made), row.target)
    taken = tuple(Parameter(each) for each in operands.values() if isinstance(each, Value))
    origins = Origins(Program("f", taken, Region((), (lookup, call))))
    names = {id(operand): place for place, operand in operands.items()}

    def resolve(places: tuple[Place, ...]) -> set[str]:
        return {names[id(argument.value)] for argument in origins.at(call, places) if id(argument.value) in names}

    return behaviour_of(row, origins.arguments(call)), resolve


def parts(value: Any) -> Iterator[Any]:
    """The value, and all that it holds."""
    yield value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from parts(key)
            yield from parts(item)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for item in value:
            yield from parts(item)
    elif isinstance(value, BaseException):
        yield from parts(value.args)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from parts(value.tolist())


def storages(value: Any) -> set[tuple[int, int]]:
    """The pieces of memory behind the tensors and arrays of a value, and the objects in it that can change."""
    found: set[tuple[int, int]] = set()
    for part in parts(value):
        if isinstance(part, torch.Tensor):
            if part.layout is torch.strided and part.untyped_storage().nbytes():
                start = part.untyped_storage().data_ptr()
                found.add((start, start + part.untyped_storage().nbytes()))
        elif isinstance(part, np.ndarray):
            if part.nbytes:
                found.add(np.lib.array_utils.byte_bounds(part))
        elif not isinstance(part, (*PLAIN_TYPES, tuple, frozenset, FunctionType, MethodType)):
            found.add((-id(part), -id(part)))
    return found


def overlap(first: set[tuple[int, int]], second: set[tuple[int, int]]) -> bool:
    return any(a == b or (a[0] < b[1] and b[0] < a[1]) for a in first for b in second)


def contents(value: Any) -> Any:
    """The value in a form that two moments can be compared by."""
    match value:
        case torch.Tensor():
            data = value.detach().clone().contiguous().flatten() if value.layout is torch.strided else value.detach()
            bits = data.view(torch.uint8).numpy().tobytes() if data.numel() and data.layout is torch.strided else b""
            return type(value), value.shape, value.stride(), value.dtype, value.requires_grad, bits
        case np.ndarray():
            return value.shape, value.strides, value.dtype.str, value.flags.writeable, value.tobytes()
        case Mapping():
            return type(value), [(contents(key), contents(item)) for key, item in value.items()]
        case list() | tuple() | deque():
            return type(value), [contents(item) for item in value]
        case set() | frozenset():
            return type(value), sorted(map(repr, value))
        case random.Random():
            return value.getstate()
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case _:
            held = getattr(value, "__dict__", None)
            return repr(value) if held is None else (type(value), contents(dict(held)))


def generators() -> tuple[Any, ...]:
    """The states of all generators that a call may draw from without being given one."""
    _, keys, *more = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), keys.tobytes(), more


def settings() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.get_default_dtype(), np.geterr(), np.get_printoptions()["precision"]


def find_broken_claim(
    row: KnownCall, arguments: Sequence[Any], keywords: Mapping[str, Any] | None = None, function: Any = None
) -> str | None:
    """What the row says and the call does not keep to; `None` where it keeps to everything."""
    keywords = dict(keywords or {})
    known, resolve = asked(row, arguments, keywords)
    if known is None:
        return "is a host call with these arguments"
    everything = {**{str(place): each for place, each in enumerate(arguments)}, **keywords}
    before = {place: contents(each) for place, each in everything.items()}
    owned = {place: storages(each) for place, each in everything.items()}
    states, modes = generators(), settings()
    function = function or callable_of(row.target)
    assert callable(function), row.target
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        result = function(*arguments, **keywords)
    if known.iterator:
        result = list(result)
    may_change = resolve(known.mutates)
    changed = {place for place, each in everything.items() if contents(each) != before[place]}
    if not changed <= may_change:
        return f"changed {sorted(changed)}, {sorted(may_change)} were said"
    may_share = set(everything) if known.aliases == EVERY else resolve(known.aliases)
    made = storages(result)
    shared = {place for place in everything if overlap(owned[place], made)}
    if not shared <= may_share:
        return f"shares storage with {sorted(shared)}, {sorted(may_share)} were said"
    if known.behaviour is Behaviour.PURE and (may_change or may_share):
        return "is pure, and changes or shares"
    if known.scalar and not all(isinstance(part, (*PLAIN_TYPES, tuple)) or is_constant(part) for part in parts(result)):
        return f"is no scalar: {type(result)}"
    if known.leaf and not is_leaf(result):
        return f"holds parts: {type(result)}"
    if states != generators() and not known.random:
        return "draws"
    if settings() != modes and not known.mode:
        return "sets"
    if shown.getvalue() and known.behaviour is not Behaviour.HARMLESS:
        return "shows"
    return None


def is_constant(value: Any) -> bool:
    """Whether an object of the standard library's is one that never changes: a match, a pattern, a time."""
    return type(value).__module__ in ("re", "time", "numpy") or callable(value)


def is_leaf(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(part, (*PLAIN_TYPES, tuple)) for part in parts(value))
    return isinstance(value, (torch.Tensor, np.ndarray, *PLAIN_TYPES)) or is_constant(value)


@pytest.fixture(scope="session")
def broken_claim() -> Broken:
    """Calls what a row is about, with copies of nothing: hand over fresh arguments."""
    return find_broken_claim
