"""Strands: pieces of a program that advance side by side, each to its next forward.

A strand is a generator. It yields the forwards that it waits for, and goes on when they have run. All strands that wait
are served at once, so that their forwards can be rows of one.

Where one fails, those after it go no further, and those before it go on to their ends, as they would have by then: one
of them may fail too, and its exception is the one that is raised. What the one that fails had come to, and does to
other things, comes last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, final

import torch

from nnsight_compiler.runtime.backward_passes import BackwardRequest, settle
from nnsight_compiler.runtime.batching import Batcher, Filling, is_seen
from nnsight_compiler.runtime.budget import Allowance
from nnsight_compiler.runtime.failures import FAILED
from nnsight_compiler.runtime.requests import Requests, forwards_in, passes_in

Strand = Generator[Requests, None, None]


class _Running(threading.local):
    """What the loop may use that runs in this thread."""

    allowance: Allowance | None = None


@final
class Together:
    """Runs the rounds of one loop side by side."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self._running = _Running()

    def run(self, strand: Callable[[tuple[Any], Any], Strand], items: Iterable[Any], state: Any, brought: bool) -> None:
        """Runs the loop. `strand` makes one round, of its item and a state of its own. `brought`: whether others may
        have the items too."""
        self._serve(lambda: self.side_by_side(strand, items, state, brought), state)

    def run_strands(self, strands: tuple[Callable[[], Strand], ...], state: Any) -> None:
        """Runs strands of the same state."""
        self._serve(lambda: self._advance((make() for make in strands), prefetches=True), state)

    def _serve(self, begin: Callable[[], Iterator[Requests]], state: Any) -> None:
        """Has the forwards run that strands wait for, which begin with this state."""
        around = self._running.allowance
        self._running.allowance = allowance = Allowance(self.batcher.budget, state)
        try:
            for requests in begin():
                self.batcher.run(requests, allowance)
        except RuntimeError as error:
            if isinstance(error.__cause__, StopIteration):  # no generator can raise it as it is
                raise error.__cause__ from None
            raise
        finally:
            self._running.allowance = around

    def side_by_side(
        self, strand: Callable[[tuple[Any], Any], Strand], items: Iterable[Any], state: Any, brought: bool
    ) -> Iterator[Requests]:
        """Advances the rounds, as many at once as can share a forward, and yields what they wait for. An iterator that
        others have too is taken from only as far as rounds come."""
        prefetches = _are_at_hand(items) and not (brought and isinstance(items, Iterator))
        return self._advance((strand((item,), fork(state)) for item in items), prefetches)

    def _advance(self, remaining: Iterator[Strand], prefetches: bool) -> Iterator[Requests]:
        """Advances strands, as many at once as can share a forward, and yields what they wait for. Where more may not
        be begun ahead of time, or a forward may see it, each runs to its end first."""
        allowance = self._running.allowance
        assert allowance is not None, "strands run inside of a call that began"
        failure: Exception | None = None
        failed: Strand | None = None
        while failure is None and failed is None:
            waiting: list[tuple[Strand, Requests]] = []
            filling = Filling(self.batcher, allowance)
            try:
                for each in remaining:
                    requests = next(each, None)
                    if requests is None:
                        continue
                    if requests is FAILED:
                        failed = each
                        break
                    waiting.append((each, requests))
                    if prefetches and len(waiting) == 1:
                        prefetches = not any(map(is_seen, forwards_in(requests)))
                    if filling.add(requests) or not prefetches:
                        break
            except Exception as error:
                failure = error
            if not waiting and failure is None and failed is None:
                return
            order = {id(each): number for number, (each, _) in enumerate(waiting)}
            passes: list[tuple[int, BackwardRequest]] = []
            last = len(order)
            while waiting:
                yield tuple(request for _, requests in waiting for request in requests)
                passes += [(order[id(each)], one) for each, requests in waiting for one in passes_in(requests)]
                going: list[tuple[Strand, Requests]] = []
                for each, _ in waiting:
                    try:
                        found = next(each, None)
                    except Exception as error:
                        failure, failed, last = error, None, order[id(each)]
                        break
                    if found is FAILED:
                        failure, failed, last = None, each, order[id(each)]
                        break
                    if found is not None:
                        going.append((each, found))
                waiting = going
            settle([one for number, one in passes if number <= last])
        if failed is not None:
            next(failed)
            raise AssertionError("a strand that failed raises what it failed with")
        assert failure is not None
        try:
            raise failure
        finally:
            del failure  # it holds this frame


_EMPTY: tuple[Any, ...] = ([], (), range(0), "", {}, set(), {}.keys(), {}.values(), {}.items())
_AT_HAND: tuple[Any, ...] = (
    frozenset, torch.Tensor, torch.nn.Parameter,
    *(type(iter(each)) for each in _EMPTY), *map(type, (*_EMPTY, reversed([]), reversed({}))),
)  # fmt: skip


def _are_at_hand(items: Iterable[Any]) -> bool:
    """Whether no code runs as items are taken that could see what was done with those before: then they can be taken
    ahead of time."""
    if type(items) in (enumerate, zip):
        reduced: Any = items.__reduce__()
        return all(isinstance(each, int) or _are_at_hand(each) for each in reduced[1])  # a number is a start
    if type(items).__module__.partition(".")[0] == "tqdm":
        return _are_at_hand(getattr(items, "iterable", ()))
    return type(items) in _AT_HAND


def fork(state: Any) -> Any:
    """A state that begins as this one is, and then goes its own way."""
    if state is None:
        return None
    kind = type(state)
    made = kind()
    for name in kind.__slots__:
        if hasattr(state, name):
            setattr(made, name, getattr(state, name))
    return made
