"""Runs the two parts of a split experiment as if they were on two machines: the client's model has no weights, and what
goes to the other side goes there as a file does."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nnsight_compiler import Experiment, LanguageModel, intervene
from nnsight_compiler.experiment import _binder
from nnsight_compiler.files.capture import Capture
from nnsight_compiler.files.document import parse
from nnsight_compiler.files.loading import experiment_from
from nnsight_compiler.files.saving import experiment_document
from nnsight_compiler.remote.segments import Segment
from nnsight_compiler.remote.split import Split, split_program


@dataclass
class TwoSides:
    """`client` names modules only; `worker` runs them. `sent` and `given` are the values of each segment that ran."""

    client: LanguageModel
    worker: LanguageModel
    sent: list[tuple[Any, ...]] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)

    def run(self, segment: Segment, values: tuple[Any, ...]) -> Any:
        """Runs a segment on the worker: its code as a file, its data by value but for what it changes."""
        model, *sent = values
        assert model is self.client
        for value in sent:
            assert_data(value)
        document, tensors = experiment_document(segment.experiment())
        loaded = experiment_from(parse(json.dumps(document)), tensors, model=self.worker)
        assert loaded.host_ops == ()
        result = without_graph(loaded(self.worker, *sent))
        assert_data(result)
        self.sent.append(tuple(sent))
        self.given.append(result)
        return result

    def split(self, function: Callable[..., Any] | Experiment, *args: Any, **kwargs: Any) -> Split | None:
        experiment = function if isinstance(function, Experiment) else intervene(function)
        plain = experiment._function
        cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
        names = [parameter.value.name for parameter in experiment.ir.parameters]
        values = _binder(plain)(*args, **kwargs)
        optional = inspect.signature(plain).parameters.items()
        defaults = {name: each.default for name, each in optional if each.default is not each.empty}
        return split_program(experiment.ir, plain.__globals__, cells, dict(zip(names, values, strict=True)), defaults)

    def call(self, function: Callable[..., Any] | Experiment, *args: Any, **kwargs: Any) -> Any:
        """Calls a function that must be split."""
        made = self.split(function, self.client, *args, **kwargs)
        assert made is not None
        result = made.function(self.run)(self.client, *args, **kwargs)
        assert all(each.is_meta for each in self.client._module.parameters()), "the client has loaded weights"
        return result


def assert_data(value: Any) -> None:
    """What crosses is data: it has a form in a file."""
    capture = Capture()
    capture.value(value, "value")
    assert not capture.problems


def without_graph(value: Any) -> Any:
    """A result as it arrives: its tensors are no part of any graph of autograd."""
    match value:
        case torch.Tensor() if value.grad_fn is not None:
            return value.detach()
        case tuple():
            return tuple(map(without_graph, value))
        case list():
            value[:] = map(without_graph, value)
        case dict():
            value.update({key: without_graph(item) for key, item in value.items()})
    return value
