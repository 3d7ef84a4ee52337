"""Undecorated traces: `with model.trace(…):` in a script, a notebook cell or a function.

On entering the `with`, its source is found, compiled and run, and what it assigned goes back into the frame around it.
Python itself must then not run the body: a trace function raises at its first line, and the `with` swallows that.
"""

from __future__ import annotations

import ctypes
import dis
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, final

from nnsight_compiler.cache import Cache
from nnsight_compiler.compilation import Compiled
from nnsight_compiler.frontend import Block, lower_block
from nnsight_compiler.frontend.cells import cell_name
from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.refusing import Refusing
from nnsight_compiler.runtime.sites import holds_tensor
from nnsight_compiler.runtime.support import UNBOUND
from nnsight_compiler.tracebacks import trimmed

if TYPE_CHECKING:
    from nnsight_compiler.remote.routing import Route


class _Skip(BaseException):
    """Raised at the first line of a body that has been run already."""


class UnsavedValueError(ExperimentError):
    """A value of the model that was not saved, used after its trace."""


@final
class Unsaved(Refusing):
    """Stands for a value of the model that was not saved; its use names the line that made it."""

    __slots__ = ("_name", "_span")

    def __init__(self, name: str, span: Span) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_span", span)

    def __repr__(self) -> str:
        return f"<unsaved value `{self._name}` of {self._span}>"

    def _refuse(self) -> NoReturn:
        raise UnsavedValueError(
            f"{self._span}: `{self._name}` is a value of the model that was not saved, so it is gone after the trace\n"
            f"  way out: save it where it is made: `{self._name} = ….save()`"
        )


@final
class Deleted(Refusing):
    """Stands for a variable that a block deleted, or only it could hold."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __repr__(self) -> str:
        return f"<`{self._name}`, which a trace left without a value>"

    def _refuse(self) -> NoReturn:
        raise UnboundLocalError(f"cannot access local variable '{self._name}' where it is not associated with a value")


@final
@dataclass(frozen=True, slots=True)
class _Site:
    """An undecorated block of some code, with what it was compiled to."""

    block: Block
    cache: Cache


_Key = tuple[CodeType, str, int, int]
"""A place in some code, and the globals that it runs with. Code that is equal may come from two cells."""
_sites: dict[_Key, _Site] = {}
_MOST_SITES = 1000
_lock = threading.Lock()


class Skipped:
    """A context whose body is compiled when a `with` enters it, and which Python then does not run. `does` says what it
    fails to do without `with`."""

    def __init__(self, method: str, does: str) -> None:
        self._entered = False
        self._before: tuple[Any, Any, bool] | None = None
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nnsight_compiler.models"):
            frame = frame.f_back
        if not _opens_with(frame):
            raise ExperimentError(
                f"{cell_name(frame.f_code.co_filename)}:{frame.f_lineno}: `.{method}(…)` without `with` {does}"
            )

    def _enter(self, what: str, frame: FrameType) -> _Key:
        """The place in the code of a frame that enters it."""
        if self._entered:
            raise ExperimentError(f"{what} in the `with` itself")
        self._entered = True
        return frame.f_code, frame.f_code.co_filename, frame.f_lasti, id(frame.f_globals)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._before is not None:
            frame = sys._getframe(1)
            tracing, local, opcodes = self._before
            frame.f_trace, frame.f_trace_opcodes = local, opcodes
            self._before = None
            sys.settrace(tracing)
        return kind is _Skip

    def _skip(self, frame: FrameType, exported: dict[str, Any], bound: Any) -> None:
        """Hands over what the block assigned, and has Python leave the body before its first instruction.

        The instruction that binds what `as` names is the last that the `with` surely covers, so it is bound here.
        """
        for instruction, value in _bindings(frame, bound):
            name = instruction.argval[0] if isinstance(instruction.argval, tuple) else instruction.argval
            if instruction.opname == "STORE_GLOBAL":
                frame.f_globals[name] = value
            elif instruction.opname != "STORE_ATTR":
                exported = {**exported, name: value}
        _write(frame, exported)
        self._before = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes
        frame.f_trace = _leave
        frame.f_trace_opcodes = True
        sys.settrace(lambda *_: None)


def _leave(frame: FrameType, event: str, argument: Any) -> Any:
    """Traces a frame whose `with` has run already: raises at the next instruction."""
    if event == "opcode":
        raise _Skip
    return _leave


@final
class Trace(Skipped):
    """What `model.trace(…)` returns. It runs when a `with` enters it; alone it does nothing."""

    def __init__(
        self, model: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], route: Route | None = None
    ) -> None:
        self._route = route
        self._model, self._method, self._args, self._kwargs = model, method, args, kwargs
        plain = "call the model" if method == "trace" else "save `tracer.result`"
        super().__init__(
            method,
            f"runs nothing\n  way out: write `with model.{method}(…):` and the body below it; for a plain run, {plain}",
        )

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        key = self._enter("a trace runs once: write `model.trace(…)`", frame)
        try:
            site = _sites.get(key) or _enter(key, frame)
            values = self._arguments(site, frame)
            if self._route is not None:
                return self._elsewhere(self._route, site, values, frame)
            compiled = site.cache.get(values)
            results = compiled.plan.run(*values)
        except Exception as error:
            _forget_cell(key)
            error.__traceback__ = trimmed(error)
            raise
        self._skip(frame, exported(site.block.program, compiled, results), self)
        return self

    def _elsewhere(self, route: Route, site: _Site, values: tuple[Any, ...], frame: FrameType) -> Any:
        """Runs the block elsewhere. Where it is not waited for, what `as` names is the handle of its job."""
        from nnsight_compiler.remote.routing import Call, run  # it is built on this module

        names = [parameter.value.name for parameter in site.block.program.parameters]
        given = {name: value for name, value in zip(names, values, strict=True) if value is not UNBOUND}
        result = run(route, Call(site.block.program, site.cache.globals, {}, given))
        if route.blocking:
            self._skip(frame, result, self)
            return self
        self._skip(frame, {}, result)
        return result

    def _arguments(self, site: _Site, frame: FrameType) -> tuple[Any, ...]:
        """The values of the block's parameters: the trace's own, then what the block reads from the frame."""
        held = frame.f_locals
        reads = [held.get(name, UNBOUND) for name in site.block.reads]
        return self._model, self._args, dict(self._kwargs), *reads


def _enter(key: _Key, frame: FrameType) -> _Site:
    """The block that a frame is entering, lowered. The oldest gives way to it where there are many."""
    with _lock:
        block = lower_block(frame)
        found = _sites[key] = _Site(block, Cache(block.program, frame.f_globals, _cells(frame)))
        while len(_sites) > _MOST_SITES:
            del _sites[next(iter(_sites))]
    return found


def _forget_cell(key: _Key) -> None:
    """Forgets a block of a notebook's cell that failed: run again, the cell has another number, and errors say so."""
    found = _sites.get(key)
    if found is not None and found.block.program.span.file != key[1]:
        _sites.pop(key, None)


