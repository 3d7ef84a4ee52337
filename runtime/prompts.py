"""What was made of the prompts of one run, so that a text which several forwards are given is tokenised once.

It is held in the state of the run, and only for programs in which nothing can change a tokenizer (`repeats_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import walk

Made = dict[Hashable, tuple[object, Any]]
"""By the maker's identity and what it was given: the maker, which is kept so that its identity stays its own, and the
result."""

_made: ContextVar[Made | None] = ContextVar("made", default=None)


@contextmanager
def remembering(made: Made | None) -> Iterator[None]:
    """Has `remembered` look here first."""
    token = _made.set(made)
    try:
        yield
    finally:
        _made.reset(token)


def remembered(maker: Callable[[Any], Any], given: Any, key: Hashable) -> Any:
    """What `maker(given)` gives, which no one may change; from earlier in this run where it was made before."""
    made = _made.get()
    if made is None:
        return maker(given)
    found = made.get((id(maker), key))
    if found is None:
        found = made[id(maker), key] = maker, maker(given)
    return found[1]


def repeats_prompts(program: Program) -> bool:
    """Whether a run may prepare a prompt several times, and runs no code between that might change how: all calls are
    in the table of known calls, and no attribute is set."""
    forwards = 0
    contexts = {op.result for op in program.walk() if isinstance(op, ops.Call)}
    for op in program.walk():
        match op:
            case ops.Forward():
                forwards += 1
            case ops.For() | ops.While():
                forwards += sum(isinstance(each, ops.Forward) for each in walk(op.body))
            case ops.Call(target=None) | ops.SetAttribute() | ops.SetGlobal() | ops.Import() | ops.Closure():
                return False
            case ops.Delete(name=str()):
                return False
            case ops.With(context=context) if context not in contexts:
                return False
    return forwards > 1
