"""Running one forward of a model with the functions of a plan at its sites.

Hooks are registered for the run and removed after it, whatever happens in it. A hook acts only for the run that
registered it: another thread, a run inside this one, and a module that the body itself calls see the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, final

import torch
from torch import nn

from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.autograd_recording import adapters, recorded, requires_grad
from nnsight_compiler.runtime.firing import check_fired
from nnsight_compiler.runtime.generation import Asked, Generation
from nnsight_compiler.runtime.hooks import (
    SitePlan,
    Started,
    Stop,
    are_watched,
    input_hook,
    module_of,
    output_hook,
    skipped,
    step_hook,
)
from nnsight_compiler.runtime.inputs import Given, Runnable, copied, shapes_of
from nnsight_compiler.runtime.invokes import Invokes
from nnsight_compiler.runtime.kept import Kept, event_of
from nnsight_compiler.runtime.observation import Event
from nnsight_compiler.runtime.operations import Operations
from nnsight_compiler.runtime.prefixes import Prefix, replaying, without_cache
from nnsight_compiler.runtime.prompts import remembering
from nnsight_compiler.runtime.replacing import Replaced, Replacement
from nnsight_compiler.runtime.runs import RECORDER, SiteName
from nnsight_compiler.runtime.scanning import as_it_runs, prepared, ready, resolve
from nnsight_compiler.runtime.shares import Share
from nnsight_compiler.runtime.stopping import not_reached


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
    invokes: what brings its input, where that is invokes.
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
    invokes: Invokes | None = None
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
        fired: list[int] = []
        generation = None
        if self.generation is not None:
            generation = self._generating(root, kwargs, (state,), fired, len(invokes) > 1)
        if invokes:
            with remembering(getattr(state, self.prompts, None)):
                assert self.invokes is not None, "the plan says what invokes bring"
                args, kwargs = self.invokes.batched(model, invokes, kwargs, state, generation)
        else:
            args, kwargs = self.prepared(model, args, kwargs, state)
        self.run_prepared(
            Running(model, root, args, kwargs, (state,), self.sites, grad=grad, fired=fired, generation=generation)
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
        fired: list[int] = []
        generation = None
        if self.generation is not None:
            kwargs = dict(kwargs)
            generation = self._generating(root, kwargs, states, fired, len(states) > 1)
        running = Running(model, root, args, kwargs, states, self.sites, fired=fired, generation=generation)
        if base is None or are_watched(root) or not self.resumes(running):
            return running
        return self.resumed(running, base.values())

    def _generating(
        self, root: nn.Module, kwargs: dict[str, Any], states: Sequence[Any], fired: list[int], several: bool
    ) -> Generation:
        """A generation that is about to run; takes from its arguments what is not the model's. `several`: whether rows
        of its batch are to be told apart."""
        asked = self.generation
        assert asked is not None

        def settle(step: int) -> None:
            check_fired(self.sites, fired, root, states[0], step=step)
            fired[:] = [0] * len(fired)

        on_token, seed = kwargs.pop("on_token", None), kwargs.pop("seed", None)
        generation = Generation(self.span, asked, states, settle, on_token, seed)
        generation.check(root, kwargs, self.span if several else None)
        return generation

    def resumes(self, running: Running) -> bool:
        """Whether modules may be replayed: what they give has no gradients, and they change nothing by running."""
        given = (*running.args, *running.kwargs.values())
        gradients = self.named or any(map(requires_grad, given)) or adapters(running.root)
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
        result: Any = None
        before = ACTIVE.run
        if generation is None:
            RECORDER.count(self.span)
        began = RECORDER.begin()
        try:
            if generation is not None:
                handles.append(root.register_forward_pre_hook(step_hook(generation, run)))
            for path, replacement in running.replaced.items():
                handles.append(Replaced(root.get_submodule(path), ACTIVE, run, replacement))
            for index, site in enumerate(sites):
                module = operations.operation(site.path) if ":" in site.path else module_of(root, site)
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
                    handles.append(Replaced(module, ACTIVE, run, skip))
                else:
                    hook = input_hook(site, run, state, fired, index, ends)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            ACTIVE.run = run
            if self.copies:
                args, kwargs = copied((args, kwargs), {})
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
            ACTIVE.run = before
            for handle in handles:
                handle.remove()
        if began is not None:
            ended = None if stopped is None else self.sites[last if stopped.site is None else stopped.site]
            name: SiteName | None = None if ended is None else (ended.path, ended.port, ended.call or 0)
            steps = generation.count if generation is not None else 1
            plans = tuple(dict.fromkeys(running.plans)) or (self,)
            began.end(plans, args, kwargs, name, steps, len(running.states), tuple(running.replaced))
        if generation is not None:
            self._end_generation(running, generation, result, stopped)
            return
        check_fired(self.sites, fired, root, state, stopped)
        if shapes is not None and stopped is None and all(site.calls is None for site in self.sites):
            self._whole.add(shapes)

    def _end_generation(self, running: Running, generation: Generation, result: Any, stopped: Stop | None) -> None:
        """Hands on what a generation returned, and refuses one that was too short. Where the program stopped it, what
        earlier steps made stays."""
        state = running.states[0]
        if stopped is not None:
            assert stopped.where is not None
            for site in (*self.sites, *self.results):
                missing = tuple(each for each in site.later if not hasattr(state, each.slot))
                not_reached(state, missing, stopped.where)
            return
        shares, plans = running.shares or (None,), running.plans or (self,) * len(running.states)
        for share, plan in zip(shares, plans, strict=True):
            assert plan.generation is not None
            count = generation.count if share is None else share.length or generation.count
            generation.finish(plan.generation.steps, count)
        failed = [each.failure is not None for each in running.strands] or [False] * len(running.states)
        for share, of, plan, over in zip(shares, running.states, plans, failed, strict=True):
            for site in () if over else plan.results:
                site.function(result if share is None else share.result(result), of)

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
        return any(map(requires_grad, self._attached(model).values()))

    def may_record(self, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether gradients are asked for, or something that a run brings requires them."""
        return self.wanted is not None or self._records(state, args, kwargs)

    def _records(self, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        brought = (getattr(state, name, None) for name in self.brings)
        return any(map(requires_grad, (*brought, *args, *kwargs.values())))

    def _attached(self, model: Runnable) -> dict[str, nn.Module]:
        """The modules that were attached to the model, of those that the body calls."""
        return {path: resolve(model, path) for path in self.own & getattr(model, "_attached", set())}
