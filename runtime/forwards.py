"""Running one forward of a model with the functions of a plan at its sites.

Hooks are registered for the run and removed after it, whatever happens in it. A hook acts only for the run that
registered it: another thread, a run inside this one, and a module that the body itself calls see the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import product
from types import FunctionType, ModuleType
from typing import Any, Protocol, final

import torch
from torch import nn

from nnsight_compiler.ir.errors import ModelError, RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.rows import Batch
from nnsight_compiler.passes.sites import PlacePort
from nnsight_compiler.runtime.active import ACTIVE as _ACTIVE
from nnsight_compiler.runtime.generation import Asked, Generation, covers
from nnsight_compiler.runtime.gradients import adapters, recorded
from nnsight_compiler.runtime.hooks import (
    SitePlan,
    Started,
    Stop,
    are_watched,
    input_hook,
    output_hook,
    skipped,
    step_hook,
)
from nnsight_compiler.runtime.kept import Kept, event_of
from nnsight_compiler.runtime.observe import Event
from nnsight_compiler.runtime.operations import Operations
from nnsight_compiler.runtime.prefixes import Prefix, replaying, without_cache
from nnsight_compiler.runtime.prompts import remembering
from nnsight_compiler.runtime.replacing import Replaced, Replacement
from nnsight_compiler.runtime.rows import Share, SitesAxes, Sizes
from nnsight_compiler.runtime.runs import RECORDER
from nnsight_compiler.runtime.scanning import as_it_runs, prepared, ready
from nnsight_compiler.runtime.stopping import not_reached

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward, or of an invoke."""
SiteName = tuple[str, PlacePort, int]
"""The path of a module, a port, a call."""
Confirm = Callable[[Any, Given, tuple[SiteName, ...]], str | None]
"""Says why invokes cannot share the sites of a model's forward on these inputs; `None` where they can."""


