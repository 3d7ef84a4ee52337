"""What autograd records of a forward.

It is recorded only from the first value that needs it, since the weights of the model take no part unless they are
asked for: while it runs, torch's functions see them detached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span


class Frozen(TorchFunctionMode):
    """While it is entered, torch's functions take these parameters as constants. The parameters stay as they are, and
    other threads see them so."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.constants = {id(parameter): parameter.detach() for parameter in parameters}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple([self._constant(value) for value in args])
        if kwargs:
            return function(*args, **{name: self._constant(value) for name, value in kwargs.items()})
        return function(*args)

    def _constant(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.constants.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)([self._constant(item) for item in value])
        return value


def plainly(value: Any) -> AbstractContextManager[Any]:
    """Around what we do ourselves to the tensors in a value: it goes past `Frozen`, which would look at every argument
    of every function. Tensors that have functions of their own keep them."""
    return torch._C.DisableTorchFunction() if _is_plain(value) else nullcontext()


_PLAIN = frozenset({torch.Tensor, bool, int, float, type(None)})


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is tuple or kind is list:
        return all(map(_is_plain, value))
    return kind in _PLAIN or (kind is dict and all(map(_is_plain, value.values())))


class _Current(threading.local):
    """The model whose forward runs in this thread."""

    root: nn.Module | None = None


_CURRENT = _Current()


@contextmanager
def recorded(root: nn.Module, wanted: Span | None, named: tuple[str, ...], everything: bool) -> Iterator[None]:
    """A forward whose values have gradients: `wanted` says where one is asked for, `named` which weights count.

    Raises:
        RunError: gradients are off, or would be wrong.
    """
    if wanted is not None and (torch.is_inference_mode_enabled() or not torch.is_grad_enabled()):
        mode = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise RunError(
            f"{wanted}: a gradient is asked for, but the experiment is run under `{mode}`\n"
            f"  way out: call it outside of `{mode}`"
        )
    if any(getattr(part, "gradient_checkpointing", False) and part.training for part in root.modules()):
        where = f"{wanted}: " if wanted is not None else ""
        raise RunError(
            f"{where}the model recomputes its values in the backward pass (gradient checkpointing), which would be"
            " without what the experiment does to them\n  way out: `model.gradient_checkpointing_disable()`"
        )
    counting = counted_parameters(root, named)
    frozen = [each for each in root.parameters() if each.requires_grad and id(each) not in counting]
    before, _CURRENT.root = _CURRENT.root, root
    try:
        if everything or not frozen:
            yield
        else:
            with Frozen(frozen):
                yield
    finally:
        _CURRENT.root = before


def counted_parameters(root: nn.Module, names: tuple[str, ...]) -> set[int]:
    """The identities of the parameters that count: those of these names, where the model has them, and adapters."""
    found = dict(root.named_parameters(remove_duplicate=False)) if names else {}
    return {id(found[name]) for name in names if name in found} | set(map(id, adapters(root)))


def adapters(root: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient in a model most of whose weights are frozen: what was put in to be
    trained, as low-rank adapters are. A model that is trained as a whole has none."""
    trained: list[nn.Parameter] = []
    frozen: list[nn.Parameter] = []
    waiting = [root]  # `root.parameters()` takes ten times as long, and this precedes every forward
    for module in waiting:
        waiting.extend([each for each in module._modules.values() if each is not None])
        for parameter in module._parameters.values():
            if parameter is not None:
                (trained if parameter.requires_grad else frozen).append(parameter)
    return trained if frozen and _size(frozen) > _size(trained) else []


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def requires_grad(value: Any, depth: int = 4) -> bool:
    """Whether a value is, or holds, a tensor that requires a gradient: in containers, modules and plain objects."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    if not depth or isinstance(value, (type, ModuleType, FunctionType)) or hasattr(type(value), "_ready"):
        return False
    if isinstance(value, (list, tuple)):
        return any(requires_grad(item, depth - 1) for item in value)
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return isinstance(held, dict) and any(requires_grad(item, depth - 1) for item in held.values())


class _Begin(torch.autograd.Function):
    """Has a tensor be a result of autograd's, in place, so that it may also be written to in place."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def require(value: Any, leaf: int | None, where: str) -> None:
    """Has what is computed from a value be recorded from here on."""
    with plainly(value):
        _require(value, leaf, where)


def _require(value: Any, leaf: int | None, where: str) -> None:
    leaves = [value] if type(value) is torch.Tensor else tree_leaves(value)
    for tensor in leaves if leaf is None else leaves[leaf : leaf + 1]:
        if not isinstance(tensor, torch.Tensor) or tensor.requires_grad:
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()) or _is_part_of_model(tensor):
            continue
        if not torch.is_grad_enabled():
            raise RunError(
                f"{where}: this value has no gradient, since the model runs this part of itself without gradients\n"
                "  way out: take the gradient of a value outside of that part"
            )
        try:
            _Begin.apply(tensor, torch.zeros((), requires_grad=True, device=tensor.device))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RunError(
                f"{where}: torch cannot record from this value on, which is one of several views of another tensor"
                f" ({error})\n  way out: take the gradient of the value of which it is a part"
            ) from error


def _is_part_of_model(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a weight or a buffer of the model that runs, which stay as they are."""
    if _CURRENT.root is None:
        return False
    storage = tensor.untyped_storage().data_ptr()
    own = (*_CURRENT.root.parameters(), *_CURRENT.root.buffers())
    return any(each.untyped_storage().data_ptr() == storage for each in own if not each.is_meta)
