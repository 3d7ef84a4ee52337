"""Draws a module and what is below it as an indented tree, own and standard names side by side."""

from __future__ import annotations

from torch import nn

from nnsight_compiler.models.names import standard_names


def draw(module: nn.Module) -> str:
    """The tree of a module as text: `(h | layers): ModuleList(` …, equal neighbours in a list drawn once."""
    return "\n".join(_lines(module, {}))


def _lines(module: nn.Module, above: dict[nn.Module, list[str]]) -> list[str]:
    known = {part: list(names) for part, names in above.items()}
    for name, path in standard_names(module).items():
        part = module.get_submodule(path)
        if name not in known.setdefault(part, []):
            known[part].append(name)
    head = f"{type(module).__name__}({module.extra_repr()}"
    children: list[list[str]] = []
    for label, child in _runs(module):
        names = " | ".join([label, *(name for name in known.get(child, []) if name != label)])
        drawn = _lines(child, known)
        children.append([f"({names}): {_count(label)}{drawn[0]}", *drawn[1:]])
    if not children:
        return [f"{head})"]
    return [head, *(f"  {line}" for child in children for line in child), ")"]


def _runs(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children, each with its label; in a list, a run of equal ones is one entry labelled `0-11`."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return children
    runs: list[tuple[str, str, nn.Module, str]] = []
    for name, child in children:
        text = repr(child)
        if runs and runs[-1][3] == text:
            first, _, shown, _ = runs[-1]
            runs[-1] = (first, name, shown, text)
        else:
            runs.append((name, name, child, text))
    return [(first if first == last else f"{first}-{last}", child) for first, last, child, _ in runs]


def _count(label: str) -> str:
    first, dash, last = label.partition("-")
    return f"{int(last) - int(first) + 1} x " if dash and first.isdigit() and last.isdigit() else ""
