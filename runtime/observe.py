"""In which order a model's modules run, found by running it once on a shadow.

The shadow is a deep copy of the module whose tensors are fakes: they have shapes and dtypes, and no data. So observing
costs no memory, needs no loaded weights, and whatever the model's code does to its own attributes is done to the copy.
A model whose code looks at numbers (`.item()`, a branch on a value) cannot run on fakes; a second shadow then shares
the real parameters and has buffers of its own. Hooks of the user's, and of accelerate's, are not part of either shadow
as long as it is fake; a real one keeps accelerate's, since they bring the weights.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any, final
from typing import Literal as OneOf

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnsight_compiler.ir.types import Dimension, TensorType

Kind = OneOf["tensor", "tuple", "mapping", "other"]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Where torch keeps the hooks of a module."""


@final
@dataclass(frozen=True, slots=True)
class Event:
    """A module receives its arguments (`input`) or returns (`output`), for the `call`-th time in the forward."""

    path: str
    port: OneOf["input", "output"]
    call: int


@final
@dataclass(frozen=True, slots=True)
class Observation:
    """What one forward did.

    events: in the order in which they happened; each module under the first of its paths.
    calls: how often each module ran; modules that did not run are absent.
    how: whether the tensors were fake or real; `reason` says why they could not be fake.
    kind: what stood at each event: a tensor, a tuple (or list), a mapping, or something else. At an input that is the
        first argument.
    shape: for each event at which a tensor stood, its dtype and shape.
    mutated_later: the events at which a tensor stood that the model wrote to in place afterwards.
    """

    events: tuple[Event, ...]
    calls: Mapping[str, int]
    how: OneOf["fake", "real", "registered"]
    reason: str = ""
    kind: Mapping[Event, Kind] = field(default_factory=dict)
    shape: Mapping[Event, TensorType | None] = field(default_factory=dict)
    mutated_later: frozenset[Event] = frozenset()
    _times: dict[Event, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_times", {event: time for time, event in enumerate(self.events)})

    def time(self, path: str, port: OneOf["input", "output"], call: int = 0) -> int:
        """The place of an event in `events`. Raises `KeyError` where it did not happen."""
        return self._times[Event(path, port, call)]

    def count(self, path: str) -> int:
        """How often a module ran."""
        return self.calls.get(path, 0)


def observe(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Observation:
    """Runs one forward of `module` on a shadow of it and says what happened. The module and the arguments stay as
    they are, and so do the states of the random generators.

    Raises: what the model itself raises on these arguments. With weights that are not loaded (on the meta device) and
        code that looks at numbers, what torch says of that.
    """
    kwargs = dict(kwargs or {})
    with torch.inference_mode(False), torch.no_grad(), _generators_kept(module):
        try:
            return _run(module, args, kwargs, _Fakes(module, args, kwargs), "")
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not _has_weights(module):
                raise
        return _run(module, args, kwargs, _Reals(), reason)


class _Fakes:
    """Stands fake tensors in for all others, on one device: where the model is, or the CPU where that is not one."""

    how: OneOf["fake", "real"] = "fake"

    def __init__(self, module: nn.Module, args: object, kwargs: object) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = {tensor.device for tensor in _tensors_of(module)} - {torch.device("meta")}
        self.device = devices.pop() if len(devices) == 1 else torch.device("cpu")

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def running(self) -> AbstractContextManager[Any]:
        return self.mode


class _Reals:
    """Shares the parameters and copies every other tensor."""

    how: OneOf["fake", "real"] = "real"

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()


def _run(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stand_in: _Fakes | _Reals, reason: str
) -> Observation:
    memo: dict[int, Any] = {}
    for tensor in (*_tensors_of(module), *tensors_in((args, kwargs))):
        if id(tensor) not in memo:
            memo[id(tensor)] = stand_in(tensor)
    shadow = _shadow(module, memo, fake=stand_in.how == "fake")
    args, kwargs = copy.deepcopy((args, kwargs), memo)
    recorder = _Recorder(shadow)
    with stand_in.running():
        shadow(*args, **kwargs)
    return recorder.observation(stand_in.how, reason)


def _shadow(module: nn.Module, memo: dict[int, Any], fake: bool) -> nn.Module:
    """A deep copy whose tensors come from `memo`, without the user's hooks."""
    for part in module.modules():
        for name in _HOOKS:
            if name in vars(part):
                memo[id(vars(part)[name])] = OrderedDict()
        hook = vars(part).get("_hf_hook")
        for one in (hook, *getattr(hook, "hooks", ())) if hook is not None else ():
            if fake:
                memo[id(one)] = _NoHook()
            for shared in ("weights_map", "tied_params_map"):  # all of the model's weights: not to be copied
                if getattr(one, shared, None) is not None:
                    memo[id(getattr(one, shared))] = getattr(one, shared)
    shadow = copy.deepcopy(module, memo)
    for part in shadow.modules():
        if fake and "_old_forward" in vars(part):  # accelerate's way of wrapping a forward
            part.forward = vars(part)["_old_forward"]
        forward = vars(part).get("forward")
        if isinstance(forward, FunctionType):
            part.forward = _within_shadow(forward, memo)
    return shadow


def _within_shadow(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A forward that someone set on the instance, with the shadow where its closure holds the module: a deep copy keeps
    functions as they are, so it would run the user's own modules."""
    cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class _NoHook:
    """What an accelerate hook becomes in a fake shadow."""


class _Recorder:
    """Hooks on every module of a shadow, and what they saw."""

    def __init__(self, shadow: nn.Module) -> None:
        self.events: list[Event] = []
        self.calls: Counter[str] = Counter()
        self.kind: dict[Event, Kind] = {}
        self.shape: dict[Event, TensorType | None] = {}
        self.versions: list[tuple[Event, torch.Tensor, int]] = []
        self.open: dict[str, list[int]] = {}
        for path, part in shadow.named_modules():
            part.register_forward_pre_hook(self._on_input(path), with_kwargs=True)
            part.register_forward_hook(self._on_output(path))

    def _on_input(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.calls[path]
            self.calls[path] += 1
            self.open.setdefault(path, []).append(call)
            first = args[0] if args else next(iter(kwargs.values()), None)
            self._record(Event(path, "input", call), first, (args, kwargs))

        return hook

    def _on_output(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
            self._record(Event(path, "output", self.open[path].pop()), output, output)

        return hook

    def _record(self, event: Event, value: object, reachable: object) -> None:
        self.events.append(event)
        self.kind[event] = _kind(value)
        self.shape[event] = _type(value) if isinstance(value, torch.Tensor) else None
        self.versions += [(event, tensor, tensor._version) for tensor in tensors_in(reachable)]

    def observation(self, how: OneOf["fake", "real"], reason: str) -> Observation:
        mutated = frozenset(event for event, tensor, version in self.versions if tensor._version != version)
        return Observation(tuple(self.events), dict(self.calls), how, reason, self.kind, self.shape, mutated)


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


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in a value made of tuples, lists and mappings."""
    match value:
        case torch.Tensor():
            yield value
        case tuple() | list():
            for item in value:
                yield from tensors_in(item)
        case Mapping():
            for item in value.values():
                yield from tensors_in(item)
        case _:
            return


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters, buffers and other tensors that the modules hold."""
    for part in module.modules():
        for value in vars(part).values():
            yield from tensors_in(value)


def _has_weights(module: nn.Module) -> bool:
    """Whether a forward can be computed: no weight is on the meta device, unless accelerate brings it when needed."""
    offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())
    return offloaded or not any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def _generators_kept(module: nn.Module) -> Iterator[None]:
    """Gives every random generator its state back: torch's, Python's, and numpy's where it is in use."""
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    python_state = random.getstate()
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


def registered(module: nn.Module) -> Observation:
    """The order in which modules are registered, each running once: what is assumed where no forward was observed."""
    events: list[Event] = []

    def visit(part: nn.Module, path: str, seen: set[nn.Module]) -> None:
        seen.add(part)
        events.append(Event(path, "input", 0))
        for name, child in part.named_children():
            if child not in seen:
                visit(child, f"{path}.{name}" if path else name, seen)
        events.append(Event(path, "output", 0))

    visit(module, "", set())
    return Observation(tuple(events), {event.path: 1 for event in events}, "registered")
