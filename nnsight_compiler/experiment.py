"""Experiments: functions that `@intervene` compiles, and the cache of what they were compiled to."""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, final, overload

from nnsight_compiler.cache import Cache, CacheInfo
from nnsight_compiler.compilation import PASSES, Compiled, lower_program
from nnsight_compiler.explain import explain
from nnsight_compiler.explanation import Explanation
from nnsight_compiler.frontend import lower_function, lower_source
from nnsight_compiler.html import program_html, stages_html
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.ops import Forward
from nnsight_compiler.ir.program import Program
from nnsight_compiler.options import DEFAULT, Options
from nnsight_compiler.passes.manager import Observer, PassResult
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.reloading import follow_autoreload
from nnsight_compiler.remote.crossings import crossings
from nnsight_compiler.remote.outside import ELSEWHERE
from nnsight_compiler.remote.routing import Call, Route, asked, checked, route_of, stays
from nnsight_compiler.remote.routing import run as elsewhere
from nnsight_compiler.runtime.meter import Meter
from nnsight_compiler.runtime.runs import RECORDER, Recording, Run
from nnsight_compiler.tracebacks import trimmed

if TYPE_CHECKING:
    from nnsight_compiler.check import Report
    from nnsight_compiler.files.kinds import HostOp
    from nnsight_compiler.files.namespace import Namespace
    from nnsight_compiler.files.saving import SavedFile


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

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what IPython asks for
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return stages_html(self.program, self.stages)

    def compile(self) -> Compiled:
        """The plan for this program, with the generated functions in `.source`."""
        return self._compile()


class _Last(threading.local):
    """The last run of an experiment in each thread."""

    run: Run | None = None


_AS_WRITTEN: Any = object()
"""Of an experiment that does not say itself where it runs."""


