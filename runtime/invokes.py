"""The invokes of one forward, as one batch of which each has its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.ir.errors import ModelError, RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.generation import Generation
from nnsight_compiler.runtime.inputs import Given, Runnable
from nnsight_compiler.runtime.runs import SiteName
from nnsight_compiler.runtime.scanning import ready
from nnsight_compiler.runtime.shares import Share, SitesAxes, Sizes

Confirm = Callable[[Any, Given, tuple[SiteName, ...]], str | None]
"""Says why invokes cannot share the sites of a model's forward on these inputs; `None` where they can."""


@final
@dataclass(slots=True, eq=False)
class Invokes:
    """The invokes that bring the input of a forward.

    span: the forward.
    shares: for each, the name in the state of its share, or nothing if no site asks for it.
    divided: the path, port and call of each site that they share, and `confirm` says of them why they cannot; asked
        once, before the first run.
    axes: tells, of the inputs, what stands at these sites, where that was not known before the run.
    """

    span: Span
    shares: tuple[str, ...]
    divided: tuple[SiteName, ...]
    confirm: Confirm
    axes: Callable[[Any, Given], SitesAxes] | None
    _confirmed: bool = False

    def batched(
        self,
        model: Runnable,
        given: tuple[Given, ...],
        options: Mapping[str, Any],
        state: Any,
        generation: Generation | None,
    ) -> Given:
        """The arguments of the forward on what these give. The share of each goes into the state.

        Args:
            options: what the forward itself was given.
        """
        try:
            batch = model._batch(given, options)
        except ModelError as error:
            raise RunError(f"{self.span}: {error}") from None
        inputs = batch.kwargs
        if generation is not None:  # its options are none of the model's forward
            inputs = {name: value for name, value in inputs.items() if name in model._forward_parameters()}
        if self.divided and not self._confirmed:
            wrong = self.confirm(model, (batch.args, inputs), self.divided)
            if wrong is not None:
                raise RunError(f"{self.span}: {wrong}")
            self._confirmed = True
        sizes = Sizes(batch.rows, batch.tokens)
        if self.axes is not None:
            sizes.axes = self.axes(model, (batch.args, inputs))
        for name, part in zip(self.shares, batch.parts, strict=True):
            if name:
                setattr(state, name, Share(part, sizes))
        if generation is None:
            return batch.args, batch.kwargs
        generation.sizes = sizes
        encodes = getattr(getattr(ready(model), "config", None), "is_encoder_decoder", False)
        if encodes and any(part.padding for part in batch.parts):
            raise RunError(
                f"{self.span}: prompts of an encoder that differ in length cannot be told apart at the steps of a"
                " generation\n  way out: a `generate` for each prompt"
            )
        kwargs = {name: value for name, value in batch.kwargs.items() if name != "position_ids"}
        return model._prepare_generation(batch.args, kwargs)  # the model makes positions at each step, from the mask
