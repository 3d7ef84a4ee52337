"""What one forward of a model did: which modules ran, in which order, and what stood where they met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal as OneOf
from typing import final

from torch import nn

from nnsight_compiler.ir.ops import Port
from nnsight_compiler.ir.types import TensorType

Kind = OneOf["tensor", "tuple", "mapping", "other"]


@final
@dataclass(frozen=True, slots=True)
class Event:
    """A module receives its arguments (`input`) or returns (`output`), for the `call`-th time in the forward."""

    path: str
    port: OneOf["input", "output"]
    call: int


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """A tensor at an event.

    number: which leaf it is of what stood there; at an input, of the pair of arguments.
    first: where it stood first, and as which leaf.
    given: the input of the call in which it was made, where the first argument of that is a tensor that can have a
        gradient.
    is_first: at an input, whether it is, or is in, the first argument.
    """

    number: int
    first: tuple[Event, int]
    given: Event | None
    is_first: bool


@final
@dataclass(frozen=True, slots=True)
class Observation:
    """What one forward did.

    events: in the order in which they happened; each module under the first of its paths.
    calls: how often each module ran; modules that did not run are absent.
    how: whether the tensors were fake or real; `reason` says why they could not be fake.
    kind: what stood at each event: a tensor, a tuple (or list), a mapping, or something else. At an input that is the
        first argument.
    shape: for each event at which a tensor stood, its dtype and shape.
    mutated_later: the events at which a tensor stood that the model wrote to in place afterwards.
    tensors: for each event, the floating-point tensors that stood there.
    since: for each event at which a tensor stood (of a tuple, its first), when that same tensor stood anywhere first.
    handed: which tensor that a module returned stands at an event, in the very shape and unchanged: the first argument
        at an input, the value itself at an output, and by their names (or numbers) the entries of a mapping there.
    refused: the operations that were asked for and are none, each with the reason and the way out.
    recomputed: the attention modules whose attention was computed anew, for its pattern or scores.
    draws: the path of a module that drew random numbers, or changed a buffer of its own; empty where none did.
    keeps: the path of a module that changed an attribute of its own; empty where none did.
    effects: the modules whose calls did more than return: they changed something that they were given, or an
        attribute of their own.
    memory: for each event, numbers of the pieces of memory behind the tensors that stood there.
    """

    events: tuple[Event, ...]
    calls: Mapping[str, int]
    how: OneOf["fake", "real", "registered"]
    reason: str = ""
    kind: Mapping[Event, Kind] = field(default_factory=dict)
    shape: Mapping[Event, TensorType | None] = field(default_factory=dict)
    mutated_later: frozenset[Event] = frozenset()
    tensors: Mapping[Event, tuple[Standing, ...]] = field(default_factory=dict)
    since: Mapping[Event, int] = field(default_factory=dict)
    handed: Mapping[tuple[Event, str], Event] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    recomputed: frozenset[str] = frozenset()
    draws: str = ""
    keeps: str = ""
    effects: frozenset[str] = frozenset()
    memory: Mapping[Event, frozenset[int]] = field(default_factory=dict)
    _times: dict[Event, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_times", {event: time for time, event in enumerate(self.events)})

    def time(self, path: str, port: OneOf["input", "output"], call: int = 0) -> int:
        """The place of an event in `events`. Raises `KeyError` where it did not happen."""
        return self._times[Event(path, port, call)]

    def count(self, path: str) -> int:
        """How often a module ran."""
        return self.calls.get(path, 0)

    def begins_after(self, path: str, port: OneOf["input", "output"], call: int = 0) -> str | None:
        """The first module that begins to run after an event; `None` where none does."""
        later = self.events[self.time(path, port, call) + 1 :]
        return next((event.path for event in later if event.port == "input" and ":" not in event.path), None)

    def pieces(self, path: str, port: OneOf["input", "output"], call: int = 0) -> frozenset[int]:
        """Numbers of the pieces of memory behind the tensors at an event."""
        return self.memory.get(Event(path, port, call), frozenset())

    def is_changed_later(self, path: str, port: OneOf["input", "output"], call: int = 0) -> bool:
        """Whether the model wrote in place to a tensor that stood there."""
        return Event(path, port, call) in self.mutated_later

    def is_tensor(self, path: str, port: OneOf["input", "output"], call: int = 0) -> bool:
        """Whether a single tensor stood there."""
        return self.kind.get(Event(path, port, call)) == "tensor"

    def within(self, path: str, call: int = 0) -> Mapping[str, int]:
        """How often each module ran inside one call of a module."""
        start, end = self.time(path, "input", call), self.time(path, "output", call)
        return Counter(event.path for event in self.events[start + 1 : end] if event.port == "input")

    def beginnings(
        self, path: str, port: OneOf["input", "output"], call: int, first: bool
    ) -> list[tuple[str, Port, int, int]]:
        """Where the tensors at an event (at an input, those of the `first` argument alone) stood first, and what the
        module that made them was given: path, port, call, and the number of the tensor in what stands there."""
        event = Event(path, port, call)
        found: dict[tuple[str, Port, int, int], None] = {}
        for tensor in self.tensors.get(event, ()):
            if port == "input" and first and not tensor.is_first:
                continue
            if tensor.given is not None:
                found[tensor.given.path, "input", tensor.given.call, 0] = None
            start, number = tensor.first
            if start != event:
                found[start.path, "inputs" if start.port == "input" else "output", start.call, number] = None
        return list(found)

    def giver(self, path: str, port: OneOf["input", "output"], part: str = "") -> str | None:
        """The module whose very output stands at an event (at an input, as the first argument), or is the `part` of
        that name of a mapping there; each of the two runs once. `None` where there is none."""
        made = self.handed.get((Event(path, port, 0), part))
        once = made is not None and self.count(path) == self.count(made.path) == 1
        return made.path if made is not None and once else None

    def why_not(self, path: str) -> tuple[str, str] | None:
        """Why an operation cannot be addressed, and the way out; `None` where it only did not run."""
        if self.how == "registered":
            return (
                "which operations a module runs is seen by running it once, and no input is known here to do so with",
                "give the model's input as an argument of the experiment",
            )
        return self.refused.get(path)


def registered(module: nn.Module) -> Observation:
    """The order in which modules are registered, each running once: what is assumed where no forward was observed."""
    events: list[Event] = []

    def visit(part: nn.Module, path: str, seen: set[nn.Module]) -> None:
        seen.add(part)
        events.append(Event(path, "input", 0))
        for name, child in part.named_children():
            if child not in seen:
                visit(child, f"{path}.{name}" if path else name, seen)
        events.append(Event(path, "output", 0))

    visit(module, "", set())
    return Observation(tuple(events), {event.path: 1 for event in events}, "registered", draws="the model")
