"""Invokes, while a program is specialised: which of them bring input, and what their bodies see.

    with model.trace() as tracer:                 forward %f = trace %model()
        with tracer.invoke(a):                      invoke %i = %f(%a)
            x = model.layers[3].output     ──▶        %x = read %model@transformer.h.3 output of %i
        with tracer.invoke(b):                      invoke %i.1 = %f(%b)
            model.layers[3].output = x                write %model@transformer.h.3 output of %i.1 = %x

How many invokes there are is known before the model runs: loops around them are unrolled, and conditions folded. What
they are given is not needed to compile, so other prompts are served by the same program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.traverse import rewrite
from nnsight_compiler.passes.completion import AccessInClosure, Completion
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import Abstract, Elements, Known, Tracer, immutable
from nnsight_compiler.passes.interpretation import Forwarding
from nnsight_compiler.passes.subject import Inputs

if TYPE_CHECKING:
    from nnsight_compiler.passes.control_flow import ControlFlow


def interpret_invoke(interpretation: ControlFlow, op: ops.Invoke) -> Completion | None:
    """Interprets an invoke in place: in its body, accesses mean its rows."""
    fail, span = interpretation.fail, interpretation.span(op)
    tracer = interpretation.abstract(op.tracer)
    if interpretation.closures:
        raise AccessInClosure
    running = interpretation.forward
    if not isinstance(tracer.fact, Tracer):
        fail(
            span,
            "`.invoke(…)` is a method of what a trace binds",
            "write `with model.trace() as tracer:` around it, and `with tracer.invoke(…):`",
        )
    if running is None or tracer.fact.forward != running.result:
        fail(
            span,
            "an invoke is a part of one forward, and that of this tracer is not running here",
            "put it inside of the `with` that binds the tracer",
        )
    if running.invoke is not None:
        fail(
            span,
            "an invoke cannot stand inside of another",
            "close the first `with` before this one; its values can be used here",
            ((interpretation.span(running.invoke), "the invoke around it"),),
        )
    if running.steps is not None:
        fail(
            span,
            "an invoke inside of a loop over steps would bring its input at each of them",
            "put the loop into the invoke",
            ((running.steps.span, "the loop"),),
        )
    _require_sure(interpretation, running, op)
    result = interpretation.builder.fresh(op.result.name)
    interpretation.scope[op.result] = Abstract(None, tracer.fact, span=span)
    brings = brings_input(interpretation, op.arguments)
    if brings:
        _require_room(interpretation, running, op)
    elif op.arguments and any(not argument.star for argument in op.arguments):
        fail(
            span,
            "this invoke is given options but no input",
            "options are given to the trace: `with model.trace(…) as tracer:`",
        )
    arguments = tuple(replace(each, value=interpretation.used(each.value)) for each in op.arguments) if brings else ()
    running.invoke, running.rows = op, result if brings else None
    try:
        if not brings:
            completion = interpretation.region(op.body)
            return None if completion.kind in ("end", "yield") else completion
        given = interpretation.evaluate.calls.known_arguments(op.arguments)
        interpretation.rely_on_options(op.arguments)
        running.invokes.append((ops.Invoke(result, running.result, arguments, Region((), ()), span=span), given))
        with interpretation.builder.region() as made:
            completion = interpretation.region(op.body)
        interpretation.emit(ops.Invoke(result, running.result, arguments, Region((), tuple(made)), span=span))
    finally:
        running.invoke = running.rows = None
    return None if completion.kind in ("end", "yield") else completion


def _require_sure(interpretation: ControlFlow, running: Forwarding, op: ops.Invoke) -> None:
    """Has the loops around an invoke unrolled and the conditions around it folded."""
    loops = set(interpretation.rolled[running.rolled :])
    if loops - interpretation.decisions.unroll:
        raise Undecided(unroll=loops)
    interpretation.fold_conditions()
    for _, condition in interpretation.conditions:
        interpretation.unknown(condition, interpretation.span(op), "whether there is this invoke")


def _require_room(interpretation: ControlFlow, running: Forwarding, op: ops.Invoke) -> None:
    """Refuses input beside that of the trace, and what the model's forward does not take."""
    span = interpretation.span(op)
    if running.brings:
        interpretation.fail(
            span,
            "the trace brings an input of its own, and so does this invoke",
            "give each input to an invoke, and none to the trace; an `invoke()` without input sees all rows",
            ((running.span, "the trace"),),
        )
    names = {argument.keyword for argument in op.arguments if argument.keyword is not None}
    for argument in op.arguments:
        if argument.star == "**":
            names.update(interpretation.evaluate.calls.known_names(interpretation.abstract(argument.value)))
    try:
        running.module.handle._check_arguments("trace", names)
    except ModelError as error:
        interpretation.fail(span, str(error))


