"""Python's rows of the table of known calls: builtins, the standard library, tqdm and einops, written by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place, words

_EXCEPTIONS = (
    "ArithmeticError AssertionError AttributeError Exception ImportError IndexError KeyError LookupError "
    "NotImplementedError OverflowError RuntimeError StopIteration TypeError ValueError ZeroDivisionError"
)

_SCALAR = {
    "builtins": "ascii bin bool bytes callable chr complex float format hasattr hash hex id int isinstance "
    "issubclass len oct ord range repr str type",
    "operator": "not_ truth is_ is_not contains countOf indexOf",
    "math": "acos acosh asin asinh atan atan2 atanh ceil comb copysign cos cosh degrees dist erf erfc exp expm1 fabs "
    "factorial floor fmod frexp fsum gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10 "
    "log1p log2 modf nextafter perm pow prod radians remainder sin sinh sqrt tan tanh trunc ulp",
}
"""Pure calls whose result is a number, a string, a type, …"""

_PURE = {
    "builtins": "abs all any dir divmod pow round",
    "operator": "truediv floordiv mod pow matmul neg abs inv invert lshift rshift lt le eq ne ge gt index",
    "copy": "deepcopy",
}

_VIEW = {
    "builtins": "dict enumerate frozenset getattr iter list max min reversed set slice sorted sum tuple vars zip "
    + _EXCEPTIONS,
    "operator": "add sub mul and_ or_ xor pos concat getitem",
    "collections": "deque defaultdict Counter OrderedDict",
    "copy": "copy",
    "itertools": "chain combinations combinations_with_replacement compress count cycle islice pairwise permutations "
    "product repeat zip_longest",
    "tqdm": "tqdm trange",
    "tqdm.auto": "tqdm trange",
    "tqdm.std": "tqdm trange",
    "tqdm.asyncio": "tqdm_asyncio",
    "tqdm.notebook": "tqdm tqdm_notebook trange",
    "einops": "rearrange reduce repeat einsum pack unpack",
}
"""Calls whose result may be one of the arguments, or holds them."""

_CONTAINER = {
    "builtins": "next setattr delattr",
    "operator": "setitem delitem",
    "heapq": "heappush heappop",
}

_HARMLESS = {
    "builtins": "print",
    "pprint": "pprint",
    "time": "time perf_counter monotonic process_time time_ns perf_counter_ns monotonic_ns strftime sleep",
    "logging": "debug info warning error critical exception log getLogger",
    "logging.Logger": "debug info warning error critical exception log",
    "warnings": "warn",
    "gc": "collect",
    "traceback": "print_exc",
    "tqdm.std.tqdm": "update set_description set_description_str set_postfix set_postfix_str refresh close write",
}

_RANDOM = {
    "random": "random uniform randint randrange gauss normalvariate betavariate expovariate getrandbits",
}

_CALLING = {"sorted": ("key",), "min": ("key",), "max": ("key",)}
"""Builtins that run a function of the user's when they are given one."""

_UNION: dict[str, tuple[Behaviour, bool]] = {
    # Methods that change their receiver, and whether their result may be a part of it.
    **{
        name: (Behaviour.CONTAINER, False)
        for name in words(
            "append appendleft extend extendleft insert remove clear discard reverse rotate "
            "update difference_update intersection_update symmetric_difference_update subtract add"
        )
    },
    **{name: (Behaviour.CONTAINER, True) for name in words("pop popitem popleft setdefault sort move_to_end")},
    # Methods that only look, and whose result may be, or hold, a part of the receiver or of the arguments.
    **{
        name: (Behaviour.VIEW, True)
        for name in words(
            "copy get items keys values union intersection difference symmetric_difference fromkeys most_common "
            "elements split __getitem__ __iter__"
        )
    },
    # Methods of strings, numbers and containers whose result is a plain value.
    **{
        name: (Behaviour.PURE, False)
        for name in words(
            "capitalize casefold center count decode encode endswith expandtabs find format format_map index isalnum "
            "isalpha isascii isdecimal isdigit isdisjoint isidentifier islower isnumeric isprintable isspace issubset "
            "issuperset istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
            "rindex rjust rpartition rsplit rstrip splitlines startswith strip swapcase title translate upper zfill "
            "bit_length bit_count as_integer_ratio is_integer hex"
        )
    },
}

TENSOR_TOO = frozenset({"add", "subtract", "sort", "index", "count", "split", "format", "values"})
"""Of these methods, the ones which tensors have as well: what is said holds for both."""


def _row(target: str, behaviour: Behaviour, **more: Any) -> KnownCall:
    return KnownCall(target, behaviour, **more)


@cache
def python_rows() -> dict[str, KnownCall]:
    """All rows of functions, by name on the wire."""
    rows: dict[str, KnownCall] = {}

    def put(table: dict[str, str], behaviour: Behaviour, **more: Any) -> None:
        for module, names in table.items():
            for name in names.split():
                calls = _CALLING.get(name, ()) if module == "builtins" else ()
                target = f"{module}.{name}"
                rows[target] = _row(target, behaviour, calls=calls, **more)

    put(_SCALAR, Behaviour.PURE, scalar=True, leaf=True)
    put(_PURE, Behaviour.PURE)
    put(_VIEW, Behaviour.VIEW, aliases=EVERY)
    put(_CONTAINER, Behaviour.CONTAINER, mutates=(0,), aliases=EVERY)
    put(_HARMLESS, Behaviour.HARMLESS, scalar=True, leaf=True)
    put(_RANDOM, Behaviour.PURE, random=True, scalar=True, leaf=True)
    places: tuple[Place, ...] = (0,)
    for name in ("choice", "choices", "sample"):
        rows[f"random.{name}"] = _row(f"random.{name}", Behaviour.VIEW, aliases=EVERY, random=True)
    rows["random.shuffle"] = _row("random.shuffle", Behaviour.CONTAINER, mutates=places, random=True)
    rows["random.seed"] = _row("random.seed", Behaviour.HARMLESS, random=True, scalar=True)
    for name in words("add sub mul truediv floordiv mod pow matmul lshift rshift and or xor concat"):
        rows[f"operator.i{name}"] = _row(f"operator.i{name}", Behaviour.MUTATES, mutates=places, aliases=EVERY)
    rows["einops.parse_shape"] = _row("einops.parse_shape", Behaviour.PURE, scalar=True, leaf=True)
    return rows


def python_method(name: str) -> KnownCall | None:
    """The row of a method of Python's own containers, strings and numbers, which holds for a tensor as well."""
    if name not in _UNION:
        return None
    behaviour, parts = _UNION[name]
    changes = behaviour is Behaviour.CONTAINER
    # An unknown receiver may be a tensor, and what `add` returns for one is new; for a set it is `None`.
    return KnownCall(
        f"method.{name}",
        behaviour,
        mutates=(0,) if changes else (),
        aliases=EVERY if parts else (),
        scalar=behaviour is Behaviour.PURE,
        leaf=not parts,
        calls=("key",) if name == "sort" else (),
    )


def python_methods() -> Iterator[str]:
    """The names of all methods that `python_method` knows."""
    yield from _UNION


def python_object(target: str) -> object | None:
    """The callable behind a name, if its module is loaded: looking it up imports nothing."""
    module, _, name = target.rpartition(".")
    if module in sys.modules:
        return getattr(sys.modules[module], name, None)
    outer, _, class_name = module.rpartition(".")
    return getattr(getattr(sys.modules.get(outer), class_name, None), name, None)
