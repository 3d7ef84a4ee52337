"""Objects of known classes, taken apart into what plain data can hold, and put together again.

    topk = logits.topk(2)      ──▶  "torch.return_types.topk", [("values", tensor), ("indices", tensor)]
    output = model(ids)        ──▶  "transformers.modeling_outputs.CausalLMOutputWithPast", [("logits", tensor), …]

The classes are a closed set: torch's named results, numpy's arrays and numbers, containers of the standard library,
outputs and caches of transformers, and what this package itself gives. A name out of a file never says more than which
of them is meant. Putting one together checks its parts and runs no code of the class that could do more than keep them.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote import model_structures
from nnsight_compiler.runtime.caches import ActivationCache, CachedModule, cache_as_data, cache_from_data
from nnsight_compiler.runtime.shares import Withheld

Parts = list[tuple[str, Any]]

_NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128",
)  # fmt: skip
"""The dtypes of numpy that torch has too, by the names of the types."""
_FACTORIES: dict[str, Callable[[], Any]] = {each.__name__: each for each in (list, dict, set, tuple, int, float, str)}
_RESULTS = "torch.return_types."
_NAMED = "namedtuple "
_MOST_FIELDS = 1000


def take_apart(value: Any) -> tuple[str, Parts] | None:
    """The name of an object's class and its parts, in order; `None` for objects of other classes.

    The same parts, or their likes, make such an object again. Parts may be made for the occasion: whoever goes by the
    identity of objects keeps them alive.
    """
    kind = type(value)
    if issubclass(kind, tuple):
        return _tuple_apart(value)
    if kind.__module__ == "numpy":
        return _numbers_apart(value)
    if kind is collections.deque:
        return "collections.deque", [("items", tuple(value)), ("most", value.maxlen)]
    if kind is collections.OrderedDict or kind is collections.Counter:
        return f"collections.{kind.__name__}", [("items", tuple(value.items()))]
    if kind is collections.defaultdict:
        return _defaults_apart(value)
    if kind is ActivationCache:
        return "nnsight_compiler.ActivationCache", cache_as_data(value)
    if kind is CachedModule:
        return "nnsight_compiler.CachedModule", [("cache", value._cache), ("path", value._view._path)]
    if kind is Withheld:
        return "nnsight_compiler.Withheld", [("reason", object.__getattribute__(value, "_reason"))]
    return model_structures.take_apart(value)


def put_together(name: str, parts: Sequence[tuple[str, Any]], model: Any = None) -> Any:
    """The object that these are the parts of.

    Args:
        name: as `take_apart` gives it.
        model: the wrapped model whose values they are, for what mentions its modules.

    Raises:
        FileError: there is no such class here, or the parts are not those of one.
    """
    held = dict(parts)
    if len(held) != len(parts) or not all(isinstance(each, str) for each in held):
        raise FileError("an object has two parts of one name")
    if name.startswith(_RESULTS):
        return _result(name.removeprefix(_RESULTS), held)
    if name.startswith(_NAMED):
        return _named(name.removeprefix(_NAMED), held)
    if name.startswith("transformers."):
        return model_structures.put_together(name, held)
    make = _MAKERS.get(name)
    if make is None:
        raise FileError(f"{name!r:.80} is no class of objects that can be sent")
    return make(held, model)


def parts_of(held: dict[str, Any], name: str, /, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The parts of an object of these names, each of one of its kinds, and no others."""
    if list(held) != list(kinds):
        raise FileError(f"a {name} has the parts {', '.join(kinds)}, not {', '.join(held)[:80] or 'none'}")
    for part, value in held.items():
        if not isinstance(value, kinds[part]) or (isinstance(value, bool) and kinds[part] is int):
            raise FileError(f"the part {part!r} of a {name} is no {type(value).__name__}")
    return list(held.values())


# --- named tuples ---


def _tuple_apart(value: Any) -> tuple[str, Parts] | None:
    kind = type(value)
    if kind.__module__ == "torch.return_types":
        return _RESULTS + kind.__name__, list(zip(kind.__match_args__, value, strict=True))
    if kind is PackedSequence:
        return "torch.nn.utils.rnn.PackedSequence", list(zip(kind._fields, value, strict=True))
    if _is_plainly_named(kind) and len(value) == len(kind._fields):
        return f"{_NAMED}{kind.__module__}:{kind.__qualname__}", list(zip(kind._fields, value, strict=True))
    return None


def _is_plainly_named(kind: type) -> bool:
    """Whether a class is one of named tuples, and no class that was made of one."""
    fields = getattr(kind, "_fields", None)
    return kind.__bases__ == (tuple,) and isinstance(fields, tuple) and all(isinstance(each, str) for each in fields)


def _result(name: str, held: dict[str, Any]) -> Any:
    kind: Any = vars(torch.return_types).get(name)
    if getattr(kind, "__bases__", None) != (tuple,):
        raise FileError(f"torch has no results {name!r:.80} here")
    if list(held) != list(kind.__match_args__):
        raise FileError(f"the parts of {name} are {', '.join(kind.__match_args__)}")
    return kind(tuple(held.values()))


