"""A copy of a model on which a forward may be run without touching the model itself.

The shadow is a deep copy of the module whose tensors are others: fakes, which have shapes and dtypes and no data, or
the real parameters beside buffers of its own. Hooks of the user's, and of accelerate's, are not part of a shadow as
long as it is fake; a real one keeps accelerate's, since they bring the weights.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CellType, FunctionType
from typing import Any
from typing import Literal as OneOf

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Where torch keeps the hooks of a module."""


class Fakes:
    """Stands fake tensors in for all others, on one device: where the model is, or the CPU where that is not one."""

    how: OneOf["fake", "real"] = "fake"

    def __init__(self, module: nn.Module, args: object, kwargs: object) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = {tensor.device for tensor in tensors_of(module)} - {torch.device("meta")}
        self.device = devices.pop() if len(devices) == 1 else torch.device("cpu")

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.device == self.device:
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def running(self) -> AbstractContextManager[Any]:
        return self.mode

    def on_real_inputs(self) -> AbstractContextManager[Any]:
        """For forwards whose inputs stay real: what is computed of them alone is real too, all else is fake."""
        return _NoFakesIntoReals()  # type: ignore[no-untyped-call]


class Reals:
    """Shares the parameters and copies every other tensor."""

    how: OneOf["fake", "real"] = "real"
    device: torch.device | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def on_real_inputs(self) -> AbstractContextManager[Any]:
        """For forwards whose inputs are real."""
        return nullcontext()


class _NoFakesIntoReals(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to write a fake into a real tensor, which would go on with numbers that nothing computed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            named = {
                argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
            } | kwargs
            written = [
                named[argument.name]
                for argument in func._schema.arguments
                if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
            ]
            real = any(not isinstance(tensor, FakeTensor) for tensor in tensors_in(written))
            if real and any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
                raise NotImplementedError(f"{func} writes a tensor without numbers into one with numbers")
        return func(*args, **kwargs)


def shadowed(module: nn.Module, stand_in: Fakes | Reals) -> nn.Module:
    """A shadow with stand-ins for all tensors that the modules hold."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = stand_in(tensor)
    return shadow_of(module, memo, fake=stand_in.how == "fake")


def shadow_of(module: nn.Module, memo: dict[int, Any], fake: bool) -> nn.Module:
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


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters, buffers and other tensors that the modules hold."""
    for part in module.modules():
        for value in vars(part).values():
            yield from tensors_in(value)


def has_weights(module: nn.Module) -> bool:
    """Whether a forward can be computed: no weight is on the meta device, unless accelerate brings it when needed."""
    offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())
    return offloaded or not any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def generators_kept(module: nn.Module) -> Iterator[None]:
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


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers: its inputs and its layers have known names then."""
    return hasattr(module, "config") and callable(getattr(module, "get_input_embeddings", None))
