"""The globals of a loaded experiment: what must be found before it runs, and which calls it may make."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from types import CellType
from typing import Any, final

from torch import nn

from nnsight_compiler.compilation import GuardedGlobals, save
from nnsight_compiler.files import vocabulary
from nnsight_compiler.files.admission import Findings, admitted, look
from nnsight_compiler.files.document import refuse
from nnsight_compiler.files.kinds import ANYTHING, GIVEN, Computed, Given, HostOp, Instances, Kind, Own, Tree, kind_of
from nnsight_compiler.files.vocabulary import HostName, KnownName, Space, builtin
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import Diagnostic, FileError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span

NOT_KNOWN = "it is not in the table of known calls"
WAY_OUT = (
    "if you trust who wrote the file: Experiment.load(path, allow_host_calls=True), or nnsightc run --allow-host-calls;"
    " such calls may do anything"
)


@final
class Namespace(GuardedGlobals):
    """The globals of every function of one file.

    What only a library, a host call or the model can give is found by `link`, when the experiment first runs.

    programs: every program of the file, the experiment's first. inside: those of functions that stand in a value, so
        that they may be called without being named.
    methods: the programs of captured classes, with the class, or `None` where it takes no object.
    model: the model, where the experiment takes it from around it.
    host_ops: the host calls that can be seen before a model is known.
    given: what the parameters of the experiment may be; where only data is passed, `COMPUTED`.
    """

    def __init__(self, model: Any, allow_host_calls: bool, given: Given | Computed = GIVEN) -> None:
        super().__init__(__name__="experiment_file")
        self.programs: list[Program] = []
        self.inside: list[Program] = []
        self.methods: dict[int, tuple[Program, type | None]] = {}
        self.member_names: set[str] = set()
        self.modules: list[nn.Module] = []
        self.instances: list[object] = []
        self.cells: dict[str, CellType] = {}
        self.allow_host_calls = allow_host_calls
        self.host_ops: tuple[HostOp, ...] = ()
        self.model = model
        self.given = given
        self._waiting: list[tuple[dict[str, Any] | CellType, str, tuple[str, str]]] = []
        self._late: dict[tuple[str, str], Kind] = {}
        self._set: set[tuple[str, str]] = set()
        self._loose: list[Span] = []
        self._methods_found: list[Findings] | None = None
        self._lock = threading.Lock()

    def wait(self, place: dict[str, Any] | CellType, name: str, kind: str, held: str) -> None:
        """Notes that a name is given its value by `link`."""
        self._waiting.append((place, name, (kind, held)))
        late: dict[str, Kind] = {
            "namespace": Space(held),
            "known": KnownName(held),
            "host": HostName(held.replace(":", ".").strip(".")),
            "model": GIVEN,
        }
        self._late[name, "free" if isinstance(place, CellType) else "global"] = late[kind]

    @property
    def needs_model(self) -> bool:
        """Whether the model is a global, or in the closure, and not yet given."""
        return self.model is None and any(kind == "model" for _, _, (kind, _) in self._waiting)

    # --- which calls are made ---

    def check(self) -> None:
        """Finds the host calls that can be seen before a model is known. Refuses programs that read what is nowhere."""
        self._set = {(op.name, op.scope) for program in self.programs for op in program.walk()
                     if isinstance(op, ops.SetGlobal)}  # fmt: skip
        for program in self.programs:
            for op in program.walk():
                if isinstance(op, (ops.Global, ops.SetGlobal)):
                    self._require(op)
        found = [
            look(program, self._kind, True, self.member_names, given=None if number else self.given)
            for number, program in enumerate(self.programs)
            if id(program) not in self.methods
        ]
        self.host_ops = tuple(admitted([*found, *self._of_methods(True)]))

    def _require(self, op: ops.Global | ops.SetGlobal) -> None:
        key = op.name, op.scope
        if key in self._late or key in self._set:
            if op.scope == "free" and op.name not in self.cells:
                refuse(f"the name {op.name!r}", "the file has no such free variable")
            return
        known = op.name in self.cells if op.scope == "free" else op.name in self or builtin(op.name) is not None
        if not known:
            refuse(f"the name {op.name!r}", "nothing in the file, and no builtin, has it")

    def _kind(self, name: str, scope: str) -> Kind:
        """What a name stands for."""
        if (name, scope) in self._set:
            return ANYTHING
        if (name, scope) in self._late:
            return self._late[name, scope]
        if scope == "global" and name not in self:
            found = builtin(name)
            assert found is not None, "`check` has looked"
            return found
        held = self.cells[name].cell_contents if scope == "free" else self[name]
        return Own() if held is save else kind_of(held)

    def _of_methods(self, deferred: bool) -> list[Findings]:
        found = []
        for program, owner in self.methods.values():
            receiver = None if owner is None else self._objects(owner)
            strict = None if deferred else ANYTHING
            found.append(look(program, self._kind, deferred, self.member_names, strict, receiver))
        return found

    def _objects(self, kind: type) -> Kind:
        """The captured objects of a class of the file."""
        if issubclass(kind, nn.Module):
            return Tree(tuple(each for each in self.modules if type(each) is kind))
        return Instances(kind, tuple(each for each in self.instances if type(each) is kind))

    def admit(self, source: Program, specialised: Program) -> None:
        """Refuses a specialised program, before any of it runs, that makes host calls which nobody allowed."""
        if self.allow_host_calls:
            return
        if self._methods_found is None:
            self._methods_found = self._of_methods(False)
        # What is no program of the file's is a part of one: what it is given comes from the parts before it.
        part = source is not self.programs[0]
        found = [look(specialised, self._kind, False, self.member_names, ANYTHING if part else self.given)]
        if found[0].loose:
            self._loose = found[0].loose
        elif part:
            found[0].loose = self._loose
        seen: dict[int, Program] = {}
        waiting = [*self.inside, *(reached for each in (*found, *self._methods_found) for reached in each.reached)]
        while waiting:
            reached = waiting.pop()
            if id(reached) not in seen and id(reached) not in self.methods:
                seen[id(reached)] = reached
                found.append(look(reached, self._kind, False, self.member_names, ANYTHING))
                waiting.extend(found[-1].reached)
        self._refuse(admitted([*found, *self._methods_found]))

    def _refuse(self, calls: Sequence[HostOp]) -> None:
        if calls:
            raise FileError(
                "this file makes calls that are not admitted:",
                [
                    Diagnostic(call.span, f"{call.name}: {NOT_KNOWN}", WAY_OUT if call is calls[-1] else "")
                    for call in calls
                ],
            )

    # --- what names stand for ---

    def link(self) -> None:
        """Gives every name its value. Imports libraries of the closed set; others only where the user allowed it."""
        if not self.allow_host_calls:
            self._refuse(self.host_ops)
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
        if self.model is None:
            raise FileError(
                f"`{name}` is the model, which this file was saved without\n"
                "  way out: give one when loading: Experiment.load(path, model=model), or nnsightc run --model M"
            )
        return self.model[path] if path else self.model
