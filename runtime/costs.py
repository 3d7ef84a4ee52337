"""What a forward of a model costs, for any number of rows and tokens: floating-point operations and live memory.

The model runs under a `Meter` on a shadow, at two numbers of rows and three of tokens. Between one event (a module
receives its arguments, or returns) and the next, what is computed and what is alive grow with the rows, and with the
tokens and their square: with attention. So six runs give the formula of each such part, and no table of modules is
needed. On fakes a run takes milliseconds and no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from nnsight_compiler.runtime.axes import Axes, AxisError
from nnsight_compiler.runtime.cut import Cut, plan_cut
from nnsight_compiler.runtime.input_axes import Sampler
from nnsight_compiler.runtime.meter import Meter
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.shadow import Fakes, Reals, as_inputs, generators_kept, has_weights, shadowed

_ROWS = (2, 5)
_TOKENS = (16, 24, 40), (4, 5, 7)
"""Short ones for models that allow no more."""


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What one model's forward costs on one kind of input, weights and inputs aside.

    events: where its parts end, in order: each part is what happens since the event before.
    fixed: the axes whose size could not be varied, with the one size for which everything that is told holds.
    """

    events: tuple[Event, ...]
    fixed: Mapping[str, int]
    _flops: torch.Tensor = field(repr=False)
    _growth: torch.Tensor = field(repr=False)
    _above: torch.Tensor = field(repr=False)
    """By part: the floating-point operations, by how much what is alive grows, and how far above what is alive at the
    beginning of the part its peak is; as coefficients of `_terms`."""

    def flops(self, rows: int, tokens: int, until: Event | None = None) -> int:
        """The floating-point operations of a forward on so many rows and tokens, or of one that ends at an event.

        Raises:
            AxisError: what is known holds for another number of rows or tokens.
        """
        return round(float(self._at(self._flops, rows, tokens)[: self._end(until)].sum()))

    def within(self, event: Event, rows: int, tokens: int) -> int:
        """The floating-point operations of the call of a module that returns at an event."""
        start = self.events.index(replace(event, port="input")) + 1
        return round(float(self._at(self._flops, rows, tokens)[start : self._end(event)].sum()))

    def peak(self, rows: int, tokens: int, until: Event | None = None, kept: Iterable[tuple[Event, int]] = ()) -> int:
        """The most bytes of tensors that are alive at once in a forward on so many rows and tokens, without gradients,
        or in one that ends at an event. `kept`: bytes that are alive besides, each from an event on.

        Raises:
            AxisError: what is known holds for another number of rows or tokens.
        """
        end = self._end(until)
        growth, above = self._at(self._growth, rows, tokens)[:end], self._at(self._above, rows, tokens)[:end]
        for event, size in kept:
            number = self.events.index(event)
            if number + 1 < end:
                growth[number + 1] += size
                above[number + 1] += size
            elif number < end:
                growth[number] += size
                above[number] = torch.maximum(above[number], growth[number])
        return max(0, round(float((growth.cumsum(0) - growth + above).max()))) if end else 0

    def rows_within(self, budget: int, tokens: int, until: Event | None = None) -> int:
        """How many rows of so many tokens a forward can have within a budget of bytes; at least one.

        Raises:
            AxisError: what is known holds for another number of rows or tokens.
        """
        few, many = 1, 2
        while many < 2**20 and self.peak(many, tokens, until) <= budget:
            few, many = many, 2 * many
        while many - few > 1:
            between = (few + many) // 2
            few, many = (between, many) if self.peak(between, tokens, until) <= budget else (few, between)
        return few

    def _end(self, until: Event | None) -> int:
        return len(self.events) if until is None else self.events.index(until) + 1

    def _at(self, coefficients: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        for name, size in (("rows", rows), ("tokens", tokens)):
            if self.fixed.get(name, size) != size:
                raise AxisError(f"costs are known for {self.fixed[name]} {name} only, not for {size}")
        return coefficients @ _terms(rows, tokens)


def _terms(rows: float, tokens: float) -> torch.Tensor:
    found = [one * other for one, other in product((1.0, rows), (1.0, tokens, tokens * tokens))]
    return torch.tensor(found, dtype=torch.float64)


def measure_cost(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Axes) -> Cost:
    """Measures what a forward of `module` on arguments of this kind costs. The module, the arguments and the random
    generators stay as they are.

    Args:
        axes: what `infer_axes` found of the module on these arguments.

    Raises:
        AxisError: the model runs in no way in which its cost could be measured.
    """
    if axes.how == "none":
        raise AxisError(axes.reason)
    stand_in: Fakes | Reals
    stand_in = Fakes(module, args, kwargs) if axes.how == "fake" else Reals(draws=not has_weights(module))
    measuring = _Measuring(module, args, dict(kwargs), axes, stand_in)
    with torch.inference_mode(False), torch.no_grad(), generators_kept(module):
        cut = plan_cut(module) if axes.cut else None
        return measuring.cost(cut.deeper() if cut else None)


def bound(axes: Axes, rows: int, tokens: int) -> int:
    """Bytes that a forward stays below in practice, from the shapes alone and so at no cost: twice all that its modules
    return, as if nothing of it was ever freed. Where that is within a budget, nothing need be measured.

    Raises:
        AxisError: what is known holds for another number of rows or tokens.
    """
    total = 0
    with _disable_current_modes():  # a meter of the run would count tensors that have no memory
        for event in axes.events:
            if event.port == "output":
                value = axes.value(event.path, "output", event.call, rows, tokens)
                total += sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return 2 * total


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """What happened since the event before."""

    flops: int
    growth: int
    above: int

    def then(self, later: _Part) -> _Part:
        """Both as one part."""
        above = max(self.above, self.growth + later.above)
        return _Part(self.flops + later.flops, self.growth + later.growth, above)


Parts = dict[Event, _Part]
"""By the event that ends each, in order."""


@final
@dataclass(frozen=True, slots=True)
class _Measuring:
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: Axes
    stand_in: Fakes | Reals

    def cost(self, cut: Cut | None) -> Cost:
        shadow = shadowed(self.module, self.stand_in, cut.left_out(self.module) if cut else frozenset())
        runs = self._grid(shadow)
        if cut is not None and any(event.call and cut.layer_of(event.path) for run in runs.values() for event in run):
            return self.cost(None)  # layers that run again and again do not stand one after the other
        common = _common(list(runs.values()))
        runs = {setting: _merged(run, common) for setting, run in runs.items()}
        if cut is not None:
            runs = {setting: _expanded(run, cut) for setting, run in runs.items()}
        events = tuple(next(iter(runs.values())))
        return Cost(
            events,
            self.axes.fixed,
            _solved({setting: [part.flops for part in run.values()] for setting, run in runs.items()}),
            _solved({setting: [part.growth for part in run.values()] for setting, run in runs.items()}),
            _solved({setting: [part.above for part in run.values()] for setting, run in runs.items()}),
        )

    def _grid(self, shadow: nn.Module) -> dict[tuple[int, int], Parts]:
        held = self.axes.fixed
        names = self.axes.inputs.names - held.keys()
        own_rows, own_tokens = self.axes.inputs.sizes(self.args, self.kwargs)
        some_rows = _ROWS if "rows" in names else (held.get("rows", own_rows),)
        for lengths in _TOKENS if "tokens" in names else ((held.get("tokens", own_tokens),),):
            try:
                return {setting: self._run(shadow, *setting) for setting in product(some_rows, lengths)}
            except Exception as error:  # whatever the model raises on inputs of this length
                reason = error
        raise AxisError(f"its cost cannot be measured: {type(reason).__name__}: {reason}") from reason

    def _run(self, shadow: nn.Module, rows: int, tokens: int) -> Parts:
        inputs = self.axes.inputs.without(*self.axes.fixed)
        sampler = Sampler(self.module, self.args, self.kwargs, inputs)
        sampled = sampler.sample(rows, tokens, seed=rows * tokens, padded=False)
        args, kwargs = as_inputs(sampled, self.stand_in)
        return _metered(shadowed(shadow, self.stand_in), args, kwargs, self.stand_in)


def _metered(shadow: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stand_in: Fakes | Reals) -> Parts:
    """The parts of one forward of a shadow."""
    meter = Meter()
    parts: Parts = {}
    begun = [0, 0]
    calls: Counter[str] = Counter()
    running: dict[str, list[int]] = {}

    def end(event: Event) -> None:
        flops, live = begun
        parts[event] = _Part(meter.flops - flops, meter.live - live, meter.peak - live)
        begun[:] = meter.flops, meter.live
        meter.mark()

    def before(path: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            running.setdefault(path, []).append(calls[path])
            calls[path] += 1
            end(Event(path, "input", running[path][-1]))

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], ___: object) -> None:
            end(Event(path, "output", running[path].pop()))

        return hook

    for path, part in shadow.named_modules():
        part.register_forward_pre_hook(before(path))
        part.register_forward_hook(after(path))
    with stand_in.running_on_numbers(), meter:
        shadow(*args, **kwargs)
    return parts