def _named(name: str, held: dict[str, Any]) -> Any:
    """A named tuple: of the class of that name where it is loaded and has these fields, else of a class like it."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for word in path.split("."):
        found = vars(found).get(word) if hasattr(found, "__dict__") else None
    if isinstance(found, type) and _is_plainly_named(found) and list(held) == list(found._fields):  # type: ignore[attr-defined]
        return tuple.__new__(found, held.values())
    word = path.rpartition(".")[2]
    if not word.isidentifier() or len(held) > _MOST_FIELDS:
        raise FileError(f"{name!r:.80} is no class of named tuples")
    return _named_class(word, tuple(held))(*held.values())


@lru_cache(maxsize=256)
def _named_class(name: str, fields: tuple[str, ...]) -> Any:
    try:
        return collections.namedtuple(name, fields)
    except ValueError as error:
        raise FileError(f"no named tuple is like this: {error}") from None


def _packed(held: dict[str, Any], model: Any) -> Any:
    maybe = (torch.Tensor, type(None))
    parts = parts_of(
        held,
        "PackedSequence",
        data=torch.Tensor,
        batch_sizes=torch.Tensor,
        sorted_indices=maybe,
        unsorted_indices=maybe,
    )
    return tuple.__new__(PackedSequence, parts)


# --- numpy ---


def _numbers_apart(value: Any) -> tuple[str, Parts] | None:
    import numpy

    if isinstance(value, numpy.generic):
        known = value.dtype.name in _NUMBERS
        return ("numpy.generic", [("dtype", value.dtype.name), ("value", value.item())]) if known else None
    if type(value) is not numpy.ndarray or value.dtype.name not in _NUMBERS:
        return None
    shared = value.flags.writeable and value.dtype.isnative and all(step >= 0 for step in value.strides)
    array = value if shared else numpy.array(value, dtype=value.dtype.newbyteorder("="))
    return "numpy.ndarray", [("values", torch.from_numpy(array))]


def _array(held: dict[str, Any], model: Any) -> Any:
    (values,) = parts_of(held, "numpy.ndarray", values=torch.Tensor)
    try:
        return values.detach().numpy()
    except (RuntimeError, TypeError, ImportError) as error:
        raise FileError(f"no array can be made of it: {error}") from None


def _number(held: dict[str, Any], model: Any) -> Any:
    name, value = parts_of(held, "number of numpy's", dtype=str, value=(bool, int, float, complex))
    if name not in _NUMBERS:
        raise FileError(f"{name!r:.80} is no dtype of a number")
    try:
        import numpy

        made = numpy.dtype(name).type(value)
    except (OverflowError, TypeError, ValueError, ImportError) as error:
        raise FileError(f"no {name} can be made of it: {error}") from None
    if made.item() != value and value == value:
        raise FileError(f"{value!r:.80} is no {name}")
    return made


# --- containers of the standard library ---


def _defaults_apart(value: Any) -> tuple[str, Parts] | None:
    make = value.default_factory
    name = None if make is None else getattr(make, "__name__", None)
    if make is not None and (not isinstance(name, str) or _FACTORIES.get(name) is not make):
        return None
    return "collections.defaultdict", [("makes", name), ("items", tuple(value.items()))]


def _pairs(items: tuple[Any, ...], name: str) -> list[tuple[Any, Any]]:
    if not all(isinstance(each, tuple) and len(each) == 2 for each in items):
        raise FileError(f"the items of a {name} are pairs")
    try:
        dict(items)
    except TypeError as error:
        raise FileError(f"no key of a {name} is like this: {error}") from None
    return list(items)


def _ordered(held: dict[str, Any], model: Any) -> Any:
    (items,) = parts_of(held, "OrderedDict", items=tuple)
    return collections.OrderedDict(_pairs(items, "OrderedDict"))


def _counter(held: dict[str, Any], model: Any) -> Any:
    (items,) = parts_of(held, "Counter", items=tuple)
    return collections.Counter(dict(_pairs(items, "Counter")))


def _defaults(held: dict[str, Any], model: Any) -> Any:
    name, items = parts_of(held, "defaultdict", makes=(str, type(None)), items=tuple)
    if name is not None and name not in _FACTORIES:
        raise FileError(f"no defaultdict makes {name!r:.80}")
    return collections.defaultdict(None if name is None else _FACTORIES[name], _pairs(items, "defaultdict"))


def _deque(held: dict[str, Any], model: Any) -> Any:
    items, most = parts_of(held, "deque", items=tuple, most=(int, type(None)))
    if most is not None and most < len(items):
        raise FileError("a deque holds no more than it may")
    return collections.deque(items, most)


# --- what this package gives ---


def _cache(held: dict[str, Any], model: Any) -> ActivationCache:
    if model is None:
        raise FileError("a cache of values is a model's, and none is given here")
    maybe = type(None)
    parts = parts_of(
        held, "cache of values", device=(str, maybe), dtype=(torch.dtype, maybe), detach=bool, held=tuple
    )  # fmt: skip
    return cache_from_data(model, *parts)


def _cached_module(held: dict[str, Any], model: Any) -> CachedModule:
    cache, path = parts_of(held, "module in a cache", cache=ActivationCache, path=str)
    try:
        view = cache._model[path] if path else cache._model
    except (LookupError, AttributeError, TypeError):
        raise FileError(f"the model has no module {path!r:.80}") from None
    return CachedModule(cache, view)


def _withheld(held: dict[str, Any], model: Any) -> Withheld:
    (reason,) = parts_of(held, "value that is withheld", reason=str)
    return Withheld(reason)


_MAKERS: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "torch.nn.utils.rnn.PackedSequence": _packed,
    "numpy.ndarray": _array,
    "numpy.generic": _number,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": _defaults,
    "collections.deque": _deque,
    "nnsight_compiler.ActivationCache": _cache,
    "nnsight_compiler.CachedModule": _cached_module,
    "nnsight_compiler.Withheld": _withheld,
}
