"""What an experiment will do: its stages, its forwards, and the calls that the compiler does not know.

stage 1, given layer=3
  demo.py:13  forward of GPT2LMHeadModel  reads transformer.h.3 output; ends after it
  demo.py:14  host op `choose(…)`         not in the table of known calls
stage 2 begins at demo.py:15, where it must be known which module this is
  demo.py:15  forward                     specialised when the run reaches it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

from nnsight_compiler.figures import Figures, in_bytes, in_time
from nnsight_compiler.remote.crossings import Crossing

HOST_OPS = "A host op runs as it is, each time its line is reached; it may read and change whatever it can get at."
IN_FULL = 4
"""Variants of a stage that are shown with their steps."""


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A forward, a call of a module, attention that is computed anew, or a host op.

    what: the forward or the call. why: what the forward is for, or why the call is a host op.
    within: the loops and conditions around it, outermost first. times: how often the same step stands there.
    estimate: of a forward, what it is going to cost; in a loop, in one round. unknown: why not all of that is known.
    last_run: what it was in the last run, all its rounds together.
    """

    kind: str
    file: str
    line: int
    what: str
    why: str
    within: tuple[str, ...] = ()
    times: int = 1
    estimate: Figures | None = None
    unknown: str = ""
    last_run: Figures | None = None


@final
@dataclass(frozen=True, slots=True)
class StageReport:
    """A part of an experiment that is specialised at once.

    file, line: where it begins. needs: what only the run of what precedes it gives; empty for the first stage.
    variants: what it was specialised to so far, each with its own steps; before a run has reached it, one of what is
        known already.
    """

    number: int
    file: str
    line: int
    needs: str
    variants: tuple[Variant, ...]


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """A stage, specialised. `given`: what for; `steps`: forwards and calls in the order of the source."""

    given: tuple[str, ...]
    steps: tuple[Step, ...]


@final
@dataclass(frozen=True, slots=True)
class Optimisation:
    """One thing that an optimisation did (`fired`), or did not do, and why; at a line."""

    name: str
    fired: bool
    file: str
    line: int
    what: str


@final
@dataclass(frozen=True, slots=True)
class LastRun:
    """A call that has ended: how often models ran in it and how long it took; the most bytes of tensors that it kept
    alive at once, where it was measured."""

    forwards: int
    seconds: float
    peak: int | None


@final
@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of an experiment for one call. `str` gives it as text, `as_data` as plain data for programs.

    forwards: how many there are in the first stage, one in a loop as one. forwards_written: how many without
        optimisations; `None` where the program does not compile without.
    last_run: the last call in this thread, whatever its arguments.
    crossings: of one that runs elsewhere, the jobs that it is.
    """

    name: str
    stages: tuple[StageReport, ...]
    forwards: int
    forwards_written: int | None
    optimisations: tuple[Optimisation, ...]
    last_run: LastRun | None
    crossings: tuple[Crossing, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The explanation as dicts, lists, strings and numbers; `version` changes with what they mean."""
        return {"version": 1, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"experiment {self.name}", *(line for stage in self.stages for line in _lines(stage))]
        steps = [step for stage in self.stages for variant in stage.variants for step in variant.steps]
        if self.forwards_written is not None and self.forwards_written != self.forwards:
            lines.append(f"{self.forwards_written} forwards as written, {self.forwards} after optimisation")
        if self.crossings:
            lines.append("one job" if len(self.crossings) == 1 else f"{len(self.crossings)} jobs")
            lines += [f"  {_place(each.file, each.lines[0])}-{each.lines[-1]}  {each}" for each in self.crossings]
        if self.optimisations:
            lines += ["optimisations", *map(_told_optimisation, self.optimisations)]
        if self.last_run is not None:
            peak = "" if self.last_run.peak is None else f"; {in_bytes(self.last_run.peak)} at the peak"
            times = "once" if self.last_run.forwards == 1 else f"{self.last_run.forwards} times"
            lines.append(f"last run: the model ran {times}; {in_time(self.last_run.seconds)}{peak}")
        return "\n".join([*lines, HOST_OPS] if any(step.kind == "host" for step in steps) else lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what IPython asks for
        printer.text(str(self))


# --- as text ---


def _lines(stage: StageReport) -> Iterator[str]:
    place = _place(stage.file, stage.line)
    title = f"stage {stage.number}"
    if stage.needs:
        title += f" begins at {place}, where it must be known {stage.needs}"
    if len(stage.variants) == 1:
        [variant] = stage.variants
        yield f"{title}{f', given {_told_given(variant)}' if variant.given else ''}"
        yield from _step_lines(variant.steps, "  ")
        return
    yield f"{title}; specialised {len(stage.variants)} times so far"
    for variant in stage.variants[:IN_FULL]:
        yield f"  given {_told_given(variant) or 'nothing'}"
        yield from _step_lines(variant.steps, "    ")
    more = [_told_given(variant) or "nothing" for variant in stage.variants[IN_FULL:]]
    if more:
        listed = "; or ".join(more if len(more) <= IN_FULL else [*more[:IN_FULL], f"{len(more) - IN_FULL} others"])
        yield f"  and {len(more)} more: given {listed}"


def _told_given(variant: Variant) -> str:
    return ", ".join(variant.given)


def _step_lines(steps: tuple[Step, ...], indent: str) -> Iterator[str]:
    if not steps:
        yield f"{indent}no forward and no host op"
    heads = [f"{_place(step.file, step.line)}  {step.what}" for step in steps]
    wide = max(map(len, heads), default=0)
    for head, step in zip(heads, steps, strict=True):
        times = f"; {step.times} of these" if step.times > 1 else ""
        within = "".join(f"; {each}" for each in step.within)
        yield f"{indent}{head.ljust(wide)}  {step.why}{times}{within}"
        expected = [str(step.estimate)] if step.estimate is not None and str(step.estimate) else []
        expected += [step.unknown] if step.unknown else []
        if expected:
            yield f"{indent}    estimate  {'; '.join(expected)}"
        if step.last_run is not None:
            yield f"{indent}    last run  {step.last_run}"


def _told_optimisation(each: Optimisation) -> str:
    verb = "" if each.fired else "not done: "
    return f"  {_place(each.file, each.line)}  {each.name}  {verb}{each.what}"


def _place(file: str, line: int) -> str:
    """`file:line`, from the working directory where the file is below it."""
    try:
        near = os.path.relpath(file)
    except ValueError:  # on another drive
        near = file
    beyond = not os.path.isabs(file) or near.startswith(os.pardir)
    return f"{file if beyond else near}:{line}"
