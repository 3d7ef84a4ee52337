"""The residual stream of a block, while a program is specialised: `resid_pre`, `resid_mid` and `resid_post` as sites.

before    %h = attr %block.resid_mid              after   %h = read %model@transformer.h.3.ln_2 input
          set_attr %block.resid_post = %v                 %0 = read %model@transformer.h.3 output
                                                          set_item %0[0] = %v

Legal since each is a value that some module is given or returns. Which one that is, the model's architecture says
(`models/residual.py`). What lies between two parts of a block is written in place: the block goes on with the very
tensor that the next part is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Literal
from nnsight_compiler.passes.facts import NO_LOOPS, Abstract, SiteCalls, SiteModule

if TYPE_CHECKING:
    from nnsight_compiler.passes.evaluate import Evaluator

STREAM = ("resid_pre", "resid_mid", "resid_post")


@final
@dataclass(frozen=True, slots=True)
class Stream:
    """Where a value of a block's residual stream stands.

    path: of the module that is given it, or that returns it.
    item: which part of what stands there it is; `None` for the whole.
    flat: whether rows and tokens are laid in one dimension there.
    within: whether the block itself goes on with the tensor that stands there, so that writes are in place.
    """

    path: str
    port: ops.Port
    item: int | None = None
    flat: bool = False
    within: bool = False


Streams = Callable[[Any, str, Any], Stream]
"""`(module, name, inputs of the forward)`. Raises `ModelError` where a module has no such value."""


def no_streams(handle: Any, name: str, inputs: Any) -> Stream:
    """Where no model is known."""
    raise ModelError(f"`.{name}` needs a model that is wrapped")


def read_stream(evaluator: Evaluator, op: ops.Attribute | ops.Read, base: Abstract, name: str) -> Abstract:
    """Reads a value of the stream at its site."""
    return _live(evaluator, op, base, name)[1]


def write_stream(
    evaluator: Evaluator, op: ops.SetAttribute | ops.Write, base: Abstract, name: str, value: Abstract
) -> None:
    """Writes one."""
    specialiser = evaluator.specialiser
    stream = _find(evaluator, base, name, op.span)
    if not stream.within and stream.item is None:
        evaluator.set_attribute(op, _at(evaluator, base, stream, op.span), stream.port, value)
        return
    read = ops.Attribute(specialiser.builder.fresh(name), Literal(None), name, span=op.span)
    whole, part = _live(evaluator, read, base, name)
    changed, index = (whole, Literal(stream.item)) if stream.item is not None else (part, Literal(...))
    use = specialiser.use
    specialiser.emit(ops.SetItem(use(changed), index, use(value), span=specialiser.span(op)))


def _live(evaluator: Evaluator, op: ops.Attribute | ops.Read, base: Abstract, name: str) -> tuple[Abstract, Abstract]:
    """What stands at the site, and the value of the stream in it."""
    stream = _find(evaluator, base, name, op.span)
    specialiser = evaluator.specialiser
    whole = evaluator.attribute(op, _at(evaluator, base, stream, op.span), stream.port)
    span, use, fresh = specialiser.span(op), specialiser.use, specialiser.builder.fresh
    if stream.item is not None:
        result = fresh(op.result.name)
        specialiser.emit(ops.Item(result, use(whole), Literal(stream.item), span=span))
    elif stream.flat:
        given = evaluator.attribute(op, base, "input")
        shape, view, result = fresh("shape"), fresh("view"), fresh(op.result.name)
        specialiser.emit(ops.Attribute(shape, use(given), "shape", span=span))
        specialiser.emit(ops.Attribute(view, use(whole), "view", span=span))
        specialiser.emit(ops.Call(result, view, (ops.Argument(shape),), "torch.Tensor.view", span=span))
    else:
        return whole, whole
    return whole, Abstract(result, None, NO_LOOPS, 2, span, True)


def _find(evaluator: Evaluator, base: Abstract, name: str, span: Span) -> Stream:
    specialiser = evaluator.specialiser
    forward = specialiser.access(span)
    module = base.fact.module if isinstance(base.fact, SiteCalls) else base.fact
    assert isinstance(module, SiteModule)
    try:
        inputs = specialiser.evaluate.calls.known_arguments((forward.invoke or forward.op).arguments)
        return specialiser.subject.streams(module.handle, name, inputs)
    except ModelError as error:
        specialiser.fail(span, str(error), "`print(model)` shows the tree of its modules")


def _at(evaluator: Evaluator, base: Abstract, stream: Stream, span: Span) -> Abstract:
    """The module at whose site the value stands, at the same call."""
    module = base.fact.module if isinstance(base.fact, SiteCalls) else base.fact
    assert isinstance(module, SiteModule)
    site = evaluator.module_value(module.handle._root[stream.path], module, span)
    if isinstance(base.fact, SiteCalls):
        assert isinstance(site.fact, SiteModule)
        return Abstract(None, SiteCalls(site.fact, base.fact.call), span=span)
    return site
