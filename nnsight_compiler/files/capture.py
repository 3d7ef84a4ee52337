"""What an experiment reads from outside of itself, as data: globals, closures, defaults, and all that these hold.

Every object that has an identity of its own (tensors, lists, functions, modules) gets one entry in a table, and is
mentioned by its number, so that what was one object before is one object after. The names of all functions come into
one namespace: those of the experiment keep theirs, those of helpers get others where they would clash.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, final

from torch import nn

from nnsight_compiler.compilation import helper_program, save
from nnsight_compiler.files import vocabulary
from nnsight_compiler.files.cannot import WAY_OUT, CannotCaptureError
from nnsight_compiler.files.classes import Classes, is_library_module, is_plain, is_users
from nnsight_compiler.files.modules import Modules
from nnsight_compiler.files.values import Node, ValueWriter
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ExperimentError
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.serial import to_json
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.runtime.tokens import Listener


@final
class Capture(ValueWriter):
    """One experiment, or the edits of one model (`edits_of`), while it is captured.

    may_be_edited: the model's edits go along by themselves. lifted: says which attributes of objects do.
    objects: the table. programs: every program that goes into the file, by whose it is, with its own span.
    problems: what has no form in a file, one diagnostic each.
    """

    def __init__(
        self,
        edits_of: Any = None,
        prefix: str = "",
        may_be_edited: bool = False,
        lifted: Callable[[Any], bool] | None = None,
    ) -> None:
        super().__init__(prefix)
        self.may_be_edited = may_be_edited
        self.edits_of = edits_of
        self.globals: dict[str, Node] = {}
        self.programs: list[Program] = []
        self.problems: list[Diagnostic] = []
        self.model: Any = None
        self.modules = Modules(self)
        self.classes = Classes(self, lifted)
        self._names: dict[tuple[int, str], str] = {}
        self._taken: set[str] = set(dir(builtins))
        self._places: dict[str, Span] = {}

    # --- functions and their names ---

    def experiment(self, program: Program, globals_: Mapping[str, Any], closure: Mapping[str, CellType]) -> Node:
        """The program of the experiment itself, whose names stay as they are, and its free variables."""
        self.programs.append(program)
        mentioned = _names_of(program)
        for name, scope in mentioned:
            if scope == "global":
                self._taken.add(name)
                self._names[id(globals_), name] = name
                if name in globals_:
                    self.globals[name] = {}  # spoken for, should what another holds mention it
        free: Node = {}
        for (name, scope), span in mentioned.items():
            if scope == "global":
                self._global(name, name, globals_, span, program)
            elif (held := self._cell(closure, name)) is not None:
                free[name] = self._node(held[0], name, name, span)
            elif not _sets(program, name, scope):
                self.problems.append(_unset(name, span))
        return {"program": to_json(program), "closure": free}

    def function(self, function: FunctionType, name: str) -> Node:
        """A helper: its program, with every name from outside a global of the file's namespace, and its defaults."""
        if hasattr(function, "__wrapped__"):
            raise CannotCaptureError(
                f"`{function.__name__}` is wrapped by another decorator, which a file cannot hold",
                "take the decorator off, or put what it does into the function",
            )
        program = helper_program(function)
        defaults = self.defaults(function, name)
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        renamed: dict[tuple[str, str], str] = {}
        for (own, scope), span in _names_of(program).items():
            renamed[own, scope] = self._outside(function.__globals__, closure, own, scope, span, program)
        moved = _renamed(program, renamed)
        self.programs.append(moved)
        return {
            "kind": "function",
            "program": to_json(moved),
            "qualified_name": function.__qualname__,
            "defaults": defaults,
        }

    def defaults(self, function: FunctionType, name: str) -> Node:
        """The defaults of a function's optional parameters, by name."""
        code = function.__code__
        held = function.__defaults__ or ()
        named = dict(zip(code.co_varnames[code.co_argcount - len(held) : code.co_argcount], held, strict=True))
        named.update(function.__kwdefaults__ or {})
        made = {}
        for parameter, default in named.items():
            try:
                made[parameter] = self.value(default, f"{name}.{parameter}")
            except CannotCaptureError as error:
                error.trail = f" (the default of `{parameter}`){error.trail}"
                raise
        return made

    def _outside(
        self,
        globals_: Mapping[str, Any],
        closure: Mapping[str, CellType],
        own: str,
        scope: str,
        span: Span,
        program: Program,
    ) -> str:
        """The name in the file's namespace of a name that a helper takes from around it."""
        if scope == "free":
            cell = closure.get(own)
            key = (id(cell), own)
            if key not in self._names:
                self._names[key] = self._fresh(own)
                held = self._cell(closure, own)
                if held is not None:
                    self.globals[self._names[key]] = self._node(held[0], own, own, span)
                elif not _sets(program, own, scope):
                    self.problems.append(_unset(own, span))
            return self._names[key]
        if own not in globals_ and hasattr(builtins, own) and own not in self.globals:
            return own
        key = (id(globals_), own)
        if key not in self._names:
            self._names[key] = self._fresh(own)
            self._global(self._names[key], own, globals_, span, program)
        return self._names[key]

    def _fresh(self, name: str) -> str:
        number, free = 0, name
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free

    def _global(self, name: str, own: str, globals_: Mapping[str, Any], span: Span, program: Program) -> None:
        if own in globals_:
            self.globals[name] = self._node(globals_[own], own, own, span)
        elif hasattr(builtins, own):
            if name != own:
                self.globals[name] = self._node(getattr(builtins, own), own, own, span)
        elif not _sets(program, own, "global"):
            self.problems.append(_unset(own, span))

    @staticmethod
    def _cell(closure: Mapping[str, CellType], name: str) -> tuple[Any] | None:
        try:
            return (closure[name].cell_contents,)
        except (KeyError, ValueError):
            return None

    def _node(self, held: Any, name: str, path: str, span: Span) -> Node:
        """What a name holds; a diagnostic at its first use where it has no form in a file."""
        self._places.setdefault(name, span)
        try:
            return self.named(held, path)
        except CannotCaptureError as error:
            self.problems.append(Diagnostic(span, f"`{name}`{error.trail}: {error.reason}", error.way_out))
        except CompileError as error:
            self.problems.append(Diagnostic(span, f"`{name}` cannot be compiled, so that no file can hold it"))
            self.problems.extend(error.diagnostics)
        except ExperimentError as error:
            self.problems.append(Diagnostic(span, f"`{name}` cannot be put into a file: {error}", WAY_OUT))
        return {}

    def captured(self, name: str, held: Any, span: Span) -> str:
        """The name of a global of the file that holds what an edit captured."""
        own = name if hasattr(builtins, name) and held is getattr(builtins, name) else self._fresh(name)
        if own != name or not hasattr(builtins, name):
            self.globals[own] = self._node(held, name, name, span)
        return own

    # --- what the modules and classes of an experiment need ---

    def number(self, held: object, entry: Node) -> int:
        """The number of an object whose entry is made elsewhere."""
        if id(held) not in self._numbers:
            self._numbers[id(held)] = len(self.objects)
            self.objects.append(entry)
            self.held.append(held)
        return self._numbers[id(held)]

    def inside(self, held: Any, name: str, path: str) -> Node:
        """The node of an attribute."""
        return self._within(held, f".{name}", path)

    def span_of(self, path: str) -> Span:
        """Where the name that a path begins with stands first."""
        name = path.partition(".")[0].partition("[")[0]
        return self._places.get(name, self.programs[0].span if self.programs else NOWHERE)

    # --- values ---

    def named(self, held: Any, path: str) -> Node:
        """What a name may hold: a value, or what is only called or looked into."""
        if isinstance(held, ModuleType):
            space = vocabulary.space_of(held)
            if space is not None:
                return {"namespace": space.name}
            if sys.modules.get(held.__name__) is held and held.__name__ != "__main__":
                return {"host": f"{held.__name__}:"}
            raise CannotCaptureError(f"it is the module `{held.__name__}`, which cannot be imported by that name")
        try:
            return self.value(held, path)
        except (CannotCaptureError, ExperimentError):
            name = _host_name(held)
            if name is None:
                raise
            return {"host": name}

    def other(self, held: Any, path: str) -> Node | None:
        """Code: what is no plain data, and no object with an entry of its own."""
        if held is save:
            return {"package": "save"}
        if isinstance(held, Listener):
            return {"listener": held.number}
        if is_handle(held):
            return self._handle(held)
        if type(held) is MethodType and (isinstance(held.__self__, nn.Module) or is_plain(type(held.__self__))):
            self.modules.asked.add(held.__name__)
            return {"method": [self.value(held.__self__, path), held.__name__]}
        target = vocabulary.name_of(held)
        return None if target is None else {"known": target}

    def _handle(self, held: Any) -> Node:
        root = held._root
        if self.edits_of is not None and root._base is self.edits_of:
            return {"model": held._path}  # whichever view of it is meant, it is the model that is edited
        if root._edits and not self.may_be_edited:
            raise CannotCaptureError(
                "it is an edited model, and an experiment file holds no edits",
                "make the model a parameter of the experiment, and export its edits: `edited.export_edits(path)`",
            )
        if self.edits_of is not None or (self.model is not None and root is not self.model):
            raise CannotCaptureError(
                "it is a second model, and a file is bound to one when it is loaded",
                "make one of the models a parameter of the experiment",
            )
        self.model = held._root
        return {"model": held._path}

    def _within(self, part: Any, step: str, path: str) -> Node:
        node = super()._within(part, step, path)
        if "model" in node:
            reason = "it is a module of the model, which only a name may stand for"
            error = CannotCaptureError(reason, "give it a name of its own, or make the container in the function")
            error.trail = step
            raise error
        return node

    def other_entry(self, held: Any, path: str) -> Node:
        """The entries of functions, modules, and objects of plain classes."""
        match held:
            case FunctionType() if not is_library(held):
                return self.function(held, path)
            case nn.Module():
                return self.modules.entry(held, path)
            case _:
                reason = _why_no_object(held)
                if reason is not None:
                    raise CannotCaptureError(reason)
                return self.classes.instance(held, path)

    def may_contain_itself(self, held: Any) -> bool:
        """A function may mention itself: its entry says by which name."""
        return isinstance(held, FunctionType)


