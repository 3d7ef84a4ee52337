"""Edits, while a program is specialised: the ops of each edit of a model come first in every forward of it.

    forward %f = trace %edited(%prompt)           %vector = captured %edited[0].vector
      %out = read %edited@lm_head output    ──▶   forward %f = trace %edited(%prompt)
                                                    applied 'demo.py:7'
                                                      %h = read %edited@h.1 output
                                                      %h.1 = %h += %vector
                                                    %out = read %edited@lm_head output

So an edit is ordinary code of the forward: source order puts what the experiment reads and writes at a site after what
the edits write there. A compiled program serves every model with the same edits, whatever these captured: what it
relies on of that is guarded, as of an argument.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.passes.completion import AccessInClosure
from nnsight_compiler.passes.facts import (
    Abstract,
    Frame,
    Known,
    OwnEdit,
    SiteModule,
    Tracer,
    python_module,
)

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Forwarding, Interpretation

Scopes = list[dict[Value, Abstract]]
"""For each edit that a model has when the program runs, what its parameters stand for; its tracer is still missing."""


def make(interpretation: Interpretation, op: ops.Edit) -> None:
    """An edit that the program makes: its body is kept for the forwards of the edited model."""
    span = interpretation.span(op)
    if interpretation.closures:
        raise AccessInClosure
    if interpretation.forward is not None:
        interpretation.fail(
            span,
            "a model cannot be edited inside a forward",
            "put the `with model.edit()` before the trace",
            ((interpretation.forward.span, "the forward"),),
        )
    for argument in op.arguments:
        if argument.keyword in ("remote", "blocking"):
            interpretation.fail(
                span,
                f"`edit` takes no `{argument.keyword}=`: an edit runs wherever the traces of the edited model do",
                "say it where the experiment is called, `experiment(…, remote=True)`; the edit goes along",
            )
        if argument.keyword != "inplace" or argument.star:
            interpretation.fail(span, "`edit` takes no argument but `inplace`")
        if interpretation.demand(interpretation.abstract(argument.value), span, "`inplace`"):
            interpretation.fail(
                span,
                "an experiment leaves the model as it was, so it cannot edit it in place",
                "take the edited view, `with model.edit() as edited:`, or edit the model outside of the function",
            )
    for inner in walk(op.body):
        if isinstance(inner, ops.Return):
            interpretation.fail(
                inner.span,
                "an edit returns nothing: its body runs in each forward of the edited model",
                "return after the `with`",
            )
    module = interpretation.evaluate.model(interpretation.abstract(op.model), span, "edit")
    edit = OwnEdit(op, dict(interpretation.scope), interpretation.frame)
    edited = Abstract(None, replace(module, edits=(*module.edits, edit)), span=span)
    edit.scope[op.results[1]] = edited
    interpretation.bind(op.results, (Abstract(None, span=span), edited))


def captured(interpretation: Interpretation, module: SiteModule, span: Span) -> Scopes:
    """What the edits that a model has took from around them. It is fetched before the forward runs."""
    scopes: Scopes = []
    for number, edit in enumerate(module.handle._edits):
        _, model, *parameters = (parameter.value for parameter in edit.program.parameters)
        scope = {model: Abstract(module.model, replace(module, edits=()), span=span)}
        for value in parameters:
            held = edit.values[value.name]
            result = interpretation.builder.fresh(value.name)
            interpretation.emit(ops.Captured(result, module.model, Literal(number), value.name, span=span))
            text = f"{module.text}._root._edits[{number}].values[{value.name!r}]"
            scope[value] = Abstract(result, Known(held, text, (text, held) if python_module(held) else None), span=span)
        scopes.append(scope)
    return scopes


def apply(interpretation: Interpretation, forward: Forwarding, scopes: Scopes) -> None:
    """Interprets the edits of the model of a forward, those made first first."""
    module, tracer = forward.module, Abstract(None, Tracer(forward.result), span=forward.span)
    for edit, scope in zip(module.handle._edits, scopes, strict=True):
        program = edit.program
        own = program.span.file == interpretation.program.span.file
        frame = Frame({}, {}, program.name, own=False, override=None if own else forward.span)
        scope[program.parameters[0].value] = tracer
        _interpret(interpretation, program.body, scope, frame, program.span)
    for own_edit in module.edits:
        scope = {**own_edit.scope, own_edit.op.results[0]: tracer}
        _interpret(interpretation, own_edit.op.body, scope, own_edit.frame, own_edit.op.span)


def _interpret(
    interpretation: Interpretation, body: ops.Region, scope: dict[Value, Abstract], frame: Frame, span: Span
) -> None:
    interpretation.editing = True
    try:
        with interpretation.builder.region() as made:
            interpretation.evaluate.calls._inline(body, scope, frame)
    finally:
        interpretation.editing = False
    interpretation.emit(ops.Applied(f"{span.file}:{span.line}", ops.Region((), tuple(made)), span=span))


def runs(running: SiteModule, module: SiteModule, in_edit: bool) -> bool:
    """Whether a forward runs a module: one of its model, or of what the model was before the edits that it has. Code of
    an edit means the model that is edited, whichever way it names it."""
    root, traced = module.handle._root, running.handle._root
    if root is traced or in_edit:
        return root._base is traced._base and (in_edit or module.edits == running.edits[: len(module.edits)])
    inherited = root._base is root or root._edits == traced._edits[: len(root._edits)]
    return root._base is traced._base and inherited and not module.edits
