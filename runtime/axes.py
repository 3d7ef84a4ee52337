"""Shapes and dtypes of every value in a model's forward, for any number of rows and tokens.

The model runs on a shadow at a few settings of rows and tokens, and the size of each dimension of each tensor that a
module receives or returns is solved as a formula in the two. One run more than needed is a check, and one on other
numbers shows what depends on them. Nothing is guessed: a size that no formula in whole numbers gives, a tensor that is
there in some runs only, a module that does not always run are refused, each with its reason.

In these runs weights and everything in floating point are fakes, but ids and masks are real and small. So what a model
computes of these alone has numbers, and whether a mask hides anything is decided as in a run of the user's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, final
from typing import Literal as OneOf

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import ExperimentError
from nnsight_compiler.runtime.cut import Cut, plan_cut, windows
from nnsight_compiler.runtime.formulas import Opaque, Setting, TensorAxes, same, solved
from nnsight_compiler.runtime.forward_record import Leaves, Record, record
from nnsight_compiler.runtime.input_axes import InputAxes, Sampler, input_axes
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.shadow import Fakes, Reals, as_inputs, generators_kept, has_weights, shadowed

__all__ = ["AxisError", "Axes", "InputAxes", "Opaque", "TensorAxes", "infer_axes", "input_axes"]

T = TypeVar("T")

_ROWS = (3, 5)
_ROWS_CHECKED = (1, 2)
"""The check is at one row, which some models treat specially; at two where the model allows no single one."""

_FEW_WEIGHTS = 2**24
"""Weights that are not loaded may be drawn at random, if they are no more than that, where fakes do not do."""

_REPEATS = {"fake": 1, "real": 4}
"""How often the first run is repeated on other numbers. A model that needs real ones looks at them, and how many
entries satisfy a condition is often the same twice."""

_LONGEST = {"fake": 4096, "real": 64}
"""Windows longer than that are not looked beyond: masks are real, and grow with the square."""

_TOKENS = ((13, 17), 11), ((5, 7), 4)
"""Two lengths and that of the check; short ones for models that allow no more."""


class AxisError(ExperimentError):
    """A value whose shape cannot be told before the run."""


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """What one model does on one kind of input.

    refused: the events at which nothing can be told, each with the reason.
    inputs: which dimensions of the inputs are rows and tokens.
    how: whether the runs were on fake or real tensors, or on none: then everything is refused.
    reason: why they could not be fake, and why sizes are fixed.
    fixed: the axes whose size could not be varied, with the one size for which everything that is told holds.
    cut: the lists of layers that were cut for the runs, and to how many.
    """

    refused: Mapping[Event, str]
    inputs: InputAxes
    how: OneOf["fake", "real", "none"]
    reason: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    _values: Mapping[Event, Leaves] = field(default_factory=dict, repr=False)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of which something is told, in the order of a forward; those of layers left out come last."""
        return tuple(self._values)

    def types(self, path: str, port: OneOf["input", "output"], call: int = 0) -> Any:
        """What stands at an event, in its own structure, each tensor as a `TensorAxes`; at an input `(args, kwargs)`.

        What is no tensor is as it was if it is a number, a text or `None` in every run, and else an `Opaque`.

        Raises:
            AxisError: the event is refused.
            KeyError: the event does not happen.
        """
        return self._built(Event(path, port, call), lambda leaf: leaf)

    def value(self, path: str, port: OneOf["input", "output"], call: int, rows: int, tokens: int) -> Any:
        """What stands at an event for these numbers of rows and tokens: as `types`, each tensor empty and on `meta`.

        Raises:
            AxisError: the event is refused, or what is known holds for another number of rows or tokens.
            KeyError: the event does not happen.
        """
        for name, size in (("rows", rows), ("tokens", tokens)):
            if self.fixed.get(name, size) != size:
                raise AxisError(f"shapes are known for {self.fixed[name]} {name} only, not for {size}: {self.reason}")
        event = Event(path, port, call)
        return self._built(event, lambda leaf: leaf.at(rows, tokens) if isinstance(leaf, TensorAxes) else leaf)

    def _built(self, event: Event, present: Callable[[Any], Any]) -> Any:
        if self.how == "none":
            raise AxisError(self.reason)
        if event in self.refused:
            raise AxisError(self.refused[event])
        if event not in self._values and any(one.path == event.path for one in self.refused):
            raise AxisError("how often it runs is not known: the sizes or the numbers decide")
        leaves, structure = self._values[event]
        return pytree.tree_unflatten(map(present, leaves), structure)


