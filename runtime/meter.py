"""What a run costs: the bytes of the tensors that are alive at once, and the floating-point operations.

Counted below autograd, operation by operation, on real tensors and on fakes alike. What a kernel allocates for itself
and gives back before it returns is not seen.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


@final
class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered, in the thread that entered it.

    live: the bytes of the storages that were made since and are alive; those of tensors from outside do not count.
    peak: the most that were alive at once, since `mark` was last called.
    flops: the floating-point operations of matrix products, convolutions and attention, a multiplication with its
        addition as two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}

    def mark(self) -> None:
        """Begins the peak anew, at what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, outside=True)
        made = func(*args, **kwargs)
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        if func._overloadpacket in _FLOPS:
            self.flops += int(_FLOPS[func._overloadpacket](*args, **kwargs, out_val=made))
        return made

    def _see(self, tensor: torch.Tensor, outside: bool = False) -> None:
        """Counts the storage of a tensor, once. One that an operation is given, and that none has made, comes from
        `outside`."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a sparse tensor has none of its own
            return
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = 0 if outside else storage.nbytes()
            weakref.finalize(storage, self._release, key).atexit = False
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The two products of attention: of queries with keys, of weights with values."""
    *outer, queries, width = query.shape
    keys, wide = value.shape[-2:]
    products: int = math.prod(outer) * queries * keys * (width + wide)
    return 2 * products


_FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
}
"""Torch's own formulas, and those that it has none of."""
