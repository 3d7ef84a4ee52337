"""A model as a tree that opens and closes, with the shapes of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape

from torch import nn

from nnsight_compiler.models.tree import Node, tree

_STYLE = """
.nnsightc-tree { font-family: monospace; line-height: 1.45; overflow-x: auto; white-space: nowrap; }
.nnsightc-tree details > div, .nnsightc-tree details > details { margin-left: 1.6em; }
.nnsightc-tree div.leaf, .nnsightc-tree div.weights { padding-left: 1em; }
.nnsightc-tree summary { cursor: pointer; }
.nnsightc-tree .names { font-weight: bold; }
.nnsightc-tree .weights, .nnsightc-tree .count { opacity: 0.65; }
.nnsightc-tree .count { padding-left: 1em; }
"""
_OPEN_DEPTH = 2
"""How many levels are open at first: the model and its trunk."""
_MOST = 1000
"""How many modules are shown."""


def modules_html(module: nn.Module, aliases: Mapping[nn.Module, Mapping[str, str]]) -> str:
    """The tree of a module: names, class, number of parameters, and the shapes of its own."""
    remaining = iter(range(_MOST))
    nodes = "".join(_node(tree(module, aliases), 0, remaining))
    return f'<div class="nnsightc-tree"><style>{_STYLE}</style>{nodes}</div>'


def _node(node: Node, depth: int, remaining: Iterator[int]) -> Iterator[str]:
    next(remaining, None)
    named = f'<span class="names">{escape(node.label)}</span>' if node.label else ""
    total = _size(weight for module in node.modules for weight in module.parameters())
    size = f'<span class="count" title="{total:,} parameters">{_short(total)}</span>' if total else ""
    weights = [f"{name} [{', '.join(map(str, each.shape))}]" for name, each in node.modules[0]._parameters.items()
               if each is not None]  # fmt: skip
    children = list(node.children())
    if not children:
        shapes = f' <span class="weights">{escape("  ".join(weights))}</span>' if weights else ""
        yield f'<div class="leaf">{named}{escape(node.description)}){shapes}{size}</div>'
        return
    yield f"<details{' open' if depth < _OPEN_DEPTH else ''}>"
    closed = f"{node.description})".removesuffix("()")
    yield f"<summary>{named}{escape(closed)}{size}</summary>"
    if weights:
        yield f'<div class="weights">{escape("  ".join(weights))}</div>'
    for number, child in enumerate(children):
        if next(remaining, None) is None:
            yield f'<div class="leaf">… and {len(children) - number:,} more</div>'
            break
        yield from _node(child, depth + 1, remaining)
    yield "</details>"


def _size(weights: Iterable[nn.Parameter]) -> int:
    """How many numbers there are in these, each tensor once."""
    return sum({id(weight): weight.numel() for weight in weights}.values())


def _short(number: int) -> str:
    """`124M` for 124,439,808."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
