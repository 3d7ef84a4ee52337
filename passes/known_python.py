"""Python's rows of the table of known calls: builtins, the standard library, tqdm and einops, written by hand."""

from __future__ import annotations

import builtins
import sys
from functools import cache
from typing import Any

from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place

_EXCEPTIONS = " ".join(
    name
    for name, held in vars(builtins).items()
    if isinstance(held, type) and issubclass(held, BaseException) and held.__name__ == name
)

_SCALAR = {
    "builtins": "ascii bin bool bytes callable chr complex float format hasattr hash hex id int isinstance "
    "issubclass len oct ord range repr str type",
    "operator": "not_ truth is_ is_not contains countOf indexOf length_hint",
    "math": "acos acosh asin asinh atan atan2 atanh cbrt ceil comb copysign cos cosh degrees dist erf erfc exp exp2 "
    "expm1 fabs factorial floor fmod frexp fsum gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma "
    "log log10 log1p log2 modf nextafter perm pow radians remainder sin sinh sqrt sumprod tan tanh trunc ulp",
    "cmath": "acos acosh asin asinh atan atanh cos cosh exp isclose isfinite isinf isnan log log10 phase polar rect "
    "sin sinh sqrt tan tanh",
    "statistics": "correlation covariance fmean geometric_mean harmonic_mean linear_regression mean median_grouped "
    "pstdev pvariance stdev variance",
    "bisect": "bisect bisect_left bisect_right",
    "string": "capwords",
    "re": "compile escape fullmatch match search sub subn",
    "json": "dumps",
    "textwrap": "dedent fill indent shorten",
}
"""Pure calls whose result is a number, a string, a type, …"""

_PURE = {
    "builtins": "abs all any bytearray dir divmod object pow round",
    "operator": "truediv floordiv mod pow matmul neg abs inv invert lshift rshift lt le eq ne ge gt index",
    "copy": "deepcopy",
    "statistics": "NormalDist quantiles",
    "re": "findall split",
    "json": "loads",
    "textwrap": "wrap",
    "collections": "namedtuple",
    "einops": "parse_shape",
}

_VIEW = {
    "builtins": "dict frozenset getattr list max memoryview min set slice sorted sum tuple vars " + _EXCEPTIONS,
    "operator": "add sub mul and_ or_ xor pos concat getitem attrgetter itemgetter methodcaller",
    "collections": "ChainMap Counter OrderedDict defaultdict deque",
    "contextlib": "nullcontext",
    "copy": "copy",
    "functools": "partial",
    "heapq": "nlargest nsmallest",
    "math": "prod",
    "statistics": "median median_high median_low mode multimode",
    "einops": "pack unpack",
}
"""Calls whose result may be one of the arguments, or holds them."""

_ITERATORS = {
    "builtins": "enumerate iter reversed zip",
    "heapq": "merge",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle groupby islice "
    "pairwise permutations product repeat tee zip_longest",
    "itertools.chain": "from_iterable",
    "re": "finditer",
    "tqdm": "tqdm trange",
    "tqdm.auto": "tqdm trange",
    "tqdm.std": "tqdm trange",
    "tqdm.asyncio": "tqdm_asyncio",
    "tqdm.notebook": "tqdm tqdm_notebook tnrange",
}
"""Calls whose result holds the arguments, and changes when it is read."""

_ONE_TENSOR = {"einops": "asnumpy einsum rearrange reduce repeat"}
"""Calls whose result is one tensor, perhaps a view of an argument."""

_CONTAINER = {
    "builtins": "next setattr delattr",
    "operator": "setitem delitem",
    "heapq": "heapify heappush heappop heappushpop heapreplace",
    "bisect": "insort insort_left insort_right",
}

_HARMLESS = {
    "builtins": "print",
    "pprint": "pprint",
    "time": "time perf_counter monotonic process_time thread_time time_ns perf_counter_ns monotonic_ns "
    "process_time_ns thread_time_ns strftime ctime asctime localtime gmtime sleep",
    "logging": "debug info warning error critical exception log",
    "logging.Logger": "debug info warning error critical exception log",
    "warnings": "warn",
    "gc": "collect",
    "traceback": "print_exc",
    "tqdm.std.tqdm": "update set_description set_description_str set_postfix set_postfix_str refresh close write",
}

