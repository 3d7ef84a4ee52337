"""The closed set of Python that a file may name: namespaces, known calls, constants of torch, a few classes.

A file holds no code and no reference to any, but names out of this set. What is not in it is a host call, which a file
can only mention: its calls are made after the user has said so, and never by loading.
"""

from __future__ import annotations

import builtins
import collections
import copy
import gc
import heapq
import importlib
import itertools
import logging
import math
import operator
import pprint
import random
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, final

import torch
import torch.nn.functional

from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.passes.known_calls import ALL, callable_of, known_function

_STANDARD = (
    builtins, collections, copy, gc, heapq, itertools, logging, math, operator, pprint, random, time, traceback,
    warnings,
)  # fmt: skip
_TORCH = ("torch", "torch.nn", "torch.nn.functional", "torch.special", "torch.linalg", "torch.fft", "torch.cuda",
          "torch.cuda.amp", "torch.amp", "torch.random", "torch.nn.init", "torch.nn.utils", "torch.nn.utils.rnn",
          "torch.optim", "torch.optim.lr_scheduler", "torch.autograd")  # fmt: skip
_OTHERS = ("tqdm", "tqdm.auto", "tqdm.std", "tqdm.notebook", "tqdm.asyncio", "einops", "numpy", "numpy.linalg",
           "numpy.random")  # fmt: skip
"""Libraries that may not be there, or not be loaded: imported when an experiment that needs them first runs."""

NAMESPACES = frozenset([*(module.__name__ for module in _STANDARD), *_TORCH, *_OTHERS])
"""The Python modules that a file may name, to take something out of them; never as values."""

CLASSES = frozenset(
    words(
        "torch.Tensor torch.dtype torch.device torch.Size torch.Generator torch.nn.Module torch.nn.Parameter "
        "torch.FloatTensor torch.LongTensor builtins.object builtins.BaseException builtins.KeyboardInterrupt"
    )
)
"""Classes without a row in the table of known calls that `isinstance` and `except` may be given."""

DENIED = frozenset(
    words(
        "torch.from_file torch.load torch.save torch.nn.Module.__call__ builtins.vars builtins.open builtins.input "
        "numpy.load numpy.save numpy.savez numpy.savez_compressed numpy.fromfile numpy.loadtxt numpy.savetxt "
        "numpy.genfromtxt numpy.memmap operator.attrgetter operator.methodcaller logging.getLogger "
        "torch.set_num_threads torch.set_num_interop_threads torch.set_default_device torch.set_default_tensor_type "
        "torch.set_printoptions torch.set_flush_denormal torch.set_warn_always torch.set_anomaly_enabled "
        "torch.set_deterministic_debug_mode torch.set_float32_matmul_precision torch.set_autocast_enabled "
        "torch.set_autocast_dtype torch.set_autocast_cache_enabled torch.use_deterministic_algorithms "
        "torch.cuda.set_device numpy.set_printoptions numpy.seterr numpy.setbufsize numpy.empty numpy.empty_like"
    )
)
"""What no file may call, whatever the table says of it: it reaches files, the insides of objects, or what outlives a
run: settings, loggers, the memory that numpy keeps of arrays."""

IN_SIGHT = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr", "setattr", "delattr", "type"))
"""Known calls that look up what a text names, or make classes. A file may only call them by their names, where it can
be seen with what: they are no values."""

DENIED_METHODS = frozenset({"tofile", "dump", "apply_", "map_", "map2_", "module_load"})
"""The same, of methods."""

DUNDERS = frozenset({"__class__", "__name__", "__qualname__", "__len__", "__getitem__", "__iter__"})
"""The only names of this form that a file may ask an object for."""

_FRAMES = ("gi_", "cr_", "ag_", "tb_", "f_", "co_", "func_")
_FRAME_NAMES = frozenset(
    f"{prefix}{name}"
    for prefix in _FRAMES
    for name in words("frame code globals builtins locals back lasti trace next yieldfrom await closure defaults")
)


