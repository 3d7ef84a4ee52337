"""Whether a job may wait for its run, and what the run is going to cost. Nothing of it runs.

The program is lowered for the model and the arguments, as it would be for a run: so every path, every call, every shape
is checked, and mistakes are refused with their lines. What it is sure to take is then held against what its sender may
use; what only a run can tell stays for the limits of the run, and the cost names it.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from nnsight_compiler.answers import Answers, example_of
from nnsight_compiler.cache import Cache
from nnsight_compiler.compilation import lower_program
from nnsight_compiler.estimates import Estimates
from nnsight_compiler.figures import Figures, in_bytes
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ExperimentError, FileError
from nnsight_compiler.ir.printer import print_op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.footprint import Bounds, Excess, Footprint, footprint
from nnsight_compiler.passes.manager import PassResult
from nnsight_compiler.passes.shapes import Surroundings
from nnsight_compiler.passes.sites import forwards
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.remote.execute import Executor, Given, Loaded, undisturbed
from nnsight_compiler.remote.job import Job
from nnsight_compiler.service.engine import Limits
from nnsight_compiler.service.known_costs import KnownCosts, kind_of

TOO_LARGE, REFUSED = 413, 422
"""Statuses of HTTP: what would come back is too large; the job is wrong, or takes more than it may."""
MOST_TOLD = 10
"""Mistakes that are told of one experiment."""


class NotAdmittedError(ExperimentError):
    """A job that is not run.

    kind: the class of the error that its sender is given. op: the op meant, as text, where one is. `__cause__` is what
    was raised, where something was.
    """

    def __init__(
        self,
        status: int,
        message: str,
        diagnostics: Sequence[Diagnostic] = (),
        kind: type[Exception] = ExperimentError,
        op: str | None = None,
    ) -> None:
        self.status, self.message, self.diagnostics = status, message, tuple(diagnostics[:MOST_TOLD])
        self.kind, self.op = kind, op
        super().__init__("\n".join([message, *map(str, self.diagnostics)]))

    def record(self) -> dict[str, Any]:
        """The error as its sender is told of it."""
        places = [each.span for each in self.diagnostics]
        where = [
            {"file": each.file, "line": each.line, "text": linecache.getline(each.file, each.line).strip()}
            for each in places
        ]
        return {
            "kind": self.kind.__name__, "module": self.kind.__module__, "message": str(self), "arguments": None,
            "notes": [], "where": where, "op": self.op,
        }  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What a run is expected to take; `None` where only the run can tell, and `open` says why.

    forwards: runs of the model at least; of a generation, as many as it may take. rows: of all of these.
    flops: floating-point operations. peak_bytes: memory beyond the weights, of the largest forward or value.
    result_bytes: what comes back, at least.
    """

    forwards: int
    rows: int | None
    flops: int | None
    peak_bytes: int
    result_bytes: int
    open: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        return {
            "forwards": self.forwards, "rows": self.rows, "flops": self.flops, "peak_bytes": self.peak_bytes,
            "result_bytes": self.result_bytes, "open": list(self.open),
        }  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that may wait for its run.

    group: jobs that have it in common may run together; empty where a job runs by itself.
    """

    cost: Cost
    group: str


@final
class Admitter:
    """Says of jobs on one model what they cost, or why they are not run."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._known: KnownCosts[Cost] = KnownCosts()

    def admit(self, job: Job, limits: Limits) -> Admitted:
        """What a run of a job is going to cost. It is compiled then.

        Raises:
            NotAdmittedError: it is damaged, has mistakes, makes calls that are not admitted, or is sure to take more
                than it may.
        """
        try:
            loaded = self.executor.load(job, job.digest)
            given = Given(job, loaded)
            with undisturbed(job), warnings.catch_warnings(), given.attributes():
                warnings.simplefilter("ignore")  # the run says it again, to its sender
                return self._admitted(job, loaded, given, limits)
        except CompileError as error:
            raise NotAdmittedError(
                REFUSED, "the experiment does not compile:", error.diagnostics, CompileError
            ) from error
        except FileError as error:
            reason = str(error).partition("\n")[0]
            raise NotAdmittedError(REFUSED, reason, error.diagnostics, FileError) from error
        except NotAdmittedError:
            raise
        except RecursionError as error:
            raise NotAdmittedError(REFUSED, "the experiment is nested too deeply to be compiled") from error
        except MemoryError as error:
            raise NotAdmittedError(REFUSED, "the experiment takes too much memory to be compiled") from error
        except Exception as error:  # whatever the model, or its tokenizer, makes of what the forwards are given
            raise NotAdmittedError(REFUSED, str(error) or type(error).__name__, kind=type(error)) from error

    def _admitted(self, job: Job, loaded: Loaded, given: Given, limits: Limits) -> Admitted:
        model, bounds = loaded.code.namespace.model, _bounds(limits)
        compiled = loaded.cache.find(given.values)
        if compiled is not None:
            kind = job.digest, bounds, kind_of(compiled, given.named, model)
            known = None if kind[-1] is None else self._known.get(kind, compiled)
            if known is not None:
                return Admitted(known, self.executor.group(job, given, compiled))
        cost, lowered = _cost(loaded.cache, loaded.cache.given(given.values), bounds)
        compiled = loaded.cache.get(given.values, lowered)
        kind = job.digest, bounds, kind_of(compiled, given.named, model)
        if kind[-1] is not None:
            self._known.keep(kind, compiled, cost)
        return Admitted(cost, self.executor.group(job, given, compiled))


