"""Gradients while an experiment runs: where they arrive, and the backward pass.

They are read and written where autograd has them complete, at the node that made the value, so that one pass serves
all of them and weights are left alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.assignments import described
from nnsight_compiler.runtime.autograd_recording import counted_parameters, plainly

Arrival = Callable[[tuple[torch.Tensor | None, ...]], tuple[torch.Tensor | None, ...] | None]
"""What autograd calls where gradients arrive: it may give others in their place."""

AGAIN = "backward through the graph a second time"
"""What torch says where a graph was used before, and freed."""
IN_PLACE = "modified by an inplace operation"
"""What torch says where a value that a gradient needs was written over."""


# --- where gradients arrive ---


@final
@dataclass(frozen=True, slots=True)
class Tracked:
    """Where the gradient with respect to a value arrives.

    whole: how the tensor that has the gradient lies in memory: its shape and strides.
    part: where the value lies in it: shape, strides and offset; `None` where it is all of it.
    """

    edge: GradientEdge
    whole: tuple[tuple[int, ...], tuple[int, ...]]
    part: tuple[tuple[int, ...], tuple[int, ...], int] | None

    def part_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """A copy of the part of the whole gradient that is the value's."""
        if self.part is not None and gradient.stride() == self.whole[1]:
            shape, strides, offset = self.part
            return gradient.as_strided(shape, strides, int(gradient.storage_offset()) + offset).clone()
        return self.split(gradient)[1]

    def split(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the whole gradient, and the part of it that is the value's."""
        if self.part is None:
            copy = gradient.clone()
            return copy, copy
        shape, strides = self.whole
        laid = torch.empty_strided(shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
        return laid, laid.as_strided(*self.part)


class _Site(threading.local):
    """What stands at the whole site in this thread, while strands look at rows of their own."""

    whole: Any = None


_SITE = _Site()


@contextmanager
def of_rows(whole: Any) -> Iterator[None]:
    """While strands look at their rows of a site: gradients arrive at the whole."""
    before, _SITE.whole = _SITE.whole, whole
    try:
        yield
    finally:
        _SITE.whole = before


def track(value: Any, source: Any, where: str) -> Tracked:
    """Where the gradient with respect to a value, as it is now, arrives. `source` is what was read at the site of which
    the value is a part.

    Raises:
        RunError: it has none.
    """
    with plainly(value):
        return _track(value, source, where)


def _track(value: Any, source: Any, where: str) -> Tracked:
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        raise RunError(f"{where}: only a tensor of real numbers has a gradient, not {described(value)}")
    whole = _whole(value, source)
    if not whole.requires_grad:
        raise RunError(
            f"{where}: this value has no gradient: it does not depend on anything that is recorded\n"
            "  way out: call `.requires_grad_()` on a tensor of your own before the experiment; make a value outside of"
            " `torch.no_grad()`"
        )
    place = (tuple(whole.shape), whole.stride())
    if whole is value:
        return Tracked(get_gradient_edge(whole), place, None)
    offset = int(value.storage_offset()) - int(whole.storage_offset())
    return Tracked(get_gradient_edge(whole), place, (tuple(value.shape), value.stride(), offset))


def _whole(value: torch.Tensor, source: Any) -> torch.Tensor:
    """The tensor at a site that a value is, or is a view of; the value itself where it shares nothing with the site."""
    held = source if _SITE.whole is None else _SITE.whole
    tensors = [each for each in tree_leaves(held) if isinstance(each, torch.Tensor)]
    if any(each is value for each in tensors):
        return value
    storage = value.untyped_storage().data_ptr()
    return next((each for each in tensors if each.untyped_storage().data_ptr() == storage), value)


# --- the backward pass ---


@final
@dataclass(slots=True)
class Piece:
    """What runs when one gradient arrives.

    span: where the gradient is asked for.
    writes: whether the model goes on with what the function returns.
    needs: the pieces whose results the function uses.
    """

    span: Span
    writes: bool
    needs: tuple[int, ...]
    function: Callable[[Any, Any], Any] | None = None


@final
@dataclass(slots=True)
class Backward:
    """The plan of one backward pass.

    changes: the lines that write in place to what may be needed.
    named: the weights of the models that count, by their paths.
    """

    span: Span
    pieces: tuple[Piece, ...]
    changes: tuple[Span, ...]
    named: tuple[str, ...]

    def run(
        self,
        loss: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tracked: tuple[Tracked, ...],
        models: tuple[Any, ...],
        state: Any,
    ) -> None:
        """Runs the pass.

        Raises:
            RunError: the loss has no gradient, or does not depend on a value whose gradient is asked for.
        """
        self._check(loss)
        arrived = [False] * len(self.pieces)
        handles: list[Any] = []
        for number, each in enumerate(tracked):
            handles.append(each.edge.node.register_prehook(self.arrival(number, each, arrived, state)))
        handles += _spare(loss, models, self.named)
        try:
            loss.backward(*args, **kwargs)
        except RuntimeError as error:
            raise self.explained(error) from error
        finally:
            for handle in handles:
                handle.remove()
        self.check_arrived(arrived)

    def _check(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor):
            raise RunError(f"{self.span}: a backward pass starts at a tensor, not at {described(loss)}")
        if not loss.requires_grad:
            if self.pieces:
                self._missed(self.pieces[0])
            raise RunError(
                f"{self.span}: this loss depends on nothing that has a gradient\n"
                "  way out: ask for the gradient of a value that it depends on, in `with loss.backward():`; for the"
                " weights of the model, `trace(…, grad=True)`"
            )

    def check_arrived(self, arrived: list[bool]) -> None:
        for piece, came in zip(self.pieces, arrived, strict=True):
            if not came:
                self._missed(piece)

    def _missed(self, piece: Piece) -> NoReturn:
        raise RunError(
            f"{piece.span}: the loss of line {self.span.line} does not depend on this value, so it has no gradient\n"
            "  way out: compute the loss from what depends on the value, outside of `torch.no_grad()`"
        )

    def arrival(self, number: int, tracked: Tracked, arrived: list[bool], state: Any) -> Arrival:
        """What is done where the gradient of a piece arrives."""
        piece, position = self.pieces[number], tracked.edge.output_nr
        function = piece.function
        assert function is not None

        def hook(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
            gradient = gradients[position]
            if gradient is None:
                return None
            for other in piece.needs:
                if not arrived[other]:
                    raise RunError(
                        f"{piece.span}: this writes a gradient, but needs that of {self.pieces[other].span}, which"
                        " arrives only later: a backward pass goes from the last value to the first\n  way out: take"
                        " the gradient that is needed in a backward pass of its own, before, with `retain_graph=True`"
                    )
            if not piece.writes:
                function(tracked.part_of(gradient), state)
                arrived[number] = True
                return None
            whole, part = tracked.split(gradient)
            result = function(part, state)
            arrived[number] = True
            if result is not part:
                if whole is part:
                    whole = result
                else:
                    part.copy_(result)
            return (*gradients[:position], whole, *gradients[position + 1 :])

        return hook

    def explained(self, error: RuntimeError) -> Exception:
        if AGAIN in str(error):
            return RunError(
                f"{self.span}: an earlier backward pass of this forward freed what was recorded; the invokes of one"
                " forward are recorded as one\n  way out: `.backward(retain_graph=True)` in all but the last"
            )
        if IN_PLACE not in str(error):
            return error
        lines = ", ".join(str(span.line) for span in self.changes)
        where = f" by line {lines}" if lines else ""
        return RunError(
            f"{self.changes[0] if self.changes else self.span}: the backward pass of line {self.span.line} needs a"
            f" value that was written over in place{where}\n  way out: make a new value and assign it, as in"
            " `module.output = new`, instead of writing into the old one"
        )


def spared(models: Iterable[Any], named: tuple[str, ...]) -> set[int]:
    """The identities of the weights of these models that accumulate nothing: all but those that are named."""
    weights: set[int] = set()
    for model in models:
        counting = counted_parameters(model._module, named)
        weights.update(
            id(each) for each in model._module.parameters() if each.requires_grad and id(each) not in counting
        )
    return weights


def _spare(loss: torch.Tensor, models: tuple[Any, ...], named: tuple[str, ...]) -> list[Any]:
    """Has the weights of these models accumulate nothing where a loss reaches them, but for those that are named."""
    weights = spared(models, named)
    if not weights:
        return []
    return [
        node.register_prehook(lambda gradients: (None,) * len(gradients))
        for node in leaves_of(loss)
        if id(node.variable) in weights
    ]


def leaves_of(loss: torch.Tensor) -> Iterator[Any]:
    """The nodes at which a backward pass from a loss would accumulate gradients."""
    return (node for node in nodes_reached(loss) if hasattr(node, "variable"))


def nodes_reached(loss: torch.Tensor) -> Iterator[Any]:
    """The nodes through which a backward pass from a loss would go."""
    waiting: list[Any] = [get_gradient_edge(loss).node] if loss.requires_grad else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for inner, _ in node.next_functions:
            if inner is not None and inner not in seen:
                seen.add(inner)
                waiting.append(inner)


def gradients(
    outputs: Any, tracked: tuple[Tracked, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> tuple[Any, ...]:
    """`torch.autograd.grad` with respect to tracked values."""
    edges = [each.edge for each in tracked]
    try:
        found = torch.autograd.grad(outputs, edges, *args, **kwargs)
    except RuntimeError as error:
        raise RunError(f"{where}: {error}") from error
    return tuple(
        gradient if gradient is None or each.part is None else each.part_of(gradient)
        for each, gradient in zip(tracked, found, strict=True)
    )
