"""What forwards on one input have in common: run once, and replayed where they would compute it again.

A module that is replayed does not run: what stands in for its `forward` gives what that gave, repeated for as many rows
as the forward has. Its hooks fire, so that sites at its input and output are what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.formulas import Opaque, TensorAxes
from nnsight_compiler.runtime.hooks import Stop
from nnsight_compiler.runtime.prompts import remembering
from nnsight_compiler.runtime.replacing import Replaced, Replacement
from nnsight_compiler.runtime.runs import RECORDER
from nnsight_compiler.runtime.scanning import as_it_runs, prepared, ready
from nnsight_compiler.runtime.shares import SiteAxes

WITHOUT_CACHE = "use_cache"
"""The argument by which a model keeps no keys and values: those of modules that do not run would be missing."""


@final
@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Which modules a prefix holds values of, by their paths, in the order in which they return.

    span: the first of the forwards that it is for.
    prompts: where in the state is what was made of prompts.
    """

    paths: tuple[str, ...]
    span: Span
    prompts: str = ""

    def of(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Prefix:
        """The prefix of forwards of a model on these arguments. Nothing runs yet."""
        with remembering(getattr(state, self.prompts, None)):
            return Prefix(self, model, *prepared(model, args, kwargs))


@final
@dataclass(slots=True, eq=False)
class Prefix:
    """The values of one input, once something asks for them."""

    plan: PrefixPlan
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _held: dict[str, Any] = field(default_factory=dict)
    _ran: bool = False

    def values(self) -> Mapping[str, Any]:
        """What each module gave, by its path."""
        if not self._ran:
            self._run(ready(self.model))
        return self._held

    def release(self) -> None:
        """Forgets the values. Asked for again, they are computed again."""
        self._held, self._ran = {}, False

    def _run(self, root: nn.Module) -> None:
        RECORDER.count(self.plan.span)
        run = object()
        before = ACTIVE.run
        kept: dict[str, Any] = {}
        paths = self.plan.paths

        def keeping(path: str, last: bool) -> Replacement:
            def replacement(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
                output = plain(*args, **kwargs)
                if path not in kept and _can_be_held(output):
                    kept[path] = pytree.tree_map(_same, output)
                if last:
                    raise Stop(run)
                return output

            return replacement

        handles: list[Replaced] = []
        try:
            for path in paths:
                module = root.get_submodule(path)
                handles.append(Replaced(module, ACTIVE, run, keeping(path, path == paths[-1])))
            ACTIVE.run = run
            with torch.no_grad(), as_it_runs():
                if paths:
                    root(*self.args, **without_cache(self.model, self.kwargs))
        except Stop as stop:
            if stop.run is not run:
                raise
        finally:
            ACTIVE.run = before
            for handle in handles:
                handle.remove()
        self._held = kept
        self._ran = True


def _can_be_held(output: Any) -> bool:
    """Whether a value is made of tensors and plain values alone: of anything else each forward may want its own."""
    plain = (torch.Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device)
    return all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(output))


def _same(leaf: Any) -> Any:
    return leaf


def without_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that keeps no keys and values, where the model can be told so."""
    known = model._keywords()
    if known is None or WITHOUT_CACHE not in known:
        return kwargs
    return {**kwargs, WITHOUT_CACHE: False}


def copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def replaying(value: Any, own: bool) -> Replacement:
    """What stands in for the forward of a module that is replayed. `own`: whether something may write to what it gives,
    so that it must be a copy. Containers are new ones each time. It stands in for one call: a model may call a module's
    `forward` again by itself, which no one sees."""
    used = False

    def replacement(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        nonlocal used
        if used:
            return plain(*args, **kwargs)
        used = True
        return pytree.tree_map(copied if own else _same, value)

    return replacement


def repeated(value: Any, axes: SiteAxes, times: int) -> Any:
    """The value for `times` as many rows: each row of the input as often, one after the other."""
    leaves, structure = pytree.tree_flatten(value)
    made = [
        _repeated(leaf, each, times) if isinstance(leaf, torch.Tensor) else leaf
        for leaf, each in zip(leaves, axes.leaves, strict=True)
    ]
    return pytree.tree_unflatten(made, structure)


def _repeated(tensor: torch.Tensor, axes: Any, times: int) -> torch.Tensor:
    axes = axes.sometimes if isinstance(axes, Opaque) else axes
    assert isinstance(axes, TensorAxes), "sites of which nothing can be told are not replayed in rows"
    for dimension, extent in enumerate(axes.shape):
        if extent.rows or extent.rows_tokens:
            if tensor.shape[dimension] == 1:
                return tensor.expand(*(times if each == dimension else -1 for each in range(tensor.dim())))
            return tensor.repeat(*(times if each == dimension else 1 for each in range(tensor.dim())))
    return tensor
