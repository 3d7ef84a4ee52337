"""The globals of a loaded experiment, and what must be found before it runs."""

from __future__ import annotations

import importlib
import threading
from types import CellType
from typing import Any, final

from nnsight_compiler.files import vocabulary
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.ir.program import Program


@final
class Namespace(dict[str, Any]):
    """The globals of every function of one file.

    What only a library, a host call or the model can give is found by `link`, when the experiment first runs.

    programs: every program of the file, the experiment's first.
    """

    def __init__(self, model: Any, allow_host_calls: bool) -> None:
        super().__init__(__name__="experiment_file")
        self.programs: list[Program] = []
        self.allow_host_calls = allow_host_calls
        self._model = model
        self._waiting: list[tuple[dict[str, Any] | CellType, str, tuple[str, str]]] = []
        self._lock = threading.Lock()

    def wait(self, place: dict[str, Any] | CellType, name: str, kind: str, held: str) -> None:
        """Notes that a name is given its value by `link`."""
        self._waiting.append((place, name, (kind, held)))

    def check(self) -> None:
        """Refuses programs that name what is nowhere."""

    def link(self) -> None:
        """Gives every name its value. Imports libraries of the closed set; others only where the user allowed it."""
        with self._lock:
            while self._waiting:
                place, name, (kind, held) = self._waiting[-1]
                value = self._found(name, kind, held)
                if isinstance(place, CellType):
                    place.cell_contents = value
                else:
                    place[name] = value
                self._waiting.pop()

    def _found(self, name: str, kind: str, held: str) -> Any:
        try:
            match kind:
                case "namespace":
                    return vocabulary.load(held)
                case "known":
                    vocabulary.load(held.rpartition(".")[0])
                    return vocabulary.resolve(held)
                case "model":
                    return self._bound(name, held)
                case _:
                    module, _, rest = held.partition(":")
                    found: Any = importlib.import_module(module)
                    for part in rest.split(".") if rest else ():
                        found = getattr(found, part)
                    return found
        except (ImportError, AttributeError) as error:
            raise FileError(f"`{name}` is `{held.replace(':', '.').strip('.')}`, which is not here: {error}") from error

    def _bound(self, name: str, path: str) -> Any:
        if self._model is None:
            raise FileError(
                f"`{name}` is the model, which this file was saved without\n"
                "  way out: give one when loading: Experiment.load(path, model=model)"
            )
        return self._model[path] if path else self._model
