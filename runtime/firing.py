"""How often the sites of a forward fired, beside what its plan says: nothing fails silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.runtime.generation import covers
from nnsight_compiler.runtime.hooks import SitePlan, Stop
from nnsight_compiler.runtime.stopping import not_reached


def check_fired(
    sites: Sequence[SitePlan],
    fired: Sequence[int],
    root: nn.Module,
    state: Any,
    stopped: Stop | None = None,
    step: int | None = None,
) -> None:
    """Refuses a forward, or a step of a generation, in which a site was not reached, or more often than the plan says.

    Args:
        fired: how often each site was reached.
        state: where what was not reached since the program stopped the forward is put down as such.
    """
    for index, (site, count) in enumerate(zip(sites, fired, strict=True)):
        if stopped is not None and stopped.site is not None and stopped.where is not None:
            if index > stopped.site:
                not_reached(state, site.later, stopped.where)
                continue
            if site.calls is not None:  # how often it would have run is not known
                continue
        if step is not None and (not covers(site.steps, step) or (not count and _is_of_encoder(root, site, step))):
            continue
        if site.calls is not None and count != site.calls:
            raise RunError(
                f"{site.span}: {site} ran {count} times in this forward, but {site.calls} times in the one that"
                " this was compiled for, so that a call counted from the end is another one\n"
                "  way out: count from the start, as in `.calls[0]`"
            )
        if count != 1 and (site.call is None or count <= site.call):
            _refuse(site, count, "this forward" if step is None else f"step {step} of this generation")


def _is_of_encoder(root: nn.Module, site: SitePlan, step: int) -> bool:
    """Whether a site is one of an encoder, which runs before the first step alone: a write outside of loops over steps
    has no other there."""
    if not step or not {(0, 1), (1, None)} <= set(site.steps):
        return False
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return False
    encoder: Any = root.get_encoder  # it is not typed
    inside = root.get_submodule(site.path)
    return any(module is inside for module in encoder().modules())


def _refuse(site: SitePlan, count: int, where: str) -> None:
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