_MODULE_INSIDES = frozenset(vars(torch.nn.Module())) - {"training"}
"""Where torch keeps the parts and the hooks of a module."""


def allowed_attribute(name: str) -> bool:
    """Whether a file may ask an object for this attribute. Those of frames and most dunders lead out of its values."""
    if name.startswith("__") and name.endswith("__"):
        return name in DUNDERS
    return name not in _FRAME_NAMES and name not in _MODULE_INSIDES and name != "mro"


@final
@dataclass(frozen=True, slots=True)
class Space:
    """A Python module of the closed set."""

    name: str


@final
@dataclass(frozen=True, slots=True)
class KnownName:
    """A known call, or a class, by its name on the wire."""

    target: str


@final
@dataclass(frozen=True, slots=True)
class Constant:
    """A constant of a namespace: `math.pi`, `torch.float32`."""

    value: Any


@final
@dataclass(frozen=True, slots=True)
class HostName:
    """Something outside of the closed set, by the name that an import statement would give it."""

    name: str


Named = Space | KnownName | Constant | HostName
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)


def space_of(module: ModuleType) -> Space | None:
    """The namespace that a module is, if the set has it: by identity, so that a module which only bears the name is
    none."""
    name = module.__name__
    return Space(name) if name in NAMESPACES and sys.modules.get(name) is module else None


def name_of(value: object) -> str | None:
    """The name on the wire of a callable or a class of the set."""
    known = known_function(value)
    if known is not None and known.target not in DENIED:
        return known.target
    return _classes().get(id(value))


@cache
def _classes() -> dict[int, str]:
    return {id(held): name for name in _class_names() if (held := _walk(name)) is not None}


@cache
def _class_names() -> frozenset[str]:
    exceptions = (
        f"builtins.{name}" for name, held in vars(builtins).items()
        if isinstance(held, type) and issubclass(held, BaseException)
    )  # fmt: skip
    return CLASSES | frozenset(exceptions)


def _walk(name: str) -> object | None:
    """What stands behind a dotted name, among the modules that are loaded."""
    module, _, rest = name.partition(".")
    found: object = sys.modules.get(module)
    for part in rest.split("."):
        found = getattr(found, part, None)
    return found


def is_target(name: str) -> bool:
    """Whether a name on the wire is that of a known call or class which a file may name."""
    if name.startswith(("method.", "torch.ops.", "torch.hub.")) or name in DENIED:
        return False
    return name in _class_names() or name in ALL


def resolve(target: str) -> object | None:
    """The object behind a name on the wire that `is_target` accepts, if its module is loaded."""
    if target in _class_names():
        return _walk(target)
    return callable_of(target)


def member(space: Space, name: str) -> Named:
    """What `name` of a namespace is. Looks it up among what is loaded, and imports nothing."""
    whole = f"{space.name}.{name}"
    if whole in NAMESPACES:
        return Space(whole)
    if is_target(whole):
        return KnownName(whole)
    module = sys.modules.get(space.name)
    if module is None or name not in vars(module):
        return HostName(whole)
    held = vars(module)[name]
    if type(held) in _CONSTANTS:
        return Constant(held)
    known = name_of(held)  # another name for the same, such as `torch.functional.einsum`
    return HostName(whole) if known is None else KnownName(known)


def part(target: str, name: str) -> Named:
    """What `name` of a class of the set is: `torch.Tensor.softmax`, `dict.fromkeys`."""
    whole = f"{target}.{name}"
    return KnownName(whole) if is_target(whole) else HostName(whole)


def builtin(name: str) -> Named | None:
    """What a builtin name is; `None` where Python has no such name, or only for itself (`__import__`)."""
    if not hasattr(builtins, name) or name.startswith("__"):
        return None
    held = getattr(builtins, name)
    if held is NotImplemented or held is Ellipsis:
        return Constant(held)
    return member(Space("builtins"), name)


def load(name: str) -> ModuleType:
    """The module of a namespace, imported if it is not there yet. Raises `ModuleNotFoundError` where none is."""
    assert name in NAMESPACES
    return importlib.import_module(name)
