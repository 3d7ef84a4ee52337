"""Experiments: functions that `@intervene` compiles, and the cache of what they were compiled to."""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, final

from nnsight_compiler.cache import Cache, CacheInfo
from nnsight_compiler.compilation import PASSES, Compiled, lower_program
from nnsight_compiler.explain import Explanation, explain
from nnsight_compiler.frontend import lower_function, lower_source
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.manager import Observer, PassResult

if TYPE_CHECKING:
    from nnsight_compiler.check import Report

_texts = itertools.count()
"""Numbers the texts given to `from_source`."""


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


class Experiment:
    """A compiled function. Calling it runs the experiment; the first call for a model compiles it."""

    def __init__(self, function: FunctionType, program: Program | None = None) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._program = program
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
            function = self._function
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            self._cache = Cache(self.ir, function.__globals__, cells)
        return self._cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = self._bind(*args, **kwargs)
        cache = self._cache or self._held()
        return (cache.find(values) or cache.get(values)).plan.run(*values)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The program after the passes, for the model and the arguments of one call. Nothing is run."""
        values = self._bind(*args, **kwargs)
        cache = self._held()
        given = cache.given(values)
        stages: list[tuple[str, Program]] = []
        observer: Observer = lambda result: stages.append(_stage(result))  # noqa: E731
        lowered = lower_program(self.ir, given, cache.globals, cache.closure, observer)
        return Lowered(lowered.program, tuple(stages), lambda: self.compile(*args, **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """The compiled program for the model and the arguments of one call. No forward is run."""
        values = self._bind(*args, **kwargs)
        return self._held().get(values)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """The stages, forwards and host ops of one call, and why each is one. Nothing is run; what earlier calls have
        specialised of later stages is shown."""
        return explain(self._function.__name__, self.compile(*args, **kwargs))

    def check(self, *args: Any, **kwargs: Any) -> Report:
        """What is wrong with the experiment, as far as it can be told without weights and without running anything.

        The arguments are as in a call; any may be left out, and what depends on them is then not checked. The model, as
        the first argument or by its name, may also be a name, a folder, or a configuration of transformers.
        """
        from nnsight_compiler.check import check_call  # it is built on this module

        return check_call(self._signature, self.ir, self._held().globals, self._held().closure, args, kwargs)

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
