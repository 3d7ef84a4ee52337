"""Experiments: functions that `@intervene` compiles, and the cache of what they were compiled to."""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, final

from nnsight_compiler.compilation import PASSES, Compiled, compile_program, lower_program
from nnsight_compiler.frontend import lower_function, lower_source
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.manager import Observer, PassResult

if TYPE_CHECKING:
    from nnsight_compiler.files import SavedFile
    from nnsight_compiler.files.kinds import HostOp
    from nnsight_compiler.files.namespace import Namespace

_texts = itertools.count()
"""Numbers the texts given to `from_source`."""


class CacheInfo(NamedTuple):
    """How often calls found a compiled program, how often one was compiled, and how many are held."""

    hits: int
    misses: int
    size: int


@final
@dataclass(frozen=True, slots=True)
class Lowered:
    """A program after the passes, for one model and one shape of arguments.

    stages: for each pass, its name and the program after it.
    """

    program: Program
    stages: tuple[tuple[str, Program], ...]
    _compile: Callable[[], Compiled] = field(repr=False)

    def __str__(self) -> str:
        return str(self.program)

    def compile(self) -> Compiled:
        """The plan for this program, with the generated functions in `.source`."""
        return self._compile()


@dataclass(slots=True)
class _Table:
    """Compiled programs that rest on guards over the same expressions: `key` evaluates them, on the parameters."""

    key: Callable[..., Any]
    held: dict[Any, Compiled] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)


class Cache:
    """What a program was compiled to, by what was guarded on. A lookup evaluates the guards and nothing else."""

    def __init__(self, program: Program, globals_: dict[str, Any], closure: Mapping[str, CellType]) -> None:
        self.program = program
        self.globals = globals_
        self.closure = closure
        self.names = [parameter.value.name for parameter in program.parameters]
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._lock = threading.RLock()
        self.hits = self.misses = 0

    @property
    def size(self) -> int:
        return sum(len(table.held) for table in self._tables.values())

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

    def get(self, values: tuple[Any, ...], given: Mapping[str, Any]) -> Compiled:
        """The compiled program for these values; compiled now where there is none. `given` are the bound"
        " ones, by name."""
        found = self.find(values)
        if found is not None:
            return found
        with self._lock:
            found = self.find(values)
            if found is not None:
                return found
            self.misses += 1
            try:
                made = compile_program(self.program, given, self.globals, self.closure)
            except CompileError as error:
                raise error.with_traceback(None) from None  # it says where; the compiler's own frames say nothing more
            texts = tuple(guard.key_text for guard in made.guards)
            table = self._tables.get(texts)
            if table is None or any(made.objects.get(name) is not held for name, held in table.kept):
                table = _Table(self._key(made.guards, made.objects), kept=list(made.objects.items()))
                self._tables[texts] = table
            table.held[table.key(*values)] = made
            return made

    def _key(self, guards: tuple[Guard, ...], objects: Mapping[str, Any]) -> Callable[..., Any]:
        """A function of the parameters that gives what the guards compare."""
        texts = [guard.key_text for guard in guards]
        parameters = ", ".join(self.names)
        outer = ", ".join(objects)
        body = f"({', '.join(texts)},)" if texts else "()"
        made = eval(f"lambda {outer}: lambda {parameters}: {body}", self.globals)
        key: Callable[..., Any] = made(*objects.values())
        return key