def _common(runs: Sequence[Parts]) -> list[Event]:
    """The events that happen in all runs, in the same order; only the last where there is no such order."""
    shared = set.intersection(*(set(run) for run in runs))
    orders = {tuple(event for event in run if event in shared) for run in runs}
    return list(orders.pop()) if len(orders) == 1 else [Event("", "output", 0)]


def _merged(run: Parts, events: Iterable[Event]) -> Parts:
    """A run with parts that end at these events only."""
    wanted = set(events)
    found: Parts = {}
    since: _Part | None = None
    for event, part in run.items():
        since = part if since is None else since.then(part)
        if event in wanted:
            found[event], since = since, None
    return found


def _expanded(run: Parts, cut: Cut) -> Parts:
    """With the parts of the layers that were left out, after those of the last layer that was kept."""
    by_layer: dict[str, Parts] = {}
    for event, part in run.items():
        if (layer := cut.layer_of(event.path)) is not None:
            by_layer.setdefault(layer, {})[event] = part
    found: Parts = {}
    for event, part in run.items():
        found[event] = part
        layers = event.path.rpartition(".")[0]
        if event.port == "output" and layers in cut.kept and event.path == f"{layers}.{cut.kept[layers] - 1}":
            for left_out, layer in cut.represented.items():
                if left_out.rpartition(".")[0] == layers:
                    for inner, same in by_layer.get(layer, {}).items():
                        found[replace(inner, path=left_out + inner.path[len(layer) :])] = same
    return found


def _solved(values: Mapping[tuple[int, int], Collection[int]]) -> torch.Tensor:
    """For each part the coefficients of `_terms` that give these values; where an axis was not varied, it has none."""
    rows, tokens = (sorted(set(sizes)) for sizes in zip(*values, strict=True))
    known = [number for number in range(6) if number // 3 < len(rows) and number % 3 < len(tokens)]
    terms = torch.stack([_terms(*setting)[known] for setting in values])
    found = torch.tensor([list(each) for each in values.values()], dtype=torch.float64)
    coefficients = torch.zeros(found.shape[1], 6, dtype=torch.float64)
    coefficients[:, known] = torch.linalg.solve(terms, found).T
    return coefficients
