"""Edited models: `with model.edit() as edited:` in a script, a notebook cell or a function.

An edit is a program, with the values that it took from around it when the `with` was entered. Nothing runs then; its
ops come first in every forward of the edited model, which shares the model's weights and has a token of its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, final

import torch

from nnsight_compiler.block import Skipped, _following, _Key
from nnsight_compiler.cache import Cache
from nnsight_compiler.compilation import lower_program
from nnsight_compiler.frontend import EditBlock, lower_edit
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.ops import Argument, Forward, Parameter, Read, Region, Return, Save
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import NOWHERE
from nnsight_compiler.ir.substitute import substitute
from nnsight_compiler.ir.values import UNBOUND, Module, Operand, Value
from nnsight_compiler.tracebacks import trimmed

if TYPE_CHECKING:
    from nnsight_compiler.models import NNsight


@final
@dataclass(frozen=True, eq=False, slots=True)
class Edit:
    """An edit of a model: its program, and the value of each of the program's parameters after the tracer and the
    model."""

    program: Program
    values: Mapping[str, Any]

    def __str__(self) -> str:
        span, captured = self.program.span, ", ".join(self.values)
        return f"{span.file}:{span.line}" + (f", with {captured}" if captured else "")


_blocks: dict[_Key, EditBlock] = {}
_MOST_BLOCKS = 1000
_lock = threading.Lock()


@final
class EditContext(Skipped):
    """What `model.edit()` returns. A `with` makes the edit, and binds the edited model; alone it does nothing."""

    def __init__(self, model: NNsight, inplace: bool) -> None:
        self._model, self._inplace = model, inplace
        super().__init__("edit", "edits nothing\n  way out: write `with model.edit() as edited:` and the body below it")

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        key = self._enter("an edit is made once: write `model.edit()`", frame)
        try:
            block = _blocks.get(key) or _lowered(key, frame)
            edit = _edit(block, frame)
            edited = self._model._with_edits((*self._model._edits, edit))
            if not edited._is_known:
                check(edited)
        except Exception as error:
            _blocks.pop(key, None)
            error.__traceback__ = trimmed(error)
            raise
        if self._inplace:
            self._model._edits = edited._edits
            edited = self._model
        target = _following(frame.f_code, frame.f_lasti)
        pair = target is not None and target.opname == "UNPACK_SEQUENCE"
        self._skip(frame, {}, (self, edited) if pair else edited)
        return edited


def _lowered(key: _Key, frame: FrameType) -> EditBlock:
    with _lock:
        found = _blocks[key] = lower_edit(frame)
        while len(_blocks) > _MOST_BLOCKS:
            del _blocks[next(iter(_blocks))]
    return found


def _edit(block: EditBlock, frame: FrameType) -> Edit:
    """The edit, with what the names that it reads stand for now. One that it assigns itself may have no value yet."""
    held: dict[str, Any] = {}
    missing: list[Diagnostic] = []
    empty: dict[Value, Operand] = {}
    parameters = list(block.program.parameters)
    for (name, span), parameter in zip(block.reads.items(), block.program.parameters[2:], strict=True):
        for names in (frame.f_locals, frame.f_globals, frame.f_builtins):
            if name in names:
                held[parameter.value.name] = names[name]
                break
        else:
            parameters.remove(parameter)
            empty[parameter.value] = UNBOUND
            if name not in block.assigned:
                reason = f"`{name}` has no value when the edit is made, which is when an edit takes what it needs"
                missing.append(Diagnostic(span, reason, "assign it before the `with`"))
    if missing:
        raise CompileError(missing)
    body = substitute(block.program.body, empty) if empty else block.program.body
    return Edit(replace(block.program, parameters=tuple(parameters), body=body), held)


def running(edit: Program | None = None) -> Program:
    """A program that runs a model and returns its output: what a plain call of an edited model means. The body of an
    edit, whose parameters are a tracer and the model, comes first in the forward."""
    tracer, model = (each.value for each in edit.parameters) if edit else (Value("tracer"), Value("model"))
    builder = Builder(value.name for value in edit.values()) if edit else Builder(("tracer", "model"))
    args, kwargs, output, kept = map(builder.fresh, ("args", "kwargs", "output", "kept"))
    first = edit.body.ops if edit else ()
    body = (*first, Read(output, Module(model, ""), "output"), Save(kept, output))
    arguments = Argument(args, star="*"), Argument(kwargs, star="**")
    span = edit.span if edit else NOWHERE
    forward = Forward(tracer, model, "trace", arguments, Region((), body), span=span)
    parameters = (Parameter(model), Parameter(args, "var_positional"), Parameter(kwargs, "var_keyword"))
    return Program("call", parameters, Region((), (forward, Return(kept))), span=span)


_PROGRAM = running()
_called = Cache(_PROGRAM, {}, {})


def check(edited: NNsight) -> None:
    """Compiles a run of an edited model whose inputs are not known, and runs nothing.

    Raises:
        CompileError: an edit names what the model does not have, saves something, …
    """
    span = edited._edits[-1].program.span
    forward, *rest = _PROGRAM.body.ops
    program = replace(_PROGRAM, body=Region((), (replace(forward, span=span), *rest)), span=span)
    lower_program(program, {"model": edited}, {}, {})


def call_edited(model: NNsight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an edited model on inputs as `trace` takes them."""
    given = {**kwargs, "grad": True} if torch.is_grad_enabled() else dict(kwargs)
    return _called.run(model, args, given)
