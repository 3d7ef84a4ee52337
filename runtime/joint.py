"""One forward for those of several lines of a program, which are its rows.

It has the sites of all of them, and ends where the last of them would. At each site the strands act that have one
there (`batching`), so that its functions are not called as they are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nnsight_compiler.runtime.forwards import Forward
from nnsight_compiler.runtime.generation import Asked
from nnsight_compiler.runtime.hooks import SitePlan
from nnsight_compiler.runtime.kept import event_of


def joint(forwards: Sequence[Forward]) -> Forward:
    """The plan of a forward that has these as its rows, which are alike."""
    first = forwards[0]
    sites: dict[Any, SitePlan] = {}
    for site in (site for each in forwards for site in each.sites):
        known = sites.get(site.name)
        sites[site.name] = site if known is None else _both(known, site)
    last = _last(forwards)
    if last is not None:
        sites[last.name] = sites.pop(last.name)  # it comes last
    generation = None
    if first.generation is not None:
        asked = (steps for each in forwards if each.generation is not None for steps in each.generation.steps)
        generation = Asked(first.generation.slot, tuple(dict.fromkeys(asked)))
    return replace(
        first,
        sites=tuple(sites.values()),
        stops=last is not None,
        copies=any(each.copies for each in forwards),
        brings=_all([each.brings for each in forwards]),
        own=frozenset[str]().union(*(each.own for each in forwards)),
        generation=generation,
        keeps=_all([each.keeps for each in forwards]),
        strand=_all([each.strand for each in forwards]),
        changes=_all([each.changes for each in forwards]),
        repeatable=all(each.repeatable for each in forwards),
        _whole=set(),
    )


def _all(parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(each for part in parts for each in part))


def _both(first: SitePlan, second: SitePlan) -> SitePlan:
    """A site of two forwards."""
    steps = tuple(dict.fromkeys((*first.steps, *second.steps)))
    looks = first.looks or second.looks
    return replace(first, steps=steps, first=first.first and second.first, looks=looks)


def _last(forwards: Sequence[Forward]) -> SitePlan | None:
    """The site after which all of these have what they need; `None` where one of them goes on to its end, or where it
    cannot be told which of two comes first."""
    if not all(each.stops and each.sites and each.events == forwards[0].events for each in forwards):
        return None
    last = {each.sites[-1].name: each.sites[-1] for each in forwards}
    times: dict[int, SitePlan] = {}
    for site in last.values():
        event = event_of(*site.name)
        if event not in forwards[0].events:
            return None
        if times.setdefault(forwards[0].events.index(event), site) is not site:
            return None  # two places inside of one module
    return times[max(times)]