def infer_axes(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    inputs: InputAxes | None = None,
    cut: bool = True,
    operations: Collection[str] = (),
) -> Axes:
    """Finds the axes of every value in the forward of `module` on arguments of this kind.

    The module, the arguments and the random generators stay as they are. Of the arguments only kinds, dtypes and
    sizes count, and of integers the range. Weights need not be loaded, unless the model's code looks at numbers.

    Args:
        inputs: which dimensions of the arguments are rows and tokens; by default what `input_axes` says.
        cut: whether a model of many equal layers may be cut to the first ones for the runs.
        operations: the operations inside of modules that are looked at as well, by their paths.
    """
    kwargs = dict(kwargs or {})
    inputs = input_axes(module, args, kwargs) if inputs is None else inputs
    with torch.inference_mode(False), torch.no_grad(), generators_kept(module):
        return _Inference(module, args, kwargs, plan_cut(module) if cut else None, operations).axes(inputs)


class _RefutedError(Exception):
    """A hypothesis that the model does not bear out."""


@final
@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """That the axes in `axes` can take any size, and that runs on these stand-ins show it.

    grid: the settings from which formulas are solved; the first is also the one that is repeated.
    checks: settings for a check, of which the first that the model allows is used.
    windows: further settings, beyond the lengths at which the model changes its masks; used if the model allows them.
    fixed: the axes that are not varied, by their size in the arguments.
    """

    axes: InputAxes
    stand_in: Fakes | Reals
    grid: tuple[Setting, ...]
    checks: tuple[Setting, ...]
    windows: tuple[Setting, ...]
    fixed: Mapping[str, int]

    def __str__(self) -> str:
        held = "".join(f" and {name} held at {size}" for name, size in self.fixed.items())
        return f"on {self.stand_in.how} tensors{held}"


