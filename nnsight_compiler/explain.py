"""Finds what an experiment will do in its compiled stages: their forwards, what these read and write, and host ops."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from nnsight_compiler.answers import example_of
from nnsight_compiler.compilation import Compiled
from nnsight_compiler.estimates import Estimates, as_run
from nnsight_compiler.explanation import Explanation, LastRun, Optimisation, StageReport, Step, Variant
from nnsight_compiler.figures import Figures
from nnsight_compiler.files.kinds import barriers
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes.behaviour import Behaviour
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.known_calls import MODULE_CALL, known_target
from nnsight_compiler.passes.moments import first_step, last_step
from nnsight_compiler.passes.sites import forwards
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.runtime.runs import Ran, Run

LATER = "specialised when the run reaches it"
NOT_KNOWN = "not in the table of known calls"
TRAINS = "trains: no forward is moved across it; files may hold it"


def explain(
    name: str, compiled: Compiled, lowered: Specialised, written: Program | None, run: Run | None
) -> Explanation:
    """The stages of a compiled experiment, with those that earlier runs have specialised.

    Args:
        lowered: the same program with what its first stage was specialised to.
        written: the program of the first stage without optimisations.
        run: the last run.
    """
    plans = {id(plan) for one in _all(compiled) for plan in one.plan.forwards}
    if run is not None and not any(plans.intersection(each.plans) for each in run.forwards):
        run = None  # it was of other programs
    ran = () if run is None else run.forwards
    estimates = Estimates(lowered, partial(example_of, lowered))
    optimisations = (
        Optimisation(each.optimisation, each.fired, each.span.file, each.span.line, each.what)
        for remarks in (*(one.remarks for one in _all(compiled)), () if run is None else run.remarks)
        for each in remarks
    )
    return Explanation(
        name,
        tuple(_stages(compiled, estimates, ran)),
        len(list(forwards(lowered.program.body))),
        None if written is None else len(list(forwards(written.body))),
        tuple(dict.fromkeys(optimisations)),
        None if run is None else LastRun(len(run.forwards), run.seconds, run.peak),
    )


def _all(compiled: Compiled) -> Iterator[Compiled]:
    """A compiled program and those of its stages."""
    yield compiled
    for stage in compiled.stages.values():
        for each in stage.compiled:
            yield from _all(each)


def _stages(first: Compiled, estimates: Estimates, ran: Sequence[Ran]) -> Iterator[StageReport]:
    span = first.program.span
    yield StageReport(1, span.file, span.line, "", (_variant(first, {}, ran, estimates),))
    found: dict[tuple[str, int, str], list[Variant]] = {}
    _collect(first, found, ran)
    for number, (place, variants) in enumerate(found.items(), start=2):
        reached = [each for each in variants if LATER not in (step.why for step in each.steps)]
        yield StageReport(number, *place, tuple(dict.fromkeys(reached or variants)))


def _collect(compiled: Compiled, found: dict[tuple[str, int, str], list[Variant]], ran: Sequence[Ran]) -> None:
    """The stages that begin in a program, and those that begin in them, by where they begin."""
    made = _made(compiled.program)
    calls = {op.function: op for op in compiled.program.walk() if isinstance(op, ops.Call)}
    for op in compiled.program.walk():
        if not isinstance(op, ops.Stage):
            continue
        held = found.setdefault((op.span.file, op.span.line, op.needs), [])
        specialised = compiled.stages[op.result.name].compiled
        names = _names(op.program, calls[op.result], made)
        held += [_variant(each, names, ran) for each in specialised] or [Variant((), _folded(_expected(op.program)))]
        for each in specialised:
            _collect(each, found, ran)


def _names(program: Program, call: ops.Call, made: Mapping[str, Op]) -> dict[str, str]:
    """What stands in the guards of a stage, and what the user calls it: what a box holds, a value without a name."""
    names = {}
    for op in program.walk():
        if isinstance(op, ops.Load) and isinstance(op.cell, Value) and op.name is not None:
            names[f"{op.cell.name}.value"] = op.name
    for parameter, argument in zip(program.parameters, call.arguments, strict=True):
        name = parameter.value.name
        if _NAMELESS.fullmatch(name) and isinstance(argument.value, Value):
            names[name] = _spelled(argument.value, made)
    return names


def _variant(
    compiled: Compiled, names: Mapping[str, str], ran: Sequence[Ran], estimates: Estimates | None = None
) -> Variant:
    told = [guard for guard in compiled.guards if guard.kind in ("value", "length") and "._path" not in guard.text]
    given = [_told(guard, names) for guard in told]
    # Estimates are of the same program, specialised anew: values, and so ops, are others.
    program = compiled.program if estimates is None else estimates.lowered.program
    plans = zip(forwards(program.body), compiled.plan.forwards, strict=True)
    runs = {op.result.name: [each for each in ran if id(plan) in each.plans] for op, plan in plans}
    return Variant(tuple(given), _folded(_steps(program, compiled.recomputed, runs, estimates)))


_NAMELESS = re.compile(r"v\d+(_\d+)*")
_SUBMODULE = re.compile(r"[\w.]+\._root\._module\.get_submodule\('([^']*)'\)")
_INDEX = re.compile(r"\.__index__\(\)")
_BRACKETED = re.compile(r"(?<![\w\])])\((\w+)\)")


def _told(guard: Guard, names: Mapping[str, str]) -> str:
    """A guard as a user would write it: modules by their paths, values by their names."""
    text = _SUBMODULE.sub(r"\1", guard.text).replace("._module.training", ".training")
    for name, known in names.items():
        text = re.sub(rf"(?<![\w.]){re.escape(name)}\b", known, text)
    return str(replace(guard, text=_BRACKETED.sub(r"\1", _INDEX.sub("", text))))


def _made(program: Program) -> dict[str, Op]:
    return {value.name: op for op in program.walk() for value in defined(op)}


def _folded(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Steps, with those that are the same as one."""
    counts: dict[Step, int] = {}
    for step in steps:
        counts[step] = counts.get(step, 0) + 1
    return tuple(replace(step, times=count) for step, count in counts.items())


