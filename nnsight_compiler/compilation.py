"""The pipeline: from a function's IR, through the passes, to a plan that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, final

from nnsight_compiler.answers import Answers, example_of
from nnsight_compiler.frontend import lower_function
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, joined
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.models.batches import concatenated
from nnsight_compiler.models.residual import stream_of
from nnsight_compiler.observations import measured, observed
from nnsight_compiler.options import DEFAULT, Options
from nnsight_compiler.passes.bounded import MOST_OPS
from nnsight_compiler.passes.check_padding import check_padding
from nnsight_compiler.passes.check_sites import check_sites
from nnsight_compiler.passes.check_unused_values import check_unused_values
from nnsight_compiler.passes.copy_on_save import copy_on_save
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from nnsight_compiler.passes.eliminate_dead_saves import eliminate_dead_saves
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.fill_caches import fill_caches
from nnsight_compiler.passes.fuse_calls import fuse_calls
from nnsight_compiler.passes.hoist_forwards import hoist_forwards
from nnsight_compiler.passes.infer import infer
from nnsight_compiler.passes.manager import NamedPass, Observer, run_passes
from nnsight_compiler.passes.merge_forwards import merge_forwards
from nnsight_compiler.passes.merge_straight_forwards import merge_straight_forwards
from nnsight_compiler.passes.narrow import narrow
from nnsight_compiler.passes.narrow_saves import narrow_saves
from nnsight_compiler.passes.parts import Positionwise
from nnsight_compiler.passes.pauses import pausing
from nnsight_compiler.passes.place import place
from nnsight_compiler.passes.record_gradients import record_gradients
from nnsight_compiler.passes.remarks import Remark, Remarks
from nnsight_compiler.passes.repeat_writes import repeat_writes
from nnsight_compiler.passes.rows import check_rows
from nnsight_compiler.passes.shapes import Surroundings
from nnsight_compiler.passes.share_prefixes import share_prefixes
from nnsight_compiler.passes.sites import forwards
from nnsight_compiler.passes.skips import check_skips
from nnsight_compiler.passes.specialise import Specialised, specialise
from nnsight_compiler.passes.stop_early import stop_early
from nnsight_compiler.passes.streams import Stream
from nnsight_compiler.passes.subject import Inputs, Subject
from nnsight_compiler.passes.unite_forwards import unite_forwards
from nnsight_compiler.positions_apart import conditions_of
from nnsight_compiler.runtime.functions import generate_function
from nnsight_compiler.runtime.observation import Observation, registered
from nnsight_compiler.runtime.placed_statements import Axes
from nnsight_compiler.runtime.plans import Plan, plan
from nnsight_compiler.runtime.shares import SiteAxes
from nnsight_compiler.runtime.support import UNBOUND
from nnsight_compiler.shapes import found_axes, site_axes, why_not_apart

if TYPE_CHECKING:
    from nnsight_compiler.check import Checker

_T = TypeVar("_T")

PASSES: tuple[str, ...] = (
    "specialise",
    "fill_caches",
    "infer",
    "check_sites",
    "check_skips",
    "check_unused_values",
    "repeat_writes",
    "eliminate_dead_saves",
    "hoist_forwards",
    "unite_forwards",
    "eliminate_common_subexpressions",
    "narrow",
    "fuse_calls",
    "record_gradients",
    "place",
    "copy_on_save",
    "stop_early",
    "merge_forwards",
    "share_prefixes",
    "merge_straight_forwards",
)
"""The names of the passes, in the order in which they run."""


def save(value: Any) -> Any:
    """Marks a value to be kept, inside a trace; the same as `value.save()`, for values that have no such method.

    The compiler knows this function and replaces its calls. Called outside of a compiled program, there is nothing to
    keep the value from, and it is returned as it is.
    """
    return value


class StageRunner(Protocol):
    """Runs the program of a stage, and holds what it was compiled to."""

    def run(self, *values: Any) -> Any: ...
    @property
    def compiled(self) -> list[Compiled]: ...


Staged = Callable[[Program, Mapping[str, Any], Mapping[str, CellType]], StageRunner]
"""Gives what runs the program of a stage, whose names come from these globals and this closure."""


class GuardedGlobals(dict[str, Any]):
    """The globals of a program that someone else wrote, which says what such a program may do.

    most_ops: what it may be unrolled to.
    """

    most_ops: int = MOST_OPS

    def admit(self, source: Program, specialised: Program) -> None:
        """Called with each program once it is specialised, before it is compiled further. Raises where it must not
        run."""
        raise NotImplementedError


@final
@dataclass(frozen=True, slots=True)
class Compiled:
    """A program compiled for one model and one shape of arguments.

    source: the generated functions as text: one for each site, and the one that runs the forwards.
    stages: what runs each of the stages that begin in it, by the name of the op's result.
    recomputed: the attention modules whose attention is computed anew, since their own gives no pattern.
    remarks: what the optimisations did, or did not do and why.
    """

    program: Program
    plan: Plan
    guards: tuple[Guard, ...]
    objects: Mapping[str, Any]
    unsaved: Mapping[str, Span]
    unsure: Mapping[str, Span]
    stages: Mapping[str, StageRunner]
    recomputed: frozenset[str]
    remarks: tuple[Remark, ...] = ()

    @property
    def source(self) -> str:
        return self.plan.source

    def __call__(self, *args: Any) -> Any:
        """Runs it, on the values of all parameters in order."""
        return self.plan.run(*args)


def compile_program(
    program: Program,
    arguments: Mapping[str, Any],
    globals_: dict[str, Any],
    closure: Mapping[str, CellType],
    staged: Staged,
    observer: Observer | None = None,
    options: Options = DEFAULT,
    lowered: Specialised | None = None,
) -> Compiled:
    """Compiles a program for the arguments of one call.

    Args:
        staged: gives what runs the stages that begin later.
        lowered: what `lower_program` made of it for the same call, where that was asked for already.
    """
    if lowered is None:
        lowered = lower_program(program, arguments, globals_, closure, observer, options=options)
    stages: dict[str, StageRunner] = {}

    def stage(op: ops.Stage) -> Callable[..., Any]:
        frame = lowered.stages[op.result.name]
        stages[op.result.name] = staged(op.program, frame.globals, frame.closure)
        return stages[op.result.name].run

    placed = (op.module.path for op in lowered.program.walk() if isinstance(op, ops.At))
    inside = frozenset(path for path in placed if ":" in path)

    def known(forward: ops.Forward, at: ops.At) -> SiteAxes | None:
        model, example = lowered.models[forward.result.name], example_of(lowered, forward.result.name)
        return None if example is None else site_axes(model, example, at.module.path, at.port, at.call or 0, inside)

    seen = cast(Mapping[str, Observation], lowered.orders)
    axes = Axes(known, found_axes, concatenated, measured, why_not_apart)
    made = plan(
        lowered.program, globals_, closure, stage, axes, seen, budget=options.memory_budget, padding=options.padding
    )
    return Compiled(
        lowered.program,
        made,
        lowered.guards,
        lowered.objects,
        lowered.unsaved,
        lowered.unsure,
        stages,
        lowered.recomputed,
        lowered.remarks,
    )


def lower_program(
    program: Program,
    arguments: Mapping[str, Any],
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
    observer: Observer | None = None,
    checker: Checker | None = None,
    options: Options = DEFAULT,
) -> Specialised:
    """Runs the passes for the arguments of one call. With a checker, mistakes go to it, and the passes go on."""
    surroundings = Surroundings(arguments, globals_, closure)
    remarks = Remarks()
    ask = Answers(arguments, checker)
    shared: list[Program] = []  # what was made on the trust that one forward gives what another would
    indexed: dict[str, object] = {}  # conditions on arguments that indices rest on

    def ordered(model: Any, inputs: Inputs | None) -> Observation:
        ask.exact = True  # calls are counted, so that the program rests on the sizes of its inputs
        return observed(model, inputs, ask.exact)

    streams = partial(_stream, checked=checker is not None)
    most = globals_.most_ops if isinstance(globals_, GuardedGlobals) else MOST_OPS
    subject = Subject(
        arguments, globals_, closure, helper_program, save, UNBOUND, streams, ordered, generate_function, most
    )

    def specialised(source: Program) -> Program:
        ask.lowered = (specialise if checker is None else checker.specialise)(source, subject)
        if isinstance(globals_, GuardedGlobals) and checker is None:  # what is only checked never runs
            globals_.admit(source, ask.lowered.program)
        return ask.lowered.program

    def inferred(source: Program) -> Program:
        try:
            return infer(source, surroundings, ask.extent)
        except CompileError as error:
            raise joined(error, lambda: check_sites(source, ask.order)) from None

    def optimised(name: str, step: Callable[[Program], Program]) -> Callable[[Program], Program]:
        """An optimisation, where it is to run: not in a program that a debugger looks into."""
        return lambda source: step(source) if options.does(name) and not pausing(source) else source

    def relied(before: Program, after: Program) -> Program:
        if after is not before:
            shared.append(after)
        return after

    def dead(source: Program) -> Program:
        keeps = any(model._module.training for model in ask.lowered.models.values())
        return eliminate_dead_saves(source, keep_forwards=keeps)

    def hoisted(source: Program) -> Program:
        return relied(source, hoist_forwards(source, remarks, ask.trusted, ask.kind_of))

    def narrowed(source: Program) -> Program:
        kept = narrow_saves(source, arguments, remarks, indexed.__setitem__)
        return narrow(kept, ask.order, ask.positionwise, arguments, remarks, indexed.__setitem__)

    def fuses(forward: ops.Forward, path: str) -> bool:
        return options.does("fuse_calls") and isinstance(ask.positionwise(forward, path), Positionwise)

    def fused(source: Program) -> Program:
        return fuse_calls(source, ask.positionwise, arguments, remarks, indexed.__setitem__)

    steps: tuple[Callable[[Program], Program], ...] = (
        specialised,
        lambda source: fill_caches(source, ask.order, ask.modules),
        inferred,
        lambda source: check_padding(check_rows(check_sites(source, ask.order), ask.undivided), ask.lengths, arguments),
        lambda source: check_skips(source, ask.order),
        lambda source: source if pausing(source) else check_unused_values(source),
        repeat_writes,
        optimised("eliminate_dead_saves", dead),
        optimised("hoist_forwards", hoisted),
        optimised("unite_forwards", lambda source: relied(source, unite_forwards(source, remarks, ask.trusted))),
        optimised("eliminate_common_subexpressions", eliminate_common_subexpressions),
        optimised("narrow", narrowed),
        optimised("fuse_calls", fused),
        lambda source: record_gradients(source, ask.order),
        lambda source: place(source, ask.order),
        copy_on_save,
        optimised("stop_early", lambda source: stop_early(source, ask.order, remarks, ask.training)),
        optimised("merge_forwards", lambda source: merge_forwards(source, ask.why_not_merged, fuses, remarks)),
        optimised("share_prefixes", lambda source: share_prefixes(source, ask.order, ask.why_not_resumed, remarks)),
        optimised("merge_forwards", lambda source: merge_straight_forwards(source, ask.why_not_merged, fuses, remarks)),
    )
    passes = [NamedPass(name, step) for name, step in zip(PASSES, steps, strict=True)]
    final_program = run_passes(program, passes, observer=observer, refused=None if checker is None else checker.refused)
    first = ask.lowered
    guards = first.guards
    if shared or len(list(forwards(final_program.body))) < len(first.models):
        # A forward was left out since its model, in eval mode, computes the same whether or not it ran before.
        models = [guard.text for guard in guards if guard.kind == "model"]
        guards += tuple(Guard(f"{text}._module.training", "value", False) for text in models)
    if shared:
        guards += tuple(ask.trust.values())
    guards += tuple(Guard(text, "condition", value) for text, value in indexed.items())
    conditions, objects = conditions_of(
        ((model, path) for (_, path), model in ask.proved.items()), guards, first.objects
    )
    guards += conditions
    recomputed = frozenset[str]().union(*(each.recomputed for each in ask.orders.values()))
    return replace(
        first,
        program=final_program,
        guards=guards,
        objects=objects,
        orders=ask.orders,
        recomputed=recomputed,
        remarks=tuple(remarks.made),
    )


# --- helpers, lowered once ---

_helpers: dict[tuple[CodeType, str], Program] = {}
_MOST_HELPERS = 1000


def helper_program(function: FunctionType) -> Program:
    """The IR of a helper function; lowered once for each piece of code. The oldest gives way where there are many. A
    function of a file brings its own."""
    own = getattr(function, "__program__", None)
    if isinstance(own, Program):
        return own
    key = function.__code__, function.__code__.co_filename  # code that is equal may come from two cells
    found = _helpers.get(key)
    if found is None:
        found = _helpers[key] = lower_function(function)
        while len(_helpers) > _MOST_HELPERS:
            _helpers.pop(next(iter(_helpers)), None)
    return found


# --- the order of sites ---


def _stream(module: Any, name: str, inputs: Inputs | None, checked: bool) -> Stream:
    """Where a value of a block's residual stream stands in a forward on these inputs."""
    try:
        seen = observed(module._root, inputs)
    except Exception:  # whatever the model's code raises; a check tells it where it asks for the order of the sites
        if not checked:
            raise
        seen = registered(module._root._module)
    return stream_of(module, name, seen)
