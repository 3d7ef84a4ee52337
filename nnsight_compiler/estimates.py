"""What each forward of a placed program is going to cost, from the model's measured cost and the program's types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.figures import Figures
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import At, Op
from nnsight_compiler.ir.traverse import defined, users_by_forward, walk
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Module, Operand, Value
from nnsight_compiler.observations import axes_of, cost_of
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.passes.subject import Inputs
from nnsight_compiler.runtime.axes import Axes, AxisError
from nnsight_compiler.runtime.costs import Cost
from nnsight_compiler.runtime.cut import layer_lists
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.runs import Ran

Kept = tuple[Event, int]
"""Bytes that are alive from an event on."""

_GRADIENTS = ops.Require | ops.Track | ops.Backward | ops.Gradients
_UNKNOWN_INPUT = "its input is known only when it runs"


class Estimates:
    """The figures of the forwards of one program."""

    def __init__(self, lowered: Specialised, example: Callable[[str], Inputs | None]) -> None:
        self.lowered = lowered
        self.example = example
        self.made = {value.name: op for op in lowered.program.walk() for value in defined(op)}
        self.users = users_by_forward(lowered.program.body)
        self.differentiates = any(isinstance(each, _GRADIENTS) for each in lowered.program.walk())

    def of(self, op: ops.Forward) -> tuple[Figures | None, str]:
        """What a forward is going to cost, and why some of it cannot be told."""
        model, inputs = self.lowered.models[op.result.name], self.lowered.inputs[op.result.name]
        known = inputs or self.example(op.result.name) or model._example()
        if known is None:
            return None, _UNKNOWN_INPUT
        try:
            cost, rows, tokens = cost_of(model, *known)
            end = end_of(op)
            found = _extent(model._module, cost.events, end)
            if inputs is None:
                return found, _UNKNOWN_INPUT
            axes, _, _ = axes_of(model, *known)
            found = replace(found, rows=rows, tokens=tokens if "tokens" in axes.inputs.names else None)
            if op.method == "generate":
                return found, "how many steps a generation takes is known only when it runs"
            found = replace(found, flops=cost.flops(rows, tokens, _within(cost, end)))
            if self.differentiates:
                return found, "its memory is not estimated, since gradients are recorded"
            copied, aliased, kept = self._kept(op, axes, rows, tokens)
            later = [(_released(model._module, cost.events, event), size) for event, size in aliased]
            peak = cost.peak(rows, tokens, _within(cost, end), [*copied, *later])
            return replace(found, peak=peak, kept=kept), ""
        except AxisError as error:
            return None, str(error)

    def run_extent(self, op: ops.Forward, ran: Iterable[Ran]) -> Figures:
        """How much of the model ran, in these runs of a forward."""
        model = self.lowered.models[op.result.name]
        known = self.lowered.inputs[op.result.name] or self.example(op.result.name) or model._example()
        if known is None:
            return Figures()
        try:
            events = cost_of(model, *known)[0].events
        except AxisError:
            return Figures()
        ends = [None if each.ended is None else _event(*each.ended) for each in ran]
        return max((_extent(model._module, events, end) for end in ends), key=lambda each: each.modules or 0)

    def _kept(self, op: ops.Forward, axes: Axes, rows: int, tokens: int) -> tuple[list[Kept], list[Kept], int]:
        """What the program keeps of a forward: with memory of its own, with the model's, and all together in bytes."""
        copied: list[Kept] = []
        aliased: list[Kept] = []
        own = {op.result.name}
        made = (value.name for each in walk(op.body) for value in defined(each))
        used_after = {name for name in made if self.users.get(name, own) - own}
        for at in op.body.ops:
            if not isinstance(at, At) or at.port == "result":
                continue
            event = _event(at.module.path, at.port, at.call or 0)
            for value, shares in _held(at, used_after):
                source = self._definition(value)
                size = _bytes(value, source, axes, rows, tokens)
                (aliased if shares and isinstance(source, ops.Read) else copied).append((event, size))
        return copied, aliased, sum(size for _, size in (*copied, *aliased))

    def _definition(self, value: Operand) -> Op | None:
        """What made a value, before it was saved."""
        found = self.made.get(value.name) if isinstance(value, Value) else None
        return self._definition(found.value) if isinstance(found, ops.Save) else found


