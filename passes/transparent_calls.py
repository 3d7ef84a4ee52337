"""Builtins that the compiler sees through, while a program is specialised: pure ones of known values, and iteration.

    for index, layer in enumerate(model.layers[:len(model.layers) // 2]):      unrolled: as many rounds as layers

`len` of modules is a number, `range` and `enumerate` are what a loop goes over; such a call is emitted only where the
program uses its result as a value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from typing import Literal as OneOf

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Operand
from nnsight_compiler.passes.behaviour import KnownCall
from nnsight_compiler.passes.bounded import TEXT, is_long, may_call
from nnsight_compiler.passes.facts import (
    NO_LOOPS,
    Abstract,
    Elements,
    Iteration,
    Known,
    SiteCalls,
    SiteModule,
    constant,
    immutable,
)
from nnsight_compiler.passes.kept_calls import Arguments, keep_call
from nnsight_compiler.passes.known_calls import known_function

if TYPE_CHECKING:
    from nnsight_compiler.passes.interpretation import Interpretation

FOLDED = {
    len, range, int, float, str, bool, abs, min, max, sum, round, tuple, sorted, isinstance, ord, chr, slice, divmod,
    *(held for name, held in vars(math).items() if callable(held) and not name.startswith("_")),
}  # fmt: skip
"""Pure functions that are evaluated where every argument is a known number, string, range or tuple."""
SAME = {"tqdm", "trange"}
Kind = OneOf["enumerate", "zip", "reversed", "same"]
KINDS: dict[Any, Kind] = {enumerate: "enumerate", zip: "zip", reversed: "reversed"}


def see_through(
    specialiser: Interpretation, op: ops.Call, function: Abstract, value: Any, arguments: Arguments
) -> Abstract | None:
    """What a call of a builtin gives, where the compiler sees through it; `None` where it is a call like any other."""
    if any(argument.star for argument, _ in arguments):
        return None
    assert isinstance(function.fact, Known)
    plain = [abstract for argument, abstract in arguments if argument.keyword is None]
    keywords = {argument.keyword: abstract for argument, abstract in arguments if argument.keyword is not None}
    for abstract in plain:
        specialiser.evaluate.resolved(abstract)
    if value is len and len(plain) == 1:
        return _length(specialiser, op, function, plain[0], arguments)
    if value is getattr and len(plain) == 2 and isinstance(plain[0].fact, SiteModule):
        specialiser.guards.rely_on_identity(function.fact)
        name = specialiser.demand(plain[1], op.span, "which attribute of a module this is")
        if isinstance(name, str):
            attribute = ops.Attribute(op.result, op.arguments[0].value, name, span=op.span)
            return specialiser.evaluate.attribute(attribute, plain[0], name)
    if value in (enumerate, zip, reversed) or getattr(value, "__name__", "") in SAME:
        specialiser.guards.rely_on_identity(function.fact)
        return _iteration(specialiser, op, function, value, plain, keywords, arguments)
    if value in (list, tuple) and len(plain) == 1:
        return _sequence(specialiser, op, function, value, plain[0], arguments)
    if value in (list, dict) and not arguments:
        return keep_call(specialiser, op, function, arguments, known_function(value), Elements(value.__name__, []))
    if value is tuple and not arguments:
        return constant(())
    if not _hashable(value) or value not in FOLDED or keywords:
        return None
    facts = [part.fact for part in plain if isinstance(part.fact, Known) and immutable(part.fact.value)]
    if len(facts) != len(plain) or not may_call(value, [fact.value for fact in facts]):
        return None
    try:
        result = value(*(fact.value for fact in facts))
    except Exception:  # the call stays, and raises for the user at its own line when it runs
        return None
    specialiser.guards.rely_on_identity(function.fact)
    texts = [fact.text for fact in facts]
    if all(text is None for text in texts):
        folded = constant(result)
        if folded.operand is not None:
            return folded
        return _deferred(specialiser, op, function, arguments, known_function(value), Known(result))
    spelled = ", ".join(fact.text if fact.text is not None else repr(fact.value) for fact in facts)
    if len(spelled) > TEXT:
        return None
    fact = Known(result, f"{function.fact.text}({spelled})") if immutable(result) else None
    if isinstance(result, range):
        return _deferred(specialiser, op, function, arguments, known_function(value), fact)
    return keep_call(specialiser, op, function, arguments, known_function(value), fact)


def _length(
    specialiser: Interpretation, op: ops.Call, function: Abstract, value: Abstract, arguments: Arguments
) -> Abstract | None:
    assert isinstance(function.fact, Known)
    specialiser.guards.rely_on_identity(function.fact)
    match value.fact:
        case SiteModule(handle=handle) as module:
            specialiser.guards.add(module.torch_module, "length", len(handle))
            return constant(len(handle))
        case SiteCalls(module=module, call=None):
            return constant(len(specialiser.evaluate.each_call(module, op.span)))
        case Elements(items=list() as items):
            return constant(len(items))
        case Known(value=held, text=text) if specialiser.evaluate.countable(value):
            if text is None:
                return constant(len(held))
            fact = Known(len(held), f"len({text})")
            return keep_call(specialiser, op, function, arguments, known_function(len), fact)
    kept = keep_call(specialiser, op, function, arguments, known_function(len))
    kept.live, kept.at_run = 0, value.at_run and not isinstance(value.fact, Elements)
    if isinstance(value.fact, Elements):
        kept.loops |= value.fact.loops
    return kept


def _iteration(
    specialiser: Interpretation,
    op: ops.Call,
    function: Abstract,
    value: Any,
    plain: list[Abstract],
    keywords: dict[Any, Abstract],
    arguments: Arguments,
) -> Abstract | None:
    name = getattr(value, "__name__", "")
    bases, start = tuple(plain), 0
    if value is enumerate and len(plain) in (1, 2):
        first = plain[1] if len(plain) == 2 else keywords.get("start")
        bases = (plain[0],)
        if first is not None:
            if not isinstance(first.fact, Known):
                return None
            start = specialiser.demand(first, op.span, "where this count starts")
    elif name == "trange" or not plain or (name == "tqdm" and len(plain) != 1):
        return None
    kind: Kind = KINDS.get(value, "same")
    return _deferred(specialiser, op, function, arguments, known_function(value), Iteration(kind, bases, start))


def _deferred(
    specialiser: Interpretation,
    op: ops.Call,
    function: Abstract,
    arguments: Arguments,
    known: KnownCall | None,
    fact: Any,
) -> Abstract:
    """A call that is emitted only where its result is used as a value."""

    def make() -> Operand:
        kept = keep_call(specialiser, op, function, arguments, known)
        assert kept.operand is not None
        return kept.operand

    loops = NO_LOOPS.union(*(abstract.loops for _, abstract in arguments))
    live = max((abstract.live for _, abstract in arguments), default=0)
    at_run = any(abstract.at_run for _, abstract in arguments)
    return Abstract(None, fact, loops, live, specialiser.span(op), at_run, make)


def _sequence(
    specialiser: Interpretation,
    op: ops.Call,
    function: Abstract,
    value: Any,
    base: Abstract,
    arguments: Arguments,
) -> Abstract | None:
    assert isinstance(function.fact, Known)
    specialiser.guards.rely_on_identity(function.fact)
    if specialiser.evaluate.mentions_modules(base):
        items = specialiser.evaluate.iterate(base, op.span)
        return Abstract(None, Elements(value.__name__, items), span=op.span)
    fact: Any = None
    match base.fact:
        case Elements(kind="tuple" | "list", items=list() as items):
            fact = Elements(value.__name__, list(items))
        case Known(value=held, text=None) if (
            immutable(held) and hasattr(held, "__iter__") and not (isinstance(held, range) and is_long(held))
        ):
            fact = Elements(value.__name__, [constant(item) for item in held])
        case Known(value=held) if immutable(held) and hasattr(held, "__iter__"):
            fact = Iteration("same", (base,))
    return keep_call(specialiser, op, function, arguments, known_function(value), fact)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
