"""The size of one dimension of a value, as a formula in the number of rows and the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Extent:
    """`constant + rows*R + tokens*T + rows_tokens*R*T`: the size for any number R of rows and T of tokens."""

    constant: int = 0
    rows: int = 0
    tokens: int = 0
    rows_tokens: int = 0

    def size(self, rows: int, tokens: int) -> int:
        """The size for that many rows and tokens."""
        return self.constant + self.rows * rows + self.tokens * tokens + self.rows_tokens * rows * tokens

    @property
    def axis(self) -> str | None:
        """What the dimension counts, such as `rows`, `2*rows*tokens` or `tokens+1`; `None` for a constant."""
        terms = ((self.rows_tokens, "rows*tokens"), (self.rows, "rows"), (self.tokens, "tokens"))
        parts = [name if factor == 1 else f"{factor}*{name}" for factor, name in terms if factor]
        if not parts:
            return None
        return "+".join(parts) + (f"{self.constant:+d}" if self.constant else "")

    def __str__(self) -> str:
        return self.axis or str(self.constant)


def solve(sizes: Mapping[tuple[int, int], int]) -> Extent | None:
    """The formula that gives these sizes, each found at (rows, tokens); `None` where there is none in whole numbers
    that counts rows and tokens up, never down.

    The settings are two numbers of rows by two of tokens, or one where a number is not varied, and any others as a
    check: four sizes always have a solution, and most wrong ones are not whole or fail at the fifth.
    """
    settings = list(sizes)
    rows_0, tokens_0 = settings[0]
    rows_1 = next((rows for rows, tokens in settings if rows != rows_0 and tokens == tokens_0), None)
    tokens_1 = next((tokens for rows, tokens in settings if tokens != tokens_0 and rows == rows_0), None)
    first = sizes[rows_0, tokens_0]
    by_rows = by_tokens = by_both = 0
    if rows_1 is not None:
        by_rows = _divided(sizes[rows_1, tokens_0] - first, rows_1 - rows_0)
    if tokens_1 is not None:
        by_tokens = _divided(sizes[rows_0, tokens_1] - first, tokens_1 - tokens_0)
    if rows_1 is not None and tokens_1 is not None:
        last = sizes[rows_1, tokens_1] - sizes[rows_1, tokens_0] - sizes[rows_0, tokens_1] + first
        by_both = _divided(last, (rows_1 - rows_0) * (tokens_1 - tokens_0))
    found = Extent(0, by_rows - by_both * tokens_0, by_tokens - by_both * rows_0, by_both)
    found = Extent(first - found.size(rows_0, tokens_0), found.rows, found.tokens, found.rows_tokens)
    if min(found.rows, found.tokens, found.rows_tokens) < 0:
        return None
    return found if all(found.size(*setting) == size for setting, size in sizes.items()) else None


def _divided(difference: int, by: int) -> int:
    """Where the quotient is not whole, the rounded one fails at the sizes that it came from."""
    return difference // by