def as_run(ran: Iterable[Ran], extent: Figures) -> Figures:
    """The figures of runs of one forward, all together; `extent` says how much of the model ran."""
    ran = tuple(ran)
    measured = [each.measured for each in ran if each.measured is not None]
    complete = len(measured) == len(ran)
    rows, tokens = [each.rows for each in ran], {each.tokens for each in ran}
    return replace(
        extent,
        forwards=sum(each.forwards for each in ran),
        runs=len(ran),
        rows=None if None in rows else sum(row for row in rows if row is not None),
        tokens=tokens.pop() if len(tokens) == 1 else None,
        skipped=len({path for each in ran for path in each.skipped}),
        shared=len({path for each in ran for path in each.shared}),
        flops=sum(each.flops for each in measured) if complete else None,
        peak=max(each.peak for each in measured) if complete else None,
        kept=sum(each.kept for each in measured) if complete else None,
        seconds=sum(each.seconds for each in ran),
    )


def end_of(op: ops.Forward) -> tuple[str, str, int] | None:
    """The site after which a placed forward ends; `None` where it runs to its end."""
    sites = [at for at in op.body.ops if isinstance(at, At) and at.port != "result"]
    if not op.stops or not sites:
        return None
    return sites[-1].module.path, sites[-1].port, sites[-1].call or 0


def _event(path: str, port: str, call: int) -> Event:
    """The event of a site; of one inside of a module, the module's own output."""
    return Event(path.partition(":")[0], "input" if port in ("input", "skip") and ":" not in path else "output", call)


def _within(cost: Cost, end: Event | tuple[str, str, int] | None) -> Event | None:
    found = _event(*end) if isinstance(end, tuple) else end
    return found if found in cost.events else None


def _extent(module: nn.Module, events: tuple[Event, ...], end: Event | tuple[str, str, int] | None) -> Figures:
    """How many modules and layers run up to an event."""
    last = _event(*end) if isinstance(end, tuple) else end
    stop = events.index(last) if last in events else len(events)
    begun = {event.path for event in events[:stop] if event.port == "input"}
    every = {event.path for event in events if event.port == "input"}
    layers = {
        f"{path}.{number}" if path else str(number) for path, held in layer_lists(module) for number in range(len(held))
    } & every
    return Figures(modules=len(begun), of_modules=len(every), layers=len(layers & begun), of_layers=len(layers) or None)


def _held(at: At, used_after: set[str]) -> Iterator[tuple[Value, bool]]:
    """The values that are kept of what happens at a site, and whether they share the model's memory."""
    saved = set()
    for op in walk(at.body):
        match op:
            case ops.Save(value=Value() as value, copy=copy):
                saved.add(op.result.name)
                yield value, not copy
            case ops.Record(value=Value() as value):
                yield value, False
    for op in walk(at.body):
        for value in defined(op):
            if value.name in used_after and value.name not in saved and isinstance(value.type, TensorType):
                yield value, True


def _bytes(value: Value, source: Op | None, axes: Axes, rows: int, tokens: int) -> int:
    """The size of a value, as far as it is known."""
    kind = value.type
    if isinstance(kind, TensorType) and kind.dtype is not None and kind.shape is not None:
        sizes = [dimension.size for dimension in kind.shape]
        if None not in sizes:
            itemsize: int = getattr(torch, kind.dtype).itemsize
            return math.prod(size for size in sizes if size is not None) * itemsize
    if isinstance(source, ops.Read) and source.port != "result" and isinstance(source.module, Module):
        event = _event(source.module.path, source.port, source.call or 0)
        try:
            held = axes.value(event.path, event.port, event.call, rows, tokens)
        except (AxisError, KeyError):
            return 0
        tensors = [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, torch.Tensor)]
        return sum(leaf.nbytes for leaf in tensors)
    return 0


def _released(module: nn.Module, events: tuple[Event, ...], event: Event) -> Event:
    """When the model itself lets go of what stands at an event, nearly: of the output of a layer when the next has run,
    of anything else when the module around it returns."""
    around, _, name = event.path.rpartition(".")
    held = module.get_submodule(around) if around else module
    if isinstance(held, nn.ModuleList | nn.Sequential) and name.isdecimal():
        following = Event(f"{around}.{int(name) + 1}".lstrip("."), "output", event.call)
        if following in events:
            return following
        around = around.rpartition(".")[0]
    return next(
        (each for each in events[events.index(event) :] if each.path == around and each.port == "output"), event
    )
