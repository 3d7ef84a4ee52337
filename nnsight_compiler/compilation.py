"""The pipeline: from a function's IR, through the passes, to a plan that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Protocol, cast, final
from weakref import WeakKeyDictionary

import torch

from nnsight_compiler.frontend import lower_function
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, joined
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Value
from nnsight_compiler.models.residual import stream_of
from nnsight_compiler.passes.check_padding import check_padding
from nnsight_compiler.passes.check_unused_values import check_unused_values
from nnsight_compiler.passes.copy_on_save import copy_on_save
from nnsight_compiler.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from nnsight_compiler.passes.eliminate_dead_saves import eliminate_dead_saves
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.fill_caches import fill_caches
from nnsight_compiler.passes.infer import infer
from nnsight_compiler.passes.interpretation import Subject
from nnsight_compiler.passes.manager import NamedPass, Observer, run_passes
from nnsight_compiler.passes.pauses import pausing
from nnsight_compiler.passes.place import place
from nnsight_compiler.passes.record_gradients import record_gradients
from nnsight_compiler.passes.repeat_writes import repeat_writes
from nnsight_compiler.passes.rows import check_rows
from nnsight_compiler.passes.shapes import Extent, Surroundings
from nnsight_compiler.passes.sites import check_sites, forwards, operations
from nnsight_compiler.passes.skips import check_skips
from nnsight_compiler.passes.specialise import Specialised, specialise
from nnsight_compiler.passes.streams import Stream
from nnsight_compiler.runtime.functions import generate_function
from nnsight_compiler.runtime.observe import Observation, observe, registered
from nnsight_compiler.runtime.operations import alike
from nnsight_compiler.runtime.plans import Axes, Plan, plan
from nnsight_compiler.runtime.rows import SiteAxes
from nnsight_compiler.runtime.support import UNBOUND
from nnsight_compiler.shapes import Inputs, extent_of, found_axes, site_axes, why_not_apart, why_undivided

if TYPE_CHECKING:
    from nnsight_compiler.check import Checker

PASSES = (
    "specialise",
    "fill_caches",
    "infer",
    "check_sites",
    "check_skips",
    "check_unused_values",
    "repeat_writes",
    "eliminate_dead_saves",
    "eliminate_common_subexpressions",
    "record_gradients",
    "place",
    "copy_on_save",
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
    """The globals of a program that someone else wrote, which says what such a program may do."""

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
    """

    program: Program
    plan: Plan
    guards: tuple[Guard, ...]
    objects: Mapping[str, Any]
    unsaved: Mapping[str, Span]
    unsure: Mapping[str, Span]
    stages: Mapping[str, StageRunner]
    recomputed: frozenset[str]

    @property
    def source(self) -> str:
        return self.plan.source

    def __call__(self, *args: Any) -> Any:
        """Runs it, on the values of all parameters in order."""
        return self.plan.run(*args)


def example_of(lowered: Specialised, forward: str) -> Inputs | None:
    """The inputs of a forward, or such as it is given: of as many invokes as are needed to make a batch."""
    inputs, model = lowered.inputs[forward], lowered.models[forward]
    if inputs is not None or forward not in lowered.invoked:
        return inputs
    example = model._example()
    if example is None:
        return None
    batch = model._batch((example, example), {})
    return batch.args, batch.kwargs


def compile_program(
    program: Program,
    arguments: Mapping[str, Any],
    globals_: dict[str, Any],
    closure: Mapping[str, CellType],
    staged: Staged,
    observer: Observer | None = None,
) -> Compiled:
    """Compiles a program for the arguments of one call. `staged` gives what runs the stages that begin later."""
    lowered = lower_program(program, arguments, globals_, closure, observer)
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
    made = plan(lowered.program, globals_, closure, stage, Axes(known, found_axes, why_not_apart), seen)
    return Compiled(
        lowered.program,
        made,
        lowered.guards,
        lowered.objects,
        lowered.unsaved,
        lowered.unsure,
        stages,
        lowered.recomputed,
    )


