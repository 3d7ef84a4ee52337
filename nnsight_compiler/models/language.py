"""Language models of transformers, wrapped: by name, folder, GGUF file, or as a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.aliases import Rename
from nnsight_compiler.models.batches import own_lengths, padded
from nnsight_compiler.models.checkpoint import Source, locate
from nnsight_compiler.models.nnsight import NNsight
from nnsight_compiler.models.padding import padding_position, require_padding_harmless
from nnsight_compiler.models.positions import Position, PositionError, find, of_ids, of_text
from nnsight_compiler.models.prompts import PromptError, encode
from nnsight_compiler.passes.rows import Batch

if TYPE_CHECKING:
    from nnsight_compiler.remote.served_models import ServedCheckpoint

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
        remote: `True`, or the URL of a service that holds the weights: names, modules and tokenizer come from there,
            and every trace runs there. The source is the model's name at the service.
        rename: names of one's own for modules, as for `NNsight`.
        dtype, device_map, options: as in `from_pretrained` of transformers.
    """

    _checkpoint: Source | None
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
        rename: Rename | None = None,
        remote: bool | str | None = None,
        **options: Any,
    ) -> None:
        if device_map is not None:
            options["device_map"] = device_map
        if remote is not None and remote is not False:
            served = _served(source, remote, [*["dtype"] * (dtype is not None), *["dispatch"] * dispatch, *options])
            super().__init__(served.empty(), rename)
            self._source, self._host = served.name, served.host
            self._checkpoint, self._loaded = served, False
        elif isinstance(source, str | Path):
            checkpoint = locate(source, dtype, options)
            super().__init__(checkpoint.empty(), rename)
            self._source = str(source)
            self._checkpoint, self._loaded = checkpoint, False
        else:
            if dtype is not None or options:
                given = ", ".join(["dtype"] * (dtype is not None) + list(options))
                raise ModelError(f"{given}: options for loading, given with a model that is loaded already")
            super().__init__(source, rename)
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

    def position(self, prompt: Any, words: str, occurrence: int | None = None, row: int | None = None) -> Position:
        """The tokens that hold `words` in a prompt: `.first`, `.last`, `.all`, and itself an index of all of them.

        Args:
            occurrence: which is meant where the prompt has the words several times; negative ones count from the end.
            row: which of several prompts; positions then count from the left edge of the padded rectangle.

        Raises:
            PositionError: the words are not in the prompt, or several times.
        """
        encoded = self._prepare((prompt,), {})[1]
        if "input_ids" not in encoded:
            raise PositionError("positions are found in text or token ids, and this prompt has neither")
        rows = encoded["input_ids"].tolist()
        if row is None and len(rows) > 1:
            raise PositionError(f"there are {len(rows)} prompts: say which is meant, `row=0` to `row={len(rows) - 1}`")
        if row is not None and not -len(rows) <= row < len(rows):
            raise PositionError(f"there is no `row={row}` among {len(rows)} prompts")
        ids = rows[row or 0]
        texts = [prompt] if isinstance(prompt, str) else prompt
        text = texts[row or 0] if isinstance(texts, list | tuple) else None
        known = of_text(self.tokenizer, text, ids) if isinstance(text, str) else of_ids(self.tokenizer, ids)
        return find(words, *known, occurrence, [self.tokenizer.decode([token]) for token in ids])

    def _renamed(self, rename: Rename) -> LanguageModel:
        return LanguageModel(self._ready(), tokenizer=self.tokenizer, rename=rename)

    def _ready(self) -> nn.Module:
        if not self._loaded:
            if _withheld.get():
                raise WeightsNeededError("this needs the weights of the model, which are not loaded for a check")
            with self._lock:
                if not self._loaded:
                    assert self._checkpoint is not None
                    loaded = self._checkpoint.load()
                    for path in sorted(self._attached):  # what the user attached before there were weights
                        owner, _, name = path.rpartition(".")
                        loaded.get_submodule(owner).add_module(name, self._wrapped.get_submodule(path))
                    self._wrapped = loaded
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
            encoded = encode(prompt, lambda: self.tokenizer, self._padding_id(), self._takes())
            if isinstance(prompt, list) and "attention_mask" in encoded and not encoded["attention_mask"].all():
                require_padding_harmless(self, self._padding_id())
            kwargs = {**encoded, **{name: value for name, value in kwargs.items() if name != "input_ids"}}
        device = _input_device(self._wrapped)
        if device is not None:
            kwargs = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
        return (), kwargs

    def _batch(self, given: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], options: Mapping[str, Any]) -> Batch:
        plain = {name: value for name, value in options.items() if name != "grad"}
        prepared = [self._prepare(*each)[1] for each in given]
        if not all({"input_ids", "inputs_embeds"} & each.keys() for each in prepared):
            raise PromptError("each invoke is given a prompt: text, token ids, or embeddings as `inputs_embeds=`")
        batch = padded(prepared, self._padding_id(), self._takes())
        if any(part.padding or part.lengths for part in batch.parts):
            require_padding_harmless(self, self._padding_id())
        return replace(batch, kwargs={**plain, **batch.kwargs})

    def _lengths(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        prompt = args[0] if args else kwargs.get("input_ids")
        if not isinstance(prompt, list):
            return ()
        return own_lengths(self._prepare((prompt,), {})[1].get("attention_mask"))

    def _takes(self) -> frozenset[str]:
        """The parameters of the model's forward that a prompt may be given by."""
        named = frozenset(self._forward_parameters())
        return named if padding_position(self._wrapped) is None else named - {"position_ids"}

    def _needs_input(self) -> bool:
        return True

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
        looked_for = padding_position(self._wrapped)
        if looked_for is not None:
            return looked_for
        config = getattr(self._wrapped, "config", None)
        for holder in (self._given_tokenizer, config):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(holder, name, None)
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int) and value >= 0:
                    return value
        return 0


def _served(source: object, remote: bool | str, options: Sequence[str]) -> ServedCheckpoint:
    """A model whose weights are at a service, which loaded them as it saw fit."""
    if not isinstance(source, str):
        raise ModelError(
            f"with `remote=`, a model is named as its service names it, and this is {type(source).__name__}\n"
            "  way out: give the name; a model in memory goes without `remote=`, which its traces can say"
        )
    if options:
        raise ModelError(
            f"{', '.join(options)}: options for loading, given with a model that a service has loaded\n"
            "  way out: leave them out"
        )
    from nnsight_compiler.remote.served_models import ServedCheckpoint  # it is built on this module

    return ServedCheckpoint(source, remote)


def _input_device(module: nn.Module) -> torch.device | None:
    """Where inputs go; `None` where the weights are not loaded, or accelerate moves the inputs itself."""
    find = getattr(module, "get_input_embeddings", None)
    embeddings: nn.Module = find() if callable(find) else module
    device = next((parameter.device for parameter in embeddings.parameters()), None)
    return device if device is not None and device.type != "meta" else None