def _cells(frame: FrameType) -> dict[str, Any]:
    """A block has no free variables of its own: what it reads from functions around it is handed to it."""
    return {}


def exported(program: Program, compiled: Compiled, results: Any) -> dict[str, Any]:
    """What goes back into the frame: names to values. Values that were not saved are stood in for."""
    found: dict[str, Any] = {}
    for name, value in zip(program.exports, results or (), strict=False):
        if name in compiled.unsaved:
            found[name] = Unsaved(name, compiled.unsaved[name])
        elif name in compiled.unsure and holds_tensor(value):
            found[name] = Unsaved(name, compiled.unsure[name])
        else:
            found[name] = value
    return found


def _write(frame: FrameType, values: dict[str, Any]) -> None:
    """Assigns variables of a running frame, and deletes those whose value is `UNBOUND`.

    A variable of a function cannot be deleted from outside since Python 3.12; something that raises takes its place.
    """
    held = frame.f_locals  # asked for once: before 3.13 each access reads all variables anew
    of_function = bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
    for name, value in values.items():
        if value is not UNBOUND:
            held[name] = value
        elif name in held and of_function:
            held[name] = Deleted(name)
        elif name in held:
            del held[name]
    if sys.version_info < (3, 13) and held is not frame.f_globals:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _bindings(frame: FrameType, value: Any) -> Iterator[tuple[dis.Instruction, Any]]:
    """The instructions by which a `with` that a frame is entering binds the value to what `as` names, and the value
    that each binds: a tuple is taken apart."""
    found = _following(frame.f_code, frame.f_lasti)
    if found is not None and found.opname == "UNPACK_SEQUENCE" and isinstance(value, tuple):
        parts = list(value)
        while parts and found is not None:
            found = _following(frame.f_code, found.offset)
            names = found.argval if found is not None and isinstance(found.argval, tuple) else (None,)
            for name in names[: len(parts)]:
                if found is not None:
                    yield found if name is None else found._replace(argval=name), parts.pop(0)
    elif found is not None and found.opname.startswith("STORE_"):
        yield found, value


def _following(code: CodeType, offset: int) -> dis.Instruction | None:
    """The instruction that runs after the one at an offset."""
    for instruction in dis.get_instructions(code):
        if instruction.offset > offset and instruction.opname not in ("CACHE", "NOP", "EXTENDED_ARG"):
            return instruction
    return None


def _opens_with(frame: FrameType) -> bool:
    """Whether the call that a frame is making is the context of a `with`: what follows enters it."""
    following = _following(frame.f_code, frame.f_lasti)
    if following is not None and following.opname == "COPY":  # since 3.14
        following = _following(frame.f_code, following.offset)
    return following is not None and following.opname in ("BEFORE_WITH", "LOAD_SPECIAL")
