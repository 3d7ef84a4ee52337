"""What an experiment will do: its stages, its forwards, and the calls that the compiler does not know.

stage 1                                          given layer=3
  demo.py:13  forward of GPT2LMHeadModel         reads transformer.h.3 output; ends after it
  demo.py:14  host op `choose(…)`                not in the table of known calls: it runs as it is, once
stage 2 begins at demo.py:15, where it must be known which module this is
  demo.py:15  forward                            specialised when the run reaches it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from nnsight_compiler.compilation import Compiled
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined, regions, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes.inline import MODULE_CALL

LATER = "specialised when the run reaches it"


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A forward or a host op.

    place: `file:line`. what: the forward or the call. why: what the forward is for, or why the call is a host op.
    """

    kind: str
    place: str
    what: str
    why: str


@final
@dataclass(frozen=True, slots=True)
class StageReport:
    """A part of an experiment that is specialised at once.

    place: where it begins. needs: what only the run of what precedes it gives; empty for the first stage.
    variants: what it was specialised to so far, each with its own steps; none before a run has reached it.
    """

    number: int
    place: str
    needs: str
    variants: tuple[Variant, ...]


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """A stage, specialised. `given`: what for; `steps`: forwards and host ops in the order of the source."""

    given: tuple[str, ...]
    steps: tuple[Step, ...]


@final
@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of an experiment for one call. `str` gives it as text, `as_data` as plain data for programs."""

    name: str
    stages: tuple[StageReport, ...]

    def as_data(self) -> dict[str, Any]:
        """The explanation as dicts, lists and strings."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([f"experiment {self.name}", *(line for stage in self.stages for line in _lines(stage))])


def _lines(stage: StageReport) -> Iterator[str]:
    begins = f" begins at {stage.place}, where it must be known {stage.needs}" if stage.needs else ""
    for variant in stage.variants:
        given = f"  given {', '.join(variant.given)}" if variant.given else ""
        yield f"stage {stage.number}{begins}{given}"
        wide = max((len(f"{step.place}  {step.what}") for step in variant.steps), default=0)
        for step in variant.steps:
            yield f"  {f'{step.place}  {step.what}'.ljust(wide)}  {step.why}"
        if not variant.steps:
            yield "  no forward and no host op"


def explain(name: str, compiled: Compiled) -> Explanation:
    """The stages of a compiled experiment, with those that earlier runs have specialised."""
    return Explanation(name, tuple(_stages(compiled)))


def _stages(first: Compiled) -> Iterator[StageReport]:
    yield StageReport(1, _place(first.program.span), "", (_variant(first),))
    found: dict[tuple[str, str], list[Variant]] = {}
    _collect(first, found)
    for number, ((place, needs), variants) in enumerate(found.items(), start=2):
        yield StageReport(number, place, needs, tuple(dict.fromkeys(variants)))


def _collect(compiled: Compiled, found: dict[tuple[str, str], list[Variant]]) -> None:
    """The stages that begin in a program, and those that begin in them, by where they begin."""
    for op in compiled.program.walk():
        if not isinstance(op, ops.Stage):
            continue
        held = found.setdefault((_place(op.span), op.needs), [])
        specialised = compiled.stages[op.result.name].compiled
        held += map(_variant, specialised) if specialised else [Variant((), tuple(_expected(op.program)))]
        for each in specialised:
            _collect(each, found)


def _variant(compiled: Compiled) -> Variant:
    return Variant(compiled.program.given, tuple(_steps(compiled.program)))


def _expected(program: Program) -> Iterator[Step]:
    """The forwards of a program that is not specialised yet."""
    for op in program.walk():
        if isinstance(op, ops.Forward):
            yield Step("forward", _place(op.span), "forward", LATER)


def _steps(program: Program) -> Iterator[Step]:
    made = {value.name: op for op in program.walk() for value in defined(op)}
    stages = {op.result for op in program.walk() if isinstance(op, ops.Stage)}

    def visit(region: Region, site: str) -> Iterator[Step]:
        for op in region.ops:
            match op:
                case ops.Forward():
                    yield Step("forward", _place(op.span), f"forward of {program.target}", _purpose(op))
                case ops.At(module=module, port=port):
                    site = f"{module.path or 'the model'} {port}"
                case ops.Call(target=None) if op.function not in stages:
                    yield Step("host", _place(op.span), f"host op `{_spelled(op.function, made)}(…)`", _why(site))
                case ops.Call(target=target) if target == MODULE_CALL:
                    what = f"module call `{_spelled(op.function, made)}(…)`"
                    yield Step("module", _place(op.span), what, "a torch module, run whole and as it is")
            for inner in regions(op):
                yield from visit(inner, site)

    return visit(program.body, "")


def _why(site: str) -> str:
    reason = "not in the table of known calls: it runs as it is, once each time the line is reached"
    return f"{reason}; in the middle of the forward, at {site}" if site else reason


def _purpose(op: ops.Forward) -> str:
    """What is read and written in a forward, and where it ends."""
    reads: list[str] = []
    writes: list[str] = []
    last = ""
    for at in op.body.ops:
        assert isinstance(at, ops.At), "explained programs are placed"
        last = f"{at.module.path or 'the model'} {at.port}"
        inside = list(walk(at.body))
        if any(isinstance(each, ops.Write | ops.SetItem) or _in_place(each) for each in inside):
            writes.append(last)
        elif any(isinstance(each, ops.Read) for each in inside):
            reads.append(last)
    touched = {"reads": reads, "writes": writes}
    parts = [f"{word} {', '.join(_shortened(sites))}" for word, sites in touched.items() if sites]
    whole = not last or last == "the model output"
    return "; ".join([*parts, "runs to its end" if whole else f"ends after {last}"])


def _in_place(op: Op) -> bool:
    return isinstance(op, ops.Operator) and op.in_place


def _shortened(sites: list[str]) -> list[str]:
    return sites if len(sites) <= 4 else [*sites[:2], f"{len(sites) - 3} more", sites[-1]]


def _spelled(operand: Operand, made: Mapping[str, Op]) -> str:
    """An operand, roughly as the user wrote it."""
    match operand:
        case Module(path=path):
            return path or "model"
        case Literal(value=value):
            return repr(value)
        case Value(name=name):
            match made.get(name):
                case ops.Global(name=known) | ops.Load(name=known) | ops.Closure(name=known):
                    return known
                case ops.Attribute(object=base, name=attribute):
                    return f"{_spelled(base, made)}.{attribute}"
                case ops.Item(object=base, index=index):
                    return f"{_spelled(base, made)}[{_spelled(index, made)}]"
                case ops.Call(function=function) if name.isdecimal():
                    return f"{_spelled(function, made)}(…)"
            return name
        case Slice() | Tuple() | Unbound():
            return "…"


def _place(span: Span) -> str:
    return f"{span.file}:{span.line}"
