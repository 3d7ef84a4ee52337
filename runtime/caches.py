"""What `tracer.cache(…)` gives: copies of what modules gave in one forward, by the names of the modules.

    cache["transformer.h.0"].output      cache.transformer.h[0].output      cache.model.layers[0].inputs

Names are the model's own or standard ones, as everywhere; `model` is the model itself. Of a module that ran several
times, and under generation, a list stands where there would be one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.ir.errors import FileError, ModelError
from nnsight_compiler.passes.caching import module_named
from nnsight_compiler.runtime.shares import Withheld

PORTS = ("output", "input", "inputs")


class NotRecordedError(ModelError, KeyError, AttributeError):
    """A module, or a side of it, that a cache does not hold."""

    __str__ = ModelError.__str__


@final
class ActivationCache(Mapping[str, "CachedModule"]):
    """What modules gave, by the paths of the modules, in the order in which they ran. It is a mapping; its values have
    `.output`, `.input` and `.inputs`. It holds copies, and the wrapped model for the sake of its names."""

    def __init__(self, model: Any, device: Any, dtype: torch.dtype | None, detach: bool) -> None:
        self._model, self._device, self._dtype, self._detach = model, device, dtype, detach
        self._held: dict[str, dict[str, _Values]] = {}

    def __getitem__(self, name: str) -> CachedModule:
        try:
            view = module_named(self._model, name)
            path = view._path
        except (AttributeError, LookupError, TypeError):
            raise _not_recorded(self, name, f"no module of the model is called `{name}`") from None
        if path not in self._held:
            raise _not_recorded(self, name, f"`{name}` was not recorded in this cache")
        return CachedModule(self, view)

    def __getattr__(self, name: str) -> CachedModule:
        if name.startswith("_"):
            raise AttributeError(name)
        module: CachedModule = getattr(CachedModule(self, self._model), name)
        return module

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<cache of {len(self)} modules: {_shown(self)}>"

    def _record(self, path: str, port: str, value: Any, call: int | None, step: int | None) -> None:
        values = self._held.setdefault(path, {}).setdefault(port, _Values(step is not None))
        values.add(_copy(value, self, {}), call)


def record(cache: ActivationCache, path: str, port: str, value: Any, call: int | None, step: int | None) -> None:
    """Puts a copy of what a module gave into a cache."""
    cache._record(path, port, value, call, step)


def cache_as_data(cache: ActivationCache) -> list[tuple[str, Any]]:
    """All that a cache holds but the model, as tuples, by name."""
    held = tuple(
        (path, port, values.many, values.calls, tuple(tuple(each) if values.calls else each for each in values.steps))
        for path, ports in cache._held.items()
        for port, values in ports.items()
    )
    device = None if cache._device is None else str(cache._device)
    return [("device", device), ("dtype", cache._dtype), ("detach", cache._detach), ("held", held)]


def cache_from_data(
    model: Any, device: str | None, dtype: torch.dtype | None, detach: bool, held: tuple[Any, ...]
) -> ActivationCache:
    """The cache of a model that `cache_as_data` was given.

    Raises:
        FileError: no cache holds this.
    """
    cache = ActivationCache(model, device, dtype, detach)
    for each in held:
        match each:
            case (str(path), str(port), bool(many), bool(calls), tuple(steps)) if port in ("output", "inputs"):
                pass
            case _:
                raise FileError("what a cache holds is a path, a side, two truths and the values")
        ports = cache._held.setdefault(path, {})
        if port in ports or not steps or (not many and len(steps) > 1):
            raise FileError(f"no cache holds the {port} of {path!r:.80} like this")
        if (calls and not all(isinstance(step, tuple) and step for step in steps)) or (port == "inputs" and not all(
            _is_call(value) for step in steps for value in (step if calls else (step,))
        )):  # fmt: skip
            raise FileError(f"these are no values of the {port} of {path!r:.80}")
        ports[port] = values = _Values(many)
        values.calls, values.steps = calls, [list(step) if calls else step for step in steps]
    return cache


def _is_call(value: Any) -> bool:
    """Whether a value is the arguments of a call: those by position and those by name."""
    match value:
        case (tuple(), dict(named)):
            return all(isinstance(name, str) for name in named)
    return False


@final
class CachedModule:
    """A module in a cache, or on the way to one that is."""

    __slots__ = ("_cache", "_view")

    def __init__(self, cache: ActivationCache, view: Any) -> None:
        self._cache, self._view = cache, view

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._values("output").of(lambda value: value)

    @property
    def inputs(self) -> Any:
        """What it was called with: the positional arguments and the keyword arguments."""
        return self._values("inputs").of(lambda value: value)

    @property
    def input(self) -> Any:
        """The first of its arguments."""
        return self._values("inputs").of(_first)

    def _values(self, port: str) -> _Values:
        path = self._view._path
        held = self._cache._held.get(path)
        name = f"`{path}`" if path else "the model itself"
        if held is None:
            raise _not_recorded(self._cache, path, f"{name} was not recorded in this cache")
        if port not in held:
            wanted = "include_inputs=True" if port == "inputs" else "include_output=True"
            raise NotRecordedError(f"this cache does not hold the {port} of {name}; ask for it with `{wanted}`")
        return held[port]

    def __getattr__(self, name: str) -> CachedModule:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in PORTS:  # it was not recorded, which an attribute of Python's tries again here
            self._values("output" if name == "output" else "inputs")
        if name == "model" and name not in self._view._module._modules and not self._view._path:
            return self
        found = module_named(self._view, name)
        if not hasattr(found, "_path"):
            raise NotRecordedError(f"`{name}` is no module")
        return CachedModule(self._cache, found)

    def __getitem__(self, index: Any) -> CachedModule | list[CachedModule]:
        found = self._view[index]
        if isinstance(found, list):
            return [CachedModule(self._cache, view) for view in found]
        return CachedModule(self._cache, found)

    def __iter__(self) -> Iterator[CachedModule]:
        return (CachedModule(self._cache, view) for view in self._view)

    def __len__(self) -> int:
        return len(self._view)

    def __repr__(self) -> str:
        path = self._view._path
        held = self._cache._held.get(path, {})
        return f"<{path or 'the model'}: {', '.join(f'{port} {_described(held[port])}' for port in held) or 'nothing'}>"


class _Values:
    """What one side of a module held: one value, one for each call, or one of these for each step of a generation."""

    def __init__(self, many: bool) -> None:
        self.many = many
        self.steps: list[Any] = []
        self.calls = False

    def add(self, value: Any, call: int | None) -> None:
        if call is None:
            self.steps.append(value)
            return
        self.calls = True
        if call == 0:
            self.steps.append([])
        self.steps[-1].append(value)

    def of(self, part: Callable[[Any], Any]) -> Any:
        """The values, or a part of each."""
        steps = [[part(value) for value in step] if self.calls else part(step) for step in self.steps]
        return steps if self.many else steps[0]


def _first(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = inputs
    if not args and not kwargs:
        raise NotRecordedError("this module is called without arguments, so it has no `.input`")
    return args[0] if args else next(iter(kwargs.values()))


def _copy(value: Any, cache: ActivationCache, made: dict[int, Any], inside: bool = False) -> Any:
    """A copy that shares no memory with the model: of tensors, and of containers and objects that hold some, with all
    that is `inside` such objects. What is one stays one."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Withheld):  # its use says why it is not there
        return value
    kind: Any = type(value)
    if isinstance(value, torch.Tensor):
        dtype = cache._dtype if cache._dtype is not None and value.is_floating_point() else value.dtype
        kept = value.detach() if cache._detach else value
        copied: Any = kept.to(device=cache._device or value.device, dtype=dtype, copy=True)
    elif isinstance(value, (tuple, list)):
        items = [_copy(item, cache, made, inside) for item in value]
        copied = kind(*items) if hasattr(value, "_fields") else kind(items)
    elif isinstance(value, Mapping):
        copied = kind({name: _copy(item, cache, made, inside) for name, item in value.items()})
    elif is_dataclass(value) and not isinstance(value, type):
        given = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
        copied = kind(**{name: _copy(held, cache, made, inside) for name, held in given.items()})
    elif _is_plain(value) and (inside or _holds_tensors(value, 3)):
        copied = kind.__new__(kind)  # such as a cache of keys and values, which is filled as the model runs
        made[id(value)] = copied
        vars(copied).update({name: _copy(item, cache, made, inside=True) for name, item in vars(value).items()})
    else:
        return value
    made[id(value)] = copied
    return copied


def _holds_tensors(value: Any, depth: int) -> bool:
    """Whether an object, which is no module, has tensors among its attributes."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item, depth) for item in value)
    if depth == 0 or not _is_plain(value):
        return False
    return any(_holds_tensors(item, depth - 1) for item in vars(value).values())


def _is_plain(value: Any) -> bool:
    """Whether an object is made of its attributes: no class, module, function or constant."""
    return hasattr(value, "__dict__") and not (isinstance(value, (type, nn.Module, Enum)) or callable(value))


def _described(values: _Values) -> str:
    value = values.of(lambda held: held)
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def _not_recorded(cache: ActivationCache, name: str, reason: str) -> NotRecordedError:
    near = get_close_matches(name, list(cache), n=3, cutoff=0.5)
    return NotRecordedError(f"{reason}; {'did you mean' if near else 'it holds'} {', '.join(near) or _shown(cache)}")


def _shown(cache: Mapping[str, Any]) -> str:
    names = [name or "the model itself" for name in cache]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