def _bounds(limits: Limits) -> Bounds:
    return Bounds(limits.memory_bytes, limits.max_result_bytes, limits.forwards, limits.wall_seconds)


def _cost(cache: Cache, arguments: Mapping[str, Any], bounds: Bounds) -> tuple[Cost, Specialised]:
    """What a run takes, and what the program is for it once the passes ran."""
    inferred: list[Program] = []

    def seen(result: PassResult) -> None:
        if result.name == "infer":
            inferred.append(result.program)

    lowered = lower_program(cache.program, arguments, cache.globals, cache.closure, seen, options=cache.options)
    asked = Answers(arguments)
    asked.lowered = lowered
    found = footprint(inferred[0], Surroundings(arguments, cache.globals, cache.closure), asked.extent, bounds)
    if found.excesses:
        _refuse(found.excesses)
    return _estimated(lowered, found, bounds), lowered


def _estimated(lowered: Specialised, found: Footprint, bounds: Bounds) -> Cost:
    estimates = Estimates(lowered, partial(example_of, lowered))
    flops: int | None = 0
    rows: int | None = 0
    peak, unknown = found.largest, [f"{reason} ({op.span})" for reason, op in found.open.items()]
    for op in forwards(lowered.program.body):
        figures, why = estimates.of(op)
        figures = figures or Figures()
        if figures.peak is not None and figures.peak > bounds.memory:
            _refuse([Excess("memory", op, figures.peak, bounds.memory)])
        times = found.forwards.get(op.result.name, 1)
        flops = None if flops is None or figures.flops is None else flops + times * figures.flops
        rows = None if rows is None or figures.rows is None else rows + times * figures.rows
        peak = max(peak, figures.peak or 0)
        if why:
            unknown.append(f"{why} ({op.span})")
    for stage in lowered.program.walk():
        if isinstance(stage, ops.Stage):
            unknown.append(f"what follows is known only when the run tells {stage.needs} ({stage.span})")
    return Cost(found.total, rows, flops, peak, found.result, tuple(dict.fromkeys(unknown)))


def _refuse(excesses: list[Excess]) -> None:
    first = excesses[0]
    result = [each for each in excesses if each.what == "result"]
    status = TOO_LARGE if len(result) == len(excesses) else REFUSED
    diagnostics = tuple(Diagnostic(each.op.span, _told(each), _WAY_OUT[each.what]) for each in excesses)
    op = print_op(first.op).partition("\n")[0].strip()
    raise NotAdmittedError(status, "the experiment takes more than it may:", diagnostics, op=op)


_WAY_OUT = {
    "memory": "make it smaller, or in parts",
    "result": "return less: the positions, layers or numbers that you need",
    "forwards": "run it in several parts",
    "seconds": "run it in several parts",
}


def _told(excess: Excess) -> str:
    match excess.what:
        case "memory":
            return f"this takes {in_bytes(excess.taken)} of memory, and {in_bytes(int(excess.allowed))} are allowed"
        case "result":
            return f"this gives back {in_bytes(excess.taken)}, and {in_bytes(int(excess.allowed))} are allowed"
        case "forwards":
            return f"this runs the model {excess.taken:,} times, and {int(excess.allowed):,} are allowed"
        case "seconds":
            return f"the rounds of this loop take {excess.taken:,} s at least, and {excess.allowed:,.0f} s are allowed"


__all__ = ["REFUSED", "TOO_LARGE", "Admitted", "Admitter", "Cost", "Limits", "NotAdmittedError"]
