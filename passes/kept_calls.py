"""Calls that stay, while a program is specialised: what is handed to them, what comes of them, and what they change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import NONE, Value
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall, behaviour_of
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Elements, Iteration, Method
from nnsight_compiler.passes.known_calls import MODULE_CALL

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation

Arguments = list[tuple[ops.Argument, Abstract]]
"""The arguments of a call in the source, and what each stands for."""


def keep_call(
    specialiser: Interpretation,
    op: ops.Call,
    function: Abstract,
    arguments: Arguments,
    known: KnownCall | None = None,
    fact: Any = None,
    target: str | None = None,
) -> Abstract:
    """The call as an op of the specialised program: a known call, one of a module (`target`), or a host op."""
    if known is not None:
        name, known = known.target, behaviour_of(known, _as_given(function, arguments))
        target = None if known is None else name
    harmless = known is not None and known.behaviour in (Behaviour.PURE, Behaviour.VIEW, Behaviour.CONTAINER)
    for _, abstract in arguments:
        if isinstance(abstract.fact, Elements) and not harmless:
            abstract.fact.forget()
        elif isinstance(abstract.fact, Iteration) and not harmless and abstract.operand is not None:
            abstract.fact = None
    use = specialiser.use
    callee = use(function)
    seen = target is None or not target.startswith("torch.")
    hand = specialiser.handed_over if seen else use
    made = tuple(replace(argument, value=hand(abstract)) for argument, abstract in arguments)
    result = specialiser.builder.fresh(op.result.name)
    span = specialiser.span(op)
    specialiser.emit(ops.Call(result, callee, made, target, span=span))
    sources = [abstract for _, abstract in arguments]
    if isinstance(function.fact, Method):
        sources.append(function.fact.receiver)
    loops = NO_LOOPS.union(*(source.loops for source in sources)) if sources else NO_LOOPS
    live = max((source.live for source in sources), default=0)
    at_run = target in (None, MODULE_CALL) or any(source.at_run for source in sources)
    _note_changes(specialiser, function, arguments, target, known, result)
    if target is None:
        live = min(live, 1)
    elif target == MODULE_CALL and specialiser.forward is not None:
        live = 2
    return Abstract(result, fact, loops, live, span, at_run)


def _note_changes(
    specialiser: Interpretation,
    function: Abstract,
    arguments: Arguments,
    target: str | None,
    known: KnownCall | None,
    result: Value,
) -> None:
    """Notes what a call changes of what the program knows."""
    if target == MODULE_CALL:
        return
    if known is None:
        specialiser.disturb()
        return
    if known.target.startswith("torch."):
        specialiser.fresh.add(result.name)
    if known.behaviour in (Behaviour.CONTAINER, Behaviour.MUTATES):
        receiver = [function.fact.receiver] if isinstance(function.fact, Method) else []
        for changed in (receiver or [abstract for _, abstract in arguments])[:1]:
            specialiser.change(changed)


def _as_given(function: Abstract, arguments: Arguments) -> list[ops.Argument]:
    """The arguments of a call as rows of the table of known calls count them: the receiver of a method first."""
    given = [replace(argument, value=abstract.operand or argument.value) for argument, abstract in arguments]
    return [ops.Argument(NONE), *given] if isinstance(function.fact, Method) else given
