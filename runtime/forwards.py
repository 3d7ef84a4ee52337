"""Running one forward of a model with the functions of a plan at its sites.

Hooks are registered for the run and removed after it, whatever happens in it. A hook acts only for the run that
registered it: another thread, a run inside this one, and a module that the body itself calls see the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Protocol, final
from typing import Literal as OneOf

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError, RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.rows import Batch
from nnsight_compiler.passes.sites import PlacePort
from nnsight_compiler.runtime.active import ACTIVE as _ACTIVE
from nnsight_compiler.runtime.generation import Asked, Generation, Steps, covers
from nnsight_compiler.runtime.gradients import adapters, recorded
from nnsight_compiler.runtime.operations import Operations
from nnsight_compiler.runtime.replacing import Replaced, Replacement
from nnsight_compiler.runtime.rows import Share, SitesAxes, Sizes
from nnsight_compiler.runtime.scanning import as_it_runs, prepared, ready
from nnsight_compiler.runtime.skipping import Left, Skipped
from nnsight_compiler.runtime.stopping import Later, Stopped, not_reached

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward, or of an invoke."""
SiteName = tuple[str, PlacePort, int]
"""The path of a module, a port, a call."""
Confirm = Callable[[Any, Given, tuple[SiteName, ...]], str | None]
"""Says why invokes cannot share the sites of a model's forward on these inputs; `None` where they can."""
SiteFunction = Callable[[Any, Any], Any]
"""`(value, state) -> value`: what the model goes on with."""


class Runnable(Protocol):
    """A wrapped model."""

    def _ready(self) -> nn.Module: ...
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]: ...
    def _batch(self, given: Sequence[Given], options: Mapping[str, Any]) -> Batch: ...
    def _forward_parameters(self) -> Collection[str]: ...
    def _prepare_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]: ...


class _Stop(BaseException):
    """Ends a forward at the last site that anything needs, or where the program says so: `site` is its number then."""

    def __init__(self, run: object, site: int | None = None, where: Span | None = None) -> None:
        self.run, self.site, self.where = run, site, where


@final
@dataclass(frozen=True, slots=True)
class SitePlan:
    """One function at one site.

    call: the number of the call, for a module that runs several times.
    calls: how often the module must run, where the call was counted from the end.
    steps: in a generation, the steps at which the function does something.
    left: what is left out where the module is skipped here.
    later: what does not exist where the forward is stopped before this site.
    """

    path: str
    port: OneOf["output", "skip", "input", "result"]
    call: int | None
    function: SiteFunction
    span: Span
    calls: int | None = None
    steps: tuple[Steps, ...] = ()
    left: Left | None = None
    later: tuple[Later, ...] = ()

    def __str__(self) -> str:
        return f"`{self.path or 'the model'}` {self.port}"


