"""A module and what is below it as a tree: own names, aliases and standard names, equal neighbours in a list once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import nn

from nnsight_compiler.models.names import standard_names


@final
@dataclass(frozen=True, slots=True)
class Node:
    """A module of a tree, or a run of equal neighbours in a list.

    names: its own name first, `0-11` for a run, then the others; none at the root.
    modules: the module, or all those of the run.
    known: the aliases and standard names of the modules below, as they resolve from above.
    aliases: the aliases that stand on each module.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    known: dict[nn.Module, tuple[str, ...]]
    aliases: Mapping[nn.Module, Mapping[str, str]]

    @property
    def label(self) -> str:
        """`(h | layers): ` and, for a run, how many it stands for; empty at the root."""
        count = f"{len(self.modules)} x " if len(self.modules) > 1 else ""
        return f"({' | '.join(self.names)}): {count}" if self.names else ""

    @property
    def description(self) -> str:
        """The module's class and what it says of itself, not closed: `Linear(in_features=4, out_features=4`."""
        return f"{type(self.modules[0]).__name__}({self.modules[0].extra_repr()}"

    def children(self) -> Iterator[Node]:
        """What is below it."""
        module = self.modules[0]
        known = dict(self.known)
        for name, path in (*self.aliases.get(module, {}).items(), *standard_names(module).items()):
            part = module.get_submodule(path)
            if name not in known.get(part, ()):
                known[part] = (*known.get(part, ()), name)
        for label, run in _runs(module, known):
            names = (label, *(name for name in known.get(run[0], ()) if name != label))
            yield Node(names, tuple(run), known, self.aliases)


def tree(module: nn.Module, aliases: Mapping[nn.Module, Mapping[str, str]]) -> Node:
    """The tree of a module."""
    return Node((), (module,), {}, aliases)


def draw(module: nn.Module, aliases: Mapping[nn.Module, Mapping[str, str]]) -> str:
    """The tree of a module as text: `(h | layers): ModuleList(` …"""
    return "\n".join(_lines(tree(module, aliases)))


def _lines(node: Node) -> list[str]:
    head = f"{node.label}{node.description}"
    children = [line for child in node.children() for line in _lines(child)]
    return [head, *(f"  {line}" for line in children), ")"] if children else [f"{head})"]


def _runs(module: nn.Module, known: Mapping[nn.Module, tuple[str, ...]]) -> list[tuple[str, list[nn.Module]]]:
    """The children, each with its label; in a list, a run of equal ones is one entry labelled `0-11`."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return [(name, [child]) for name, child in children]
    runs: list[tuple[str, str, list[nn.Module], object]] = []
    for name, child in children:
        text = repr(child), [known.get(part, ()) for part in child.modules()]
        if runs and runs[-1][3] == text:
            first, _, held, _ = runs[-1]
            runs[-1] = (first, name, [*held, child], text)
        else:
            runs.append((name, name, [child], text))
    return [(first if first == last else f"{first}-{last}", held) for first, last, held, _ in runs]
