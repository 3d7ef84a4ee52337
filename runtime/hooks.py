"""The hooks by which a run's functions act at the sites of a model.

A hook acts only for the run that registered it: another thread, a run inside this one, and a module that the body
itself calls see the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final
from typing import Literal as OneOf

from torch import nn
from torch.nn.modules import module as module_hooks

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.generation import Generation, Steps
from nnsight_compiler.runtime.replacing import Replacement
from nnsight_compiler.runtime.skipping import Left, Skipped
from nnsight_compiler.runtime.stopping import Later, Stopped

SiteFunction = Callable[[Any, Any], Any]
"""`(value, state) -> value`: what the model goes on with."""


class Stop(BaseException):
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
    first: whether of the arguments of a module only the first is looked at.
    looks: whether the value is looked at, or written: else the site is but the moment at which something is done.
    required: from which tensors of what is read here gradients are recorded, as `require` counts them.
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
    required: tuple[int | None, ...] = ()
    first: bool = False
    looks: bool = True

    @property
    def name(self) -> tuple[str, str, int | None]:
        """What tells it from the other sites of its forward."""
        return self.path, self.port, self.call

    def __str__(self) -> str:
        return f"`{self.path or 'the model'}` {self.port}"


_EVERYWHERE = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)


def are_watched(root: nn.Module) -> bool:
    """Whether hooks of others watch a module of the model: they are to see each forward, whole."""
    if any(_EVERYWHERE):
        return True
    for module in root.modules():
        for held in (module._forward_hooks, module._forward_pre_hooks):
            if held and not all(map(_is_known, held.values())):
                return True
    return False


def _is_known(hook: Any) -> bool:
    """Whether a run registered this hook, which acts for that run alone, or transformers did, which leaves its own on a
    model that once was asked for hidden states or attentions: they put these into what it returns, where asked for."""
    owner: str = getattr(hook, "__module__", None) or type(hook).__module__
    return owner.partition(".")[0] == __name__.partition(".")[0] or owner == "transformers.utils.output_capturing"


def module_of(root: nn.Module, site: SitePlan) -> nn.Module:
    """The module at whose port a site is."""
    module: nn.Module = root
    for name in site.path.split(".") if site.path else ():
        found = module._modules.get(name)
        if found is None:
            raise RunError(f"{site.span}: the model no longer has a module `{site.path}`")
        module = found
    return module


class Started:
    """Numbers the calls of a module as they begin. They end in another order where a module calls itself."""

    def __init__(self, run: object) -> None:
        self.run, self.count = run, 0
        self.open: list[int] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        if ACTIVE.run is self.run:
            self.open.append(self.count)
            self.count += 1


def output_hook(
    site: SitePlan, run: object, state: Any, fired: list[int], index: int, ends: bool, started: Started | None
) -> Callable[[nn.Module, Any, Any], Any]:
    function, call = site.function, site.call

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if ACTIVE.run is not run:
            return None
        fired[index] += 1
        if started is not None and started.open.pop() != call:
            return None
        ACTIVE.run = None
        try:
            result = function(output, state)
        finally:
            ACTIVE.run = run
        if type(result) is Stopped:
            raise Stop(run, index, result.where)
        if ends:
            raise Stop(run)
        return result

    return hook


def input_hook(
    site: SitePlan, run: object, state: Any, fired: list[int], index: int, ends: bool
) -> Callable[[nn.Module, Any, Any], Any]:
    function, call = site.function, site.call

    # torch notes that a hook takes keywords after it has the hook: another thread may call it without them in between.
    def hook(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if ACTIVE.run is not run:
            return None
        number = fired[index]
        fired[index] = number + 1
        if call is not None and number != call:
            return None
        ACTIVE.run = None
        try:
            given = (args, kwargs)
            result = function(given, state)
        finally:
            ACTIVE.run = run
        if type(result) is Stopped:
            raise Stop(run, index, result.where)
        if ends:
            raise Stop(run)
        return None if result is given else result

    return hook


def step_hook(generation: Generation, run: object) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        if ACTIVE.run is run:
            generation.begin()

    return hook


def skipped(
    sites: tuple[SitePlan, ...], run: object, state: Any, fired: list[int], index: int, starts: dict[int, Started]
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
        ACTIVE.run = None
        try:
            found = function(None, state)
        finally:
            ACTIVE.run = run
        if type(found) is Stopped:
            raise Stop(run, index, found.where)
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