def lower_program(
    program: Program,
    arguments: Mapping[str, Any],
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
    observer: Observer | None = None,
    checker: Checker | None = None,
) -> Specialised:
    """Runs the passes for the arguments of one call. With a checker, mistakes go to it, and the passes go on."""
    surroundings = Surroundings(arguments, globals_, closure)
    result: list[Specialised] = []
    orders: dict[str, Observation] = {}
    sized = False  # whether calls were counted, so that the program rests on the sizes of its inputs

    def ordered(model: Any, inputs: Inputs | None) -> Observation:
        nonlocal sized
        sized = True
        return observed(model, inputs, sized)

    streams = partial(_stream, checked=checker is not None)
    subject = Subject(arguments, globals_, closure, helper_program, save, UNBOUND, streams, ordered, generate_function)

    def specialised(source: Program) -> Program:
        result.append((specialise if checker is None else checker.specialise)(source, subject))
        if isinstance(globals_, GuardedGlobals) and checker is None:  # what is only checked never runs
            globals_.admit(source, result[0].program)
        return result[0].program

    def at(forward: ops.Forward) -> tuple[Any, Inputs | None]:
        name = forward.result.name
        return result[0].models[name], result[0].inputs[name]

    def inside() -> frozenset[str]:
        return operations(result[0].program.body)

    def order(forward: ops.Forward) -> Observation:
        name = forward.result.name
        if name not in orders:
            model, inputs = at(forward)
            orders[name] = (
                observed(model, inputs, sized, inside())
                if checker is None
                else checker.order(forward, model, inputs, inside())
            )
        return orders[name]

    def extent(op: ops.Forward | ops.Invoke) -> Extent | None:
        name = op.result.name
        if isinstance(op, ops.Invoke):
            name = next(forward for forward, invokes in result[0].invoked.items() if name in invokes)
        found = extent_of if checker is None else checker.extent
        whole = found(result[0].models[name], result[0].inputs[name], example_of(result[0], name), inside())
        if whole is None or isinstance(op, ops.Forward):
            return whole
        part = result[0].parts.get(op.result.name)
        return replace(whole, rows=part and part.rows, tokens=part and part.tokens)

    def lengths(forward: ops.Forward, rows: Value | None) -> tuple[int, ...]:
        name = forward.result.name
        invokes = result[0].invoked.get(name, ())
        if rows is not None or len(invokes) == 1:
            part = result[0].parts.get(invokes[0] if rows is None else rows.name)
            return part.lengths if part else ()
        inputs = result[0].inputs[name]
        return () if inputs is None or invokes else result[0].models[name]._lengths(*inputs)

    def undivided(forward: ops.Forward, op: ops.Read | ops.Write) -> str | None:
        name = forward.result.name
        return why_undivided(result[0].models[name], example_of(result[0], name), op, inside())

    def modules(forward: ops.Forward) -> dict[str, torch.nn.Module]:
        return dict(result[0].models[forward.result.name]._module.named_modules())

    def inferred(source: Program) -> Program:
        try:
            return infer(source, surroundings, extent)
        except CompileError as error:
            raise joined(error, lambda: check_sites(source, order)) from None

    def dead(source: Program) -> Program:
        if pausing(source):
            return source
        training = any(model._module.training for model in result[0].models.values())
        return eliminate_dead_saves(source, keep_forwards=training)

    steps: tuple[Callable[[Program], Program], ...] = (
        specialised,
        lambda source: fill_caches(source, order, modules),
        inferred,
        lambda source: check_padding(check_rows(check_sites(source, order), undivided), lengths, arguments),
        lambda source: check_skips(source, order),
        lambda source: source if pausing(source) else check_unused_values(source),
        repeat_writes,
        dead,
        lambda source: source if pausing(source) else eliminate_common_subexpressions(source),
        lambda source: record_gradients(source, order),
        lambda source: place(source, order),
        copy_on_save,
    )
    passes = [NamedPass(name, step) for name, step in zip(PASSES, steps, strict=True)]
    final_program = run_passes(program, passes, observer=observer, refused=None if checker is None else checker.refused)
    first = result[0]
    guards = first.guards
    if len(list(forwards(final_program.body))) < len(first.models):
        # A forward was left out since its model, in eval mode, computes the same whether or not it ran before.
        models = [guard.text for guard in guards if guard.kind == "model"]
        guards += tuple(Guard(f"{text}._module.training", "value", False) for text in models)
    recomputed = frozenset[str]().union(*(each.recomputed for each in orders.values()))
    return replace(first, program=final_program, guards=guards, orders=orders, recomputed=recomputed)


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

_observations: WeakKeyDictionary[Any, dict[Any, Observation]] = WeakKeyDictionary()
_lock = threading.Lock()


def _stream(module: Any, name: str, inputs: Inputs | None, checked: bool) -> Stream:
    """Where a value of a block's residual stream stands in a forward on these inputs."""
    try:
        seen = observed(module._root, inputs)
    except Exception:  # whatever the model's code raises; a check tells it where it asks for the order of the sites
        if not checked:
            raise
        seen = registered(module._root._module)
    return stream_of(module, name, seen)


def observed(model: Any, inputs: Inputs | None, exact: bool = False, operations: Collection[str] = ()) -> Observation:
    """The order in which a model runs its modules, and these operations inside of them: observed once for each kind of
    input, and with `exact` for each size of it. What was observed at a size serves all that follows.

    Where the inputs of a forward are known only when it runs, an earlier observation of the model stands in, then one
    on the model's own example, then the order in which its modules are registered; a run that goes otherwise is an
    error.
    """
    if inputs is None:
        known = _observations.get(model._root._base)
        if known and not operations:
            return next(reversed(known.values()))
        inputs = model._example()
    if inputs is None:
        return registered(model._module)
    kwargs = {name: value for name, value in inputs[1].items() if name != "grad"}
    args, kwargs = model._prepare(inputs[0], kwargs)
    module = model._module
    structure = tuple(map(id, module.modules())), module.training
    inside = alike(module, operations)
    given = tuple(map(_signature, args)), tuple((name, _signature(kwargs[name])) for name in kwargs)
    key: Any = (structure, *given, inside)
    if exact:
        key = key, tuple(getattr(value, "shape", None) for value in (*args, *kwargs.values()))
    with _lock:
        held = _observations.setdefault(model._root._base, {})
        if key not in held:
            held[key] = _observe(model, args, kwargs, inside)
        return held[key]


def _observe(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: frozenset[str]) -> Observation:
    try:
        return observe(model._module, args, kwargs, inside)
    except Exception:
        if not any(parameter.is_meta for parameter in model._module.parameters()):
            raise
    return observe(model._ready(), args, kwargs, inside)  # it looks at numbers, so it needs its weights


def _signature(value: Any) -> Any:
    """What of an input may decide which modules run: the kind of a tensor, not its contents or sizes."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.ndim, str(value.dtype)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_signature, value))
    return type(value).__name__
