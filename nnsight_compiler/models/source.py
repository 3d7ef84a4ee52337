"""The operations inside of a module's forward, as users hold them: `model.layers[0].attn.source.self_c_proj_0`.

Outside of a trace they are there to be looked at: `print(module.source)` shows the forward with the names of its
operations beside its lines.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, final

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.models.view import OutsideTraceError, describe_at, module_at
from nnsight_compiler.runtime.replacing import forward_of
from nnsight_compiler.runtime.source_operations import Listing, NoSourceError, listing

if TYPE_CHECKING:
    from nnsight_compiler.models.nnsight import NNsight

_AROUND = 4
"""Lines of the source that are shown before and after an operation."""


class UnknownOperationError(ModelError, AttributeError):
    """A name that no operation has."""


class SourceError(ModelError, AttributeError):
    """A function whose operations cannot be seen."""


class _Nothing:
    """What stands in the place of a torch module: it has no attributes."""


class _Inside:
    """A part of a forward, by its path. It cannot be changed, and holds nothing."""

    __slots__ = ("__weakref__", "_path", "_root")

    _root: NNsight
    _path: str

    def __init__(self, root: NNsight, path: str) -> None:
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_path", path)

    @property
    def _module(self) -> Any:
        return _Nothing()

    @property
    def _shown(self) -> str:
        return "`print(….source)` shows the operations of a module"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise OutsideTraceError(f"`.{name}` of {self._path} can be set inside `with model.trace(…)` only")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (self._root, self._path) == (other._root, other._path)

    def __hash__(self) -> int:
        return hash((id(self._root), self._path))


@final
class SourceView(_Inside):
    """The operations of a module's forward, or of a function that an operation calls, by their names."""

    __slots__ = ()

    def _listing(self) -> Listing | None:
        """The operations; `None` for a function that is known only when its call runs."""
        if ":" in self._path:
            return None
        module = module_at(self._root, self._path)
        try:
            return listing(forward_of(module))
        except NoSourceError as error:
            raise SourceError(
                f"the operations of {describe_at(self._root, self._path)} cannot be seen: {error}; read and write its"
                " `.input` and `.output`"
            ) from None

    def __getattr__(self, name: str) -> OperationView:
        if name.startswith("__") or name in ("_root", "_path", "_wrapped"):
            raise AttributeError(name)
        found = self._listing()
        if found is None:
            if not name.rpartition("_")[2].isdecimal():
                raise UnknownOperationError(f"operations have a number, as in `{name}_0`", name=name)
        elif name not in found.names:
            near = difflib.get_close_matches(name, found.names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has: {', '.join(found.names[:12])}"
            raise UnknownOperationError(
                f"there is no operation `{name}` in the forward of {describe_at(self._root, self._path)}; {hint}",
                name=name,
            )
        return OperationView(self._root, f"{self._path}:{name}")

    def __iter__(self) -> Iterator[OperationView]:
        return (OperationView(self._root, f"{self._path}:{name}") for name in self._known().names)

    def __len__(self) -> int:
        return len(self._known().names)

    def __dir__(self) -> list[str]:
        found = self._listing()
        return [*super().__dir__(), *(found.names if found is not None else ())]

    def _known(self) -> Listing:
        found = self._listing()
        if found is None:
            raise SourceError(f"which function `{self._path}` calls is known only when it runs")
        return found

    def __repr__(self) -> str:
        found = self._listing()
        return f"<operations of what {self._path} calls>" if found is None else str(found)


@final
class OperationView(_Inside):
    """One operation. Inside a trace it has `.output`, `.input`, `.inputs`, `.calls`, `.skip(…)` and `.source`."""

    __slots__ = ()

    @property
    def source(self) -> SourceView:
        """The operations of the function that it calls."""
        return SourceView(self._root, self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_root", "_path", "_wrapped"):
            raise AttributeError(name)
        if name in ("output", "input", "inputs", "calls", "skip"):
            raise OutsideTraceError(f"`.{name}` of {self._path} exists inside `with model.trace(…)` only")
        raise UnknownOperationError(
            f"{self._path} is an operation: it has `.output`, `.input`, `.inputs`, `.calls`, `.skip(…)` and `.source`,"
            f" and no `.{name}`",
            name=name,
        )

    def __repr__(self) -> str:
        around, _, name = self._path.rpartition(":")
        found = SourceView(self._root, around)._listing()
        if found is None:
            return f"<operation {self._path}>"
        lines = found.text.rstrip("\n").split("\n")
        line = found.lines[name]
        first, last = max(0, line - _AROUND), min(len(lines), line + _AROUND + 1)
        shown = [f"{'─▶' if number == line else '  '} {lines[number]}".rstrip() for number in range(first, last)]
        return "\n".join([f"{self._path}:", *shown])
