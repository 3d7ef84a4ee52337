"""Captured classes of the user's, and the objects of plain ones: methods as programs, attributes by their names.

    class Scaler:                                  class     Scaler, base "builtins.object",
        def __init__(self, factor): …    ──▶                 apply: a method, which is a program
        def apply(self, h): …                      instance  of that class, factor: 3.0
    scaler = Scaler(3.0)

Of a class a file holds the methods that some program of the file mentions by name, each lowered to a program as helpers
are; a class is not more than these once it is loaded. An object is never made by calling its class: what `__init__` has
left of it is what a file holds.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, final

from torch import nn

from nnsight_compiler.files.cannot import WAY_OUT, CannotCaptureError
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ExperimentError
from nnsight_compiler.passes.behaviour import words

if TYPE_CHECKING:
    from nnsight_compiler.files.capture import Capture
    from nnsight_compiler.files.values import Node

OF_FILES = "experiment_file"
"""The `__module__` of classes that a file has made."""
OBJECT = "builtins.object"
"""The base of plain classes."""
METHODS = frozenset({"__len__", "__getitem__", "__iter__", "__contains__"})
"""The methods of this form that a captured class of modules may define."""
PLAIN_METHODS = METHODS | {"__call__"}
"""The same, of a plain class."""
_BY_PYTHON = frozenset(
    words(
        "__init__ __doc__ __module__ __annotations__ __dict__ __weakref__ __qualname__ __static_attributes__ "
        "__firstlineno__ __annotate__ __annotate_func__ __annotations_cache__"
    )
)
_IGNORED = _BY_PYTHON | frozenset(
    words("__repr__ __str__ __parameters__ __orig_bases__ __constants__ __jit_unused_properties__ __hash__")
)
"""What a class of modules may define besides: nothing of it takes part in a forward."""
HELD = (
    "a file holds tensors, numbers, strings, tuples, lists, dicts, sets, torch modules, functions, and objects of"
    " classes that are plain"
)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)

TORCH_CLASSES: dict[str, type[nn.Module]] = {
    f"torch.nn.{name}": held
    for name, held in vars(nn).items()
    if isinstance(held, type) and issubclass(held, nn.Module) and held.__name__ == name
}
"""Torch's own modules, by their public names."""
# A part of `torch.nn.MultiheadAttention` without a public name.
TORCH_CLASSES["torch.nn.NonDynamicallyQuantizableLinear"] = nn.modules.linear.NonDynamicallyQuantizableLinear


def torch_class(kind: type) -> str | None:
    """`torch.nn.Linear`, where a class is one of torch's own modules."""
    name = f"torch.nn.{kind.__name__}"
    return name if TORCH_CLASSES.get(name) is kind else None


def is_library_module(name: str, file: str) -> bool:
    """Whether a Python module is one of Python's, or of a package that was installed: nothing of its source is taken
    into a file."""
    top = name.partition(".")[0]
    return (
        (top in sys.stdlib_module_names and top != "__main__")
        or top in ("torch", "transformers", "nnsight_compiler")
        or any(folder in file for folder in ("site-packages", "dist-packages"))
    )


def is_users(kind: type) -> bool:
    """Whether a class is written by the user, and of no library."""
    module = sys.modules.get(kind.__module__)
    return not is_library_module(kind.__module__, getattr(module, "__file__", None) or "")


def is_plain(kind: type) -> bool:
    """Whether a file can hold objects of a class: the user's own, of methods and constants alone."""
    return why_not_plain(kind) is None


def why_not_plain(kind: type) -> tuple[str, str] | None:
    """Why a file holds no objects of a class, and a way out; `None` where it does.

    What Python would run by itself, or look up in another way than by the name, is refused.
    """
    if not is_users(kind):
        return f"it is an object of class `{kind.__qualname__}`, and {HELD}", WAY_OUT
    foreign = next((each for each in kind.__mro__[:-1] if not is_users(each)), None)
    if foreign is not None:
        base = f"{foreign.__module__}.{foreign.__qualname__}"
        return f"its class `{kind.__qualname__}` inherits from `{base}`", "use one that inherits from nothing"
    for each in kind.__mro__[:-1]:
        if type(each) is not type:
            return (
                f"its class `{each.__qualname__}` has the metaclass `{type(each).__qualname__}`",
                "write the class without a metaclass",
            )
        for name in vars(each):
            if name.startswith("__") and name not in PLAIN_METHODS | _BY_PYTHON:
                return (
                    f"its class `{each.__qualname__}` defines `{name}`, which a file cannot hold",
                    f"write it without `{name}`: a class may define `__init__`, {_told(PLAIN_METHODS)} and methods"
                    " with other names",
                )
    return None