def _expected(program: Program) -> Iterator[Step]:
    """The forwards of a program that is not specialised yet."""
    for op in program.walk():
        if isinstance(op, ops.Forward):
            yield Step("forward", op.span.file, op.span.line, "forward", LATER)


def _steps(
    program: Program, recomputed: Collection[str], runs: Mapping[str, Sequence[Ran]], estimates: Estimates | None
) -> Iterator[Step]:
    made = _made(program)
    stages = {op.result for op in program.walk() if isinstance(op, ops.Stage)}

    def visit(region: Region, site: str, within: tuple[str, ...]) -> Iterator[Step]:
        for op in region.ops:
            place = op.span.file, op.span.line
            around = within
            match op:
                case ops.Forward():
                    step = Step("forward", *place, f"forward of {program.target}", _purpose(op), within)
                    ran = runs[op.result.name]
                    extent = Figures()
                    if estimates is not None:
                        estimate, unknown = estimates.of(op)
                        step = replace(step, estimate=estimate, unknown=unknown)
                        extent = estimates.run_extent(op, ran) if ran else extent
                    yield replace(step, last_run=as_run(ran, extent)) if ran else step
                case ops.At(module=module, port=port):
                    site = _named(module.path, port) if port != "result" else ""
                    attention, _, value = module.path.rpartition(":")
                    if value in ("pattern", "scores") and attention in recomputed:
                        what = f"attention of {attention}"
                        why = f"computed from q, k and the mask, in this run: torch's kernel gives no {value}"
                        yield Step("attention", *place, what, why, within)
                case ops.Steps():
                    around = *within, *(when.strip() for when, _ in _pieces(Region((), (op,))))
                case ops.Call(target=None) if op.function not in stages:
                    spelled = _spelled(op.function, made)
                    why = TRAINS if spelled.rpartition(".")[2] in barriers() else NOT_KNOWN
                    yield Step("host", *place, f"host op `{spelled}(…)`", why + _in_the_middle(site), within)
                case ops.Call(target=target) if target == MODULE_CALL:
                    what = f"module call `{_spelled(op.function, made)}(…)`"
                    yield Step("module", *place, what, "a torch module, run whole and as it is", within)
                case ops.For() | ops.While():
                    around = *within, f"in each round of line {op.span.line}"
                case ops.If():
                    around = *within, f"if line {op.span.line} says so"
            for inner in regions(op):
                yield from visit(inner, site, around)

    return visit(program.body, "", ())


def _in_the_middle(site: str) -> str:
    return f"; in the middle of the forward, at {site}" if site else ""


