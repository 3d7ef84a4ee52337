"""What the language leaves out: for each construct the reason, and what to write instead."""

from __future__ import annotations

import libcst as cst

Refusal = tuple[str, str]
"""A reason, and a way out."""

ASYNC: Refusal = (
    "asynchronous code cannot be part of an experiment",
    "write the experiment as an ordinary function, and await outside of it",
)
BARE_SUPER: Refusal = (
    "super() without arguments is not supported",
    "name the class and the object: super(Class, self)",
)
STAR_IMPORT: Refusal = (
    "a star import hides which names it binds",
    "import the names that are used, or import at the top",
)
DELETED_OUTER_NAME: Refusal = ("a global or nonlocal name cannot be deleted here", "assign None to it instead")
TRY_IN_FORWARD: Refusal = (
    "try/except cannot surround part of a forward: the model goes on running while the block is being left",
    "put the try around the whole `with`, or into a helper function that is called here",
)
NAMED_BACKWARD: Refusal = (
    "a backward pass has no value to bind",
    "leave out the `as`, and read `.grad` of a value in its body",
)
_CLASS: Refusal = ("a class cannot be defined inside an experiment", "define the class outside, and use it here")
_MATCH: Refusal = ("the match statement is not supported", "write it as if/elif")
_TRY_STAR: Refusal = ("except* is not supported", "catch ExceptionGroup with a plain except")
_TYPE_ALIAS: Refusal = ("a type alias cannot be defined inside an experiment", "define it at the top of the module")
_YIELD: Refusal = (
    "a generator function cannot be an experiment",
    "collect the values in a list and return it, or write a generator expression",
)


def outer_jump(word: str) -> Refusal:
    """A jump out of an undecorated block."""
    return (
        f"{word} cannot leave an undecorated block: its body runs after Python has gone past it",
        f"move the {word} after the block, or put the code into a function decorated with @intervene",
    )


def statement(node: cst.CSTNode) -> Refusal:
    """Why a statement is refused."""
    match node:
        case cst.ClassDef():
            return _CLASS
        case cst.Match():
            return _MATCH
        case cst.TryStar():
            return _TRY_STAR
        case cst.TypeAlias():
            return _TYPE_ALIAS
        case _:
            return _other(node)


def expression(node: cst.CSTNode) -> Refusal:
    """Why an expression is refused."""
    match node:
        case cst.Await():
            return ASYNC
        case cst.Yield():
            return _YIELD
        case _:
            return _other(node)


def _other(node: cst.CSTNode) -> Refusal:
    return (f"{type(node).__name__} is not supported", "move this code into a helper function outside the experiment")
