"""An oracle that runs an experiment's text as plain Python, statement by statement, with torch hooks.

`StandIn(net)` stands for the wrapped model. The body of `with model.trace(x):` runs as it stands: each access to a site
runs the plain module again, from its start, under hooks that put at every earlier site what the program left there,
and gives the value that the module then has at the site. So all host code, effects, random draws and exceptions are
Python's own, in Python's order.

That is exact as long as no site is changed after a later site of the same forward was computed: a body may read in any
order, and may write anything which nothing before it in the text was computed from. Programs outside of this class
raise `OutsideError`, whatever their values. It also takes each module to be called once, and to return a tensor.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Site = tuple[str, str]
"""A module's path, and `input` or `output`."""


class OutsideError(Exception):
    """The program is not one that this oracle can run."""


@dataclass
class Cell:
    """What a site holds: `computed` by the model, or assigned; and how often it was written to when last looked at."""

    value: torch.Tensor
    computed: bool
    version: int


class ForwardRun:
    """One forward: what its sites hold, in the order in which the module reaches them."""

    def __init__(self, module: nn.Module, inputs: torch.Tensor) -> None:
        self.module, self.inputs = module, inputs.clone()
        self.cells: dict[Site, Cell] = {}
        self.shapes: dict[Site, torch.Size] = {}

        def note(site: Site, value: torch.Tensor) -> None:
            if site in self.shapes:
                raise OutsideError(f"{site} is reached twice")
            self.shapes[site] = value.shape

        self.run(note)
        self.order = {site: number for number, site in enumerate(self.shapes)}

    def run(self, visit: Callable[[Site, torch.Tensor], torch.Tensor | None]) -> None:
        """Runs the module; `visit` sees the value at each site, and what it returns replaces it."""
        handles = []
        for path, module in self.module.named_modules():

            def before(_module: nn.Module, args: Any, path: str = path) -> Any:
                new = visit((path, "input"), args[0])
                return None if new is None else (new,)

            def after(_module: nn.Module, _args: Any, out: Any, path: str = path) -> Any:
                return visit((path, "output"), out)

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            with torch.no_grad():
                self.module(self.inputs.clone())
        finally:
            for handle in handles:
                handle.remove()

    def get(self, site: Site) -> torch.Tensor:
        self.check()
        if site not in self.cells:
            seen: list[torch.Tensor] = []

            def visit(each: Site, value: torch.Tensor) -> torch.Tensor | None:
                if each == site:
                    seen.append(value.clone())
                elif each in self.cells and self.order[each] < self.order[site]:
                    return self.cells[each].value.clone()
                return None

            self.run(visit)
            self.cells[site] = Cell(seen[0], True, seen[0]._version)
        return self.cells[site].value

    def set(self, site: Site, value: Any) -> None:
        self.check()
        if site in self.cells and value is self.cells[site].value:
            return  # `site += value` changed it in place
        self.changed(site)
        shape = self.shapes[site]
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            value = torch.full(shape, float(value))
        if value.shape != shape:
            raise OutsideError(f"{site} has the shape {tuple(shape)}, not {tuple(value.shape)}")
        copy = value.clone()
        self.cells[site] = Cell(copy, False, copy._version)

    def check(self) -> None:
        """Notices what was changed in place since the last access."""
        for site, cell in self.cells.items():
            if cell.value._version != cell.version:
                cell.version = cell.value._version
                self.changed(site)

    def changed(self, site: Site) -> None:
        for later, cell in self.cells.items():
            if cell.computed and self.order[later] > self.order[site]:
                raise OutsideError(f"{site} is changed after {later} was computed")


class Held:
    """The forward in which a stand-in's accesses are, if any."""

    run: ForwardRun | None = None


class StandIn:
    """Stands for a wrapped model, or for one of its modules."""

    def __init__(self, module: nn.Module, held: Held | None = None, path: str = "") -> None:
        self.__dict__.update(_module=module, _held=held or Held(), _path=path)

    def _site(self, port: str) -> tuple[ForwardRun, Site]:
        if self._held.run is None:
            raise OutsideError("an access outside of a trace")
        return self._held.run, (self._path, port)

    def __getattr__(self, name: str) -> Any:
        if name in ("output", "input"):
            run, site = self._site(name)
            return run.get(site)
        value = getattr(self._module, name)
        return StandIn(value, self._held, f"{self._path}.{name}".strip(".")) if isinstance(value, nn.Module) else value

    def __setattr__(self, name: str, value: Any) -> None:
        run, site = self._site(name)
        run.set(site, value)

    def __getitem__(self, index: Any) -> Any:
        parts = list(self)
        return parts[index] if isinstance(index, slice) else parts[operator.index(index)]

    def __iter__(self) -> Iterator[StandIn]:
        return iter([StandIn(part, self._held, f"{self._path}.{name}") for name, part in self._module.named_children()])

    def __len__(self) -> int:
        return len(self._module)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def trace(self, inputs: torch.Tensor) -> Iterator[None]:
        if self._held.run is not None:
            raise OutsideError("a trace within a trace")
        self._held.run = ForwardRun(self._module, inputs)
        try:
            yield
            self._held.run.check()
        finally:
            self._held.run = None


def keep(value: Any) -> Any:
    """What `save` means: the value as it is at that line."""
    return value.clone() if isinstance(value, torch.Tensor) else value