class Runnable(Protocol):
    """A wrapped model."""

    def _ready(self) -> nn.Module: ...
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]: ...
    def _batch(self, given: Sequence[Given], options: Mapping[str, Any]) -> Batch: ...
    def _forward_parameters(self) -> Collection[str]: ...
    def _prepare_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given: ...
    def _first_step(self, inputs: Given) -> Given | None: ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """One run of a model that is about to begin.

    args, kwargs: what the model is given.
    states: the state of each strand that takes part in it. plans: the plan of each, where they have different ones.
    strands: what each asked for, which has the `failure` of those that failed.
    sites: the plan's sites with the functions that act in this run.
    shares: where several strands take part, what each brought.
    replaced: for modules that do not run, by their paths, what is called instead.
    grad: whether all weights count for gradients.
    kind: of strands that share rows, the shapes of what each is given: rows are told apart, so that how often modules
        run does not depend on how many there are.
    run: what stands for this run where hooks ask which one acts.
    fired: how often each site was reached, in the step that runs.
    generation: the generation, where it is one.
    """

    model: Runnable
    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: tuple[Any, ...]
    sites: tuple[SitePlan, ...]
    shares: tuple[Share, ...] = ()
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    grad: bool = False
    kind: tuple[Any, ...] | None = None
    run: object = field(default_factory=object)
    fired: list[int] = field(default_factory=list)
    generation: Generation | None = None
    plans: tuple[Forward, ...] = ()
    strands: tuple[Any, ...] = ()


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
    replays: the modules that do not run where a prefix holds what they give, each with whether that must be a copy.
    results: what is done with what a generation returned.
    generation: what a generation is asked for; `None` where the model runs once.
    prompts: where in the state is what was made of prompts, for programs that may prepare one several times.
    keeps: what the program keeps of it. `strand`: what it keeps of all forwards of the round that this is one of.
    changes: where values of the model are replaced.
    made: the names in the state of what its sites make.
    repeatable: whether the functions change nothing but what they make and what the model does, so that a run which
        did not end can be followed by another.
    events: of a forward of a strand, what happens in it, in order, as it was seen.
    alike: what is equal for forwards that may be rows of one, where their inputs are of one kind.

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
    replays: Mapping[str, bool] = field(default_factory=dict)
    generation: Asked | None = None
    prompts: str = ""
    keeps: tuple[Kept, ...] = ()
    strand: tuple[Kept, ...] = ()
    changes: tuple[Event, ...] = ()
    made: tuple[str, ...] = ()
    repeatable: bool = False
    events: tuple[Event, ...] = ()
    alike: Any = field(init=False)
    _whole: set[Any] = field(default_factory=set)
    _confirmed: bool = False

    def __post_init__(self) -> None:
        bound = tuple((*site.name, site.required, site.calls) for site in self.sites if site.required or site.calls)
        self.alike = tuple(self.replays.items()), self.wanted is not None, bound, self.generation is not None

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
        run, fired = object(), list[int]()
        generation = None
        if self.generation is not None:
            several = self.span if len(invokes) > 1 else None
            generation = self.generating(root, kwargs, (state,), run, fired, several)
        if invokes:
            with remembering(getattr(state, self.prompts, None)):
                args, kwargs = self._batched(model, invokes, kwargs, state, generation)
        else:
            args, kwargs = self.prepared(model, args, kwargs, state)
        self.run_prepared(
            Running(
                model, root, args, kwargs, (state,), self.sites, grad=grad, run=run, fired=fired, generation=generation
            )
        )

    def prepared(self, model: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Given:
        """The arguments of the torch module, from those of the forward."""
        with remembering(getattr(state, self.prompts, None)):
            if self.generation is not None:
                return model._prepare_generation(args, kwargs)
            return prepared(model, args, kwargs)

    def resume(self, model: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any, base: Prefix) -> None:
        """Runs the model on these arguments, from where a prefix of them ends."""
        args, kwargs = self.prepared(model, args, kwargs, state)
        self.run_prepared(self.running(model, ready(model), args, kwargs, (state,), base))

    def running(
        self,
        model: Runnable,
        root: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        states: tuple[Any, ...],
        base: Prefix | None = None,
    ) -> Running:
        """A run on prepared arguments, in which these states take part."""
        run, fired = object(), list[int]()
        generation = None
        if self.generation is not None:
            kwargs = dict(kwargs)
            generation = self.generating(root, kwargs, states, run, fired, self.span if len(states) > 1 else None)
        running = Running(model, root, args, kwargs, states, self.sites, run=run, fired=fired, generation=generation)
        if base is None or are_watched(root) or not self.resumes(running):
            return running
        return self.resumed(running, base.values())

    def resumes(self, running: Running) -> bool:
        """Whether modules may be replayed: what they give has no gradients, and they change nothing by running."""
        given = (*running.args, *running.kwargs.values())
        gradients = self.named or any(map(_requires_grad, given)) or adapters(running.root)
        return not running.root.training and not (torch.is_grad_enabled() and gradients)

    def resumed(self, running: Running, values: Mapping[str, Any]) -> Running:
        """The same run, with these values of the modules that are replayed."""
        replaced = {path: replaying(values[path], own) for path, own in self.replays.items() if path in values}
        return replace(running, kwargs=without_cache(running.model, running.kwargs), replaced=replaced)

    @property
    def end(self) -> Event | None:
        """What happens last of all that is needed; `None` where the model runs to its end."""
        return event_of(self.sites[-1].path, self.sites[-1].port, self.sites[-1].call) if self.sites else None

    def ends_early(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a run on such inputs stops after the last site."""
        return self.stops and shapes_of(args, kwargs) in self._whole

    def forget(self, states: Sequence[Any]) -> None:
        """Lets go of what the sites made in a run that did not end."""
        for state, name in product(states, self.made):
            if hasattr(state, name):
                delattr(state, name)

    def run_prepared(self, running: Running) -> None:
        """Runs the model on arguments that are its own already."""
        root, run, args, kwargs, sites = running.root, running.run, running.args, running.kwargs, running.sites
        fired, generation, state = running.fired, running.generation, running.states[0]
        fired[:] = [0] * len(sites)
        shapes = (running.kind or shapes_of(args, kwargs)) if self.stops else None
        stops = shapes in self._whole and not root.training
        last = len(sites) - 1
        operations = Operations(root, run)
        handles: list[Any] = [operations]
        starts: dict[int, Started] = {}
        stopped: Stop | None = None
        before = _ACTIVE.run
        if generation is None:
            RECORDER.count(self.span)
        began = RECORDER.begin()
        try:
            if generation is not None:
                handles.append(root.register_forward_pre_hook(step_hook(generation, run)))
            for path, replacement in running.replaced.items():
                handles.append(Replaced(root.get_submodule(path), _ACTIVE, run, replacement))
            for index, site in enumerate(sites):
                module = operations.operation(site.path) if ":" in site.path else self._module(root, site)
                ends = stops and index == last
                if site.port == "output":
                    started = None if site.call is None else Started(run)
                    if started is not None:
                        starts[index] = started
                        if generation is not None:
                            generation.counters.append(started)
                        handles.append(module.register_forward_pre_hook(started))
                    handles.append(
                        module.register_forward_hook(output_hook(site, run, state, fired, index, ends, started))
                    )
                elif site.port == "skip":
                    skip = skipped(sites, run, state, fired, index, starts)
                    handles.append(Replaced(module, _ACTIVE, run, skip))
                else:
                    hook = input_hook(site, run, state, fired, index, ends)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            _ACTIVE.run = run
            if self.copies:
                args, kwargs = _copied((args, kwargs), {})
            with as_it_runs(), self._recorded(running):
                if generation is not None:
                    result = generation.run(root, args, kwargs)
                else:
                    root(*args, **kwargs)
        except Stop as stop:
            if stop.run is not run:
                raise
            stopped = stop.with_traceback(None)  # which would hold this frame, and this frame holds it
        finally:
            _ACTIVE.run = before
            for handle in handles:
                handle.remove()
        if began is not None:
            ended = None if stopped is None else self.sites[last if stopped.site is None else stopped.site]
            name: SiteName | None = None if ended is None else (ended.path, ended.port, ended.call or 0)
            steps = generation.count if generation is not None else 1
            plans = tuple(dict.fromkeys(running.plans)) or (self,)
            began.end(plans, args, kwargs, name, steps, len(running.states), tuple(running.replaced))
        if generation is not None and self.generation is not None:
            if stopped is not None:
                assert stopped.site is not None
                assert stopped.where is not None
                for site in (*self.sites, *self.results):  # what earlier steps made stays
                    missing = tuple(each for each in site.later if not hasattr(state, each.slot))
                    not_reached(state, missing, stopped.where)
                return
            if not running.shares:
                generation.finish(self.generation.steps, generation.count)
            plans = running.plans or (self,) * len(running.states)
            for share, plan in zip(running.shares, plans, strict=False):
                assert plan.generation is not None
                generation.finish(plan.generation.steps, share.length or generation.count)
            failed = [each.failure is not None for each in running.strands] or [False] * len(running.states)
            for own, of, plan, over in zip(running.shares or (None,), running.states, plans, failed, strict=True):
                for site in () if over else plan.results:
                    site.function(result if own is None else own.result(result), of)
            return
        self._check(root, fired, stopped, state)
        if shapes is not None and stopped is None and all(site.calls is None for site in self.sites):
            self._whole.add(shapes)

    def _recorded(self, running: Running) -> AbstractContextManager[Any]:
        """Around the run of the model: whether gradients are recorded."""
        root = running.root
        if self.wanted is None and not (running.grad and torch.is_grad_enabled()):
            given = [(state, running.args, running.kwargs) for state in running.states]
            if not self.records(running.model, root, given):
                return torch.no_grad()
        own = self._attached(running.model)
        attached = (f"{path}.{name}" for path, module in own.items() for name, _ in module.named_parameters())
        return recorded(root, self.wanted, (*self.named, *attached), everything=running.grad)

    def records(
        self, model: Runnable, root: nn.Module, given: Sequence[tuple[Any, tuple[Any, ...], Mapping[str, Any]]]
    ) -> bool:
        """Whether what one of several runs gives has gradients, though the program asks for none. `given`: of each, its
        state and the arguments of the model."""
        if not torch.is_grad_enabled():
            return False
        if any(self._records(*each) for each in given) or adapters(root):
            return True
        return any(map(_requires_grad, self._attached(model).values()))

    def _attached(self, model: Runnable) -> dict[str, nn.Module]:
        """The modules that were attached to the model, of those that the body calls."""
        return {path: resolve(model, path) for path in self.own & getattr(model, "_attached", set())}

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
        self, root: nn.Module, fired: list[int], stopped: Stop | None, state: Any, step: int | None = None
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

    def generating(
        self,
        root: nn.Module,
        kwargs: dict[str, Any],
        states: Sequence[Any],
        run: object,
        fired: list[int],
        several: Span | None,
    ) -> Generation:
        """A generation that is about to run; takes from its arguments what is not the model's."""
        asked = self.generation
        assert asked is not None
        on_token, seed = kwargs.pop("on_token", None), kwargs.pop("seed", None)

        def settle(step: int) -> None:
            self._check(root, fired, None, states[0], step)
            fired[:] = [0] * len(fired)

        def plain(ids: torch.Tensor) -> None:
            _ACTIVE.run = None  # what it calls is the plain model
            try:
                on_token(ids)
            finally:
                _ACTIVE.run = run

        def advance(step: int) -> None:
            for state in states:
                setattr(state, asked.slot, step)

        generation = Generation(self.span, advance, settle, None if on_token is None else plain, seed)
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

    def may_record(self, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether gradients are asked for, or something that a run brings requires them."""
        return self.wanted is not None or self._records(state, args, kwargs)

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


def shapes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
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
