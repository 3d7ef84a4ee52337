"""Documents: JSON that is read strictly, since nobody knows who wrote it.

Everything here is said of a document before anything is believed of it: how deep it is nested, that each key of an
object stands once, that numbers are numbers. Nothing here needs torch.
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any, NoReturn

from nnsight_compiler.ir.errors import FileError

KEY = "nnsight-compiler"
"""The entry of a file's metadata that holds its document."""
MAX_DIGITS = 400
"""Longer integers are written as text by the serial form of programs, so none stands in a document."""
MAX_DEPTH = 800
"""How deep a document may be nested: a program of the deepest regions and operands that the IR has stays below."""


def refuse(where: str, reason: str) -> NoReturn:
    """Refuses a document, with the path to what is wrong in it."""
    raise FileError(f"at {where or 'the top'}: {reason}")


_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def skeleton(text: str) -> str:
    """What stands outside of the strings of a JSON text."""
    unescaped = text.replace(r"\\", "").replace(r"\"", "")
    return "".join(unescaped.split('"')[::2])


def depth(bare: str) -> int:
    """How deep the brackets of a skeleton are nested."""
    brackets = bare.encode("utf-8", "replace").translate(None, _NO_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def parse(text: str) -> object:
    """The document in a text, as plain data."""
    if depth(skeleton(text)) > MAX_DEPTH:
        raise FileError("the document is nested too deeply")
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=lambda word: refuse("", f"{word} is no number of JSON"),
            parse_int=_whole,
        )
    except RecursionError:
        raise FileError("the document is nested too deeply") from None
    except ValueError as error:
        raise FileError(f"the document is no JSON: {error}") from None


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        refuse("", f"a number has {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        refuse("", f"the key {twice!r:.80} stands twice in one object")
    return made


def fields(data: object, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """An object with exactly these fields."""
    if type(data) is not dict:
        refuse(where, "expected an object")
    for key in data:
        if key not in names:
            refuse(where, f"unknown field {key!r:.80}")
    for name in names:
        if name not in data:
            refuse(where, f"the field {name!r} is missing")
    return data


def mapping(data: object, where: str) -> dict[str, Any]:
    """An object with any fields."""
    if type(data) is not dict:
        refuse(where, "expected an object")
    return data


def array(data: object, where: str, length: int | None = None) -> list[Any]:
    """An array, of one length where it is given."""
    if type(data) is not list or (length is not None and len(data) != length):
        refuse(where, "expected an array" + ("" if length is None else f" of {length}"))
    return data


def string(data: object, where: str) -> str:
    """A string that can be written as UTF-8."""
    if type(data) is not str:
        refuse(where, "expected a string")
    try:
        data.encode()
    except UnicodeEncodeError:
        refuse(where, "the string holds half of a surrogate pair")
    return data


def whole(data: object, where: str, low: int = 0, high: int = 2**62) -> int:
    """A whole number within bounds."""
    if type(data) is not int or not low <= data <= high:
        refuse(where, f"expected a whole number from {low} to {high}")
    return data


def truth(data: object, where: str) -> bool:
    """`true` or `false`."""
    if type(data) is not bool:
        refuse(where, "expected true or false")
    return data


def only(data: object, where: str) -> tuple[str, Any]:
    """The key and the value of an object with one field."""
    if type(data) is not dict or len(data) != 1:
        refuse(where, "expected an object with one field")
    ((key, held),) = data.items()
    return key, held
