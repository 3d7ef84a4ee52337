"""What programs were compiled to, by what was guarded on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CellType
from typing import Any, NamedTuple

from nnsight_compiler.compilation import Compiled, compile_program
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.options import DEFAULT, Options
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.runtime.support import UNBOUND


class CacheInfo(NamedTuple):
    """How often calls found a compiled program, how often one was compiled, and how many are held."""

    hits: int
    misses: int
    size: int


@dataclass(slots=True)
class _Table:
    """Compiled programs that rest on guards over the same expressions: `key` evaluates them, on the parameters."""

    key: Callable[..., Any]
    held: dict[Any, Compiled] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)


class Cache:
    """What a program was compiled to, by what was guarded on. A lookup evaluates the guards and nothing else."""

    def __init__(
        self,
        program: Program,
        globals_: dict[str, Any],
        closure: Mapping[str, CellType],
        options: Options = DEFAULT,
    ) -> None:
        self.program = program
        self.options = options
        self.globals = globals_
        self.closure = closure
        self.names = [parameter.value.name for parameter in program.parameters]
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._lock = threading.RLock()
        self.hits = self.misses = 0

    @property
    def size(self) -> int:
        return sum(len(table.held) for table in self._tables.values())

    @property
    def compiled(self) -> list[Compiled]:
        """Everything that the program was compiled to, in that order."""
        return [each for table in self._tables.values() for each in table.held.values()]

    def clear(self) -> None:
        with self._lock:
            self._tables = {}
            self.hits = self.misses = 0

    def find(self, values: tuple[Any, ...]) -> Compiled | None:
        """The compiled program whose guards hold for these values of the parameters."""
        for table in tuple(self._tables.values()):  # another thread may add one
            try:
                found = table.held.get(table.key(*values))
            except (LookupError, AttributeError, TypeError, NameError, ValueError, RuntimeError):
                continue  # an expression that cannot be evaluated on these values: its guards do not hold
            if found is not None:
                self.hits += 1
                return found
        return None

    def run(self, *values: Any) -> Any:
        """Runs the program on the values of its parameters; compiles it first where nothing compiled holds for them."""
        return (self.find(values) or self.get(values)).plan.run(*values)

    def get(self, values: tuple[Any, ...], lowered: Specialised | None = None) -> Compiled:
        """The compiled program for these values; compiled now where there is none. A parameter without a value is
        given as `UNBOUND`. `lowered`: what the passes made of the program for them, where they ran already."""
        found = self.find(values)
        if found is not None:
            return found
        with self._lock:
            found = self.find(values)
            if found is not None:
                return found
            self.misses += 1
            try:
                given = self.given(values)
                made = compile_program(
                    self.program, given, self.globals, self.closure, self.stage, options=self.options, lowered=lowered
                )
            except CompileError as error:
                raise error.with_traceback(None) from None  # it says where; the compiler's own frames say nothing more
            texts = tuple(guard.key_text for guard in made.guards)
            table = self._tables.get(texts)
            if table is None or any(made.objects.get(name) is not held for name, held in table.kept):
                table = _Table(self._key(made.guards, made.objects), kept=list(made.objects.items()))
                self._tables[texts] = table
            table.held[table.key(*values)] = made
            return made

    def given(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The values of the parameters that have one, by name."""
        return {name: value for name, value in zip(self.names, values, strict=True) if value is not UNBOUND}

    def _key(self, guards: tuple[Guard, ...], objects: Mapping[str, Any]) -> Callable[..., Any]:
        """A function of the parameters that gives what the guards compare."""
        texts = [guard.key_text for guard in guards]
        parameters = ", ".join(self.names)
        outer = ", ".join(objects)
        body = f"({', '.join(texts)},)" if texts else "()"
        made = eval(f"lambda {outer}: lambda {parameters}: {body}", self.globals)
        key: Callable[..., Any] = made(*objects.values())
        return key

    def stage(self, program: Program, globals_: Mapping[str, Any], closure: Mapping[str, CellType]) -> Cache:
        """What runs the program of a stage."""
        assert isinstance(globals_, dict), "the globals of a function are a dict"
        return Cache(program, globals_, closure, self.options)
