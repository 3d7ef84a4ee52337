"""What the compiler knows of a value while it specialises a program, and the guards that make the knowledge safe.

Every value of the source program stands for an `Abstract`: how the specialised program refers to it, and a fact about
it. A fact that rests on an argument or a global is only *relied on* through `Guards`, so that what is never needed is
never guarded on: a new prompt does not recompile, a new layer number does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CellType, ModuleType, NoneType
from typing import Any, Protocol, TypeGuard
from typing import Literal as OneOf

from nnsight_compiler.ir.ops import Closure, Edit
from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.values import Literal, Operand, Value

NO_LOOPS: frozenset[int] = frozenset()
SCALARS = (int, float, complex, bool, str, bytes, NoneType, range, slice, type(...))


class ModuleHandle(Protocol):
    """A module of a wrapped model, as users hold it: `model.layers[3]`. The root's path is empty."""

    @property
    def _root(self) -> ModelHandle: ...
    @property
    def _path(self) -> str: ...
    @property
    def _module(self) -> Any: ...
    @property
    def _shown(self) -> str: ...
    def __getitem__(self, index: Any) -> Any: ...
    def __len__(self) -> int: ...


class ModelHandle(ModuleHandle, Protocol):
    """A wrapped model. `_token` is a number that no other wrapped model of the process has or had, with these edits."""

    _token: int

    @property
    def _edits(self) -> tuple[Any, ...]: ...
    @property
    def _base(self) -> ModelHandle: ...


def is_handle(value: object) -> TypeGuard[ModuleHandle]:
    """Whether a value is a module of a wrapped model; runs none of the value's own code."""
    kind = type(value)
    return inspect.getattr_static(kind, "_path", None) is not None and hasattr(kind, "_module")


def is_constant(value: Abstract) -> bool:
    """Whether a value is a number or a text that the program itself says."""
    return isinstance(value.fact, Known) and value.fact.text is None and type(value.fact.value) in (bool, int, str)


def immutable(value: object) -> bool:
    """Whether a value can never change: numbers, strings, ranges, and tuples of such."""
    if isinstance(value, tuple):
        return all(map(immutable, value))
    return isinstance(value, SCALARS) or (
        type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device")
    )


# --- facts ---


