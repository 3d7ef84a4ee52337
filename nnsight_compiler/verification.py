"""Showing that experiments leave a model alone: an experiment that changes nothing gives what the plain model gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nnsight_compiler.cache import Cache
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.ops import Argument, Forward, Op, Parameter, Read, Region, Return, Save, Write
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.values import Module, Value
from nnsight_compiler.observations import observed


def verify(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs the plain model, then an experiment that reads the output of every module and writes it back unchanged.

    Raises:
        ModelError: the results are not equal bit for bit.
    """
    module = model._ready()
    order = observed(model, (args, kwargs))
    paths = [path for path, _ in module.named_modules() if order.count(path) == 1]
    changing_nothing = Cache(_program(paths), {}, {})
    with torch.random.fork_rng(), torch.no_grad():
        state = torch.random.get_rng_state()
        expected = model(*args, **kwargs)
        torch.random.set_rng_state(state)
        found = changing_nothing.run(model, args, dict(kwargs))
    for where, (left, right) in enumerate(zip(_tensors(expected), _tensors(found), strict=True)):
        if not torch.equal(left, right) and not torch.equal(left.nan_to_num(), right.nan_to_num()):
            raise ModelError(
                f"an experiment that changes nothing gives another result than the plain {type(module).__name__}:"
                f" tensor {where} of its output differs by up to {(left - right).abs().max():.3g}"
            )


def _program(paths: list[str]) -> Program:
    """Reads the output of each module and writes it back; returns the model's own output."""
    model, args, kwargs, tracer, result = map(Value, ("model", "args", "kwargs", "tracer", "result"))
    body: list[Op] = []
    for number, path in enumerate(path for path in paths if path):
        value = Value(str(number))
        body += [Read(value, Module(model, path), "output"), Write(Module(model, path), "output", value)]
    output = Value("output")
    body += [Read(output, Module(model, ""), "output"), Save(result, output)]
    arguments = Argument(args, star="*"), Argument(kwargs, star="**")
    forward = Forward(tracer, model, "trace", arguments, Region((), tuple(body)))
    parameters = tuple(map(Parameter, (model, args, kwargs)))
    return Program("verify", parameters, Region((), (forward, Return(result))))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