def _told(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def method_of(kind: type, name: str) -> tuple[FunctionType, bool] | None:
    """The function that a plain class has by this name, and whether it is static."""
    found = inspect.getattr_static(kind, name, None)
    function = found.__func__ if isinstance(found, staticmethod) else found
    return (function, function is not found) if isinstance(function, FunctionType) else None


@final
class Classes:
    """The classes of one experiment while it is captured, and the objects of plain ones.

    lifted: says which attributes of objects are left out here, since they are sent as data. fields: what was left out,
        with whose it is.
    """

    def __init__(self, capture: Capture, lifted: Callable[[Any], bool] | None) -> None:
        self.capture = capture
        self.lifted = lifted
        self.fields: list[tuple[object, dict[str, Any]]] = []
        self._held: dict[type, tuple[Node, str]] = {}
        self._looked: set[tuple[type, str]] = set()

    def of_modules(self, kind: type, path: str) -> int:
        """The number of a class of torch modules."""
        outer = [each for each in kind.__mro__ if torch_class(each) is not None]
        if kind.__module__.startswith("torch.") or not outer:
            raise CannotCaptureError(
                f"its class `{kind.__qualname__}` is one that torch makes for itself",
                "undo the parametrization, compilation or wrapping before saving",
            )
        for each in kind.__mro__[: kind.__mro__.index(outer[0])]:
            for name in vars(each):
                if name.startswith("__") and name.endswith("__") and name not in METHODS | _IGNORED:
                    raise CannotCaptureError(
                        f"its class `{each.__qualname__}` defines `{name}`, which a file cannot hold",
                        "capture a module without it",
                    )
        base = torch_class(outer[0])
        assert base is not None
        return self._number(kind, base, path)

    def _number(self, kind: type, base: str, path: str) -> int:
        if kind not in self._held:
            made: Node = {"kind": "class", "name": kind.__qualname__, "base": base, "members": {}}
            self._held[kind] = made, path
            self.capture.keep(kind)
        return self.capture.number(kind, self._held[kind][0])

    def instance(self, held: Any, path: str) -> Node:
        """The entry of an object of a plain class, without the methods that `find` adds."""
        kind, capture = type(held), self.capture
        problem = why_not_plain(kind)
        if problem is not None:
            raise CannotCaptureError(*problem)
        number = self._number(kind, OBJECT, path)
        attributes: Node = {}
        lifted: dict[str, Any] = {}
        for name, value in vars(held).items():
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
                raise CannotCaptureError(f"it has the attribute {name!r:.40}, whose name a file cannot hold")
            if callable(inspect.getattr_static(kind, name, None)):
                raise CannotCaptureError(
                    f"its method `{name}` was replaced on the object itself", "write a class with that method"
                )
            if self.lifted is not None and self.lifted(value):
                lifted[name] = value
            else:
                attributes[name] = capture.inside(value, name, path)
        self.fields.append((held, lifted))
        return {"kind": "instance", "class": {"object": number}, "attributes": attributes}

    def find(self, names: set[str]) -> bool:
        """Adds the members of these names; says whether any was new."""
        before = len(self._looked)
        for kind, (made, path) in list(self._held.items()):
            for name in sorted(names | (PLAIN_METHODS if made["base"] == OBJECT else METHODS)):
                if (kind, name) not in self._looked:
                    self._looked.add((kind, name))
                    self._member(kind, made, name, path)
        return len(self._looked) > before

    def _member(self, kind: type, made: Node, name: str, path: str) -> None:
        plain = made["base"] == OBJECT
        base = object if plain else TORCH_CLASSES[made["base"]]
        owner = next((each for each in _owners(kind, base) if name in vars(each)), None)
        if owner is None:
            return
        held = inspect.getattr_static(owner, name)
        node = self._plain(held, f"{kind.__qualname__}.{name}") if plain else self._of_module(held, kind, name)
        self.report(made["members"], name, path, node)

    def _of_module(self, held: Any, kind: type, name: str) -> Callable[[], Node]:
        capture = self.capture
        where = f"{kind.__qualname__}.{name}"

        def node() -> Node:
            match held:
                case FunctionType():
                    return {"method": capture.value(held, where)}
                case staticmethod():
                    return {"static": capture.value(held.__func__, where)}
                case property(fget=FunctionType() as get, fset=None):
                    return {"property": capture.value(get, where)}
                case classmethod() | property():
                    raise CannotCaptureError(
                        f"`{where}` is a {type(held).__name__} which a file cannot hold", "write it as a method"
                    )
                case _:
                    return {"value": capture.value(held, where)}

        return node

    def _plain(self, held: Any, where: str) -> Callable[[], Node]:
        capture = self.capture

        def node() -> Node:
            function = held.__func__ if isinstance(held, staticmethod) else held
            if isinstance(function, FunctionType):
                return {"static" if held is not function else "method": capture.value(function, where)}
            if not is_constant(held):
                kind = type(held).__name__
                raise CannotCaptureError(
                    f"`{where}` is a {kind} of the class, which holds methods and constants in a file",
                    "write it as a method" if hasattr(type(held), "__get__") else "set it in `__init__`",
                )
            return {"value": capture.value(held, where)}

        return node

    def report(self, into: Node, name: str, path: str, node: Callable[[], Node]) -> None:
        """Adds what a name stands for; a diagnostic where it has no form in a file."""
        capture = self.capture
        span = capture.span_of(path)
        try:
            into[name] = node()
        except CannotCaptureError as error:
            text = f"`{path}`, its `{name}`: {error.reason}"
            capture.problems.append(Diagnostic(span, text, error.way_out))
        except CompileError as error:
            text = f"`{path}`: its `{name}` cannot be compiled, so that no file can hold it"
            capture.problems.append(Diagnostic(span, text))
            capture.problems.extend(error.diagnostics)
        except ExperimentError as error:
            text = f"`{path}`: its `{name}` cannot be put into a file: {error}"
            capture.problems.append(Diagnostic(span, text))


def is_constant(held: object) -> bool:
    """Whether a value is a constant that a plain class may hold."""
    return type(held) in _CONSTANTS or (type(held) is tuple and all(map(is_constant, held)))


def _owners(kind: type, base: type) -> Iterator[type]:
    yield from kind.__mro__[: kind.__mro__.index(base)]
