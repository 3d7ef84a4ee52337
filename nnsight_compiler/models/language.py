"""Language models of transformers, wrapped: by name, folder, GGUF file, or as a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.checkpoint import Checkpoint, locate
from nnsight_compiler.models.nnsight import NNsight
from nnsight_compiler.models.prompts import PromptError, encode

_withheld: ContextVar[bool] = ContextVar("withheld", default=False)


@contextmanager
def weights_withheld() -> Iterator[None]:
    """Refuses the loading of weights, in this thread: what needs them raises `WeightsNeededError` instead."""
    token = _withheld.set(True)
    try:
        yield
    finally:
        _withheld.reset(token)


class WeightsNeededError(ModelError):
    """Weights that may not be loaded are needed."""


class LanguageModel(NNsight):
    """A causal language model of transformers, with its tokenizer.

    Given a name, only the configuration is read at first: the module tree exists without weights, and programs compile
    against it. The weights are loaded when a run or a value needs them, or at once with `dispatch=True`, in evaluation
    mode.

    Args:
        source: a repository of the hub, a local folder, a GGUF file, `"tiny"` for the model that comes with this
            package, or a transformers model in memory (wrapped as it is).
        tokenizer: the tokenizer, where the one beside the weights is not the one meant. Never changed.
        dtype, device_map, options: as in `from_pretrained` of transformers.
    """

    _checkpoint: Checkpoint | None
    _loaded: bool
    _lock: RLock
    _given_tokenizer: Any

    def __init__(
        self,
        source: str | Path | nn.Module,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        dispatch: bool = False,
        **options: Any,
    ) -> None:
        if device_map is not None:
            options["device_map"] = device_map
        if isinstance(source, str | Path):
            checkpoint = locate(source, dtype, options)
            super().__init__(checkpoint.empty())
            self._checkpoint, self._loaded = checkpoint, False
        else:
            if dtype is not None or options:
                given = ", ".join(["dtype"] * (dtype is not None) + list(options))
                raise ModelError(f"{given}: options for loading, given with a model that is loaded already")
            super().__init__(source)
            self._checkpoint, self._loaded = None, True
        self._given_tokenizer, self._lock = tokenizer, RLock()
        if dispatch:
            self._ready()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one given, else the one beside the weights."""
        with self._lock:
            if self._given_tokenizer is None:
                if self._checkpoint is None:
                    raise PromptError("this model has no tokenizer: give one as `tokenizer=`, or token ids as input")
                self._given_tokenizer = self._checkpoint.tokenizer()
            return self._given_tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings, on which they run. Loads the weights."""
        return _input_device(self._ready()) or torch.device("cpu")

    def _ready(self) -> nn.Module:
        if not self._loaded:
            if _withheld.get():
                raise WeightsNeededError("this needs the weights of the model, which are not loaded for a check")
            with self._lock:
                if not self._loaded:
                    assert self._checkpoint is not None
                    self._wrapped = self._checkpoint.load()
                    self._loaded = True
        return self._wrapped

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Token ids for a prompt, given first or as `input_ids=`; all tensors where the model takes its inputs."""
        if len(args) > 1:
            raise PromptError("one prompt, or one list of prompts, is given by position; the rest by keyword")
        prompt = args[0] if args else kwargs.get("input_ids")
        if args and "input_ids" in kwargs:
            raise PromptError("the prompt is given twice: by position and as `input_ids=`")
        if prompt is not None:
            takes = self._forward_parameters()
            encoded = encode(prompt, lambda: self.tokenizer, self._padding_id(), takes)
            kwargs = {**encoded, **{name: value for name, value in kwargs.items() if name != "input_ids"}}
        device = _input_device(self._wrapped)
        if device is not None:
            kwargs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
        return (), kwargs

    def _prepare_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args and "inputs" in kwargs:
            args = (kwargs.pop("inputs"),)
        given = "position_ids" in kwargs
        args, kwargs = super()._prepare_generation(*self._prepare(args, kwargs))
        if not given:
            kwargs.pop("position_ids", None)  # the model makes them at each step, from the mask
        return args, kwargs

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._prepare((torch.zeros(1, 4, dtype=torch.long),), {})

    def _padding_id(self) -> int:
        """The padding token, else the end of text: what it is makes no difference, since the mask hides it."""
        config = getattr(self._wrapped, "config", None)
        for holder in (self._given_tokenizer, config):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(holder, name, None)
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int) and value >= 0:
                    return value
        return 0


def _input_device(module: nn.Module) -> torch.device | None:
    """Where inputs go; `None` where the weights are not loaded, or accelerate moves the inputs itself."""
    find = getattr(module, "get_input_embeddings", None)
    embeddings: nn.Module = find() if callable(find) else module
    device = next((parameter.device for parameter in embeddings.parameters()), None)
    return device if device is not None and device.type != "meta" else None
