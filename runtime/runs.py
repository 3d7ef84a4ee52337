"""What an experiment did in a call: how often its models ran, on how much, for how long.

A record of the call is always kept; it costs a few microseconds. What a `Meter` counts, memory and floating-point
operations, slows a run down and is recorded where it is asked for. An `Effort` counts while the call goes on, and may
end it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple, Protocol, final

import torch

from nnsight_compiler.ir.errors import LimitError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.remarks import Remark
from nnsight_compiler.passes.sites import PlacePort
from nnsight_compiler.runtime.meter import Meter

SiteName = tuple[str, PlacePort, int]
"""The path of a module, a port, a call."""


class Planned(Protocol):
    """The plan of a forward."""

    span: Span


class Measured(NamedTuple):
    """What a meter counted in a forward.

    flops: floating-point operations, those of the program's own code in it too.
    peak: the most bytes of tensors that were alive at once, beyond those that were before it began.
    kept: the bytes that were still alive when it had ended: what the program holds of it.
    """

    flops: int
    peak: int
    kept: int


class Ran(NamedTuple):
    """One run of a model.

    plans: the identities of the plans that it followed; several where forwards of several lines shared it. span: the
        first `trace` or `generate` that it is of.
    given: the first tensor that the model was given, by dtype and shape.
    seconds: by the clock, with what the program does at its sites.
    ended: the site, and its call, after which it was stopped; `None` where it ran to its end.
    steps: of a generation, how often the model ran.
    forwards: how many forwards of the program it was; more than one where they shared it as rows.
    skipped: the modules that the program skipped.
    shared: the modules that did not run since another forward had run them already.
    """

    plans: tuple[int, ...]
    span: Span
    given: tuple[torch.dtype, torch.Size] | None
    seconds: float
    ended: SiteName | None
    steps: int
    forwards: int
    skipped: tuple[str, ...]
    shared: tuple[str, ...]
    measured: Measured | None

    @property
    def rows(self) -> int | None:
        """The first dimension of the input."""
        return self.given[1][0] if self.given is not None and self.given[1] else None

    @property
    def tokens(self) -> int | None:
        """The second dimension of ids; `None` for any other input."""
        if self.given is None or len(self.given[1]) != 2 or self.given[0].is_floating_point:
            return None
        return self.given[1][1]


class Run(NamedTuple):
    """One call of an experiment: the forwards in it, in the order in which they ended, and how long it took.

    peak: the most bytes of tensors that it kept alive at once, where that was measured.
    remarks: what only the run could tell of what optimisations did, or did not do and why.
    """

    forwards: tuple[Ran, ...]
    seconds: float
    peak: int | None = None
    remarks: tuple[Remark, ...] = ()


@final
class Recording:
    """What is recorded of one call while it goes on, in one thread."""

    __slots__ = ("began", "meter", "peak", "ran", "remarks", "skipped")

    def __init__(self, meter: Meter | None) -> None:
        self.meter = meter
        self.ran: list[Ran] = []
        self.skipped: list[str] = []
        self.remarks: dict[Remark, None] = {}
        self.peak = 0
        self.began = perf_counter()

    def done(self) -> Run:
        """The record of a call that has ended."""
        seconds = perf_counter() - self.began
        peak = None if self.meter is None else max(self.peak, self.meter.peak)
        return Run(tuple(self.ran), seconds, peak, tuple(self.remarks))


@final
class Began:
    """A forward that runs, and what there was before it."""

    __slots__ = ("clock", "flops", "live", "recording")

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        meter = recording.meter
        if meter is not None:
            recording.peak = max(recording.peak, meter.peak)
            meter.mark()
            self.live, self.flops = meter.live, meter.flops
        self.clock = perf_counter()

    def end(
        self,
        plans: Sequence[Planned],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ended: SiteName | None,
        steps: int = 1,
        forwards: int = 1,
        shared: tuple[str, ...] = (),
    ) -> None:
        """Records the forward that has run on these arguments of the torch module. `steps`, `forwards` and `shared` as
        in `Ran`."""
        seconds = perf_counter() - self.clock
        recording, measured = self.recording, None
        meter = recording.meter
        if meter is not None:
            measured = Measured(meter.flops - self.flops, meter.peak - self.live, meter.live - self.live)
        given = _given(args, kwargs)
        skipped: tuple[str, ...] = ()
        if recording.skipped:
            skipped = tuple(dict.fromkeys(recording.skipped))
            recording.skipped.clear()
        recording.ran.append(
            Ran(tuple(map(id, plans)), plans[0].span, given, seconds, ended, steps, forwards, skipped, shared, measured)
        )


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.dtype, torch.Size] | None:
    for value in args or kwargs.values():
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape
    return None


@final
class Effort:
    """How often models have run: each forward counts one, and so does each step of a generation.

    Args:
        most: how often they may. Beyond it the run ends with a `LimitError`.
        report: told how often, as a model is about to run: the first time, and then at most once in `every` seconds.
    """

    __slots__ = ("_due", "_every", "_report", "count", "most")

    def __init__(
        self, most: int | None = None, report: Callable[[int], object] | None = None, every: float = 0.1
    ) -> None:
        self.most, self.count = most, 0
        self._report, self._every, self._due = report, every, 0.0

    def one(self, span: Span) -> None:
        """One more run of a model, for what stands here in the source."""
        if self.most is not None and self.count >= self.most:
            raise LimitError(
                f"{span}: this may run the model {self.most:,} times, each step of a generation counted, and has\n"
                "  way out: fewer rounds or steps, or several runs"
            )
        self.count += 1
        if self._report is not None and (now := perf_counter()) >= self._due:
            self._due = now + self._every
            self._report(self.count)


@final
class Recorder(threading.local):
    """The call that is being recorded in this thread."""

    recording: Recording | None = None
    effort: Effort | None = None

    def count(self, span: Span) -> None:
        """Called where a model is about to run, once for each forward and each step of a generation."""
        if self.effort is not None:
            self.effort.one(span)

    def begin(self) -> Began | None:
        """Called where a forward is about to run; its `end` is called when it has."""
        return None if self.recording is None else Began(self.recording)

    def skip(self, path: str) -> None:
        """A module that the program skips in the forward that runs."""
        if self.recording is not None:
            self.recording.skipped.append(path)

    def remark(self, remark: Remark) -> None:
        """What an optimisation did, or why not."""
        if self.recording is not None:
            self.recording.remarks[remark] = None


RECORDER = Recorder()


@contextmanager
def counted(effort: Effort) -> Iterator[Effort]:
    """Counts the runs of models in this thread."""
    assert RECORDER.effort is None, "who counts, counts all"
    RECORDER.effort = effort
    try:
        yield effort
    finally:
        RECORDER.effort = None