def brings_input(interpretation: ControlFlow, arguments: tuple[ops.Argument, ...]) -> bool:
    """Whether these arguments of a trace or an invoke hold an input, rather than options alone: a switch, a count."""
    found = False
    for argument in arguments:
        value = interpretation.abstract(argument.value)
        match argument.star, value.fact:
            case "*", Known(value=tuple() | list() as held, text=text):
                if text is not None:
                    interpretation.guards.add(text, "length", len(held))
                found |= bool(held)
            case "*", Elements(items=list() as items):
                found |= bool(items)
            case "**", Known(value=dict() as held, text=text):
                if text is not None:
                    interpretation.guards.add(f"tuple({text})", "value", tuple(held))
                found |= any(_is_input(name, each) for name, each in held.items())
            case "**", Elements(items=list() as items, keys=keys):
                named = zip(keys, items, strict=True)
                found |= any(_is_input(_plain(key), _plain(item)) for key, item in named)
            case "", fact if argument.keyword is not None:
                found |= _is_input(argument.keyword, fact.value if isinstance(fact, Known) else None)
                if isinstance(fact, Known) is False:
                    found |= argument.keyword != "grad"
            case _:
                found = True
    return found


def _plain(value: Abstract) -> Any:
    return value.fact.value if isinstance(value.fact, Known) else ...


def _is_input(name: Any, value: Any) -> bool:
    """Whether a keyword argument is an input: what is no number, switch or `None`."""
    return name != "grad" and not (immutable(value) and not isinstance(value, (str, tuple)))


def first_inputs(interpretation: ControlFlow, handle: Any, op: ops.Forward) -> Inputs | None:
    """What a forward is given, where that is known; of a generation, what its first step is given."""
    given = interpretation.evaluate.calls.known_arguments(op.arguments)
    return handle._first_step(given) if op.method == "generate" else given


def settle(interpretation: ControlFlow, running: Forwarding, op: ops.Forward, made: Iterable[Op]) -> tuple[Op, ...]:
    """The body of a forward whose invokes are all known, and its inputs for those who ask for an example.

    An invoke that is alone sees all rows: its accesses need not say whose they mean.
    """
    body, invokes, name = tuple(made), running.invokes, running.result.name
    handle = running.module.handle
    interpretation.inputs[name] = first_inputs(interpretation, handle, op)
    if not invokes:
        if not running.brings and handle._needs_input():
            interpretation.fail(
                running.span,
                "this forward is given no input",
                f"give it to the trace, `with model.{op.method}(…):`, or to invokes inside of it:"
                " `with tracer.invoke(…):`",
            )
        return body
    options = interpretation.evaluate.calls.known_arguments(op.arguments)
    given = [each for _, each in invokes if each is not None and not handle._is_untold(*each)]
    interpretation.invoked[name] = tuple(invoke.result.name for invoke, _ in invokes)
    interpretation.inputs[name] = None
    if options is not None and len(given) == len(invokes):
        taken = options[1]
        if op.method == "generate":  # its options are none of the model's forward
            taken = {each: value for each, value in taken.items() if each in handle._forward_parameters()}
        try:
            batch = handle._batch(given, taken)
        except ModelError as error:
            interpretation.fail(running.span, str(error))
        inputs = batch.args, batch.kwargs
        interpretation.inputs[name] = handle._first_step(inputs) if op.method == "generate" else inputs
        interpretation.parts.update(zip(interpretation.invoked[name], batch.parts, strict=True))
    return tuple(map(_of_all_rows, body)) if len(invokes) == 1 else body


def _of_all_rows(op: Op) -> Op:
    new = rewrite(op, region=lambda region: Region(region.parameters, tuple(map(_of_all_rows, region.ops))))
    return replace(new, rows=None) if isinstance(new, (ops.Read, ops.Write, ops.Skip, ops.Steps, ops.Cache)) else new