def _why_no_object(held: Any) -> str | None:
    """Why something is code that no file holds; `None` for an object of some class."""
    if type(held).__name__ == "Experiment" and hasattr(held, "_cache"):
        return "it is another experiment, which has a file of its own"
    if isinstance(held, type):
        return f"it is the class `{held.__qualname__}`, and a file holds no code but that of functions and of objects"
    if callable(held) and not is_users(type(held)) and hasattr(held, "__qualname__"):
        return f"it is the function `{held.__qualname__}`, whose source cannot be taken into a file"
    return None


def is_library(function: FunctionType) -> bool:
    """Whether a function belongs to Python, or to a package that was installed: its source is not taken into a file."""
    return is_library_module(function.__module__ or "", function.__code__.co_filename)


def _host_name(held: Any) -> str | None:
    """`module:name` of a callable that can be imported; `None` for anything else."""
    if not isinstance(held, (FunctionType, BuiltinFunctionType, MethodType, type)) and not callable(held):
        return None
    module, name = getattr(held, "__module__", None), getattr(held, "__qualname__", getattr(held, "__name__", None))
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is held else None


# --- the names of a program ---


def _names_of(program: Program) -> dict[tuple[str, str], Span]:
    """The names that a program takes from around it, with their scope, and where each stands first."""
    found: dict[tuple[str, str], Span] = {}
    for op in program.walk():
        if isinstance(op, (ops.Global, ops.SetGlobal)):
            found.setdefault((op.name, op.scope), op.span)
    return found


def _sets(program: Program, name: str, scope: str) -> bool:
    return any(isinstance(op, ops.SetGlobal) and (op.name, op.scope) == (name, scope) for op in program.walk())


def _unset(name: str, span: Span) -> Diagnostic:
    return Diagnostic(span, f"`{name}` has no value, so that no file can hold it", "give it one before saving")


def _renamed(program: Program, names: Mapping[tuple[str, str], str]) -> Program:
    """The program with its outside names changed, all of them to globals."""

    def change(op: Op) -> Op:
        op = rewrite(op, region=region)
        if isinstance(op, (ops.Global, ops.SetGlobal)):
            return replace(op, name=names[op.name, op.scope], scope="global")
        return op

    def region(held: Region) -> Region:
        return Region(held.parameters, tuple(map(change, held.ops)))

    return replace(program, body=region(program.body))