class Experiment:
    """A compiled function. Calling it runs the experiment; the first call for a model compiles it."""

    def __init__(
        self, function: FunctionType, program: Program | None = None, namespace: Namespace | None = None
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._program = program
        self._namespace = namespace
        self._signature = inspect.signature(function)
        self._cache: Cache | None = None
        self._bind = _binder(function)

    @property
    def ir(self) -> Program:
        """The program as it was written: before any model or argument is known."""
        if self._program is None:
            self._program = lower_function(self._function)
        return self._program

    def _held(self) -> Cache:
        if self._cache is None:
            if self._namespace is not None:
                self._namespace.link()
            function = self._function
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            self._cache = Cache(self.ir, function.__globals__, cells)
        return self._cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = self._bind(*args, **kwargs)
        cache = self._cache or self._held()
        found = cache.find(values)
        if found is None:
            found = cache.get(values, dict(zip(cache.names, values, strict=True)))
        return found.plan.run(*values)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The program after the passes, for the model and the arguments of one call. Nothing is run."""
        values = self._bind(*args, **kwargs)
        cache = self._held()
        given = dict(zip(cache.names, values, strict=True))
        stages: list[tuple[str, Program]] = []
        observer: Observer = lambda result: stages.append(_stage(result))  # noqa: E731
        lowered = lower_program(self.ir, given, cache.globals, cache.closure, observer)
        return Lowered(lowered.program, tuple(stages), lambda: self.compile(*args, **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """The compiled program for the model and the arguments of one call. No forward is run."""
        values = self._bind(*args, **kwargs)
        cache = self._held()
        return cache.get(values, dict(zip(cache.names, values, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> SavedFile:
        """Writes the experiment to a file, with all that it reads from outside of itself (see `docs/files.md`)."""
        from nnsight_compiler.files import save_experiment

        return save_experiment(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Any = None, allow_host_calls: bool = False) -> Experiment:
        """The experiment in a file that `save` wrote. Loading runs and imports nothing (see `docs/files.md`)."""
        from nnsight_compiler.files import load_experiment

        return load_experiment(path, model, allow_host_calls)

    @property
    def host_ops(self) -> tuple[HostOp, ...]:
        """For an experiment from a file, the calls that it makes only where `allow_host_calls` was given."""
        return () if self._namespace is None else self._namespace.host_ops

    def cache_info(self) -> CacheInfo:
        """Hits, misses and size of the cache of compiled programs."""
        cache = self._held()
        return CacheInfo(cache.hits, cache.misses, cache.size)

    def cache_clear(self) -> None:
        """Forgets every compiled program."""
        self._held().clear()

    def __repr__(self) -> str:
        return f"<experiment {self._function.__qualname__}{self._signature}>"


def _stage(result: PassResult) -> tuple[str, Program]:
    return result.name, result.program


def _binder(function: FunctionType) -> Callable[..., tuple[Any, ...]]:
    """A function with the same signature that returns the values of the parameters, in order, as Python binds them."""
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    names = list(code.co_varnames[: count + bool(code.co_flags & 4) + bool(code.co_flags & 8)])
    signature, result = [], []
    for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
        signature.append(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
        result.append(parameter.name)
    text = str(inspect.Signature(signature)) if signature else "()"
    made = eval(f"lambda {text[1:-1]}: ({', '.join(result)}{',' if result else ''})")
    assert isinstance(made, FunctionType)
    assert set(names) == set(result)
    made.__defaults__ = function.__defaults__
    made.__kwdefaults__ = function.__kwdefaults__
    made.__code__ = made.__code__.replace(co_name=function.__name__, co_qualname=function.__qualname__)
    made.__qualname__ = function.__qualname__
    return made


class _Intervene:
    """The decorator `@intervene`."""

    def __call__(self, function: Callable[..., Any]) -> Experiment:
        """Compiles a function to an experiment: its source is read now or at the first use, and never run by Python.

        Raises:
            TypeError: it is not a plain Python function.
        """
        if isinstance(function, (staticmethod, classmethod)):
            kind = type(function)
            return kind(self(function.__func__))  # type: ignore[return-value]
        if isinstance(function, Experiment):
            return function
        if not isinstance(function, FunctionType):
            raise TypeError(
                f"@intervene decorates plain functions, not {type(function).__name__}; put it closest to the `def`"
            )
        if hasattr(function, "__wrapped__"):
            raise TypeError(
                f"@intervene reads the source of a function, and another decorator wraps `{function.__name__}`; put"
                " @intervene closest to the `def`, and the others around it"
            )
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"@intervene decorates plain functions: `{function.__name__}` is an `async def`")
        return Experiment(function)

    @staticmethod
    def from_source(text: str, globals: dict[str, Any] | None = None) -> Experiment:
        """An experiment from the text of one function, for where Python keeps no source: `exec`, the bare prompt.

        The `def` itself is executed, as Python would, in `globals` (those of the caller where none are given).
        """
        scope = sys._getframe(1).f_globals if globals is None else globals
        text = textwrap.dedent(text)
        file = f"<from_source {next(_texts)}>"
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # for tracebacks
        program = lower_source(text, file)
        made: dict[str, Any] = {}
        exec(compile(text, file, "exec"), scope, made)
        function = made[program.name]
        if isinstance(function, Experiment):
            function = function._function
        return Experiment(function, program)


intervene = _Intervene()

__all__ = ["PASSES", "Cache", "CacheInfo", "Experiment", "Lowered", "intervene"]
