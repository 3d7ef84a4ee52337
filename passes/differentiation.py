"""Backward passes and gradients, while a program is specialised.

What has a gradient is a value of the model, what is computed from such values, or a weight of the model that is named.
A tensor of the user's own keeps torch's attribute `.grad`, inside of a backward pass too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Region
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Operand, Tuple, Value
from nnsight_compiler.passes.completion import AccessInClosure
from nnsight_compiler.passes.decisions import Undecided
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Function,
    Iteration,
    Known,
    Method,
    SiteCalls,
    SiteModule,
    Tracer,
    constant,
)

if TYPE_CHECKING:
    from nnsight_compiler.passes.completion import Completion
    from nnsight_compiler.passes.interpretation import Interpretation


def backward(specialiser: Interpretation, op: ops.Backward) -> Completion | None:
    """`with loss.backward(…):`."""
    loss = specialiser.evaluate.resolved(specialiser.abstract(op.loss))
    span = specialiser.span(op)
    _check(specialiser, loss, span)
    arguments = tuple(ops.Argument(specialiser.used(each.value), each.keyword, each.star) for each in op.arguments)
    specialiser.disturb()  # gradients of tensors from outside accumulate
    outer, specialiser.in_backward = specialiser.in_backward, True
    try:
        with specialiser.builder.region() as made:
            completion = specialiser.region(op.body)
    finally:
        specialiser.in_backward = outer
    specialiser.emit(ops.Backward(specialiser.use(loss), arguments, Region((), tuple(made)), span=span))
    return None if completion.kind in ("end", "yield") else completion


def backward_call(specialiser: Interpretation, op: ops.Call, loss: Abstract) -> Abstract:
    """`loss.backward(…)` as a statement: a backward pass that nothing looks into."""
    span = specialiser.span(op)
    _check(specialiser, loss, span)
    arguments = tuple(ops.Argument(specialiser.used(each.value), each.keyword, each.star) for each in op.arguments)
    specialiser.disturb()
    specialiser.emit(ops.Backward(specialiser.use(loss), arguments, Region(), span=span))
    return constant(None)


def _check(specialiser: Interpretation, loss: Abstract, span: Span) -> None:
    if isinstance(loss.fact, (SiteModule, SiteCalls, Tracer, Function, Elements, Iteration)):
        specialiser.fail(span, "a backward pass starts at a tensor", "call `.backward()` on the loss")
    forward = specialiser.forward
    if forward is not None and forward.op.method == "generate":
        specialiser.fail(
            span,
            "a generation records no gradients",
            "run the model on the whole sequence with `trace`, and take the gradient there",
            ((forward.span, "the generation"),),
        )
    if forward is not None and forward.op.method == "scan":
        specialiser.fail(
            span,
            "a scan records no gradients: a gradient has the shape of what it is of",
            "leave it out of the scan, or run it with `model.trace(…)`",
            ((forward.span, "the scan"),),
        )


def grad(specialiser: Interpretation, op: ops.Grad) -> Abstract:
    """`value.grad` inside of a backward pass."""
    value = specialiser.evaluate.resolved(specialiser.abstract(op.value))
    if _is_own(value):
        attribute = ops.Attribute(op.result, op.value, "grad", span=op.span)
        return specialiser.evaluate.attribute(attribute, value, "grad")
    return gradient_of(specialiser, value, op)


def gradient_of(specialiser: Interpretation, value: Abstract, op: ops.Grad | ops.Attribute | ops.Read) -> Abstract:
    """The gradient of a value of the model; `op` asks for it."""
    span = specialiser.span(op)
    operand = _differentiated(specialiser, value, span)
    result = specialiser.builder.fresh(op.result.name)
    specialiser.emit(ops.Grad(result, operand, span=span))
    return Abstract(result, None, NO_LOOPS, 2, span, True)


def set_grad(specialiser: Interpretation, op: ops.SetGrad) -> None:
    """`value.grad = gradient` inside of a backward pass."""
    value = specialiser.evaluate.resolved(specialiser.abstract(op.value))
    gradient = specialiser.abstract(op.gradient)
    if _is_own(value):
        attribute = ops.SetAttribute(op.value, "grad", op.gradient, span=op.span)
        specialiser.evaluate.set_attribute(attribute, value, "grad", gradient)
    else:
        set_gradient_of(specialiser, value, gradient, specialiser.span(op))


def set_gradient_of(specialiser: Interpretation, value: Abstract, gradient: Abstract, span: Span) -> None:
    """The model goes on with this gradient of a value."""
    operand = _differentiated(specialiser, value, span)
    specialiser.emit(ops.SetGrad(operand, specialiser.use(gradient), span=span))


def gradients(
    specialiser: Interpretation, op: ops.Call, arguments: list[tuple[ops.Argument, Abstract]]
) -> Abstract | None:
    """`torch.autograd.grad(outputs, inputs, …)`; `None` where the model has no part in it."""
    if not any(abstract.live or _of_live(abstract) for _, abstract in arguments):
        return None
    span = specialiser.span(op)
    if any(argument.star for argument, _ in arguments):
        specialiser.fail(span, "which tensors are meant is not known here", "write the arguments out, without a star")
    given = {argument.keyword: abstract for argument, abstract in arguments if argument.keyword is not None}
    rest = [argument for argument, _ in arguments if argument.keyword not in (None, "outputs", "inputs")]
    plain = [(argument, abstract) for argument, abstract in arguments if argument.keyword is None]
    for name in ("outputs", "inputs"):
        if name not in given and plain:
            given[name] = plain.pop(0)[1]
    if "outputs" not in given or "inputs" not in given:
        specialiser.fail(span, "`torch.autograd.grad` takes the outputs and the inputs", "give it both")
    outputs, inputs = given["outputs"], given["inputs"]
    _check(specialiser, outputs if outputs.operand is not None else Abstract(None), span)
    for argument, _ in arguments:
        assert not argument.star
    extra = tuple(
        ops.Argument(specialiser.used(argument.value), argument.keyword)
        for argument in (*(each for each, _ in plain), *rest)
    )
    match inputs.fact:
        case Elements(items=list() as items):
            parts: list[Operand] = [_differentiated(specialiser, item, span) for item in items]
        case _:
            parts = [_differentiated(specialiser, inputs, span)]
    result = specialiser.builder.fresh(op.result.name)
    specialiser.emit(ops.Gradients(result, specialiser.use(outputs), Tuple(tuple(parts)), extra, span=span))
    return Abstract(result, None, NO_LOOPS, 2, span, True)


def _of_live(value: Abstract) -> bool:
    return isinstance(value.fact, Elements) and any(item.live for item in value.fact.items or ())


def _is_own(value: Abstract) -> bool:
    """Whether a value is the user's own, not the model's: an argument, a global, a part of one, an item of such."""
    if value.live:
        return False
    match value.fact:
        case Known():
            return True
        case Method(receiver=receiver):
            return not isinstance(receiver.fact, SiteModule)
        case None:
            return bool(value.loops)
    return False


def _differentiated(specialiser: Interpretation, value: Abstract, span: Span) -> Operand:
    """The value that a gradient is taken with respect to, which must be one value."""
    if specialiser.closures:
        raise AccessInClosure
    match value.fact:
        case SiteModule() | SiteCalls() | Tracer() | Function():
            specialiser.fail(span, "only values have gradients, not modules", "take the gradient of its `.output`")
        case Elements():
            specialiser.fail(span, "a container has no gradient", "take the gradient of a tensor in it")
    unrolled = value.loops - specialiser.decisions.unroll - specialiser.decisions.roll
    if unrolled:
        raise Undecided(unroll=set(unrolled))
    if value.loops:
        specialiser.unknown(value, span, "whose gradient this is")
    operand = specialiser.use(value)
    if not isinstance(operand, Value):
        specialiser.fail(span, "only tensors have gradients, and this is none", "take that of a value of the model")
    return operand


def outside_of_backward(specialiser: Interpretation, span: Span, *, written: bool = False) -> NoReturn:
    """The error of `.grad` of a value of the model where no backward pass is around."""
    example = "`with loss.backward(): h.grad = new`" if written else "`with loss.backward(): g = h.grad`"
    specialiser.fail(span, "`.grad` of a value of the model exists only inside of a backward pass", f"write {example}")