@dataclass(frozen=True, slots=True)
class Known:
    """The value itself. `text` is the Python expression over the arguments and globals that gives it at each call;
    `None` for a constant. `anchor` is the part of it whose identity stands for the whole (`torch` of
    `torch.softmax`)."""

    value: Any
    text: str | None = None
    anchor: tuple[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SiteModule:
    """A module of a model. `model` is the value of the specialised program that holds the model; `step` the step of a
    generation that is meant, where `.next()` named one; `edits` are those that the program itself makes."""

    handle: Any
    model: Value
    text: str
    step: int | None = None
    edits: tuple[OwnEdit, ...] = ()

    @property
    def torch_module(self) -> str:
        """The Python expression that gives the torch module at each call."""
        return f"{self.text}._root._module.get_submodule({self.handle._path!r})"


@dataclass(frozen=True, slots=True, eq=False)
class OwnEdit:
    """An edit that the program makes, with the values that its body sees."""

    op: Edit
    scope: dict[Value, Abstract]
    frame: Frame


@dataclass(frozen=True, slots=True)
class SiteCalls:
    """`module.calls`, or one of them with `call`."""

    module: SiteModule
    call: int | None = None


@dataclass(frozen=True, slots=True)
class Tracer:
    """What `with model.trace(…) as tracer` binds."""

    forward: Value


@dataclass(frozen=True, slots=True)
class OpenSession:
    """What `with model.session() as session` binds."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What `tracer.cache(…)` gives: filled while the forward runs, and read after it."""

    forward: Value


@dataclass(frozen=True, slots=True)
class StepRange:
    """Steps of the generation that a tracer stands for: these numbers, or those from `start` to `stop` (open-ended
    where it is `None`)."""

    forward: Value
    start: int = 0
    stop: int | None = None
    numbers: tuple[int, ...] | None = None


@dataclass(slots=True)
class Elements:
    """A container that the program itself made, element by element known. `items` becomes `None` when it is no longer
    followed; `loops` are then the loops whose unrolling would keep it known, and `at_run` tells whether it held values
    that only a run gives, `held` whether these were of the model. `saved`: whether the user said `.save()`."""

    kind: OneOf["tuple", "list", "dict"]
    items: list[Abstract] | None
    keys: list[Abstract] = field(default_factory=list)
    loops: frozenset[int] = NO_LOOPS
    at_run: bool = False
    saved: bool = False
    held: bool = False
    size: int = field(init=False)
    """How much there is in it, what it holds several times counted as often."""

    def __post_init__(self) -> None:
        self.size = 1 + sum(map(size_of, self.items or ()))

    @property
    def holds_values(self) -> bool:
        """Whether it holds, or may hold, values of the model."""
        return self.held or any(item.live or holds_values(item.fact) for item in self.items or ())

    @property
    def mutable(self) -> bool:
        return self.kind != "tuple"

    def forget(self, loops: frozenset[int] = NO_LOOPS) -> None:
        """Stops following the container, and what it contains, unless it cannot change."""
        if self.items is None:
            self.loops |= loops
            return
        items, self.held = self.items, self.holds_values
        self.at_run = any(item.at_run for item in items)
        if self.mutable:
            self.items, self.loops = None, self.loops | loops
        for item in items:
            if isinstance(item.fact, Elements):
                item.fact.forget(loops)


def size_of(value: Abstract) -> int:
    """How much there is in a value: containers may hold one another many times over."""
    return value.fact.size if isinstance(value.fact, Elements) else 1


def holds_values(fact: Fact) -> bool:
    """Whether what is iterated holds, or may hold, values of the model."""
    match fact:
        case Elements():
            return fact.holds_values
        case Iteration(bases=bases):
            return any(base.live or holds_values(base.fact) for base in bases)
    return False


@dataclass(frozen=True, slots=True)
class Method:
    """An attribute of a value that only the run can give, as it is when called."""

    receiver: Abstract
    name: str


@dataclass(frozen=True, slots=True)
class Function:
    """A closure of the program, with the values that it sees."""

    closure: Closure
    scope: dict[Value, Abstract]
    frame: Frame


@dataclass(frozen=True, slots=True)
class Iteration:
    """`enumerate`, `zip`, `reversed`, `tqdm` of other values, and `keys`, `values`, `items` of a known dict:
    transparent when iterated."""

    kind: OneOf["enumerate", "zip", "reversed", "same", "keys", "values", "items"]
    bases: tuple[Abstract, ...]
    start: int = 0


Fact = (
    Known | SiteModule | SiteCalls | Tracer | OpenSession | Recording | StepRange | Elements | Method | Function
    | Iteration | None
)  # fmt: skip


@dataclass(slots=True)
class Abstract:
    """A value of the source program.

    operand: what stands for it in the specialised program; `None` where nothing can (a function that touches the
    model),
        or where `make` emits it at each use, since a use may never come (`range(3)` of a loop that is unrolled).
    loops: the rolled loops that it changes with.
    live: 2 where it is a value of the model that was not saved, 1 where only the run can tell, 0 where it is not.
    at_run: whether it comes from a forward or from code that the compiler does not know, so that no unrolling helps.
    """

    operand: Operand | None
    fact: Fact = None
    loops: frozenset[int] = NO_LOOPS
    live: int = 0
    span: Span = NOWHERE
    at_run: bool = False
    make: Callable[[], Operand] | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a function's names come from: the program's own function, or a helper that is being inlined.

    texts: prefix for the texts of its globals and free variables; empty for the program's own globals.
    override: the span that ops of a helper from another file are given, so that errors show the user's own line.
    """

    globals: Mapping[str, Any]
    closure: Mapping[str, CellType]
    name: str
    own: bool
    override: Span | None = None


# --- guards ---

GuardKind = OneOf["value", "identity", "model", "length", "condition"]


@dataclass(frozen=True, slots=True)
class Guard:
    """A fact that a specialised program rests on: the value (or its identity or length) of an expression. A `condition`
    is what an optimisation rests on."""

    text: str
    kind: GuardKind
    value: Any

    def __str__(self) -> str:
        match self.kind:
            case "value":
                return f"{self.text}={self.value!r}"
            case "length":
                return f"len({self.text})={self.value}"
            case "identity":
                return f"{self.text} is {getattr(self.value, '__name__', type(self.value).__name__)}"
            case "model":
                return f"{self.text} is this model"
            case "condition":
                return f"{self.text} stays as it is"

    @property
    def key_text(self) -> str:
        """The expression whose value tells whether the guard holds."""
        match self.kind:
            case "value":
                return f"({self.text}).__class__, {self.text}"
            case "length":
                return f"len({self.text})"
            case "identity":
                return f"id({self.text})"
            case "model":
                return f"{self.text}._token"
            case "condition":
                return self.text


@dataclass(slots=True)
class Guards:
    """The guards collected so far. `objects` are what texts may name besides arguments and globals."""

    guards: dict[tuple[str, GuardKind], Guard] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)

    def add(self, text: str, kind: GuardKind, value: Any) -> None:
        self.guards.setdefault((text, kind), Guard(text, kind, value))

    def name(self, value: Any, hint: str) -> str:
        """A name by which texts can mention an object."""
        for name, held in self.objects.items():
            if held is value:
                return name
        name = f"_{hint}_{len(self.objects)}"
        self.objects[name] = value
        return name

    def rely_on_identity(self, known: Known) -> None:
        """Relies on what a callable or module is."""
        if known.text is not None:
            text, value = known.anchor or (known.text, known.value)
            self.add(text, "identity", value)

    def rely_on_definition(self, known: Known) -> None:
        """Relies on what a function is and does: a reload may put new code and new defaults into the old function."""
        self.rely_on_identity(known)
        text = self.name(known.value, "function") if known.text is None else known.text
        for attribute in ("__code__", "__defaults__", "__kwdefaults__"):
            self.add(f"{text}.{attribute}", "identity", getattr(known.value, attribute))


def constant(value: Any) -> Abstract:
    """A value that the source spells out."""
    return Abstract(Literal(value) if isinstance(value, (*SCALARS[:7], type(...))) else None, Known(value))


def anchored(value: Any, text: str, parent: Known | None = None) -> Known:
    """What an expression gives; a Python module is the anchor of what is found in it (`parent`)."""
    if python_module(value) and (parent is None or parent.anchor is None):
        return Known(value, text, (text, value))
    return Known(value, text, None if parent is None else parent.anchor)


def python_module(value: object) -> TypeGuard[ModuleType]:
    return isinstance(value, ModuleType)