_RANDOM = "random randint randrange getrandbits randbytes getstate"
_DISTRIBUTIONS = (
    "uniform gauss normalvariate betavariate expovariate gammavariate lognormvariate paretovariate triangular "
    "vonmisesvariate weibullvariate"
)
"""Draws of numbers; from a distribution whose parameters are tensors, of tensors."""

_CALLING: dict[str, tuple[Place, ...]] = {
    "builtins.iter": (1,),
    "builtins.max": ("key",),
    "builtins.min": ("key",),
    "builtins.sorted": ("key",),
    "bisect.bisect": ("key",),
    "bisect.bisect_left": ("key",),
    "bisect.bisect_right": ("key",),
    "bisect.insort": ("key",),
    "bisect.insort_left": ("key",),
    "bisect.insort_right": ("key",),
    "copy.deepcopy": (1, "memo"),
    "heapq.merge": ("key",),
    "heapq.nlargest": (2, "key"),
    "heapq.nsmallest": (2, "key"),
    "itertools.accumulate": (1, "func"),
    "itertools.groupby": (1, "key"),
    "json.dumps": ("cls", "default"),
    "json.loads": ("cls", "object_hook", "object_pairs_hook", "parse_constant", "parse_float", "parse_int"),
    "einops.reduce": (2, "reduction"),
    "re.sub": (1, "repl"),
    "re.subn": (1, "repl"),
}
"""Arguments that bring a function which is called; `deepcopy`'s is a dict that it fills."""


def _row(target: str, behaviour: Behaviour, **more: Any) -> KnownCall:
    return KnownCall(target, behaviour, calls=_CALLING.get(target, ()), **more)


@cache
def python_rows() -> dict[str, KnownCall]:
    """All rows of functions, by name on the wire."""
    rows: dict[str, KnownCall] = {}

    def put(table: dict[str, str], behaviour: Behaviour, **more: Any) -> None:
        for module, names in table.items():
            for name in names.split():
                rows[f"{module}.{name}"] = _row(f"{module}.{name}", behaviour, **more)

    put(_SCALAR, Behaviour.PURE, scalar=True, leaf=True)
    put(_PURE, Behaviour.PURE)
    put(_VIEW, Behaviour.VIEW, aliases=EVERY)
    put(_ITERATORS, Behaviour.VIEW, aliases=EVERY, iterator=True)
    put(_ONE_TENSOR, Behaviour.VIEW, aliases=EVERY, leaf=True)
    put(_CONTAINER, Behaviour.CONTAINER, mutates=(0,), aliases=EVERY)
    put(_HARMLESS, Behaviour.HARMLESS, scalar=True, leaf=True)
    put({"logging": "getLogger"}, Behaviour.HARMLESS)
    put({"random": _RANDOM}, Behaviour.PURE, random=True, scalar=True, leaf=True)
    put({"random": _DISTRIBUTIONS}, Behaviour.VIEW, aliases=EVERY, random=True, leaf=True)
    put({"random": "choice choices sample"}, Behaviour.VIEW, aliases=EVERY, random=True)
    put({"random": "shuffle"}, Behaviour.CONTAINER, mutates=(0, "x"), random=True)
    put({"random": "Random"}, Behaviour.PURE)
    put({"random.Random": _RANDOM}, Behaviour.MUTATES, mutates=(0,), random=True, scalar=True, leaf=True)
    put({"random.Random": _DISTRIBUTIONS}, Behaviour.MUTATES, mutates=(0,), aliases=EVERY, random=True, leaf=True)
    put({"random.Random": "choice choices sample"}, Behaviour.MUTATES, mutates=(0,), aliases=EVERY, random=True)
    put({"random.Random": "shuffle"}, Behaviour.MUTATES, mutates=(0, 1, "x"), random=True)
    put({"random.Random": "seed setstate"}, Behaviour.MUTATES, mutates=(0,), random=True)
    put({"random": "seed setstate"}, Behaviour.HARMLESS, random=True, scalar=True, leaf=True)
    put({"nnsight_compiler.models.language.LanguageModel": "position"}, Behaviour.PURE, scalar=True, leaf=True)
    return rows


def python_object(target: str) -> object | None:
    """The callable behind a name, if its module is loaded: looking it up imports nothing."""
    module, _, name = target.rpartition(".")
    if module in sys.modules:
        return getattr(sys.modules[module], name, None)
    outer, _, class_name = module.rpartition(".")
    return getattr(getattr(sys.modules.get(outer), class_name, None), name, None)