@final
@dataclass(slots=True, eq=False)
class Forward:
    """The plan of one forward: the functions at its sites, in the order in which they run.

    stops: whether nothing that comes after the last site is needed.
    copies: whether the functions may write in place: the model is then given copies, lest a site be a caller's tensor.
    brings: the names in the state of what comes from outside of the forward; gradients are recorded where one of these
        requires them.
    wanted: where a gradient is asked for, which is also recorded then.
    named: the weights whose gradients count, by their paths.
    invokes: for each invoke that brings input, the name in the state of its share, or nothing if no site asks for it.
    divided: the path, port and call of each site that invokes share, and `confirm` says of them why they cannot;
        asked once, before the first run.
    axes: tells, of the inputs, what stands at the sites that invokes share, where that was not known before the run.
    own: the paths of the modules that the body calls: where one was attached, its weights count, and gradients are
        recorded where it is trained.
    results: what is done with what a generation returned.
    generation: what a generation is asked for; `None` where the model runs once.

    The first run on inputs of new shapes never stops early: how often a module runs may depend on them, and a second
    run of the last site would otherwise go unnoticed.
    """

    sites: tuple[SitePlan, ...]
    stops: bool
    copies: bool
    brings: tuple[str, ...]
    span: Span
    own: frozenset[str] = frozenset()
    wanted: Span | None = None
    named: tuple[str, ...] = ()
    invokes: tuple[str, ...] = ()
    axes: Callable[[Any, Given], SitesAxes] | None = None
    divided: tuple[SiteName, ...] = ()
    confirm: Confirm | None = None
    results: tuple[SitePlan, ...] = ()
    generation: Asked | None = None
    _whole: set[Any] = field(default_factory=set)
    _confirmed: bool = False

    def run(
        self,
        model: Runnable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Any,
        invokes: tuple[Given, ...] = (),
    ) -> None:
        """Runs the model on these arguments, or on those of its invokes as one batch.

        Raises:
            RunError: a site was not reached, or more often than the plan says.
        """
        grad = kwargs.pop("grad", False)
        root = ready(model)
        run = object()
        fired = [0] * len(self.sites)
        generation = None
        if self.generation is not None:
            several = self.span if len(invokes) > 1 else None
            generation = self._generation(self.generation, root, kwargs, state, run, fired, several)
        if invokes:
            args, kwargs = self._batched(model, invokes, kwargs, state, generation)
        elif generation is not None:
            args, kwargs = model._prepare_generation(args, kwargs)
        else:
            args, kwargs = prepared(model, args, kwargs)
        shapes = _shapes(args, kwargs) if self.stops else None
        stops = shapes in self._whole and not root.training
        last = len(self.sites) - 1
        operations = Operations(root, run)
        handles: list[Any] = [operations]
        starts: dict[int, _Started] = {}
        stopped: _Stop | None = None
        before = _ACTIVE.run
        try:
            if generation is not None:
                handles.append(root.register_forward_pre_hook(_step_hook(generation, run)))
            for index, site in enumerate(self.sites):
                module = operations.operation(site.path) if ":" in site.path else self._module(root, site)
                ends = stops and index == last
                if site.port == "output":
                    started = None if site.call is None else _Started(run)
                    if started is not None:
                        starts[index] = started
                        if generation is not None:
                            generation.counters.append(started)
                        handles.append(module.register_forward_pre_hook(started))
                    handles.append(
                        module.register_forward_hook(_output_hook(site, run, state, fired, index, ends, started))
                    )
                elif site.port == "skip":
                    skip = _skip(self.sites, run, state, fired, index, starts)
                    handles.append(Replaced(module, _ACTIVE, run, skip))
                else:
                    hook = _input_hook(site, run, state, fired, index, ends)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            _ACTIVE.run = run
            own = {path: resolve(model, path) for path in self.own & getattr(model, "_attached", set())}
            records = grad or self._records(state, args, kwargs) or any(map(_requires_grad, own.values()))
            records = records or (torch.is_grad_enabled() and bool(adapters(root)))
            attached = (f"{path}.{name}" for path, module in own.items() for name, _ in module.named_parameters())
            named = (*self.named, *attached)
            if self.copies:
                args, kwargs = _copied((args, kwargs), {})
            asked = self.wanted is not None or (records and torch.is_grad_enabled())
            around = recorded(root, self.wanted, named, everything=grad) if asked else torch.no_grad()
            with as_it_runs(), around:
                if generation is not None:
                    result = generation.run(root, args, kwargs)
                else:
                    root(*args, **kwargs)
        except _Stop as stop:
            if stop.run is not run:
                raise
            stopped = stop.with_traceback(None)  # which would hold this frame, and this frame holds it
        finally:
            _ACTIVE.run = before
            for handle in handles:
                handle.remove()
        if generation is not None and self.generation is not None:
            if stopped is not None:
                assert stopped.site is not None
                assert stopped.where is not None
                for site in (*self.sites, *self.results):  # what earlier steps made stays
                    missing = tuple(each for each in site.later if not hasattr(state, each.slot))
                    not_reached(state, missing, stopped.where)
                return
            generation.finish(self.generation.steps)
            for site in self.results:
                site.function(result, state)
            return
        self._check(root, fired, stopped, state)
        if shapes is not None and stopped is None and all(site.calls is None for site in self.sites):
            self._whole.add(shapes)

    @staticmethod
    def _once(root: nn.Module, site: SitePlan, step: int) -> bool:
        """Whether a site is one of an encoder, which runs before the first step alone: a write outside of loops over
        steps has no other there."""
        if not step or not {(0, 1), (1, None)} <= set(site.steps):
            return False
        if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
            return False
        encoder: Any = root.get_encoder  # it is not typed
        inside = root.get_submodule(site.path)
        return any(module is inside for module in encoder().modules())

    def _check(
        self, root: nn.Module, fired: list[int], stopped: _Stop | None, state: Any, step: int | None = None
    ) -> None:
        """Refuses a forward, or a step, in which a site was not reached, or more often than the plan says."""
        for index, (site, count) in enumerate(zip(self.sites, fired, strict=True)):
            if stopped is not None and stopped.site is not None and stopped.where is not None:
                if index > stopped.site:
                    not_reached(state, site.later, stopped.where)
                    continue
                if site.calls is not None:  # how often it would have run is not known
                    continue
            if step is not None and (not covers(site.steps, step) or (not count and self._once(root, site, step))):
                continue
            if site.calls is not None and count != site.calls:
                raise RunError(
                    f"{site.span}: {site} ran {count} times in this forward, but {site.calls} times in the one that"
                    " this was compiled for, so that a call counted from the end is another one\n"
                    "  way out: count from the start, as in `.calls[0]`"
                )
            if count != 1 and (site.call is None or count <= site.call):
                self._missed(site, count, "this forward" if step is None else f"step {step} of this generation")

    def _generation(
        self,
        asked: Asked,
        root: nn.Module,
        kwargs: dict[str, Any],
        state: Any,
        run: object,
        fired: list[int],
        several: Span | None,
    ) -> Generation:
        """A generation that is about to run; takes from its arguments what is not the model's."""
        on_token, seed = kwargs.pop("on_token", None), kwargs.pop("seed", None)

        def settle(step: int) -> None:
            self._check(root, fired, None, state, step)
            fired[:] = [0] * len(fired)

        def plain(ids: torch.Tensor) -> None:
            _ACTIVE.run = None  # what it calls is the plain model
            try:
                on_token(ids)
            finally:
                _ACTIVE.run = run

        advance: Callable[[int], None] = lambda step: setattr(state, asked.slot, step)  # noqa: E731
        generation = Generation(advance, settle, None if on_token is None else plain, seed)
        generation.check(asked.steps, root, kwargs, several)
        return generation

    def _batched(
        self,
        model: Runnable,
        invokes: tuple[Given, ...],
        options: Mapping[str, Any],
        state: Any,
        generation: Generation | None,
    ) -> Given:
        """The arguments of the forward for a batch, each invoke's share of which goes into the state."""
        try:
            batch = model._batch(invokes, options)
        except ModelError as error:
            raise RunError(f"{self.span}: {error}") from None
        inputs = batch.kwargs
        if generation is not None:  # its options are none of the model's forward
            inputs = {name: value for name, value in inputs.items() if name in model._forward_parameters()}
        if self.confirm is not None and not self._confirmed:
            wrong = self.confirm(model, (batch.args, inputs), self.divided)
            if wrong is not None:
                raise RunError(f"{self.span}: {wrong}")
            self._confirmed = True
        sizes = Sizes(batch.rows, batch.tokens)
        if self.axes is not None:
            sizes.axes = self.axes(model, (batch.args, inputs))
        for name, part in zip(self.invokes, batch.parts, strict=True):
            if name:
                setattr(state, name, Share(part, sizes))
        if generation is None:
            return batch.args, batch.kwargs
        generation.sizes = sizes
        encodes = getattr(getattr(ready(model), "config", None), "is_encoder_decoder", False)
        if encodes and any(part.padding for part in batch.parts):
            raise RunError(
                f"{self.span}: prompts of an encoder that differ in length cannot be told apart at the steps of a"
                " generation\n  way out: a `generate` for each prompt"
            )
        kwargs = {name: value for name, value in batch.kwargs.items() if name != "position_ids"}
        return model._prepare_generation(batch.args, kwargs)  # the model makes positions at each step, from the mask

    @staticmethod
    def _module(root: nn.Module, site: SitePlan) -> nn.Module:
        module: nn.Module = root
        for name in site.path.split(".") if site.path else ():
            found = module._modules.get(name)
            if found is None:
                raise RunError(f"{site.span}: the model no longer has a module `{site.path}`")
            module = found
        return module

    def _records(self, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        brought = (getattr(state, name, None) for name in self.brings)
        return any(map(_requires_grad, (*brought, *args, *kwargs.values())))

    @staticmethod
    def _missed(site: SitePlan, count: int, where: str) -> None:
        if count == 0:
            raise RunError(
                f"{site.span}: {site} did not run in {where}, so what the experiment does there did not happen\n"
                "  way out: address a module that runs on these inputs"
            )
        raise RunError(
            f"{site.span}: {site} ran {count} times in {where}, and what the experiment does there is meant for"
            " one\n"
            "  way out: say which call is meant, as in `.calls[0].output`"
        )


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a forward's inputs may decide how often its modules run, besides what was guarded on."""
    return tuple([getattr(value, "shape", None) for value in (*args, *kwargs.values())])


def _copied(value: Any, made: dict[int, Any]) -> Any:
    """A copy of an input: of the tensors in it, and of the containers around them. What is one stays one."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, torch.Tensor):
        copy: Any = value.clone()
    elif isinstance(value, tuple):
        items = [_copied(item, made) for item in value]
        copy = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif type(value) is list:
        copy = [_copied(item, made) for item in value]
    elif type(value) is dict:
        copy = {name: _copied(item, made) for name, item in value.items()}
    else:
        return value
    made[id(value)] = copy
    return copy


class _Started:
    """Numbers the calls of a module as they begin. They end in another order where a module calls itself."""

    def __init__(self, run: object) -> None:
        self.run, self.count = run, 0
        self.open: list[int] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        if _ACTIVE.run is self.run:
            self.open.append(self.count)
            self.count += 1


def _output_hook(
    site: SitePlan, run: object, state: Any, fired: list[int], index: int, ends: bool, started: _Started | None
) -> Callable[[nn.Module, Any, Any], Any]:
    function, call = site.function, site.call

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if _ACTIVE.run is not run:
            return None
        fired[index] += 1
        if started is not None and started.open.pop() != call:
            return None
        _ACTIVE.run = None
        try:
            result = function(output, state)
        finally:
            _ACTIVE.run = run
        if type(result) is Stopped:
            raise _Stop(run, index, result.where)
        if ends:
            raise _Stop(run)
        return result

    return hook


def _input_hook(
    site: SitePlan, run: object, state: Any, fired: list[int], index: int, ends: bool
) -> Callable[[nn.Module, Any, Any], Any]:
    function, call = site.function, site.call

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if _ACTIVE.run is not run:
            return None
        number = fired[index]
        fired[index] = number + 1
        if call is not None and number != call:
            return None
        _ACTIVE.run = None
        try:
            given = (args, kwargs)
            result = function(given, state)
        finally:
            _ACTIVE.run = run
        if type(result) is Stopped:
            raise _Stop(run, index, result.where)
        if ends:
            raise _Stop(run)
        return None if result is given else result

    return hook


def _step_hook(generation: Generation, run: object) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        if _ACTIVE.run is run:
            generation.begin()

    return hook


def _skip(
    sites: tuple[SitePlan, ...], run: object, state: Any, fired: list[int], index: int, starts: dict[int, _Started]
) -> Replacement:
    """What is called in the place of the forward of a module that may be skipped."""
    site = sites[index]
    function, call, left = site.function, site.call, site.left
    assert left is not None, "the plan says what a skip leaves out"

    def replacement(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        number = fired[index]
        fired[index] = number + 1
        if call is not None and number != call:
            return plain(*args, **kwargs)
        _ACTIVE.run = None
        try:
            found = function(None, state)
        finally:
            _ACTIVE.run = run
        if type(found) is Stopped:
            raise _Stop(run, index, found.where)
        if type(found) is not Skipped:
            return plain(*args, **kwargs)
        for other, each in enumerate(sites):  # calls keep the numbers that they have where nothing is skipped
            if each.path in left.inner:
                fired[other] += left.inner[each.path]
                if other in starts:
                    starts[other].count += left.inner[each.path]
            if each.port == "skip" and each.path == site.path:
                fired[other] = number + 1  # another call of this module may be skipped too
        return left.output(found.value, args, kwargs, found.where)

    return replacement


def _requires_grad(value: Any, depth: int = 4) -> bool:
    """Whether a value is, or holds, a tensor that requires a gradient: in containers, modules and plain objects."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    if not depth or isinstance(value, (type, ModuleType, FunctionType)) or hasattr(type(value), "_ready"):
        return False
    if isinstance(value, (list, tuple)):
        return any(_requires_grad(item, depth - 1) for item in value)
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return isinstance(held, dict) and any(_requires_grad(item, depth - 1) for item in held.values())


def resolve(model: Any, path: str) -> nn.Module:
    """A module of a wrapped model, with its weights: what the body calls, or takes a weight of."""
    found: nn.Module = ready(model).get_submodule(path)
    return found
