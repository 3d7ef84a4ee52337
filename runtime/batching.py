"""Forwards that strands ask for, as rows of one.

Requests of one plan whose inputs have equal shapes share a forward, up to the size at which more rows gain nothing and
up to the memory that they may use; with padding, also those whose inputs are about as long. Each sees its own rows at
each site, as invokes do. Where memory runs out all the same, half as many are tried.

Where what a strand does at a site fails, it does no more in that forward, and the others go on: the exception is raised
in its strand. What the model itself raises is that of the strand for which it raises it where each runs by itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import ModelError, RunError
from nnsight_compiler.passes.remarks import Remark
from nnsight_compiler.passes.rows import Batch
from nnsight_compiler.runtime.autograd_recording import plainly, require
from nnsight_compiler.runtime.axes import AxisError
from nnsight_compiler.runtime.backward_passes import BackwardRequest, GradientsRequest, run_backwards, run_gradients
from nnsight_compiler.runtime.budget import Allowance, Needs, is_out_of_memory
from nnsight_compiler.runtime.calls import CallRequest, run_calls
from nnsight_compiler.runtime.divided_sites import Divided
from nnsight_compiler.runtime.formulas import Opaque
from nnsight_compiler.runtime.forwards import Forward, Running
from nnsight_compiler.runtime.gradients import of_rows
from nnsight_compiler.runtime.hooks import SiteFunction, SitePlan, are_watched
from nnsight_compiler.runtime.inputs import Given, shapes_of
from nnsight_compiler.runtime.invokes import Confirm
from nnsight_compiler.runtime.joint import joint
from nnsight_compiler.runtime.prefixes import repeated
from nnsight_compiler.runtime.requests import Request, Requests, forwards_in
from nnsight_compiler.runtime.runs import RECORDER
from nnsight_compiler.runtime.shares import Share, SiteAxes, SitesAxes, Sizes
from nnsight_compiler.runtime.sites import first_argument

ENOUGH = {"cpu": 1024, "cuda": 8192}
"""How many tokens keep a device busy: forwards that have as many gain nothing from more rows."""

ROWS = 32
"""How many rows of a generation share its steps, however long their prompts are."""

WAVES = 4
"""How many full forwards' worth of strands wait at once, at most, until enough of them are alike."""

SHORTEST = 0.75
"""How long the shortest prompt is, as a part of the longest, where prompts are padded to share a forward."""


def is_seen(request: Request) -> bool:
    """Whether what stands before and after a forward may see it, or is seen by it: in training mode, where the user's
    own hooks watch the model, and where the model is given an object that it may change."""
    if request.root.training or are_watched(request.root):
        return True
    return any(not isinstance(leaf, _VALUES) for leaf in pytree.tree_leaves(request.inputs))


_VALUES = torch.Tensor, bool, int, float, str, type(None), torch.dtype, torch.device


def _must_be_apart(group: Sequence[Request]) -> bool:
    """Whether requests cannot share a forward now: where others see each, and where each leaves a graph of its own."""
    first = group[0]
    if is_seen(first):
        return True
    return first.forward.records(first.model, first.root, [(each.state, each.args, each.kwargs) for each in group])


@final
class NotTogetherError(Exception):
    """Why requests cannot share a forward. They run one by one then."""


