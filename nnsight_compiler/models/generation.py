"""The arguments of `generate`: which there are, which are refused and why, and what the first forward is given."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError

OURS = frozenset({"seed", "on_token"})
"""Arguments of `generate` that transformers does not know: the seed of what is drawn, and a function that is called
with the ids of each step's tokens."""

_ASSISTED = "in assisted decoding a forward checks several tokens at once, so that no step would be one token"
_TWICE = "the model would run more than once for a token, so that no forward would be one step"
REFUSED: Mapping[str, str] = {
    "assistant_model": _ASSISTED,
    "assistant_tokenizer": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "prefill_chunk_size": "the prompt would run in several forwards, so that step 0 would be several",
    "guidance_scale": _TWICE,
    "negative_prompt_ids": _TWICE,
    "negative_prompt_attention_mask": _TWICE,
    "penalty_alpha": _TWICE,
    "dola_layers": "it reads the model's layers by a loop of its own",
    "custom_generate": "what a step is in a loop of one's own is not known",
    "token_healing": "it generates once more, for the end of the prompt",
    "grad": "a generation records no gradients; trace the text that it gave",
}
"""Arguments of `generate` that are refused, and why."""


class GenerationArgumentError(ModelError, TypeError):
    """An argument that `generate` does not take."""


def check_arguments(module: nn.Module, names: Collection[str], forward: Collection[str]) -> None:
    """Refuses arguments that `generate` does not take, or that have no meaning for an experiment.

    Raises:
        ModelError: an argument, or a model that does not generate.
    """
    class_name = type(module).__name__
    method = getattr(type(module), "generate", None)
    if method is None:
        raise ModelError(
            f"{class_name} has no `generate`: only a model with a head for its next token generates"
            " (`AutoModelForCausalLM` of transformers)"
        )
    for name in sorted(names):
        if name in REFUSED:
            raise GenerationArgumentError(f"`{name}` is refused: {REFUSED[name]}")
    own = dict(inspect.signature(method).parameters)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if not is_of_transformers(module):
        known = {*own, *OURS - {"on_token"}}
        wrong = sorted(set(names) & {"on_token"}) or ([] if takes_any else sorted(set(names) - known))
    else:
        known = {*own, *forward, *_options(), *OURS} - {"self", "kwargs", *REFUSED}
        wrong = sorted(set(names) - known)
    if wrong:
        near = get_close_matches(wrong[0], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "it takes what `generate` of transformers takes, and `seed`"
        raise GenerationArgumentError(f"`generate` of {class_name} takes no `{wrong[0]}`; {hint}")


def check_configuration(*configurations: Any) -> None:
    """Refuses what a generation config asks for and an experiment cannot mean."""
    for configuration in configurations:
        for name, reason in REFUSED.items():
            value = getattr(configuration, name, None)
            if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
                raise GenerationArgumentError(f"`{name}={value!r}` of the generation config is refused: {reason}")


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a model generates as those of transformers do."""
    return any(kind.__name__ == "GenerationMixin" for kind in type(module).__mro__)


def first_step(
    module: nn.Module, forward: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What of the arguments of `generate` the first forward is given: the prompt, and what belongs to it. `None` where
    a prompt may become several rows."""
    config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
    for name in ("num_beams", "num_return_sequences"):
        if (kwargs.get(name) or getattr(config, name, None) or 1) != 1:
            return None
    options = _options() if is_of_transformers(module) else frozenset()
    given = {name: value for name, value in kwargs.items() if name in forward and name not in options}
    if "inputs" in kwargs and not args:
        args = (kwargs["inputs"],)
    if is_of_transformers(module):
        if "logits_to_keep" in forward:
            given.setdefault("logits_to_keep", 1)  # what `generate` asks for: the last logits alone
        config = getattr(module, "config", None)
        start = getattr(config, "decoder_start_token_id", None)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in given:
            prompt = args[0] if args else given.get("input_ids")
            rows = prompt.shape[0] if isinstance(prompt, torch.Tensor) and prompt.dim() > 1 else 1
            given["decoder_input_ids"] = torch.full((rows, 1), start if isinstance(start, int) else 0)
    return args, given


def _options() -> frozenset[str]:
    """What a generation config holds."""
    from transformers import GenerationConfig

    made: Any = GenerationConfig  # it is not typed
    return frozenset(name for name in vars(made()) if not name.startswith("_"))
