"""Calls of the user's own modules whose inside can be read: `layer.sae(h, hook=True)`, while a program is specialised.

    %r = call %model@transformer.h.1.sae(%h, hook=True) as torch.nn.Module.__call__
    %codes = item %r[1, 'encoder', 'output']

The result of such a call is what the module returns, and a record of what its own modules returned. A read of one of
these is an item of the record: it takes no part in the forward of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.ir.values import Literal, Tuple, Value
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, Known, SiteModule

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation
    from nnsight_compiler.passes.kept_calls import Arguments


def is_observed(specialiser: Interpretation, arguments: Arguments, span: Span) -> bool:
    """Whether a call says `hook=True`."""
    for argument, value in arguments:
        if argument.keyword == "hook":
            known = value.fact
            if not (isinstance(known, Known) and known.text is None and known.value is True):
                specialiser.fail(span, "`hook` says whether the inside of a call is observed", "write `hook=True`")
            return True
    return False


def observe(specialiser: Interpretation, module: SiteModule, call: Abstract, span: Span) -> Abstract:
    """The value of an observed call, whose record is kept for the reads that follow."""
    path = module.handle._path
    forward = specialiser.access(span)
    order = specialiser.subject.order
    if order is not None and order(forward.module.handle, specialiser.inputs[forward.result.name]).count(path):
        specialiser.fail(
            span,
            f"`{path}` is a module that the model runs itself, so that reads of it mean the model's own call",
            "leave `hook=True` out; attach a module of your own to observe it: `model.layers[0].probe = …`, outside",
        )
    if path in specialiser.observed:
        specialiser.fail(
            span,
            f"`{path}` is called with `hook=True` twice, so that a read inside of it could mean either call",
            "observe one of the calls",
            ((specialiser.observed[path].span, "it is called here, too"),),
        )
    specialiser.observed[path] = call
    assert isinstance(call.operand, Value)
    result = specialiser.builder.fresh(f"{call.operand.name}.output")
    specialiser.emit(ops.Item(result, call.operand, Literal(0), span=span))
    return Abstract(result, None, NO_LOOPS, 2, span, True)


def read_inside(specialiser: Interpretation, module: SiteModule, port: str, name: str, span: Span) -> Abstract | None:
    """What stood inside of a call that was observed; `None` for a module that is not in one."""
    path = module.handle._path
    for called, call in specialiser.observed.items():
        if path != called and not path.startswith(f"{called}."):
            continue
        assert isinstance(call.operand, Value)
        specialiser.access(span)
        if not any(call.operand in defined(op) for op in specialiser.builder.open_ops(0)):
            specialiser.fail(
                span,
                f"`{called}` is called under a condition or in a loop, and its inside is read outside of it",
                "read it where it is called",
                ((call.span, "it is called here"),),
            )
        key = Tuple((Literal(1), Literal(path[len(called) + 1 :]), Literal(port), Literal(str(span))))
        result = specialiser.builder.fresh(name)
        specialiser.emit(ops.Item(result, call.operand, key, span=span))
        return Abstract(result, None, NO_LOOPS, 2, span, True)
    return None
