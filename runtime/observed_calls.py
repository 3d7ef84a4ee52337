"""Calling a module in the body so that what happens inside of it can be read: `layer.sae(h, hook=True)`."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NoReturn, final

import torch
from torch import nn

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.runtime.refusing import Refusing

Record = dict[tuple[str, str], Any]
"""What stood at each module below the one that was called, by its path from there and `output` or `inputs`."""


def observed(module: nn.Module, *args: Any, hook: bool, **kwargs: Any) -> tuple[Any, Record]:
    """What the module returns, and what its own modules, and itself, were given and returned. Where one is called
    several times, that is its last call."""
    assert hook, "only observed calls come here"
    found: Record = {}
    versions: list[tuple[tuple[str, str], torch.Tensor, int]] = []

    def keep(path: str, port: str, value: Any) -> None:
        found[path, port] = value
        if isinstance(value, torch.Tensor):
            versions.append(((path, port), value, value._version))

    own = get_ident()
    handles = []
    for path, part in module.named_modules():
        # Another thread may run the module, too, and without keywords: torch notes last that a hook takes them.
        def before(_: nn.Module, args: Any, kwargs: Any = None, path: str = path) -> None:
            if get_ident() == own:
                keep(path, "inputs", (args, kwargs))
                first = args[0] if args else next(iter(kwargs.values()), None)
                keep(path, "input", first)

        def after(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            if get_ident() == own:
                keep(path, "output", output)

        handles += [part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(after)]
    try:
        result = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for key, tensor, version in versions:
        if tensor._version != version and found[key] is tensor:
            found[key] = Overwritten(*key)
    return result, found


def inside(record: Record, path: str, port: str, where: str) -> Any:
    """What stood at a module below one that was called."""
    if (path, port) in record:
        return record[path, port]
    raise RunError(f"{where}: `{path}` did not run in this call\n  way out: read a module that runs on these inputs")


@final
class Overwritten(Refusing):
    """Stands for a value that the module itself changed in place."""

    __slots__ = ("_path", "_port")

    def __init__(self, path: str, port: str) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_port", port)

    def _refuse(self) -> NoReturn:
        raise RunError(
            f"the {self._port} of `{self._path}` was changed in place by the module around it, after it was made\n"
            "  way out: write that module without `inplace=True` and `_` methods"
        )
