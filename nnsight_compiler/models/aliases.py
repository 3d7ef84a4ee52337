"""Names of the user's for the modules of a model: `rename={"transformer.h": "layers", "mlp": "ff"}`.

A key is the path of a module, from any module above it: `mlp` is each child of that name, `transformer.h` the one below
the model. `*` stands for one name of a path. A key may also be a class of modules: each child that is the only one of
it. An alias stands where its key begins, if it means one module there, and on what the last `*` stands for: of
`"transformer.h.*.attn": "a"` that is each block. An alias with dots, as `"attn.c_proj": "attn.o"`, stands deeper.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.names import NoStandardModule, stands_for

Key = str | type[nn.Module]
Rename = Mapping[Key, str | Sequence[str]]
Aliases = Mapping[str, Mapping[str, str]]
"""For the path of a module, the names that stand on it, each with the path from there of what it means."""

INSIDE_A_TRACE = ("output", "input", "inputs", "calls", "skip", "source", "resid_pre", "resid_mid", "resid_post")
"""What a module has inside a trace only."""


class RenameError(ModelError, ValueError):
    """A key of `rename` that means no module, or an alias that cannot stand where it would."""


def bind(root: nn.Module, rename: Rename, taken: type) -> Aliases:
    """Where each alias stands, and what it means there.

    Args:
        taken: the class of the views on modules, whose own names no alias may hide.

    Raises:
        RenameError: a key that means no module, an alias that hides a name or means several modules.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    first = {module: path for path, module in reversed(list(modules.items()))}
    bound: dict[str, dict[str, str]] = {}
    for key, names in rename.items():
        for alias in [names] if isinstance(names, str) else names:
            holders = list(_holders(modules, key, alias))
            if not holders:
                raise _means_nothing(modules, key)
            for holder, name, path in holders:
                _check(modules[holder], name, path, key, holder, taken)
                here = bound.setdefault(first[modules[holder]], {})
                held = here.setdefault(name, path)
                if modules[_join(holder, held)] is not modules[_join(holder, path)]:
                    raise RenameError(
                        f"rename: `{name}` on {holder or 'the model'} would mean both `{held}` and `{path}`; give each"
                        " a name of its own"
                    )
    return bound


def _holders(modules: Mapping[str, nn.Module], key: Key, alias: str) -> Iterator[tuple[str, str, str]]:
    """Where an alias stands: the path of the module, the alias there, and the path from there of what it means."""
    if isinstance(key, type):
        for holder, module in modules.items():
            found = [name for name, child in module._modules.items() if isinstance(child, key)]
            if len(found) > 1:
                raise RenameError(
                    f"rename: `{alias}` on {holder or 'the model'} would mean each of {len(found)} {key.__name__}:"
                    f" {', '.join(found[:4])}{', …' if len(found) > 4 else ''}; a name stands for one module"
                )
            yield from ((holder, alias, name) for name in found)
        return
    parts = key.removeprefix(".").split(".")
    *above, name = alias.removeprefix(".").split(".")
    if not name.isidentifier() or parts[: len(above)] != above or len(above) >= len(parts):
        raise RenameError(
            f"rename: the alias {alias!r} of {key!r} is neither a name nor a name below the beginning of its key"
        )
    if parts[-1] == "*" or any("*" in part and part != "*" for part in parts):
        raise RenameError(f"rename: in {key!r} a `*` stands for one whole name, and not for the last: end in a name")
    last_star = max((number for number, part in enumerate(parts) if part == "*"), default=-1)
    for start in modules:
        found = list(_below(modules, start, parts))
        deepest = max(last_star + 1, len(above))
        depths = {len(above), deepest} if len(found) == 1 else {deepest}
        for path in found:
            steps = path.split(".")
            for depth in depths:
                yield _join(start, ".".join(steps[:depth])), name, ".".join(steps[depth:])


def _below(modules: Mapping[str, nn.Module], start: str, parts: list[str]) -> Iterator[str]:
    """The paths from `start` that a key means."""
    found = [""]
    for part in parts:
        found = [
            _join(path, name)
            for path in found
            for name, child in modules[_join(start, path)]._modules.items()
            if child is not None and part in ("*", name)
        ]
    yield from found


def _check(module: nn.Module, name: str, path: str, key: Any, holder: str, taken: type) -> None:
    """Refuses an alias that hides a name of the module, of its view, or a standard name of another module."""
    where = holder or "the model"
    if name in INSIDE_A_TRACE or inspect.getattr_static(taken, name, None) is not None:
        raise RenameError(f"rename: `{name}` has a meaning of its own on every module; choose another name")
    target = module.get_submodule(path)
    if getattr(module, name, None) is target:
        return
    if hasattr(module, name):
        raise RenameError(f"rename: {where} has a `{name}` of its own, which the alias of {_spelled(key)} would hide")
    try:
        standard = stands_for(module, name)
    except NoStandardModule:
        return
    if standard is not None and module.get_submodule(standard) is not target:
        raise RenameError(
            f"rename: `{name}` is the standard name of `{standard}` on {where}, which the alias of {_spelled(key)}"
            " would hide"
        )


def _means_nothing(modules: Mapping[str, nn.Module], key: Key) -> RenameError:
    if isinstance(key, type):
        near = difflib.get_close_matches(key.__name__, {type(module).__name__ for module in modules.values()}, 3, 0.5)
    else:
        parts = key.split(".")
        names = {".".join("*" if step.isdigit() else step for step in path.split(".")) for path in modules}
        tails = {".".join(path.split(".")[-len(parts) :]) for path in names if path}
        near = difflib.get_close_matches(key, sorted(tails), 3, 0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`print(model)` shows the tree of its modules"
    return RenameError(f"rename: {_spelled(key)} means no module of this model; {hint}")


def _spelled(key: Key) -> str:
    return key.__name__ if isinstance(key, type) else repr(key)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
