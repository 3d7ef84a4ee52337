"""Positions by text: which tokens of a prompt hold the words that a user names.

A tokenizer that tells where its tokens come from is asked; of any other, and of token ids, the text of the first tokens
is compared with that of one more. A token that holds a part of the words counts whole; spaces at their ends do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

from nnsight_compiler.ir.errors import ModelError

_SHOWN = 60
"""Tokens that an error shows."""

Range = tuple[int, int]


class PositionError(ModelError, ValueError):
    """Words that a prompt does not hold, or holds several times."""


@final
class Position(tuple[int, ...]):
    """The tokens of some words in a prompt, by their numbers: an index, as in `hidden[:, position]`."""

    __slots__ = ()

    @property
    def first(self) -> int:
        """The first token."""
        return self[0]

    @property
    def last(self) -> int:
        """The last token."""
        return self[-1]

    @property
    def all(self) -> slice:
        """All of them, as a slice: `hidden[:, position.all]` is a view."""
        return slice(self[0], self[-1] + 1)

    def __repr__(self) -> str:
        return f"Position({', '.join(map(str, self))})"


def find(words: str, text: str, ranges: Sequence[Range], occurrence: int | None, tokens: Sequence[str]) -> Position:
    """The tokens of `words` in a prompt.

    Args:
        text: the prompt's text; `ranges`: for each token the characters that it holds.
        occurrence: which is meant where there are several; negative ones count from the end.
        tokens: the text of each token, for errors.

    Raises:
        PositionError: there is none, or there are several.
    """
    if not isinstance(words, str) or not words:
        raise PositionError(f"a position is found by the words that stand there, not by {words!r}")
    found = []
    for match in re.finditer(re.escape(words), text):
        inner = words.strip()
        start = match.start() + words.index(inner) if inner else match.start()
        held = _holding(ranges, start, start + len(inner or words))
        if held:
            found.append(held)
    if not found:
        raise PositionError(f"{words!r} is not in the prompt; its tokens: {_listed(tokens)}")
    if occurrence is None and len(found) > 1:
        places = ", ".join(_place(each) for each in found)
        raise PositionError(
            f"{words!r} is {len(found)} times in the prompt, at tokens {places}; say which is meant: `occurrence=0` to"
            f" `occurrence={len(found) - 1}`; its tokens: {_listed(tokens)}"
        )
    number = 0 if occurrence is None else occurrence
    if not isinstance(number, int) or not -len(found) <= number < len(found):
        raise PositionError(
            f"{words!r} is {len(found)} times in the prompt: there is no `occurrence={number!r}`; its tokens:"
            f" {_listed(tokens)}"
        )
    return found[number]


def _holding(ranges: Sequence[Range], start: int, end: int) -> Position | None:
    held = [number for number, (first, last) in enumerate(ranges) if first < end and last > start and last > first]
    return Position(range(held[0], held[-1] + 1)) if held else None


def _place(position: Position) -> str:
    return str(position.first) if len(position) == 1 else f"{position.first}-{position.last}"


def _listed(tokens: Sequence[str]) -> str:
    shown = "  ".join(f"{number} {token!r}" for number, token in enumerate(tokens[:_SHOWN]))
    return shown + ("  …" if len(tokens) > _SHOWN else "")


def of_text(tokenizer: Any, text: str, ids: Sequence[int]) -> tuple[str, list[Range]]:
    """A text, and the characters of it that each of its tokens holds. Padding before them holds none."""
    if not getattr(tokenizer, "is_fast", False):
        return of_ids(tokenizer, ids)
    ranges = [tuple(each) for each in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    return text, [(0, 0)] * (len(ids) - len(ranges)) + ranges


def of_ids(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Range]]:
    """The text of tokens, and the characters of it that each holds; special tokens hold none."""
    special = set(tokenizer.all_special_ids)
    text, ranges, kept = "", list[Range](), list[int]()
    incomplete: list[int] = []  # tokens that hold a part of a character, which the next ones complete
    for number, token in enumerate(ids):
        ranges.append((len(text), len(text)))
        if token in special:
            continue
        kept.append(token)
        grown = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        incomplete.append(number)
        if grown.endswith("\ufffd") and number + 1 < len(ids):
            continue
        for each in incomplete:
            ranges[each] = (len(text), len(grown))
        incomplete.clear()
        text = grown
    return text, ranges
