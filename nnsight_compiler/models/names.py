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
from dataclasses import dataclass
from typing import final

from torch import nn

TRUNKS = (
    "", "model", "transformer", "gpt_neox", "backbone", "decoder", "model.decoder", "encoder", "model.encoder",
    "language_model", "model.language_model", "language_model.model", "bert", "bert.encoder", "roberta",
    "roberta.encoder", "vit", "vit.encoder",
)  # fmt: skip
"""Where a model, with its head or bare, keeps the parts that it is made of."""


@final
@dataclass(frozen=True, slots=True)
class Own:
    """A name that architectures use for a part. It means that part where the siblings are right: `beside` is one that
    must be there, `without` one that must not."""

    name: str
    beside: str = ""
    without: str = ""


OF_A_MODEL: Mapping[str, tuple[Own, ...]] = {
    "layers": (Own("layers"), Own("h"), Own("blocks"), Own("block"), Own("layer")),
    "embed": (
        Own("wte"),
        Own("embed_tokens"),
        Own("embed_in"),
        Own("word_embeddings"),
        Own("embeddings.word_embeddings"),
        Own("embeddings", beside="norm_f"),
    ),
    "pos_embed": (Own("wpe"), Own("embed_positions"), Own("embeddings.position_embeddings")),
    "ln_final": (
        Own("ln_f"),
        Own("norm_f"),
        Own("norm", beside="layers"),
        Own("layer_norm", beside="layers"),
        Own("final_layernorm", beside="layers"),
        Own("final_layer_norm", beside="layers"),
        Own("final_layer_norm", beside="block"),
        Own("layernorm", beside="encoder"),
        Own("layernorm", beside="layers"),
    ),
    "lm_head": (Own("lm_head"), Own("embed_out"), Own("proj_out", beside="model")),
}
"""The names that architectures use for the parts of a model, below a trunk."""

OF_A_LAYER: Mapping[str, tuple[Own, ...]] = {
    "attn": (Own("attn"), Own("self_attn"), Own("attention"), Own("self_attention")),
    "mlp": (Own("mlp"), Own("feed_forward"), Own("ffn"), Own("block_sparse_moe")),
    "ln1": (
        Own("ln_1"),
        Own("norm_1"),
        Own("norm1"),
        Own("input_layernorm"),
        Own("self_attn_layer_norm"),
        Own("layernorm_before"),
    ),
    "ln2": (
        Own("ln_2"),
        Own("norm_2"),
        Own("norm2"),
        Own("pre_feedforward_layernorm"),
        Own("post_attention_layernorm", without="post_feedforward_layernorm"),  # there it is a norm of the output
        Own("final_layer_norm", beside="self_attn_layer_norm"),
        Own("layernorm_after"),
    ),
}
"""The names that architectures use for the parts of a block."""

INSTEAD: Mapping[str, tuple[tuple[Own, str], ...]] = {
    "mlp": (
        (Own("fc1", beside="fc2"), "`fc1` (up) and `fc2` (down)"),
        (Own("intermediate", beside="output"), '`intermediate` (up) and `["output"]` (down)'),
    ),
    "ln1": ((Own("post_feedforward_layernorm"), "`post_attention_layernorm`, which follows the attention"),),
    "ln2": (
        (
            Own("post_feedforward_layernorm", without="pre_feedforward_layernorm"),
            "`post_feedforward_layernorm`, which follows the feed-forward part",
        ),
        (Own("input_layernorm"), "`input_layernorm`, which attention and the feed-forward part share"),
        (Own("ln_1"), "`ln_1`, which attention and the feed-forward part share"),
    ),
}
"""What to use on architectures that do without a part."""


class NoStandardModule(Exception):  # noqa: N818  a message on its way to the error that users see
    """A standard name that no one module of this architecture stands for."""


def stands_for(module: nn.Module, name: str) -> str | None:
    """The path, from `module`, of what a standard name means; `None` where `name` is not a standard one.

    Raises:
        NoStandardModule: nothing stands for it here, or several things may.
    """
    if name in OF_A_MODEL:
        candidates = [(trunk, own) for own in OF_A_MODEL[name] for trunk in TRUNKS]
    elif name in OF_A_LAYER:
        candidates = [("", own) for own in OF_A_LAYER[name]]
    else:
        return None
    found: dict[int, str] = {}
    for trunk, own in candidates:
        part = _part(module, trunk, own)
        if part is not None:
            found.setdefault(id(part), _join(trunk, own.name))
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise NoStandardModule(f"`{name}` may mean {' or '.join(sorted(found.values()))}; use one of these")
    for own, use in INSTEAD.get(name, ()):
        if _part(module, "", own) is not None:
            raise NoStandardModule(f"this architecture has no module for `{name}`; use {use}")
    raise NoStandardModule(
        f"nothing here stands for `{name}`; it has: {', '.join(list(module._modules)[:12]) or 'no children'}"
    )


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


def _part(module: nn.Module, trunk: str, own: Own) -> nn.Module | None:
    holder = _below(module, trunk)
    if holder is None or (own.beside and _below(holder, own.beside) is None):
        return None
    if own.without and _below(holder, own.without) is not None:
        return None
    return _below(holder, own.name)


def _below(module: nn.Module, path: str) -> nn.Module | None:
    part: nn.Module | None = module
    for name in path.split(".") if path else ():
        part = part._modules.get(name) if part is not None else None
    return part


def _join(trunk: str, own: str) -> str:
    return f"{trunk}.{own}" if trunk else own
