"""Captured torch modules: their weights, the attributes that are used, and the programs of their methods.

A class of `torch.nn` is kept by its name. Of any other class a file holds the methods that some program of the file
mentions by name, each lowered to a program as helpers are; a class is not more than these once it is loaded. Attributes
of such modules are kept where a program mentions them, so that what only training needed stays out of the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, final

from torch import nn

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ExperimentError
from nnsight_compiler.ir.traverse import operands
from nnsight_compiler.ir.values import Literal
from nnsight_compiler.passes.behaviour import words

if TYPE_CHECKING:
    from nnsight_compiler.files.capture import Capture, Node

OWN = frozenset([*vars(nn.Module()), "_compiled_call_impl", "_flat_weights", "_flat_weight_refs"])
"""What torch keeps in every module, and what it makes again by itself."""
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
METHODS = frozenset({"__len__", "__getitem__", "__iter__", "__contains__"})
"""The methods of this form that a captured class may define."""
_IGNORED = frozenset(
    words(
        "__init__ __repr__ __str__ __doc__ __module__ __annotations__ __dict__ __weakref__ __qualname__ __parameters__ "
        "__orig_bases__ __static_attributes__ __firstlineno__ __annotate__ __annotate_func__ __annotations_cache__ "
        "__constants__ __jit_unused_properties__ __hash__"
    )
)
"""What a class may define besides: nothing of it takes part in a forward."""


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


@final
class Modules:
    """The modules of one experiment while it is captured.

    asked: names that are asked for otherwise than in a program.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.asked: set[str] = {"forward"}
        self._classes: dict[type, tuple[Node, str]] = {}
        self._instances: list[tuple[nn.Module, Node, str]] = []
        self._looked: set[tuple[int, str]] = set()

    def entry(self, module: nn.Module, path: str) -> Node:
        """The entry of a module, without the attributes and methods that `finish` adds."""
        self._refuse(module)
        capture = self.capture
        kind = type(module)
        own = torch_class(kind)
        made: Node = {
            "kind": "module",
            "class": {"known": own} if own is not None else {"object": self._class(kind, path)},
            "training": module.training,
        }
        for word, held in (
            ("parameters", module._parameters),
            ("buffers", module._buffers),
            ("modules", module._modules),
        ):
            made[word] = {name: None if part is None else self._inside(part, name, path) for name, part in held.items()}
        made["non_persistent"] = sorted(module._non_persistent_buffers_set)
        made["attributes"] = {}
        if own is not None:
            for name, held in vars(module).items():
                if name not in OWN:
                    made["attributes"][name] = self._inside(held, name, path)
        else:
            self._instances.append((module, made, path))
        capture.keep(module)
        return made

    def _inside(self, held: Any, name: str, path: str) -> Node:
        try:
            return self.capture.value(held, f"{path}.{name}")
        except CannotCaptureError as error:
            error.trail = f".{name}{error.trail}"
            raise

    @staticmethod
    def _refuse(module: nn.Module) -> None:
        """Refuses what makes a module more than its class, weights and attributes."""
        kind = type(module).__name__
        if any(getattr(module, word) for word in HOOKS):
            raise CannotCaptureError(
                f"the module ({kind}) has hooks, which a file cannot hold", "remove the hooks before saving"
            )
        if "forward" in vars(module):
            raise CannotCaptureError(
                f"the `forward` of this module ({kind}) was replaced on the object itself",
                "write a subclass with that `forward`",
            )

    # --- classes of the user's ---

    def _class(self, kind: type, path: str) -> int:
        if kind not in self._classes:
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
            made: Node = {
                "kind": "class",
                "name": kind.__qualname__,
                "base": torch_class(outer[0]),
                "members": {},
            }
            self._classes[kind] = made, path
            self.capture.keep(kind)
            return self.capture.number(kind, made)
        return self.capture.number(kind, self._classes[kind][0])

    def finish(self) -> None:
        """Adds the methods and attributes that the programs of the file mention, until none is missing."""
        while True:
            names = self.asked | _mentioned(self.capture)
            before = len(self._looked)
            for kind, (made, path) in list(self._classes.items()):
                for name in sorted(names | METHODS):
                    if (id(kind), name) not in self._looked:
                        self._looked.add((id(kind), name))
                        self._member(kind, made, name, path)
            for module, made, path in list(self._instances):
                for name in sorted(names & vars(module).keys() - OWN):
                    if (id(module), name) not in self._looked:
                        self._looked.add((id(module), name))
                        self._report(
                            made["attributes"], name, path, partial(self._inside, vars(module)[name], name, path)
                        )
            if len(self._looked) == before:
                return

    def _member(self, kind: type, made: Node, name: str, path: str) -> None:
        base = TORCH_CLASSES[made["base"]]
        owners = kind.__mro__[: kind.__mro__.index(base)]
        owner = next((each for each in owners if name in vars(each)), None)
        if owner is None:
            return
        held = inspect.getattr_static(owner, name)
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

        self._report(made["members"], name, path, node)

    def _report(self, into: Node, name: str, path: str, node: Callable[[], Node]) -> None:
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


def _mentioned(capture: Capture) -> set[str]:
    """The names that any program of the file may look up on an object, also by `getattr` with a text."""
    found: set[str] = set()
    for program in capture.programs:
        for op in program.walk():
            if isinstance(op, ops.Attribute | ops.SetAttribute):
                found.add(op.name)
            elif isinstance(op, ops.Read):
                found.add(op.port)
            elif isinstance(op, ops.Call):
                found |= {each.value for each in operands(op)
                          if isinstance(each, Literal) and isinstance(each.value, str)}  # fmt: skip
    return found