class Experiment:
    """A compiled function. Calling it runs the experiment; the first call for a model compiles it."""

    def __init__(
        self,
        function: FunctionType,
        program: Program | None = None,
        namespace: Namespace | None = None,
        options: Options = DEFAULT,
        remote: Any = _AS_WRITTEN,
    ) -> None:
        if remote is not _AS_WRITTEN:
            checked(remote)
        functools.update_wrapper(self, function)
        self._function = function
        self._program = program
        self._namespace = namespace
        self._options = options
        self._remote = remote
        self._signature = inspect.signature(function)
        self._cache: Cache | None = None
        self._bind = _binder(function)
        self._elsewhere = ELSEWHERE - self._signature.parameters.keys()
        self._asks = False
        self._last = _Last()

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
            # Without traces of its own, what it was compiled to may hold for a model that is elsewhere.
            self._asks = bool(asked(self.ir)) or not any(isinstance(op, Forward) for op in self.ir.walk())
            self._cache = Cache(stays(self.ir), function.__globals__, cells, self._options)
        return self._cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._called(args, kwargs, None)
        except Exception as error:
            error.__traceback__ = trimmed(error)
            raise

    def measure(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the experiment, with a meter that counts memory and floating-point operations: slower than a plain
        call, with the same result. `last_run`, and `explain` after it, have what it counted."""
        try:
            return self._called(args, kwargs, Meter())
        except Exception as error:
            error.__traceback__ = trimmed(error)
            raise

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], meter: Meter | None) -> Any:
        around = RECORDER.recording
        try:
            cache = self._cache or self._held()
            asked = {name: kwargs.pop(name) for name in self._elsewhere & kwargs.keys()}
            values = self._bind(*args, **kwargs)
            compiled = cache.find(values)
            if compiled is None or asked or self._asks or self._remote is not _AS_WRITTEN:
                route = self._route(asked, values)
                if route is not None:
                    return elsewhere(route, self._call(values, args, kwargs))
            run = (compiled or cache.get(values)).plan.run
            RECORDER.recording = recording = Recording(meter or (around and around.meter))
            if meter is None:
                result = run(*values)
            else:
                with meter:
                    result = run(*values)
            self._last.run = recording.done()
            if around is not None:  # what an experiment that another calls does is part of that one's run
                around.ran += recording.ran
                around.remarks |= recording.remarks
            return result
        finally:
            RECORDER.recording = around

    def _call(self, values: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of this experiment that is to run elsewhere."""
        cache, parameters = self._held(), self._signature.parameters.values()
        given = dict(zip(cache.names, values, strict=True))
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        return Call(cache.program, cache.globals, cache.closure, given, self._options, args, kwargs, defaults)

    def _route(self, asked_here: dict[str, Any], values: tuple[Any, ...]) -> Route | None:
        """Where a call runs: as it says, or else as the experiment says, or else as its traces say."""
        cache = self._held()
        said = asked_here.get("remote", self._remote)
        if said is not _AS_WRITTEN:
            return checked(said, asked_here.get("blocking", True))
        found = route_of(self.ir, dict(zip(cache.names, values, strict=True)), cache.globals, cache.closure)
        if "blocking" in asked_here:
            return checked(found and found.remote, asked_here["blocking"])
        return found

    @property
    def last_run(self) -> Run | None:
        """What the last call in this thread that ended without an error did: the forwards that ran, their rows, how
        long each took. `None` before the first."""
        return self._last.run

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The program after the passes, for the model and the arguments of one call. Nothing is run."""
        values = self._bind(*args, **kwargs)
        cache = self._held()
        given = cache.given(values)
        stages: list[tuple[str, Program]] = []
        observer: Observer = lambda result: stages.append(_stage(result))  # noqa: E731
        lowered = lower_program(cache.program, given, cache.globals, cache.closure, observer, options=self._options)
        return Lowered(lowered.program, tuple(stages), lambda: self.compile(*args, **kwargs))

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """The compiled program for the model and the arguments of one call. No forward is run."""
        values = self._bind(*args, **kwargs)
        return self._held().get(values)

    def with_options(
        self,
        without: Collection[str] | str = (),
        memory_budget: int | str | None = None,
        padding: bool = False,
        remote: bool | str | None = _AS_WRITTEN,
    ) -> Experiment:
        """The same experiment, optimised otherwise, or run elsewhere; what this one has compiled stays with it.

        Args:
            without: optimisations that are left out, by the names of their passes; `"all"` leaves every one out.
            memory_budget: how many bytes of tensors forwards that share a batch may keep alive at once; also as text,
                such as `"2 GiB"`. Without it, a quarter of what is free on the model's device.
            padding: whether prompts that differ in length may be padded to share a forward.
            remote: where it runs unless the call says something else: True, a URL, "local"; False or `None`: here,
                whatever its traces say. Left out, it stays as it is.

        Raises:
            ValueError: an optimisation or an amount that there is not.
            TypeError: there is no such place.
        """
        options = Options.of(without, memory_budget, padding)
        remote = self._remote if remote is _AS_WRITTEN else remote
        return Experiment(self._function, self._program, self._namespace, options, remote)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """The stages, forwards and host ops of one call, and why each is one; what each forward is estimated to cost,
        and what it cost in the last run; which optimisations did something, or did not, and why; of one that runs
        elsewhere (`remote=`), which jobs it is, and what crosses. Nothing is run or sent; what earlier calls have
        specialised of later stages is shown."""
        self._held()
        asked_here = {name: kwargs.pop(name) for name in self._elsewhere & kwargs.keys()}
        values = self._bind(*args, **kwargs)
        says = asked_here or self._asks or self._remote is not _AS_WRITTEN
        route = self._route(asked_here, values) if says else None
        compiled = self.compile(*args, **kwargs)
        lowered = self._lowered(self._options, args, kwargs)
        try:
            plain = replace(self._options, without=Options.of("all").without)
            written: Program | None = self._lowered(plain, args, kwargs).program
        except CompileError:  # what is not used may not be possible either
            written = None
        told = explain(self._function.__name__, compiled, lowered, written, self.last_run)
        return told if route is None else replace(told, crossings=crossings(self._call(values, args, kwargs)))

    def _lowered(self, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialised:
        cache = self._held()
        given = cache.given(self._bind(*args, **kwargs))
        return lower_program(cache.program, given, cache.globals, cache.closure, options=options)

    def check(self, *args: Any, **kwargs: Any) -> Report:
        """What is wrong with the experiment, as far as it can be told without weights and without running anything.

        The arguments are as in a call; any may be left out, and what depends on them is then not checked. The model, as
        the first argument or by its name, may also be a name, a folder, or a configuration of transformers.
        """
        from nnsight_compiler.check import check_call  # it is built on this module

        return check_call(self._signature, self.ir, self._held().globals, self._held().closure, args, kwargs)

    def save(self, path: str | os.PathLike[str]) -> SavedFile:
        """Writes the experiment to a file, with all that it reads from outside of itself (see `docs/files.md`)."""
        from nnsight_compiler.files.saving import save_experiment

        return save_experiment(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], model: Any = None, allow_host_calls: bool = False) -> Experiment:
        """The experiment in a file that `save` wrote. Loading runs and imports nothing (see `docs/files.md`)."""
        from nnsight_compiler.files.loading import load_experiment

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

    def _repr_html_(self) -> str:
        return program_html(self.ir)


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

    @overload
    def __call__(self, function: Callable[..., Any], /) -> Experiment: ...
    @overload
    def __call__(
        self,
        /,
        *,
        without: Collection[str] | str = ...,
        memory_budget: int | str | None = ...,
        padding: bool = ...,
        remote: bool | str | None = ...,
    ) -> Callable[[Callable[..., Any]], Experiment]: ...

    def __call__(
        self,
        *functions: Callable[..., Any],
        without: Collection[str] | str = (),
        memory_budget: int | str | None = None,
        padding: bool = False,
        remote: bool | str | None = _AS_WRITTEN,
    ) -> Experiment | Callable[[Callable[..., Any]], Experiment]:
        """Compiles a function to an experiment: its source is read now or at the first use, and never run by Python.

        With options (see `Experiment.with_options`), as in `@intervene(memory_budget="2 GiB", remote=True)`, it is the
        decorator that does so.

        Raises:
            TypeError: it is not a plain Python function, or there is no such place.
            ValueError: an optimisation or an amount that there is not.
        """
        options = Options.of(without, memory_budget, padding)
        if not functions:
            if remote is not _AS_WRITTEN:
                checked(remote)
            return lambda decorated: self._experiment(decorated, options, remote)
        (function,) = functions
        return self._experiment(function, options, remote)

    def _experiment(self, function: Callable[..., Any], options: Options, remote: Any) -> Experiment:
        if isinstance(function, (staticmethod, classmethod)):
            kind = type(function)
            return kind(self._experiment(function.__func__, options, remote))  # type: ignore[return-value]
        if isinstance(function, Experiment):
            if options == DEFAULT and remote is _AS_WRITTEN:
                return function
            remote = function._remote if remote is _AS_WRITTEN else remote
            return Experiment(function._function, function._program, function._namespace, options, remote)
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
        follow_autoreload(Experiment)
        return Experiment(function, options=options, remote=remote)

    @staticmethod
    def from_source(text: str, globals: dict[str, Any] | None = None) -> Experiment:
        """An experiment from the text of one function, for where Python keeps no source: `exec`, the bare prompt.

        The `def` itself is executed, as Python would, in `globals` (those of the caller where none are given).
        """
        scope = sys._getframe(1).f_globals if globals is None else globals
        text = textwrap.dedent(text)
        file = f"<from_source {hashlib.sha256(text.encode()).hexdigest()[:8]}>"  # one name for one text
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
