"""What may stand in strands: pieces of a program that advance side by side, each to its next forward.

The rounds of a loop are strands (`merge_forwards`), and so are pieces of code that follow one another
(`merge_straight_forwards`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import AnyOp, Op
from nnsight_compiler.ir.traverse import regions, walk
from nnsight_compiler.ir.values import Literal, Module
from nnsight_compiler.passes.known_calls import MODULE_CALL
from nnsight_compiler.passes.looked_on import looked_on
from nnsight_compiler.passes.memory import Memory, Weight

WhyNot = Callable[[ops.Forward], str | None]
"""Why forwards like this one cannot be rows of one; `None` where they can, as far as is known before the run."""

Fuses = Callable[[ops.Forward, str], bool]
"""Whether calls of this module of a forward's model, on several values, can be one call on their stack."""


def hindrance(op: Op, memory: Memory, who: str) -> str | None:
    """Why an op by itself cannot stand in a strand, which messages call `who`; `None` where it can."""
    match cast(AnyOp, op):
        case ops.Return() | ops.Raise():
            return f"{who} may leave the loop"
        case ops.Closure() | ops.Cell() | ops.Load() | ops.Store() | ops.SetGlobal() | ops.Delete():
            return f"{who} assigns variables that others see, or makes a function"
        case ops.Attribute(name="grad", object=owner) if not _is_autograd(memory.origins.definition(owner)):
            return f"{who} looks at gradients that others may look at too"
        case ops.Try() | ops.With() | ops.Import() | ops.Stage() | ops.Session() | ops.Edit() | ops.Captured():
            return f"{who} has a `{_word(op)}`"
        case ops.Backward() | ops.Gradients() if names_weights(memory):
            return "the gradient of a weight is asked for, which all rows share"
        case ops.Backward(arguments=given) | ops.Gradients(arguments=given) if given:
            return "a backward pass has arguments of its own"
        case ops.If() | ops.For() | ops.While() if runs(op):
            return "a forward runs under a condition, or in a loop within"
        case ops.Call() as call if not isinstance(call.function, Module):
            known = memory.origins.known(call)
            if known is None:
                return "a call is not known, and may change or see anything"
            if known.random:
                return "a call draws random numbers, in the order of the program"
            return "a call sets how torch computes" if known.mode else None
        case _:
            return None


def runs(op: Op) -> bool:
    """Whether forwards run in an op."""
    return any(isinstance(inner, ops.Forward) for region in regions(op) for inner in walk(region))


def names_weights(memory: Memory) -> bool:
    """Whether the gradient of a weight of a model is asked for anywhere."""
    tracked = (op.value for op in memory.program.walk() if isinstance(op, ops.Track))
    return any(isinstance(root, Weight) for value in tracked for root in memory.roots(value))


def _is_autograd(op: Op | None) -> bool:
    """Whether an op looks up `torch.autograd`."""
    return isinstance(op, ops.Attribute) and op.name == "autograd"


def _word(op: Op) -> str:
    return {"With": "with", "Try": "try", "Import": "import", "Session": "session"}.get(type(op).__name__, "stage")


def _generation_hindrance(forward: ops.Forward) -> str | None:
    """Why generations cannot be rows of one."""
    if not any(each.keyword == "do_sample" and each.value == Literal(False) for each in forward.arguments):
        return "tokens may be drawn, in the order of the program (`do_sample=False` says that they are not)"
    seen = looked_on(forward)
    if seen is not None:
        return f"`{seen.keyword or '**'}=` may look at all rows of a generation"
    return None


def forward_hindrance(forward: ops.Forward) -> str | None:
    """Why a forward cannot be a row of one, as its own line and body show; `None` where it can."""
    if forward.method == "scan":
        return "a scan runs no model"
    generation = _generation_hindrance(forward) if forward.method == "generate" else None
    if generation is not None:
        return generation
    if any(argument.keyword == "grad" for argument in forward.arguments):
        return "the forward records gradients for all weights"
    for op in walk(forward.body):
        match op:
            case ops.Invoke():
                return "the forward has invokes of its own"
            case ops.Skip() | ops.Stop():
                return "a module is skipped, or the forward stopped, in all rows or in none"
            case ops.Cache() | ops.Record():
                return "a cache of activations has the values of all rows"
            case ops.Read(port="result"):
                pass
            case ops.Read(module=Module(path="")) | ops.Write(module=Module(path="")):
                return "what the whole model returns, or is given, is not one tensor, and may hold what rows share"
    return None


def is_fused(forward: ops.Forward, fuses: Fuses, op: Op) -> bool:
    """Whether an op calls a module of the model that can as well be called once for all rounds."""
    return (
        isinstance(op, ops.Call)
        and op.target == MODULE_CALL
        and isinstance(op.function, Module)
        and op.function.model == forward.model
        and [(each.keyword, each.star) for each in op.arguments] == [(None, "")]
        and fuses(forward, op.function.path)
    )