def _purpose(op: ops.Forward) -> str:
    """What is read and written in a forward, at which steps of a generation, and where it ends."""
    touched: dict[tuple[str, str], list[tuple[str, str]]] = {}
    last = ("", "output")
    gives = False
    invokes = sum(isinstance(each, ops.Invoke) for each in op.body.ops)
    for at in op.body.ops:
        if isinstance(at, ops.Invoke):
            continue
        assert isinstance(at, ops.At), "explained programs are placed"
        if at.port == "result":
            gives = any(isinstance(each, ops.Read) for each in walk(at.body))
            continue
        last = at.module.path, at.port
        for when, part in _pieces(at.body):
            inside = list(walk(part))
            if at.port == "skip":
                touched.setdefault(("may skip at", when), []).append(last)
            elif any(isinstance(each, ops.Write | ops.SetItem) or _in_place(each) for each in inside):
                touched.setdefault(("writes", when), []).append(last)
            elif any(isinstance(each, ops.Read) for each in inside):
                touched.setdefault(("reads", when), []).append(last)
    ordered = sorted(touched.items(), key=lambda each: ("reads", "writes", "may skip at").index(each[0][0]))
    parts = [f"{word} {', '.join(_ranges(sites))}{when}" for (word, when), sites in ordered]
    if invokes:
        parts.insert(0, "1 invoke" if invokes == 1 else f"{invokes} invokes")
    parts += [f"stops where line {each.span.line} says so" for each in walk(op.body) if isinstance(each, ops.Stop)]
    if op.method == "generate":
        return "; ".join([*parts, "generates to its end", *(["gives what it returns"] if gives else [])])
    sites = [site for (word, _), held in touched.items() for site in held if word != "may skip at"]
    end = "ends after it" if sites == [last] else f"ends after {_named(*last)}"
    return "; ".join([*parts, end if op.stops else "runs to its end"])


def _pieces(body: Region) -> Iterator[tuple[str, Region]]:
    """The parts of what happens at a site, and at which steps of a generation each does."""
    if not any(isinstance(op, ops.Steps) for op in body.ops):
        yield "", body
        return
    for op in body.ops:
        if isinstance(op, ops.Steps):
            first, end = first_step(op), last_step(op)
            if end == math.inf:
                yield f" at every step from {first}" if first else " at every step", op.body
            else:
                yield f" at step {first}" if first == end else f" at steps {first} to {end}", op.body


def _in_place(op: Op) -> bool:
    match op:
        case ops.Operator(in_place=in_place):
            return in_place
        case ops.Call(target=str() as target) if target != MODULE_CALL:
            return known_target(target).behaviour is Behaviour.MUTATES
    return False


def _named(path: str, port: str) -> str:
    return f"{path or 'the model'} {port}"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def _ranges(sites: Iterable[tuple[str, str]]) -> list[str]:
    """Sites by name; those of one kind in layers that follow each other as one: `h.0…3 output`."""
    found: list[tuple[str, str, str, list[int]]] = []
    for path, port in sites:
        number = _NUMBER.search(path)
        if number is None:
            found.append((path, "", port, []))
            continue
        before, layer, after = path[: number.start()], int(number[0]), path[number.end() :]
        for one, rest, held_port, layers in found:
            if (one, rest, held_port) == (before, after, port) and layers and layers[-1] == layer - 1:
                layers.append(layer)
                break
        else:
            found.append((before, after, port, [layer]))
    names = []
    for before, after, port, layers in found:
        numbers = "" if not layers else str(layers[0]) if len(layers) == 1 else f"{layers[0]}…{layers[-1]}"
        names.append(_named(f"{before}{numbers}{after}", port))
    return names if len(names) <= 6 else [*names[:3], f"{len(names) - 4} more", names[-1]]


def _spelled(operand: Operand, made: Mapping[str, Op]) -> str:
    """An operand, roughly as the user wrote it."""
    match operand:
        case Module(path=path):
            return path or "model"
        case Literal(value=value):
            return repr(value)
        case Value(name=name):
            match made.get(name):
                case ops.Global(name=known) | ops.Bound(name=known) | ops.Closure(name=known):
                    return known
                case ops.Load(name=str() as known):
                    return known
                case ops.Operator(operator=sign, operands=(left, right)):
                    return f"{_spelled(left, made)} {sign} {_spelled(right, made)}"
                case ops.Attribute(object=base, name=attribute):
                    return f"{_spelled(base, made)}.{attribute}"
                case ops.Item(object=base, index=index):
                    return f"{_spelled(base, made)}[{_spelled(index, made)}]"
                case ops.Call(function=function) if name.isdecimal():
                    return f"{_spelled(function, made)}(…)"
            return name
        case Slice() | Tuple() | Unbound():
            return "…"
