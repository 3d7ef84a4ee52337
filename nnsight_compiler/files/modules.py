"""Captured torch modules: their weights, and the attributes that are used.

A class of `torch.nn` is kept by its name, any other as `classes` says. Attributes of modules of such classes are kept
where a program mentions them, so that what only training needed stays out of the file.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, final

from torch import nn

from nnsight_compiler.files.cannot import CannotCaptureError
from nnsight_compiler.files.classes import torch_class
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.traverse import operands
from nnsight_compiler.ir.values import Literal

if TYPE_CHECKING:
    from nnsight_compiler.files.capture import Capture
    from nnsight_compiler.files.values import Node

OWN = frozenset([*vars(nn.Module()), "_compiled_call_impl", "_flat_weights", "_flat_weight_refs"])
"""What torch keeps in every module, and what it makes again by itself."""
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@final
class Modules:
    """The modules of one experiment while it is captured.

    asked: names that are asked for otherwise than in a program.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.asked: set[str] = {"forward"}
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
            "class": {"known": own} if own is not None else {"object": capture.classes.of_modules(kind, path)},
            "training": module.training,
        }
        for word, held in (
            ("parameters", module._parameters),
            ("buffers", module._buffers),
            ("modules", module._modules),
        ):
            made[word] = {
                name: None if part is None else capture.inside(part, name, path) for name, part in held.items()
            }
        made["non_persistent"] = sorted(module._non_persistent_buffers_set)
        made["attributes"] = {}
        if own is not None:
            for name, held in vars(module).items():
                if name not in OWN:
                    made["attributes"][name] = capture.inside(held, name, path)
        else:
            self._instances.append((module, made, path))
        capture.keep(module)
        return made

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

    def finish(self) -> None:
        """Adds the methods and attributes that the programs of the file mention, until none is missing."""
        capture = self.capture
        while True:
            names = self.asked | _mentioned(capture)
            before = len(self._looked)
            found = capture.classes.find(names)
            for module, made, path in list(self._instances):
                for name in sorted(names & vars(module).keys() - OWN):
                    if (id(module), name) not in self._looked:
                        self._looked.add((id(module), name))
                        inside = partial(capture.inside, vars(module)[name], name, path)
                        capture.classes.report(made["attributes"], name, path, inside)
            if not found and len(self._looked) == before:
                return


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
