"""Standard names: `layers`, `attn`, `mlp`, `embed`, `ln_final`, `lm_head`, … on every architecture that has them.

A standard name is resolved by the names that architectures give to their modules. Where nothing matches, or several
things do (an encoder and a decoder), the name is refused rather than guessed. A module's own names come first.

| name | what it is |
|---|---|
| `layers` | the list of transformer blocks, in order |
| `embed`, `pos_embed` | the table of token embeddings; of learned positions |
| `ln_final` | the norm after the last block |
| `lm_head` | the map from the last hidden state to logits |
| `attn`, `mlp` | of a block: its attention, its feed-forward part |
| `ln1`, `ln2` | of a block: the norm of what attention gets; of what the feed-forward part gets |
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

TRUNKS = (
    "", "model", "transformer", "gpt_neox", "backbone", "decoder", "model.decoder", "encoder", "model.encoder",
    "language_model", "model.language_model", "language_model.model", "bert", "bert.encoder", "roberta",
    "roberta.encoder", "vit", "vit.encoder",
)  # fmt: skip
"""Where a model, with its head or bare, keeps the parts that it is made of."""

OF_A_MODEL: Mapping[str, tuple[str, ...]] = {
    "layers": ("layers", "h", "blocks", "block", "layer"),
    "embed": ("wte", "embed_tokens", "embed_in", "word_embeddings", "embeddings.word_embeddings"),
    "pos_embed": ("wpe", "embed_positions", "embeddings.position_embeddings"),
    "ln_final": ("ln_f", "norm", "final_layer_norm", "final_layernorm", "norm_f", "layernorm"),
    "lm_head": ("lm_head", "embed_out"),
}
"""The names that architectures use for the parts of a model, below a trunk."""

OF_A_LAYER: Mapping[str, tuple[str, ...]] = {
    "attn": ("attn", "self_attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "ln1": ("ln_1", "input_layernorm", "self_attn_layer_norm", "norm_1", "norm1", "layernorm_before"),
    "ln2": ("ln_2", "pre_feedforward_layernorm", "post_attention_layernorm", "norm_2", "norm2", "layernorm_after"),
}
"""The names that architectures use for the parts of a block."""


class NoStandardModule(Exception):  # noqa: N818  a message on its way to the error that users see
    """A standard name that no one module of this architecture stands for."""


def stands_for(module: nn.Module, name: str) -> str | None:
    """The path, from `module`, of what a standard name means; `None` where it means nothing here."""
    if name in OF_A_MODEL:
        candidates = [_join(trunk, own) for own in OF_A_MODEL[name] for trunk in TRUNKS]
    elif name in OF_A_LAYER:
        candidates = list(OF_A_LAYER[name])
    else:
        return None
    found = {id(part): path for path in reversed(candidates) if (part := _part(module, path)) is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise NoStandardModule(f"`{name}` may mean {' or '.join(sorted(found.values()))}; use one of these")
    return None


def standard_names(module: nn.Module) -> dict[str, str]:
    """The standard names that resolve on a module and that are not its own, each with the path it stands for."""
    names: dict[str, str] = {}
    for name in (*OF_A_MODEL, *OF_A_LAYER):
        if hasattr(module, name):
            continue
        try:
            path = stands_for(module, name)
        except NoStandardModule:
            continue
        if path is not None:
            names[name] = path
    return names


def _part(module: nn.Module, path: str) -> nn.Module | None:
    part: nn.Module | None = module
    for name in path.split("."):
        part = part._modules.get(name) if part is not None else None
    return part


def _join(trunk: str, own: str) -> str:
    return f"{trunk}.{own}" if trunk else own
