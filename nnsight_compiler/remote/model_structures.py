"""What the models of transformers return, taken apart and put together: outputs, caches of keys and values, encodings.

A class is looked up by its name where it must be: among the outputs of `transformers.modeling_outputs`, of
generations, and of the file that defines a model; and the caches with their layers. Its constructor is not run, and its
state is nothing but tensors, numbers, and layers of such. Encodings come back without what a fast tokenizer keeps of
words and characters, which says so when it is asked.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch

from nnsight_compiler.ir.errors import FileError

_COMMON = tuple(
    f"transformers.{name}"
    for name in ("modeling_outputs", "cache_utils", "generation.utils", "tokenization_utils_base")
)
_MODELS = re.compile(r"transformers\.models(\.[a-z][a-z0-9_]*){1,2}\.modeling_[a-z0-9_]+")
"""The modules whose classes are meant. Those of models count only where such a model was loaded."""
_REPLICATED = "layer_class_to_replicate"
_DEEPEST = 4

Family = Literal["output", "cache", "layer", "encoding"]


def take_apart(value: Any) -> tuple[str, list[tuple[str, Any]]] | None:
    """The name of an object's class and its parts; `None` for those of other classes, and with more state than data."""
    kind = type(value)
    if not _is_meant(kind.__module__) or vars(sys.modules[kind.__module__]).get(kind.__name__) is not kind:
        return None
    name = f"{kind.__module__}.{kind.__name__}"
    match _family(kind):
        case "output":
            parts = _output_apart(value)
        case "encoding":
            parts = list(value.data.items())
        case "cache" | "layer":
            parts = _state_apart(value)
        case None:
            parts = None
    return None if parts is None else (name, parts)


def put_together(name: str, held: dict[str, Any]) -> Any:
    """The object that these are the parts of.

    Raises:
        FileError: there is no such class here, or the parts are not those of one.
    """
    kind = _class(name)
    match _family(kind):
        case "output":
            return _output(kind, held)
        case "encoding":
            return kind(held)
        case "cache" | "layer" as family:
            return _with_state(kind, held, family)
        case None:
            raise FileError(f"{name!r:.100} is no class of objects that can be sent")


def _class(name: str) -> type:
    module, _, word = name.rpartition(".")
    if not _is_meant(module):
        raise FileError(f"{name!r:.100} is no class of objects that can be sent")
    loaded = importlib.import_module(module) if module in _COMMON else sys.modules.get(module)
    found = None if loaded is None else vars(loaded).get(word)
    if not isinstance(found, type) or found.__module__ != module:
        raise FileError(f"no class {name!r:.100} is loaded: transformers has none here, or its model is another's")
    return found


def _is_meant(module: str) -> bool:
    return module in _COMMON or _MODELS.fullmatch(module) is not None


def _family(kind: type) -> Family | None:
    from transformers import BatchEncoding, cache_utils
    from transformers.utils import ModelOutput

    layers = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
    if kind is BatchEncoding:
        return "encoding"
    if issubclass(kind, ModelOutput) and is_dataclass(kind):
        return "output"
    if issubclass(kind, cache_utils.Cache):
        return "cache"
    return "layer" if issubclass(kind, layers) else None


# --- outputs ---


def _output_apart(value: Any) -> list[tuple[str, Any]] | None:
    """The fields that are there; `None` where the object holds anything else."""
    there = [(each.name, held) for each in fields(value) if (held := vars(value).get(each.name)) is not None]
    same = len(there) == len(value) and all(held is dict.get(value, name) for name, held in there)
    return there if same and vars(value).keys() <= {each.name for each in fields(value)} else None


def _output(kind: Any, held: dict[str, Any]) -> Any:
    names = [each.name for each in fields(kind)]
    for name, value in held.items():
        if name not in names or value is None:
            raise FileError(f"{kind.__name__} has no part {name!r:.80} like this")
    made = kind.__new__(kind)
    for name in names:
        setattr(made, name, held.get(name))
    return made


# --- caches ---


def _state_apart(value: Any) -> list[tuple[str, Any]] | None:
    parts = []
    for name, held in vars(value).items():
        if name == _REPLICATED:
            held = None if held is None else f"{held.__module__}.{held.__qualname__}" if isinstance(held, type) else ...
        if not _is_state(held):
            return None
        parts.append((name, held))
    return parts


def _with_state(kind: type, held: dict[str, Any], family: str) -> Any:
    if (family == "layer" and "layers" in held) or (
        family == "cache" and not {"layers", "self_attention_cache"} & {*held}
    ):
        raise FileError(f"these are not the parts of a {kind.__name__}")
    try:
        made: Any = object.__new__(kind)
    except TypeError as error:
        raise FileError(f"no object is a {kind.__name__} alone: {error}") from None
    for name, value in held.items():
        known = inspect.getattr_static(kind, name, None)
        if not name.isidentifier() or name.startswith("__") or callable(known) or isinstance(known, property):
            raise FileError(f"{kind.__name__} keeps nothing as {name!r:.80}")
        if name == _REPLICATED:
            if value is not None and (not isinstance(value, str) or _family(_class(value)) != "layer"):
                raise FileError("what a cache makes more of are layers")
            value = None if value is None else _class(value)
        elif not _is_state(value):
            raise FileError(f"the part {name!r:.80} of a {kind.__name__} is no {type(value).__name__}")
        elif name in ("layers", "self_attention_cache", "cross_attention_cache"):
            _check_inner(name, value, kind)
        vars(made)[name] = value
    _place(made)
    return made


def _check_inner(name: str, value: Any, kind: type) -> None:
    inner, wanted = (value, "layer") if name == "layers" else ([value], "cache")
    if not isinstance(inner, list) or any(_family(type(each)) != wanted for each in inner):
        raise FileError(f"the part {name!r} of a {kind.__name__} is no {type(value).__name__} like this")


def _place(made: Any) -> None:
    """Has a layer say that it is on the device on which its tensors are here."""
    state = vars(made)
    held = [*state.values(), *(each for inner in state.values() if isinstance(inner, dict) for each in inner.values())]
    tensors = [each for each in held if isinstance(each, torch.Tensor)]
    if tensors and isinstance(state.get("device"), torch.device):
        made.device = tensors[0].device


def _is_state(value: Any, depth: int = 0) -> bool:
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device, torch.Size, torch.Tensor):
        return True
    if depth == _DEEPEST:
        return False
    if type(value) in (list, tuple):
        return all(_is_state(each, depth + 1) for each in value)
    if type(value) is dict:
        return all(type(key) in (int, str) and _is_state(each, depth + 1) for key, each in value.items())
    return _is_meant(type(value).__module__) and _family(type(value)) in ("cache", "layer")
