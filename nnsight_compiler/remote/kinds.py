"""What a value of a program is, as far as it matters to where it can be, and on which side an op can run.

A value is a name, a module of the model, data, or something that the client alone has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.compilation import helper_program, save
from nnsight_compiler.experiment import Experiment
from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.capture import Capture, is_library
from nnsight_compiler.files.classes import is_plain, is_users
from nnsight_compiler.files.vocabulary import Constant, HostName, KnownName, Space, name_of, space_of
from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.facts import is_handle
from nnsight_compiler.remote.data import holds_modules, is_data
from nnsight_compiler.runtime.tokens import Listener

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, torch.Tensor, torch.dtype, torch.device)
"""Classes whose objects can always be sent."""


class Side(Enum):
    """Where an op runs. What is found later may be a side further down."""

    EITHER = auto()
    NEAR = auto()
    """The client has what it needs, and so has the worker: a tokenizer, say. No reason to split, but a place to."""
    WORKER = auto()
    CLIENT = auto()
    BOTH = auto()
    """It holds ops of both sides: it is gone into."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """A module of the model, or the model."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Helper:
    """A function of the user's, or an experiment, whose program is known."""

    held: FunctionType | Experiment

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Helper) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


@final
@dataclass(frozen=True, slots=True)
class Closed:
    """A closure of the program, by the name of its value."""

    name: str


@final
@dataclass(frozen=True, slots=True)
class Modules:
    """A module of the model of which it is not known which, or something that holds modules."""


@final
@dataclass(frozen=True, slots=True)
class Belonging:
    """What belongs to the model, and is on both sides: its tokenizer, its configuration."""


@final
@dataclass(frozen=True, slots=True)
class Data:
    """What can be sent: tensors, numbers, text, containers of these."""


@final
@dataclass(frozen=True, slots=True)
class Carried:
    """A torch module of the user's, or a part of one, that can be sent with what calls it."""


@final
@dataclass(frozen=True, slots=True)
class ModuleClass:
    """A class of torch modules, whose objects only the client makes."""

    name: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """An object of a plain class of the user's, which can be sent.

    held: the object, where it is known.
    """

    kind: type
    held: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instance) and self.kind is other.kind and self.held is other.held

    def __hash__(self) -> int:
        return hash((self.kind, id(self.held)))


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A method of such an object. `static`: it is not given the object."""

    held: FunctionType
    owner: Instance
    static: bool


@final
@dataclass(frozen=True, slots=True)
class PlainClass:
    """A plain class, whose objects only the client makes."""

    held: type


@final
@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """What the client alone has: an object of another class, what a function of the client's gave.

    held: the object, where it is known.
    """

    held: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Local) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


@final
@dataclass(frozen=True, slots=True)
class Called:
    """A function of the user's, and what its parameters are, by name."""

    held: FunctionType | Experiment
    given: tuple[tuple[str, Kind], ...]


Named = Space | KnownName | Constant | HostName
Kind = (
    Named
    | Handle
    | Helper
    | Closed
    | Modules
    | Belonging
    | Data
    | Carried
    | ModuleClass
    | Instance
    | Method
    | PlainClass
    | Local
)
LISTENER = KnownName("nnsight_compiler.listener")
MODULES, BELONGING, DATA, CARRIED, LOCAL = Modules(), Belonging(), Data(), Carried(), Local()
OF_MODEL = (Handle, Modules)


def kind_of(held: object) -> Kind:
    """What an object is."""
    if is_handle(held):
        return Handle(held)
    if isinstance(held, ModuleType):
        return space_of(held) or HostName(held.__name__)
    if isinstance(held, PLAIN) or is_data(held):
        return DATA
    if holds_modules(held):
        return MODULES
    if held is save:
        return KnownName("nnsight_compiler.save")
    if isinstance(held, Listener):
        return LISTENER
    target = name_of(held)
    if target is not None:
        return KnownName(target)
    if isinstance(held, Experiment) or (isinstance(held, FunctionType) and not is_library(held)):
        try:
            program_of(held)
        except ExperimentError:  # it runs as Python does it
            return HostName(surroundings(held)[0].__qualname__)
        return Helper(held)
    if isinstance(held, type) and issubclass(held, nn.Module):
        return ModuleClass(held.__qualname__)
    if isinstance(held, type) and is_plain(held):
        return PlainClass(held)
    if is_plain(type(held)):
        return Instance(type(held), held) if captured(held) else Local(held)
    if is_users(type(held)) and not isinstance(held, nn.Module):
        return Local(held)
    if isinstance(held, (FunctionType, type)) or (callable(held) and not isinstance(held, (nn.Module, MethodType))):
        return HostName(getattr(held, "__qualname__", type(held).__qualname__))
    if not captured(held):
        return Local(held)
    return CARRIED if isinstance(held, (nn.Module, MethodType)) else DATA


def program_of(held: FunctionType | Experiment) -> Program:
    """The program of a function."""
    return held.ir if isinstance(held, Experiment) else helper_program(held)


def surroundings(held: FunctionType | Experiment) -> tuple[FunctionType, dict[str, CellType]]:
    """The Python function, whose globals are those of the program, and its closure."""
    function = held._function if isinstance(held, Experiment) else held
    return function, dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def captured(held: object) -> bool:
    """Whether an object can be put into a job."""
    return why_not_captured(held) is None


def why_not_captured(held: object) -> str | None:
    """Why an object cannot be put into a job; `None` where it can."""
    capture = Capture()
    try:
        node = capture.named(held, "value")
        capture.modules.finish()
    except CannotCaptureError as error:
        return f"in its `{error.trail}`: {error.reason}" if error.trail else error.reason
    except ExperimentError as error:
        return str(error).partition("\n")[0]
    if capture.problems:
        return capture.problems[0].reason
    return "it is called by its name" if "host" in node else None


def joined(one: Kind | None, other: Kind) -> Kind:
    """What a value is that is the one or the other."""
    if one is None or one == other:
        return other
    if isinstance(one, Instance) and isinstance(other, Instance) and one.kind is other.kind:
        return Instance(one.kind)
    if isinstance(one, OF_MODEL) and isinstance(other, OF_MODEL):
        return MODULES
    plain = (Data, Constant, Carried)
    if isinstance(one, plain) and isinstance(other, plain):
        return DATA
    if Belonging in (type(one), type(other)) and all(isinstance(each, (*plain, Belonging)) for each in (one, other)):
        return BELONGING
    return LOCAL


def together(sides: Iterable[Side]) -> Side:
    """The side of what holds ops of these sides."""
    found = set(sides)
    if Side.BOTH in found or {Side.CLIENT, Side.WORKER} <= found:
        return Side.BOTH
    for side in (Side.CLIENT, Side.WORKER, Side.NEAR):
        if side in found:
            return side
    return Side.EITHER
