"""What crosses between caller and service: the bytes of a job, and of what comes back at least, before it is sent."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from nnsight_compiler.answers import Answers
from nnsight_compiler.compilation import lower_program
from nnsight_compiler.figures import in_bytes
from nnsight_compiler.ir.program import Program
from nnsight_compiler.passes.footprint import Bounds, footprint
from nnsight_compiler.passes.manager import PassResult
from nnsight_compiler.passes.shapes import Surroundings
from nnsight_compiler.remote.job import pack
from nnsight_compiler.remote.outside import sent

if TYPE_CHECKING:
    from nnsight_compiler.remote.routing import Call

_EVERYTHING = Bounds(sys.maxsize, sys.maxsize, sys.maxsize, float("inf"))


@final
@dataclass(frozen=True, slots=True)
class Crossing:
    """One job.

    file, lines: where its code stands. takes, gives: the names of what it takes from the caller's code and gives back
        to it; none where the whole experiment is one job.
    sends, receives: bytes of the request, and of the tensors and numbers that come back, as far as they are known
        before the run. unknown: what of them is not, and why.
    """

    file: str
    lines: tuple[int, ...]
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    sends: int | None = None
    receives: int | None = None
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = []
        if self.takes or self.gives:
            told.append(f"takes {', '.join(self.takes) or 'nothing'}, gives {', '.join(self.gives) or 'nothing'}")
        if self.sends is not None:
            told.append(f"sends {in_bytes(self.sends)}")
        if self.receives is not None:
            told.append(f"receives {in_bytes(self.receives)}{' at least' if self.unknown else ''}")
        return "; ".join((*told, *self.unknown))


def crossings(call: Call) -> tuple[Crossing, ...]:
    """The jobs of a call, in the order of the source. Nothing is sent.

    Raises:
        ExperimentError: it cannot be sent.
    """
    from nnsight_compiler.remote.routing import model_name, split_of

    split = split_of(call)
    if split is not None:
        return tuple(
            Crossing(split.program.span.file, each.lines, each.takes, each.gives, unknown=(_NOT_YET,))
            for each in split.describe()
        )
    job = sent(call.program, call.globals, call.closure, call.values, model_name, call.options).job
    received, unknown = _received(call)
    lines = sorted({op.span.line for op in call.program.walk() if op.span.line})
    return (Crossing(call.program.span.file, tuple(lines), (), (), len(pack(job)), received, unknown),)


_NOT_YET = "how many bytes is known when it runs"


def _received(call: Call) -> tuple[int, tuple[str, ...]]:
    inferred: list[Program] = []

    def seen(result: PassResult) -> None:
        if result.name == "infer":
            inferred.append(result.program)

    answers = Answers(call.values)
    answers.lowered = lower_program(call.program, call.values, call.globals, call.closure, seen, options=call.options)
    surroundings = Surroundings(call.values, call.globals, call.closure)
    found = footprint(inferred[0], surroundings, answers.extent, _EVERYTHING)
    return found.result, tuple(f"{reason} ({op.span})" for reason, op in found.open.items())
