"""What a forward costs, in the same figures whether estimated or as a run had it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Figures:
    """What a forward costs; what is not known is `None`.

    forwards, runs: how many forwards of the program these are, and how often the model runs for them: less often where
        forwards are rows of one.
    rows, tokens: of its input, all runs together; the tokens of a row.
    modules, layers: how many of the model's run. skipped: those that the program skips. shared: those whose values come
        from another forward.
    flops: floating-point operations of matrix products, convolutions and attention.
    peak: the most bytes of tensors alive at once, beyond weights and inputs. kept: the bytes that the program keeps.
    seconds: by the clock.
    """

    forwards: int = 1
    runs: int = 1
    rows: int | None = None
    tokens: int | None = None
    modules: int | None = None
    of_modules: int | None = None
    layers: int | None = None
    of_layers: int | None = None
    skipped: int = 0
    shared: int = 0
    flops: int | None = None
    peak: int | None = None
    kept: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return "; ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.forwards != self.runs:
            yield f"{_counted(self.forwards, 'forward')} in {_counted(self.runs, 'run')} of the model"
        elif self.runs != 1:
            yield f"{self.runs} runs of the model"
        if self.rows is not None:
            size = _counted(self.rows, "row")
            yield size if self.tokens is None else f"{size} of {_counted(self.tokens, 'token')}"
        if self.of_layers:
            yield f"{self.layers} of {_counted(self.of_layers, 'layer')}"
        elif self.of_modules:
            yield f"{self.modules} of {_counted(self.of_modules, 'module')}"
        if self.skipped:
            yield f"{_counted(self.skipped, 'module')} skipped"
        if self.shared:
            yield f"{_counted(self.shared, 'module')} shared"
        if self.flops is not None:
            yield in_units(self.flops, 1000, "FLOP", ("k", "M", "G", "T", "P"))
        if self.peak is not None:
            yield f"{in_bytes(self.peak)} at the peak"
        if self.kept is not None:
            yield f"{in_bytes(self.kept)} kept"
        if self.seconds is not None:
            yield in_time(self.seconds)


def in_bytes(number: int) -> str:
    """An amount of memory, as users write it."""
    return in_units(number, 1024, "B", ("Ki", "Mi", "Gi", "Ti"))


def in_time(seconds: float) -> str:
    """A time, to the millisecond's tenth where it is short."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def in_units(number: int, step: int, unit: str, prefixes: tuple[str, ...]) -> str:
    """A number with three digits at least, and the prefix that leaves four at most."""
    size, prefix = float(number), ""
    for larger in prefixes:
        if size < step:
            break
        size, prefix = size / step, larger
    return f"{size:.3g} {prefix}{unit}" if prefix and size < 1000 else f"{size:.0f} {prefix}{unit}"


def _counted(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"
