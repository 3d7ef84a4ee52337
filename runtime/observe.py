"""In which order a model's modules run, found by running it once on a shadow.

The shadow is a deep copy of the module whose tensors are fakes: they have shapes and dtypes, and no data. So observing
costs no memory, needs no loaded weights, and whatever the model's code does to its own attributes is done to the copy.
A model whose code looks at numbers (`.item()`, a branch on a value) cannot run on fakes; a second shadow then shares
the real parameters and has buffers of its own. Hooks of the user's, and of accelerate's, are not part of either shadow
as long as it is fake; a real one keeps accelerate's, since they bring the weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from typing import Literal as OneOf

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnsight_compiler.ir.types import Dimension, TensorType
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.observation import Event, Kind, Observation, Standing
from nnsight_compiler.runtime.operations import Operations
from nnsight_compiler.runtime.shadow import (
    Fakes,
    Reals,
    generators_kept,
    has_weights,
    shadow_of,
    tensors_in,
    tensors_of,
)


def observe(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    operations: Collection[str] = (),
) -> Observation:
    """Runs one forward of `module` on a shadow of it and says what happened, to modules and to these operations inside
    of them. The module and the arguments stay as they are, and so do the states of the random generators.

    Raises: what the model itself raises on these arguments. With weights that are not loaded (on the meta device) and
        code that looks at numbers, what torch says of that.
    """
    kwargs = dict(kwargs or {})
    with torch.inference_mode(False), torch.no_grad(), generators_kept(module):
        try:
            return _run(module, args, kwargs, Fakes(module, args, kwargs), "", operations)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not has_weights(module):
                raise
        return _run(module, args, kwargs, Reals(), reason, operations)


def _run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: Fakes | Reals,
    reason: str,
    operations: Collection[str],
) -> Observation:
    memo: dict[int, Any] = {}
    for tensor in (*tensors_of(module), *tensors_in((args, kwargs))):
        if id(tensor) not in memo:
            memo[id(tensor)] = stand_in(tensor)
    shadow = shadow_of(module, memo, fake=stand_in.how == "fake")
    args, kwargs = copy.deepcopy((args, kwargs), memo)
    recorder = _Recorder(shadow, operations)
    kept = [(path, buffer, buffer._version) for path, buffer in shadow.named_buffers()]
    with stand_in.running(), ACTIVE.running(recorder), recorder.draws:
        shadow(*args, **kwargs)
    changed = (path for path, buffer, version in kept if buffer._version != version)
    recorder.draws.where = recorder.draws.where or next(changed, "")
    return recorder.observation(stand_in.how, reason)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Notes where random numbers are drawn: the module that runs then."""

    def __init__(self, running: list[Event]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running, self.where = running, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.where and torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs):
            self.where = (self.running[-1].path if self.running else "") or "the model"
        return func(*args, **kwargs)


def _drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is an operation that draws for its dropout alone, and there is none."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "train"):
            return not (args[number] if number < len(args) else kwargs.get(argument.name, argument.default_value))
    return False


