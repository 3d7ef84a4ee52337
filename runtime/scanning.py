"""Scans: forwards on tensors without data, of a model whose weights need not be loaded.

The functions of a plan run as they are, at the sites of a shadow of the model. What they see are fake tensors, which
have shapes, dtypes and devices; where code needs the numbers in one, the scan ends with the line.
"""

from __future__ import annotations

import copy
import functools
import traceback
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FunctionType
from typing import Any, final

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.inputs import Given
from nnsight_compiler.runtime.shadow import Fakes, shadowed, tensors_in

_TORCH = str(Path(torch.__file__).parent)
_NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@final
class Scan:
    """One run of a program whose forwards are scans: the shadow of each model, all with tensors of one kind."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.shadows: dict[int, tuple[Any, Fakes, nn.Module]] = {}

    def of(self, model: Any) -> tuple[Fakes, nn.Module]:
        """What stands for a wrapped model."""
        if id(model) not in self.shadows:
            fakes = Fakes(model._module, (), {})
            fakes.mode = self.mode
            self.shadows[id(model)] = model, fakes, shadowed(model._module, fakes)
        _, fakes, shadow = self.shadows[id(model)]
        return fakes, shadow


_SCAN: ContextVar[Scan | None] = ContextVar("scan", default=None)


def scanning(run: FunctionType, span: Span) -> FunctionType:
    """The function of a plan, run as a scan.

    Raises:
        RunError: some line needs numbers.
    """

    @functools.wraps(run)
    def scan(*values: Any) -> Any:
        token = _SCAN.set(Scan())
        try:
            return run(*values)
        except (*_NEEDS_NUMBERS, RuntimeError) as error:
            if not isinstance(error, _NEEDS_NUMBERS) and "tensor subclass" not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == span.file]
            place = f"{span.file}:{own[-1].lineno}" if own else str(span)
            outside = [frame for frame in frames if _TORCH not in frame.filename]
            if outside and outside[-1].filename == span.file:
                raise RunError(
                    f"{place}: this needs the numbers in a tensor, and a scan has shapes and dtypes only\n"
                    "  way out: run it with `model.trace(…)`, or leave this line out of the scan"
                ) from None
            raise RunError(
                f"{place}: code that this calls, or the model's own, needs the numbers in a tensor, and a scan has"
                f" shapes and dtypes only: {outside[-1].filename}:{outside[-1].lineno}\n"
                "  way out: run it with `model.trace(…)`"
            ) from error
        finally:
            _SCAN.reset(token)

    assert isinstance(scan, FunctionType)
    return scan


def ready(model: Any) -> nn.Module:
    """The torch module that runs: of a scan the shadow, else the model with its weights loaded."""
    scan = _SCAN.get()
    found: nn.Module = model._ready() if scan is None else scan.of(model)[1]
    return found


def resolve(model: Any, path: str) -> nn.Module:
    """A module of a wrapped model, with its weights: what the body calls, or takes a weight of."""
    found: nn.Module = ready(model).get_submodule(path)
    return found


def prepared(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of the torch module; of a scan without data."""
    made: Given = model._prepare(args, kwargs)
    scan = _SCAN.get()
    if scan is None:
        return made
    fakes, _ = scan.of(model)
    return copy.deepcopy(made, {id(tensor): fakes(tensor) for tensor in tensors_in(made)})


def as_it_runs() -> AbstractContextManager[Any]:
    """Around a forward: of a scan, what makes new tensors makes fakes."""
    scan = _SCAN.get()
    return nullcontext() if scan is None else scan.mode