@final
@dataclass(slots=True)
class Batcher:
    """Runs requests, as few forwards as may be.

    axes: what stands at the sites of a model's forward on some inputs.
    concatenated: the arguments of one forward for those of several.
    confirm: says why rows cannot share these sites of a forward; asked once for each plan and model.
    needs: how much memory requests need.
    budget: how many bytes may be alive at once; `None` where a part of what is free may be.
    padding: whether prompts may be padded to share a forward.
    """

    axes: Callable[[Any, Given], SitesAxes]
    concatenated: Callable[[Any, Sequence[Given], Mapping[str, Any]], Batch]
    confirm: Confirm
    needs: Needs
    budget: int | None = None
    padding: bool = False
    _apart: dict[Any, str] = field(default_factory=dict)
    _sites: dict[Any, dict[tuple[str, str, int], SiteAxes]] = field(default_factory=dict)
    _mixed: dict[Any, str | None] = field(default_factory=dict)
    _joint: dict[tuple[Forward, ...], Forward] = field(default_factory=dict)

    def run(self, requests: Requests, allowance: Allowance) -> None:
        """Runs what strands wait for."""
        forwards = forwards_in(requests)
        for group in self._groups(forwards):
            self._serve(group, forwards, allowance)
        run_backwards([each for each in requests if isinstance(each, BackwardRequest)])
        run_calls([each for each in requests if isinstance(each, CallRequest)])
        run_gradients([each for each in requests if isinstance(each, GradientsRequest)])

    def rows_at_once(self, first: Request, allowance: Allowance, waiting: Sequence[Request]) -> int:
        """How many requests like this one share a forward, while these wait."""
        size = max(1, first.rows * first.tokens)
        rows = ENOUGH.get(first.device.type, ENOUGH["cuda"]) // size
        if first.forward.generation is not None:  # each step after the first brings one token a row
            rows = max(rows, ROWS // max(1, first.rows))
        most = allowance.tokens(first)
        if most is not None:
            rows = min(rows, most // size)
        if rows < 2:
            return 1
        try:
            found = self.needs.most(first, rows, allowance, waiting)
        except AxisError as error:
            _refused(first, f"forwards run one by one, since the memory that they need cannot be told: {error}")
            return 1
        if found == 1 and allowance.given is not None:
            need = self.needs.peak(first, 2) + self.needs.waiting(first, allowance, waiting)
            _refused(
                first,
                f"forwards run one by one: two need {need:,} bytes together, more than memory_budget="
                f"{allowance.given:,}",
            )
        return found

    def group_of(self, request: Request) -> Any:
        """What requests have in common that may share a forward."""
        alike = request.forward.alike
        if self.padding and request.base is None and request.padded_key not in self._apart:
            return "padded", alike, *request.padded_key[2:]
        return alike, *request.key[1:], id(request.base)

    def _groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Requests that may share forwards, in their order."""
        groups: dict[Any, list[Request]] = {}
        for each in requests:
            groups.setdefault(self.group_of(each), []).append(each)
        for group in groups.values():
            while group:
                shortest = SHORTEST * max(each.tokens for each in group)
                yield [each for each in group if each.tokens >= shortest]
                group = [each for each in group if each.tokens < shortest]

    def _serve(self, group: Sequence[Request], waiting: Sequence[Request], allowance: Allowance) -> None:
        """Runs requests of one group, as many at once as there is memory for."""
        while group:
            longest = self._longest(group)
            some = group[: self.rows_at_once(longest, allowance, waiting)]
            if self._ran(some, waiting, allowance):
                group = group[len(some) :]

    def _ran(self, group: Sequence[Request], waiting: Sequence[Request], allowance: Allowance) -> bool:
        """Runs these requests, together where they can be. Whether there was memory for it."""
        longest = self._longest(group)
        padded = any(each.tokens != longest.tokens for each in group)
        key = longest.padded_key if padded else longest.key
        if len(group) > 1 and key not in self._apart and not _must_be_apart(group):
            try:
                return self._share(key, group, allowance)
            except NotTogetherError as error:
                self._apart[key] = str(error)
                what = "inputs are not padded to one length" if padded else "forwards run one by one"
                _refused(longest, f"{what}: {error}")
            if padded:
                for exact in self._groups(group):
                    self._serve(exact, waiting, allowance)
                return True
        self._run_alone(group)
        return True

    def _run_alone(self, group: Sequence[Request]) -> None:
        """Runs each of these by itself; what one raises is raised in its strand."""
        for each in group:
            try:
                each.forward.run_prepared(each.alone())
            except Exception as error:
                each.failure = error

    def _share(self, key: Any, group: Sequence[Request], allowance: Allowance) -> bool:
        """Runs these requests as rows of one forward. Whether there was memory for it."""
        longest = self._longest(group)
        forward = longest.forward
        try:
            forward.run_prepared(self._together(key, forward, group))
        except NotTogetherError:
            raise
        except Exception as error:
            if not isinstance(error, RuntimeError) or not is_out_of_memory(error):
                if not forward.repeatable:
                    raise
                # Whose it is shows where each runs by itself, as it would have.
                _forget(group)
                self._run_alone(group)
                return True
            if not forward.repeatable:
                error.add_note(
                    f"{forward.span}: {len(group)} forwards were rows of one, and cannot be run again as fewer, since"
                    " what the trace does to other things is done by now\n"
                    "  way out: `memory_budget=` bounds how many are, as in @intervene(memory_budget='2 GiB')"
                )
                raise
        else:
            return True
        _forget(group)
        allowance.halve(longest, len(group))
        _refused(longest, f"{len(group)} forwards as rows of one ran out of memory, and go on as half as many")
        return False

    def _longest(self, group: Sequence[Request]) -> Request:
        """The longest of some requests, with the plan of a forward that all of them can share."""
        longest = max(group, key=_length)
        forwards = tuple(dict.fromkeys(each.forward for each in group))
        if len(forwards) == 1:
            return longest
        if forwards not in self._joint:
            self._joint[forwards] = joint(forwards)
        return longest.by(self._joint[forwards])

    def _together(self, key: Any, forward: Forward, group: Sequence[Request]) -> Running:
        """The run of a forward that has these as its rows."""
        first, inputs = group[0].by(forward), [each.inputs for each in group]
        padded = any(each.tokens != first.tokens for each in group)
        try:
            batch = first.model._batch(inputs, {}) if padded else self.concatenated(first.root, inputs, {})
        except ModelError as error:
            raise NotTogetherError(str(error)) from None
        args, kwargs = batch.args, batch.kwargs
        if padded and forward.generation is not None:  # the model makes positions at each step, from the mask
            kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}
        sites = _Sites(self, key, first, (args, kwargs) if padded else first.inputs)
        sizes = Sizes(batch.rows, batch.tokens)
        members = [(Share(part, sizes), each) for part, each in zip(batch.parts, group, strict=True)]
        at = _by_site(members)
        functions = tuple(
            replace(site, function=_in_rows(site, sites.divided(site) if site.looks else None, at[site.name]))
            for site in forward.sites
        )
        sites.require_apart()
        states = tuple(each.state for each in group)
        running = forward.running(first.model, first.root, args, kwargs, states)
        if running.generation is not None:
            running.generation.sizes = sizes
        kind = None if padded else shapes_of(*first.inputs)
        shares, plans = tuple(share for share, _ in members), tuple(each.forward for each in group)
        running = replace(running, sites=functions, shares=shares, plans=plans, kind=kind, strands=tuple(group))
        if first.base is None or not forward.resumes(running):
            return running
        held = first.base.values()
        values: dict[str, Any] = {}
        for path in forward.replays:
            axes = sites.at(path, "output", 0)
            if path in held and not any(isinstance(leaf, Opaque) for leaf in axes.leaves):
                values[path] = repeated(held[path], axes, len(group))
        return forward.resumed(running, values)


@final
@dataclass(frozen=True, slots=True)
class _Sites:
    """What stands at the sites of forwards like that of a request, on these inputs. It is kept by the key."""

    batcher: Batcher
    key: Any
    first: Request
    inputs: Given

    def divided(self, site: SitePlan) -> SiteAxes:
        """What stands at a site of which each strand is to see its rows."""
        axes = self.at(site.path, site.port, site.call or 0)
        leaves = axes.leaves[:1] if site.first else axes.leaves
        unknown = next((leaf for leaf in leaves if isinstance(leaf, Opaque) and leaf.sometimes is None), None)
        if unknown is not None:
            raise NotTogetherError(f"rows cannot be told apart at {axes.site}: {unknown.reason}")
        return axes

    def at(self, path: str, port: Any, call: int) -> SiteAxes:
        known = self.batcher._sites.setdefault(self.key, {})
        name = path, port, call
        if name not in known:
            try:
                known[name] = self._found()(path, port, call)
            except RunError as error:
                raise NotTogetherError(str(error)) from None
        return known[name]

    def require_apart(self) -> None:
        """Refuses forwards in which what one row is given changes what stands in others at a site."""
        forward, model, known = self.first.forward, self.first.model, self.batcher._mixed
        name = id(forward), id(model)
        if name not in known:
            sites = tuple(
                (site.path, site.port, site.call or 0) for site in forward.sites if site.port != "result" and site.looks
            )
            known[name] = self.batcher.confirm(model, self._step(), sites)
        reason = known[name]
        if reason is not None:
            raise NotTogetherError(reason.partition("\n")[0])

    def _found(self) -> SitesAxes:
        return self.batcher.axes(self.first.model, self._step())

    def _step(self) -> Given:
        """What the model's forward is given: in a generation, the first."""
        if self.first.forward.generation is None:
            return self.inputs
        inputs = self.first.model._first_step(self.inputs)
        if inputs is None or getattr(getattr(self.first.root, "config", None), "is_encoder_decoder", False):
            raise NotTogetherError("rows of this generation cannot be told apart")
        return inputs


@final
class Filling:
    """Strands that wait, while they become enough: as many of one kind as share a forward, or as many of all kinds as
    there is memory for."""

    def __init__(self, batcher: Batcher, allowance: Allowance) -> None:
        self.batcher, self.allowance = batcher, allowance
        self._alike: Counter[Any] = Counter()
        self._waves = 0.0
        self._held = 0

    def add(self, requests: Requests) -> bool:
        """Takes in what one more strand waits for. Whether these are enough."""
        enough = False
        forwards = forwards_in(requests)
        for each in forwards:
            most, group = self.batcher.rows_at_once(each, self.allowance, forwards), self.batcher.group_of(each)
            self._alike[group] += 1
            self._waves += 1 / most
            self._held += self.batcher.needs.strand(each)
            enough = enough or self._alike[group] >= most or 2 * self._held > self.allowance.limit(each.device)
        return enough or self._waves >= WAVES


def _length(request: Request) -> int:
    return request.tokens


def _refused(request: Request, why: str) -> None:
    RECORDER.remark(Remark("merge_forwards", False, request.forward.span, why))


def _forget(group: Sequence[Request]) -> None:
    for each in group:
        each.failure = None
        each.forward.forget([each.state])


Member = tuple[Share, Request, SiteFunction]
"""What a strand has at a site: its rows, what it asked for, its function."""


def _by_site(members: Sequence[tuple[Share, Request]]) -> dict[object, list[Member]]:
    """The strands that have a function at a site, for each site by its name."""
    found: dict[object, list[Member]] = defaultdict(list)
    for share, each in members:
        for own in each.forward.sites:
            found[own.name].append((share, each, own.function))
    return found


def _in_rows(site: SitePlan, axes: SiteAxes | None, members: Sequence[Member]) -> SiteFunction:
    """The function of a site for several strands, each on its own rows; without `axes`, of one at which none looks."""
    where = str(site.span)

    def in_rows(value: Any, _: Any) -> Any:
        for leaf in site.required:
            require(first_argument(value, where) if site.port == "input" else value, leaf, where)
        if not torch.is_grad_enabled():
            return divided(value)
        with of_rows(value):
            return divided(value)

    def divided(value: Any) -> Any:
        lasting = [each for each in members if _goes_on(*each[:2])]
        if axes is None:
            for _, each, function in lasting:
                _result(function, value, each)
            return value
        whole = Divided(value, axes)
        with plainly(value):
            parts = [whole.read(share) for share, _, _ in lasting]
        results = [_result(function, own, each) for own, (_, each, function) in zip(parts, lasting, strict=True)]
        with plainly((value, results)):
            for made, own, (share, each, _) in zip(results, parts, lasting, strict=True):
                if made is own:
                    continue
                try:
                    whole.replace(share, made, where)
                except RunError as error:
                    each.failure = error
            return whole.whole()

    return in_rows


def _goes_on(share: Share, request: Request) -> bool:
    """Whether a strand still acts in a forward: its sequences have not ended, and nothing that it did failed."""
    return request.failure is None and (share.length is None or share.sizes.step < share.length)


def _result(function: SiteFunction, own: Any, request: Request) -> Any:
    """What a strand makes of its rows; the rows as they are where that fails."""
    try:
        return function(own, request.state)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        request.failure = error
        return own
