"""Code objects: those that a text compiles to, and whether one does what another does."""

from __future__ import annotations
import __future__

import ast
import dis
from functools import lru_cache, reduce
from operator import or_
from types import CodeType

_FUTURES: int = reduce(or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))
_NOTHING = ("NOP", "CACHE", "EXTENDED_ARG")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))


def codes_of(text: str | ast.Module, like: CodeType) -> tuple[CodeType, ...]:
    """Every code object that a text compiles to, under the `from __future__` imports that a given one was under.

    None where it does not compile. `await` outside of functions is allowed, as notebooks allow it.
    """
    flags = like.co_flags & _FUTURES | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return _codes_of_text(text, flags) if isinstance(text, str) else _compiled(text, flags)


@lru_cache(maxsize=8)
def _codes_of_text(text: str, flags: int) -> tuple[CodeType, ...]:
    return _compiled(text, flags)


def _compiled(text: str | ast.Module, flags: int) -> tuple[CodeType, ...]:
    try:
        found = [compile(text, "<string>", "exec", flags, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return ()
    for code in found:
        found.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
    return tuple(found)


def alike(first: CodeType, second: CodeType) -> bool:
    """Whether two code objects bear one name and do the same, wherever each was written."""
    return first is second or (
        (first.co_name, first.co_varnames, first.co_freevars)
        == (second.co_name, second.co_varnames, second.co_freevars)
        and len(ours := instructions(first)) == len(theirs := instructions(second))
        and all(map(_same, ours, theirs))
    )


def instructions(code: CodeType) -> list[dis.Instruction]:
    """The instructions that do anything."""
    return [each for each in dis.get_instructions(code) if each.opname not in _NOTHING]


def _same(first: dis.Instruction, second: dis.Instruction) -> bool:
    if first.opcode != second.opcode:
        return False
    one, other = first.argval, second.argval
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return alike(one, other)
    if isinstance(one, frozenset):  # its parts come in any order
        return bool(one == other)
    return first.opcode in _JUMPS or repr(one) == repr(other)  # `1` and `True` are equal
