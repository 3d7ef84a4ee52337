"""A copy of a model on which a forward may be run without touching the model itself.

The shadow is a deep copy of the module whose tensors are others: fakes, which have shapes and dtypes and no data, or
the real parameters beside buffers of its own. Hooks of the user's, and of accelerate's, are not part of a shadow as
long as it is fake; a real one keeps accelerate's, since they bring the weights.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CellType, FunctionType
from typing import Any
from typing import Literal as OneOf

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Where torch keeps the hooks of a module."""

_TENSORS = frozenset({torch.Tensor, nn.Parameter, FakeTensor})
"""The classes of tensors that fakes may be mixed with."""

_ATEN = torch.ops.aten
_SHAPES_ALONE = frozenset({
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor,
    _ATEN.div.Tensor, _ATEN.mul.Scalar, _ATEN.pow.Tensor_Scalar, _ATEN.neg.default, _ATEN.rsqrt.default,
    _ATEN.cos.default, _ATEN.sin.default, _ATEN.tanh.default, _ATEN.sigmoid.default, _ATEN.relu.default,
    _ATEN.gelu.default, _ATEN.silu.default, _ATEN._softmax.default, _ATEN.native_layer_norm.default,
    _ATEN.mean.dim, _ATEN.where.self, _ATEN.masked_fill.Scalar, _ATEN.cat.default, _ATEN.clone.default,
    _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default, _ATEN._unsafe_view.default,
    _ATEN._reshape_alias.default, _ATEN.as_strided.default, _ATEN.expand.default, _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim, _ATEN.slice.Tensor, _ATEN.select.int, _ATEN.split.Tensor, _ATEN.detach.default,
    _ATEN.alias.default,
})  # fmt: skip
"""The operations that models consist of. What they give for fakes is what torch's kernels for shapes give: where all
tensors are fakes on one device, nothing else is to be seen to, and the way through `FakeTensorMode` is far longer."""


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

    @contextmanager
    def running_on_numbers(self) -> Iterator[None]:
        """For forwards whose inputs are real where they are whole numbers or truth values: what a model computes of
        these alone, such as whether a mask hides anything, has numbers; all else is fake."""
        logger, quiet = logging.getLogger(FakeTensorMode.__module__), _Quiet()
        logger.addFilter(quiet)
        try:
            with _NewFloatsAreFake(self):
                yield
        finally:
            logger.removeFilter(quiet)

    def as_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for an input in such a forward."""
        return self(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor.to(self.device)


class Reals:
    """Shares the parameters and copies every other tensor. Where it `draws`, weights that are not loaded are random."""

    how: OneOf["fake", "real"] = "real"

    def __init__(self, draws: bool = False) -> None:
        self.draws = draws

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and self.draws:
            drawn = torch.randn(tensor.shape).to(tensor.dtype)
            return nn.Parameter(drawn, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else drawn
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def running_on_numbers(self) -> AbstractContextManager[Any]:
        """For forwards whose inputs are real."""
        return nullcontext()

    def as_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for an input in such a forward."""
        return tensor


class _NewFloatsAreFake(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes fakes of new floating-point tensors, which models fill later. What is computed of whole numbers and truth
    values stays real until it meets a fake."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = fakes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPES_ALONE and self._are_fakes_on_one_device(args):
            return self._shaped(func, args, kwargs)
        if func._schema.is_mutable:
            self._refuse_mixing(func, args, kwargs)
        if FakeTensor in types and func is not torch.ops.prim.device.default and _TENSORS.issuperset(types):
            return self.fakes.mode.dispatch(func, types, args, kwargs)  # what `func` comes to, by a longer way
        made = func(*args, **kwargs)
        new = isinstance(made, torch.Tensor) and next(tensors_in((args, kwargs)), None) is None
        return self.fakes(made) if new and (made.is_floating_point() or made.is_complex()) else made

    def _are_fakes_on_one_device(self, args: tuple[Any, ...]) -> bool:
        found = list(tensors_in(args))
        return bool(found) and all(
            type(tensor) is FakeTensor
            and tensor.fake_mode is self.fakes.mode
            and tensor.fake_device == self.fakes.device
            and tensor.constant is None
            for tensor in found
        )

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the kernel for shapes gives."""
        mode, device = self.fakes.mode, self.fakes.device
        with in_kernel_invocation_manager(mode):
            made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor):
            return FakeTensor(mode, made, device)
        return type(made)(FakeTensor(mode, each, device) for each in made)

    @staticmethod
    def _refuse_mixing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses to write a fake into a real tensor, which would go on with numbers that nothing computed."""
        arguments = func._schema.arguments
        named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        written = [
            named.get(argument.name) for argument in arguments if argument.alias_info and argument.alias_info.is_write
        ]
        real = any(not isinstance(tensor, FakeTensor) for tensor in tensors_in(written))
        if real and any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
            raise NotImplementedError(f"{func} writes a tensor without numbers into one with numbers")


class _Quiet(logging.Filter):
    """Drops what torch logs when an operation has no shapes for fakes: that is raised too, and told by who asked."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != threading.get_ident()


def as_inputs(inputs: Any, stand_in: Fakes | Reals) -> Any:
    """What a shadow is given: the model may change it, so that what is no tensor is a copy."""
    return pytree.tree_map(
        lambda leaf: stand_in.as_input(leaf) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf), inputs
    )


def shadowed(module: nn.Module, stand_in: Fakes | Reals, without: Set[nn.Module] = frozenset()) -> nn.Module:
    """A shadow with stand-ins for all tensors that the modules hold, and `without` some of the modules."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(module, without):
        if id(tensor) not in memo:
            memo[id(tensor)] = stand_in(tensor)
    return shadow_of(module, memo, stand_in.how == "fake", without)


def shadow_of(module: nn.Module, memo: dict[int, Any], fake: bool, without: Set[nn.Module] = frozenset()) -> nn.Module:
    """A deep copy whose tensors come from `memo`, without the user's hooks, and `without` some of the modules."""
    holders: list[tuple[nn.Module, dict[str, Any]]] = []
    for part in module.modules():
        for name in HOOKS:
            if name in vars(part):
                memo[id(vars(part)[name])] = OrderedDict()
        hook = vars(part).get("_hf_hook")
        for one in (hook, *getattr(hook, "hooks", ())) if hook is not None else ():
            if fake:
                memo[id(one)] = _NoHook()
            for shared in ("weights_map", "tied_params_map"):  # all of the model's weights: not to be copied
                if getattr(one, shared, None) is not None:
                    memo[id(getattr(one, shared))] = getattr(one, shared)
        if not without.isdisjoint(part.children()):
            holders.append((part, {}))
            memo[id(part._modules)] = holders[-1][1]
    shadow = copy.deepcopy(module, memo)
    for part, remaining in holders:
        remaining.update(
            {name: copy.deepcopy(child, memo) for name, child in part._modules.items() if child not in without}
        )
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


def tensors_of(module: nn.Module, without: Set[nn.Module] = frozenset()) -> Iterator[torch.Tensor]:
    """The parameters, buffers and other tensors that the modules hold, but for some modules and what is below them."""
    waiting, seen = [module], set(without)
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            waiting.extend(part.children())
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
