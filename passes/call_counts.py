"""How often a forward calls a module, while a program is specialised: what `.calls` of a module counts.

    for call in model.layers[0].attention.calls:        as many rounds as the module is called

The model is run once, without data, on what the forward is given; the count is guarded on the sizes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.passes.facts import Abstract, Elements, Fact, Known, SiteModule, immutable
from nnsight_compiler.passes.subject import Inputs

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Forwarding, Interpretation


def count_calls(specialiser: Interpretation, module: SiteModule, span: Span) -> int:
    """How often the forward that is running here calls a module, guarded on the sizes of what it is given."""
    forward = specialiser.access(span)
    if module.handle._root is not forward.module.handle._root:
        specialiser.site(Abstract(None, module), span)  # refuses it
    if specialiser.subject.order is None:
        specialiser.fail(span, "how often a module is called is not known here", "name its calls one by one")
    inputs = specialiser.inputs[forward.result.name]
    if inputs is None and forward.invokes:  # those that follow bring more rows, and call no module more often
        inputs = _brought(specialiser, forward)
    brought = () if forward.invoke is None else forward.invoke.arguments
    for argument in (*forward.op.arguments, *brought):
        _rely_on_sizes(specialiser, specialiser.abstract(argument.value).fact)
    order = specialiser.subject.order(forward.module.handle, inputs)
    if order.why_not(module.handle._path) is not None:
        specialiser.fail(
            span,
            "how often a module is called is seen by running the model once, and no input is known for it here",
            "give the model's input as an argument of the experiment, or name the calls one by one",
            ((forward.span, "the forward"),),
        )
    count = order.count(module.handle._path)
    if not count:
        specialiser.fail(
            span,
            f"`{module.handle._path or 'the model'}` is never called in this forward",
            "its values do not exist there; address a module that runs, such as one around it or inside it",
        )
    return count


def _brought(specialiser: Interpretation, forward: Forwarding) -> Inputs | None:
    """The inputs of a forward by the invokes that came so far, as an example; `None` where they are not known."""
    handle, options = forward.module.handle, specialiser.evaluate.calls.known_arguments(forward.op.arguments)
    given = [each for _, each in forward.invokes if each is not None and not handle._is_untold(*each)]
    if not given or options is None:
        return None
    try:
        batch = handle._batch(given, options[1])
    except ModelError as error:
        specialiser.fail(forward.span, str(error))
    return batch.args, batch.kwargs


def _rely_on_sizes(specialiser: Interpretation, fact: Fact) -> None:
    """Guards on the shapes of the tensors that a forward is given: how often its modules run may depend on them."""
    match fact:
        case Known(value=torch.Tensor() as held, text=str() as text):
            specialiser.guards.add(f"tuple({text}.shape)", "value", tuple(held.shape))
        case Known(value=list() | tuple() as held, text=str() as text) if not immutable(held):
            specialiser.guards.add(text, "length", len(held))
            for number, each in enumerate(held):
                _rely_on_sizes(specialiser, Known(each, f"{text}[{number}]"))
        case Known(value=dict() as held, text=str() as text):
            for name, each in held.items():
                _rely_on_sizes(specialiser, Known(each, f"{text}[{name!r}]"))
        case Elements(items=list() as items):
            for item in items:
                _rely_on_sizes(specialiser, item.fact)
