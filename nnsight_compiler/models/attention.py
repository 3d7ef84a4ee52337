"""Attention by name: which module `attn.pattern` belongs to.

`q`, `k`, `v` and `z` are `[rows, tokens, heads, width]`: queries, keys and values as they meet each other, with their
positions turned in; what each head gives, before the output projection mixes the heads. Keys and values are those of a
cache too, and each head of theirs is there once, where several heads of queries share it. `scores` (what the softmax
gets: scaled, with biases and masks) and `pattern` (attention probabilities) are `[rows, heads, queries, keys]`.
"""

from __future__ import annotations

from torch import nn

from nnsight_compiler.passes.sites import ATTENTION_VALUES
from nnsight_compiler.runtime.attention import form_of

__all__ = ["ATTENTION_VALUES", "NoAttention", "attention_below"]


class NoAttention(Exception):  # noqa: N818  a message on its way to the error that users see
    """A name of attention on a module that has none."""


def attention_below(module: nn.Module, name: str) -> str:
    """The path, from `module`, of what computes attention: the module itself, or the one below an attention block.

    Raises:
        NoAttention: it is no attention module, or computes attention in a way that is not known.
    """
    if form_of(module) is not None:
        return ""
    kind = type(module).__name__
    found = [str(path) for path, part in module.named_modules() if path and form_of(part) is not None]
    if "attention" not in kind.lower():
        use = f"; `{name}` is a value of `{'`, `'.join(found[:3])}`" if found else ""
        raise NoAttention(f"`{kind}` is no attention module{use}")
    if len(found) == 1:
        return found[0]
    if found:
        raise NoAttention(f"`{name}` may be that of {' or '.join(found)}; use one of these")
    raise NoAttention(
        f"how `{kind}` computes attention is not known here: `print(….source)` shows the operations of its forward, of"
        f" which one may be the {name}"
    )
