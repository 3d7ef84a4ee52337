"""What users give a language model, as the arguments of its forward.

A prompt is text, or token ids; several make a rectangle, padded on the left where they differ in length. Padding
happens here rather than in the tokenizer: a tokenizer without a padding token works, and none is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.runtime.prompts import remembered

Tokenizer = Callable[..., Any]
_FORMS = (
    "text, a list of texts, token ids (a list, a list of lists, or a tensor of one or two dimensions), or a mapping"
)


class PromptError(ModelError, ValueError):
    """An input that a language model cannot be given."""


def encode(prompt: object, tokenizer: Callable[[], Any], padding_id: int, takes: Collection[str]) -> dict[str, Any]:
    """The forward's arguments for a prompt.

    Args:
        tokenizer: gives the tokenizer, or raises where there is none; called for text only.
        padding_id: the token that shorter rows are filled with; the attention mask hides it.
        takes: the names of the parameters of the model's forward.
    """
    match prompt:
        case str():
            return _rectangle(_tokenized([prompt], tokenizer(), takes), padding_id, takes)
        case Mapping():
            return {name: _as_tensor(name, value) for name, value in prompt.items()}
        case torch.Tensor():
            return {"input_ids": _ids(prompt)}
        case Sequence() if prompt and all(isinstance(item, str) for item in prompt):
            return _rectangle(_tokenized(list(prompt), tokenizer(), takes), padding_id, takes)
        case Sequence() if prompt and all(_is_id(item) for item in prompt):
            return _rectangle({"input_ids": [[int(token) for token in prompt]]}, padding_id, takes)
        case Sequence() if prompt and all(_is_row(item) for item in prompt):
            return _rectangle({"input_ids": [[int(token) for token in row] for row in prompt]}, padding_id, takes)
        case _:
            shown = "an empty list" if isinstance(prompt, Sequence) and not prompt else f"a {type(prompt).__name__}"
            raise PromptError(f"a prompt is {_FORMS}; this is {shown}")


def _tokenized(texts: list[str], tokenizer: Any, takes: Collection[str]) -> dict[str, list[list[int]]]:
    encoded = remembered(tokenizer, texts, tuple(texts))
    return {name: rows for name, rows in encoded.items() if name in takes}


def _rectangle(columns: dict[str, list[list[int]]], padding_id: int, takes: Collection[str]) -> dict[str, torch.Tensor]:
    """Rows of one length each, as tensors. Where lengths differ: filled on the left, with a mask and positions."""
    lengths = [len(row) for row in columns["input_ids"]]
    if min(lengths) == 0:
        raise PromptError(f"prompt {lengths.index(0)} has no tokens")
    longest = max(lengths)
    if min(lengths) < longest:
        if "attention_mask" not in takes:
            raise PromptError("this model takes no attention mask: prompts of different lengths cannot share a forward")
        columns = {**columns, "attention_mask": [[1] * length for length in lengths]}
        if "position_ids" in takes:
            columns["position_ids"] = [list(range(length)) for length in lengths]
    fill = {"input_ids": padding_id}
    return {
        name: torch.tensor([[fill.get(name, 0)] * (longest - len(row)) + list(row) for row in rows])
        for name, rows in columns.items()
    }


def _ids(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise PromptError(f"token ids are whole numbers, not {tensor.dtype}; give embeddings as `inputs_embeds=`")
    if tensor.dim() not in (1, 2) or tensor.numel() == 0:
        raise PromptError(f"token ids have the shape [tokens] or [rows, tokens], not {list(tensor.shape)}")
    return tensor.long() if tensor.dim() == 2 else tensor.long()[None]


def _as_tensor(name: str, value: Any) -> Any:
    """An entry of a mapping: lists of numbers as tokenizers give them become tensors; one row becomes a batch."""
    if not isinstance(value, list):
        return _ids(value) if name == "input_ids" and isinstance(value, torch.Tensor) else value
    try:
        tensor = torch.tensor(value)
    except (ValueError, TypeError):
        raise PromptError(f"`{name}` is no rectangle of numbers: pad the rows, or give the prompts as a list") from None
    return tensor if tensor.dim() > 1 else tensor[None]


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_row(item: object) -> bool:
    if isinstance(item, torch.Tensor):
        return item.dim() == 1 and not item.is_floating_point() and item.dtype != torch.bool
    return isinstance(item, Sequence) and not isinstance(item, str) and all(_is_id(token) for token in item)
