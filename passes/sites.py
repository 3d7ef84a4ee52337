"""The sites of a model, as passes see them: in which order its modules run, and where in it an access has its place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf
from typing import Protocol

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Port, Region
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.values import Module

PlacePort = OneOf["output", "skip", "input", "result"]

RESULT = 1 << 62
"""The time of what a generation returns: after everything."""

ATTENTION_VALUES = ("pattern", "scores", "q", "k", "v", "z")
"""What attention modules compute, by names that are the same on every architecture."""


class ModuleEvent(Protocol):
    """A module receives its arguments (`input`) or returns (`output`), for the `call`-th time in the forward."""

    @property
    def path(self) -> str: ...
    @property
    def port(self) -> str: ...
    @property
    def call(self) -> int: ...


class Order(Protocol):
    """When the modules of a model, and the operations inside of them that a program names, run within one forward.

    events: every event, in order.
    how: how that was found out: `registered` if it is only assumed.
    draws: the path of a module that drew random numbers, or changed a buffer of its own; empty where none did.
    keeps: the path of a module that changed an attribute of its own; empty where none did.
    effects: the modules whose calls did more than return.
    """

    @property
    def events(self) -> Sequence[ModuleEvent]: ...
    @property
    def how(self) -> str: ...
    @property
    def draws(self) -> str: ...
    @property
    def keeps(self) -> str: ...
    @property
    def effects(self) -> Collection[str]: ...

    def time(self, path: str, port: OneOf["output", "input"], call: int = 0) -> int:
        """The place of an event in the forward. Raises `KeyError` where it does not happen."""

    def count(self, path: str) -> int:
        """How often a module runs."""

    def pieces(self, path: str, port: OneOf["output", "input"], call: int = 0) -> Collection[int]:
        """Numbers of the pieces of memory behind the tensors at an event."""

    def is_changed_later(self, path: str, port: OneOf["output", "input"], call: int = 0) -> bool:
        """Whether the model writes in place to a tensor that stood there."""

    def is_tensor(self, path: str, port: OneOf["output", "input"], call: int = 0) -> bool:
        """Whether a single tensor stands there."""

    def within(self, path: str, call: int = 0) -> Mapping[str, int]:
        """How often each module runs inside one call of a module."""

    def begins_after(self, path: str, port: OneOf["output", "input"], call: int = 0) -> str | None:
        """The first module that begins to run after an event; `None` where none does."""

    def why_not(self, path: str) -> tuple[str, str] | None:
        """Why an operation cannot be addressed, and the way out; `None` where it only does not run."""

    def beginnings(
        self, path: str, port: OneOf["output", "input"], call: int, first: bool
    ) -> Sequence[tuple[str, Port, int, int]]:
        """Where the tensors at an event (at an input, those of the `first` argument alone) stood first, and what the
        module that made them was given: path, port, call, and the number of the tensor in what stands there."""

    def giver(self, path: str, port: OneOf["output", "input"], part: str = "") -> str | None:
        """The module whose very output stands at an event (at an input, as the first argument), or is the `part` of
        that name of a mapping there; each of the two runs once. `None` where there is none."""


Orders = Callable[[ops.Forward], Order]
"""Gives the order in which the model of a forward runs its modules."""


@dataclass(frozen=True, slots=True)
class Place:
    """A site, at its time in the forward. `call` is `None` for a module that runs once. Times of inputs and outputs are
    even; a module is skipped just after its input."""

    path: str
    port: PlacePort
    call: int | None
    time: int


def event_port(port: str) -> PlacePort:
    """Where a port lives: `input` and `inputs` are the same event."""
    match port:
        case "output" | "skip" | "result":
            return port
        case _:
            return "input"


def place_of(op: ops.Read | ops.Write | ops.Skip, order: Order) -> Place:
    """The site that an access names.

    Raises:
        CompileError: the module does not run, runs several times, or not as often as asked for.
    """
    assert isinstance(op.module, Module), "places are asked for after specialise"
    port = event_port("skip" if isinstance(op, ops.Skip) else op.port)
    return locate(op.module.path, port, op.call, op.span, order)


def locate(path: str, port: PlacePort, call: int | None, span: Span, order: Order) -> Place:
    """The place of a site in the forward; errors point to `span`."""
    if port == "result":
        return Place(path, port, None, RESULT)
    count = order.count(path)
    name = path or "the model"
    inner = path.rpartition(":")[2]
    access = inner if inner in ATTENTION_VALUES and ":" in path else port
    if count == 0 and ":" in path:
        raise CompileError([_no_operation(path, span, order)])
    if count == 0:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is never called in this forward",
                    "its values do not exist there; address a module that runs, such as one around it or inside it",
                )
            ]
        )
    if call is None and count > 1:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is called {count} times in one forward",
                    f"say which call is meant: `.calls[0].{access}` to `.calls[{count - 1}].{access}`",
                )
            ]
        )
    if call is not None and not -count <= call < count:
        raise CompileError(
            [
                Diagnostic(
                    span,
                    f"`{name}` is called {count} times in one forward; there is no call {call}",
                    f"calls count from 0 to {count - 1}",
                )
            ]
        )
    number = 0 if call is None else call % count
    time = 2 * order.time(path, "input", number) + 1 if port == "skip" else 2 * order.time(path, port, number)
    return Place(path, port, None if count == 1 else number, time)


def _no_operation(path: str, span: Span, order: Order) -> Diagnostic:
    told = order.why_not(path)
    if told is not None:
        return Diagnostic(span, *told)
    module, _, name = path.rpartition(":")
    if name in ATTENTION_VALUES:
        return Diagnostic(
            span,
            f"`{path}` is never computed in this forward: `{module}` takes another way on these inputs",
            f"`print(….source)` of `{module}` shows its operations, which can be read and written",
        )
    return Diagnostic(
        span,
        f"`{path}` is never run in this forward",
        "its lines are not reached on these inputs; address an operation that runs",
    )


def operations(region: Region) -> frozenset[str]:
    """The paths of the operations inside of modules that a specialised program reads and writes."""
    accesses = (op for op in walk(region) if isinstance(op, (ops.Read, ops.Write, ops.Skip)))
    paths = (op.module.path for op in accesses if isinstance(op.module, Module))
    return frozenset(path for path in paths if ":" in path)


def forwards(region: Region) -> Iterator[ops.Forward]:
    """Every forward of a program."""
    return (op for op in walk(region) if isinstance(op, ops.Forward))