class _Recorder:
    """Hooks on every module of a shadow, and what they saw."""

    def __init__(self, shadow: nn.Module, operations: Collection[str]) -> None:
        self.operations = Operations(shadow, self)
        self.operations.refused = {}
        self.events: list[Event] = []
        self.calls: Counter[str] = Counter()
        self.kind: dict[Event, Kind] = {}
        self.shape: dict[Event, TensorType | None] = {}
        self.versions: list[tuple[Event, torch.Tensor, int]] = []
        self.held: list[torch.Tensor] = []
        self.open: dict[str, list[int]] = {}
        self.running: list[Event] = []
        self.effects: set[str] = set()
        self.keeps = ""
        self.memory: dict[Event, frozenset[int]] = {}
        self.before: list[Any] = []
        self.draws = _Draws(self.running)
        self.tensors: dict[Event, tuple[Standing, ...]] = {}
        self.made: dict[int, tuple[tuple[Event, int], Event | None]] = {}
        self.first: dict[int, int] = {}
        self.since: dict[Event, int] = {}
        self.returned: dict[Any, tuple[Event, int]] = {}
        self.handed: dict[tuple[Event, str], Event] = {}
        parts: list[tuple[str, Any]] = list(shadow.named_modules())
        parts += [(path, self.operations.operation(path)) for path in sorted(operations)]
        for path, part in parts:
            part.register_forward_pre_hook(self._on_input(path), with_kwargs=True)
            part.register_forward_hook(self._on_output(path))

    def _on_input(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.calls[path]
            self.calls[path] += 1
            self.open.setdefault(path, []).append(call)
            first = args[0] if args else next(iter(kwargs.values()), None)
            event = Event(path, "input", call)
            self._record(event, first, (args, kwargs))
            self.running.append(event)
            self.before.append((args, kwargs, _own(module), _given(args, kwargs)))

        return hook

    def _on_output(self, path: str) -> Any:
        def hook(module: nn.Module, _: tuple[Any, ...], output: object) -> None:
            args, kwargs, own, given = self.before.pop()
            if _own(module) != own:
                self.keeps = self.keeps or path or "the model"
                self.effects.add(path)
            if _given(args, kwargs) != given:
                self.effects.add(path)
            self._record(Event(path, "output", self.open[path].pop()), output, output)
            self.running.pop()

        return hook

    def _record(self, event: Event, value: object, reachable: object) -> None:
        self.events.append(event)
        self.kind[event] = _kind(value)
        self.shape[event] = _type(value) if isinstance(value, torch.Tensor) else None
        self._note_handed(event, value)
        held = list(tensors_in(reachable))
        for tensor in held:
            self.first.setdefault(id(tensor), len(self.events) - 1)
        self.versions += [(event, tensor, tensor._version) for tensor in held]
        self.memory[event] = frozenset(tensor.untyped_storage()._cdata for tensor in held if _has_storage(tensor))
        leading = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(leading, torch.Tensor):
            self.since[event] = self.first[id(leading)]
        self.tensors[event] = tuple(self._standing(event, value, reachable))

    def _note_handed(self, event: Event, value: object) -> None:
        """Notes which of the tensors are what a module returned: one storage in one shape, not written to since."""
        named = {"": value}
        if event.port == "output" and isinstance(value, Mapping):
            named |= {name: part for name, part in value.items() if isinstance(name, str)}
            if hasattr(value, "to_tuple"):  # an output of transformers, which has numbers too
                named |= {str(number): part for number, part in enumerate(value.to_tuple())}
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self.held.append(tensor)  # so that no other comes to have the address of its storage
                key = storage._cdata, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
                made, version = self.returned.get(key, (None, 0))
                if made is not None and version == tensor._version:
                    self.handed[event, name] = made
                elif event.port == "output" and not name:
                    self.returned[key] = event, tensor._version

    def _standing(self, event: Event, value: object, reachable: object) -> Iterator[Standing]:
        around = self.running[-1] if self.running else None
        given = around if around is not None and _is_real(self.shape[around]) else None
        of_first = {id(leaf) for leaf in tree_leaves(value)}
        for number, leaf in enumerate(tree_leaves(reachable)):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                first, made_in = self.made.setdefault(id(leaf), ((event, number), given))
                self.held.append(leaf)
                yield Standing(number, first, made_in, id(leaf) in of_first)

    def observation(self, how: OneOf["fake", "real"], reason: str) -> Observation:
        mutated = frozenset(event for event, tensor, version in self.versions if tensor._version != version)
        return Observation(
            tuple(self.events),
            dict(self.calls),
            how,
            reason,
            self.kind,
            self.shape,
            mutated,
            self.tensors,
            self.since,
            self.handed,
            self.operations.refused or {},
            frozenset(self.operations.recomputed),
            self.draws.where,
            self.keeps,
            frozenset(self.effects),
            self.memory,
        )


def _own(module: Any) -> Any:
    """What a module keeps between its calls besides the contents of tensors, to be compared."""
    if not isinstance(module, nn.Module):  # an operation inside of one
        return None
    held = {name: _contents(value) for name, value in vars(module).items() if not name.startswith("_")}
    return held, {name: id(value) for name, value in module._buffers.items()}


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is in the containers and objects that a module is given."""
    return [_contents(value) for value in (*args, *kwargs.values()) if not _is_cache(value)]


def _contents(value: Any) -> Any:
    """A value by its identity; a container or a plain object by what it holds, too."""
    if isinstance(value, dict):
        return id(value), {key: id(item) for key, item in value.items()}
    if isinstance(value, (list, set)):
        return id(value), list(map(id, value))
    if isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__"):
        return id(value)
    return id(value), {name: id(item) for name, item in vars(value).items()}


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, which the forwards that this matters to are told to go without."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _is_real(found: TensorType | None) -> bool:
    return found is not None and (found.dtype or "").startswith(("float", "bfloat"))


def _kind(value: object) -> Kind:
    match value:
        case torch.Tensor():
            return "tensor"
        case tuple() | list():
            return "tuple"
        case Mapping():
            return "mapping"
        case _:
            return "other"


def _type(tensor: torch.Tensor) -> TensorType:
    return TensorType(str(tensor.dtype).removeprefix("torch."), tuple(Dimension(int(size)) for size in tensor.shape))