class _Inference:
    """One model and one kind of arguments, and the hypotheses that are tried on them."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cut: Cut | None,
        operations: Collection[str],
    ) -> None:
        self.module, self.args, self.kwargs, self.cut, self.operations = module, args, kwargs, cut, operations
        self.stand_ins: list[Fakes | Reals] = [Fakes(module, args, kwargs)]
        if has_weights(module):
            self.stand_ins.append(Reals())
        elif sum(parameter.numel() for parameter in module.parameters()) <= _FEW_WEIGHTS:
            self.stand_ins.append(Reals(draws=True))

    def axes(self, inputs: InputAxes) -> Axes:
        """The axes by the first hypothesis that holds."""
        reasons: dict[str, None] = {}  # in order, each once
        for hypothesis in self._hypotheses(inputs):
            try:
                found = self._tested(hypothesis)
            except Exception as error:  # whatever the model raises: it is the reason for what is tried next
                reasons[f"{hypothesis}: {_first_line(error)}"] = None
                continue
            reason = "; ".join([*reasons, found.uncut] if found.uncut else reasons)
            how, fixed = hypothesis.stand_in.how, hypothesis.fixed
            return Axes(found.refused, inputs, how, reason, fixed, found.cut, found.values)
        return Axes({}, inputs, "none", "; ".join(reasons))

    def _hypotheses(self, inputs: InputAxes) -> Iterator[_Hypothesis]:
        """The strongest first: rows and tokens vary, rows alone, neither."""
        rows, tokens = inputs.sizes(self.args, self.kwargs)
        for dropped in ((), ("tokens",), ("rows", "tokens")):
            if dropped and dropped[0] not in inputs.names:
                continue
            held = inputs.without(*dropped)
            sizes = {"rows": rows, "tokens": tokens}
            fixed = {name: sizes[name] for name in sizes if name in inputs.names - held.names}
            some_rows, checked_rows = (_ROWS, _ROWS_CHECKED) if "rows" in held.names else ((rows,), (rows,))
            lengths = _TOKENS if "tokens" in held.names else (((tokens,), tokens),)
            for stand_in, (some_tokens, checked_tokens) in itertools.product(self.stand_ins, lengths):
                grid = tuple(itertools.product(some_rows, some_tokens))
                checks = tuple((number, checked_tokens) for number in checked_rows) if held.names else ()
                beyond = self._beyond(stand_in, some_tokens) if "tokens" in held.names else ()
                yield _Hypothesis(held, stand_in, grid, checks, beyond, fixed)

    def _beyond(self, stand_in: Fakes | Reals, lengths: tuple[int, ...]) -> tuple[Setting, ...]:
        """One row of more tokens than each window longer than all lengths, of fewer than each that is shorter."""
        longest = _LONGEST[stand_in.how]
        longer = [(1, window + 1) for window in windows(self.module) if max(lengths) < window <= longest]
        return *longer, *((1, window - 1) for window in windows(self.module) if window <= min(lengths))

    def _tested(self, hypothesis: _Hypothesis) -> _Found:
        """Raises what the model raises; `_RefutedError` where nothing that it returns has rows."""
        uncut = ""
        if self.cut is not None:
            try:
                return self._found(hypothesis, self.cut)
            except Exception as error:  # is it the cut? the whole model shows
                uncut = f"not cut to its first layers: {_first_line(error)}"
        return replace(self._found(hypothesis, None), uncut=uncut)

    def _found(self, hypothesis: _Hypothesis, cut: Cut | None) -> _Found:
        # One shadow is copied for each run, so that what a run leaves in it is not seen by the next.
        shadow = shadowed(self.module, hypothesis.stand_in, cut.left_out(self.module) if cut else frozenset())
        grid = {setting: self._run(shadow, hypothesis, setting) for setting in hypothesis.grid}
        checks = self._checks(shadow, hypothesis)
        first = hypothesis.grid[0]
        if cut is not None:
            deeper = shadowed(self.module, hypothesis.stand_in, cut.left_out(self.module, more=1))
            _require_agreement(grid[first], self._run(deeper, hypothesis, first), cut)
        again = range(1, 1 + _REPEATS[hypothesis.stand_in.how]) if hypothesis.axes.names else ()
        repeats = [self._run(shadow, hypothesis, first, repeat) for repeat in again]
        values, refused = solved(grid | checks, repeats)
        root = Event("", "output", 0)
        if "rows" in hypothesis.axes.names and root in values and not _has_rows(values[root]):
            raise _RefutedError("nothing that the model returns has as many entries as its input has rows")
        if cut is not None:
            values, refused = _expanded(values, cut), _expanded(refused, cut)
        return _Found(values, refused, cut.kept if cut else {})

    def _checks(self, shadow: nn.Module, hypothesis: _Hypothesis) -> dict[Setting, Record]:
        """Runs at other settings: the first check that the model allows, and beyond its windows where allowed."""
        found: dict[Setting, Record] = {}
        for settings in (hypothesis.checks, *((setting,) for setting in hypothesis.windows)):
            for setting in settings:
                try:
                    found[setting] = self._run(shadow, hypothesis, setting)
                    break
                except Exception:  # what a model does not allow in these runs, it does not allow in any
                    if hypothesis.checks[-1:] == (setting,):
                        raise
        return found

    def _run(self, shadow: nn.Module, hypothesis: _Hypothesis, setting: Setting, repeat: int = 0) -> Record:
        """One forward, on a copy of the shadow; a repeat has other numbers and a mask that hides a token."""
        stand_in = hypothesis.stand_in
        if hypothesis.axes.names:
            sampler = Sampler(self.module, self.args, self.kwargs, hypothesis.axes)
            seed = 10_000 * setting[0] + 10 * setting[1] + repeat
            inputs = sampler.sample(*setting, seed, padded=repeat > 0)
        else:  # nothing varies: the arguments themselves are most likely to be such as the model takes
            inputs = pytree.tree_map(_copied, (self.args, self.kwargs))
        args, kwargs = as_inputs(inputs, stand_in)
        with stand_in.running_on_numbers():
            return record(shadowed(shadow, stand_in), args, kwargs, self.operations)


@final
@dataclass(frozen=True, slots=True)
class _Found:
    """What a hypothesis that holds has shown. `uncut`: why a cut that was planned does not do."""

    values: dict[Event, Leaves]
    refused: dict[Event, str]
    cut: Mapping[str, int]
    uncut: str = ""


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return copy.deepcopy(leaf)
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf.detach().clone()


def _require_agreement(one: Record, deeper: Record, cut: Cut) -> None:
    """That a layer more changes nothing elsewhere, and that it does what the one that stands for it does.

    Raises:
        _RefutedError: it does not.
    """
    for event in deeper | one:
        alike, leaves = one.get(replace(event, path=cut.represented_by(event.path))), deeper.get(event)
        if alike is None or leaves is None or not same(alike, leaves):
            raise _RefutedError(f"one layer more makes a difference at {event.path or 'the model'} {event.port}")


def _expanded(of: dict[Event, T], cut: Cut) -> dict[Event, T]:
    """With the events of the layers that were left out."""
    by_layer: dict[str, list[tuple[Event, T]]] = {}
    for event, value in of.items():
        if (layer := cut.layer_of(event.path)) is not None:
            by_layer.setdefault(layer, []).append((event, value))
    return of | {
        replace(event, path=left_out + event.path[len(layer) :]): value
        for left_out, layer in cut.represented.items()
        for event, value in by_layer.get(layer, ())
    }


def _has_rows(value: Leaves) -> bool:
    leaves = [leaf for leaf in value[0] if isinstance(leaf, TensorAxes)]
    return not leaves or any(extent.rows or extent.rows_tokens for leaf in leaves for extent in leaf.shape)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, _RefutedError) else f"{type(error).__name__}: {text}"
