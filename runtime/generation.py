"""One generation: its steps, and what must have happened in each.

A step is one forward of the model. Hooks at sites stay for the whole generation; each site function looks at the number
of the step in the state, which `Generation` sets as each forward begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import nn

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.ir.span import Span
from nnsight_compiler.runtime.active import ACTIVE
from nnsight_compiler.runtime.runs import RECORDER
from nnsight_compiler.runtime.shares import Sizes

Steps = tuple[int, int | None]
"""From a step to one before another, or open-ended."""


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """Steps at which the program does something; `span` is where it says so."""

    start: int
    stop: int | None
    span: Span

    @property
    def least(self) -> int:
        """How many steps there must be: all that are named, or the first of an open end."""
        return self.start + 1 if self.stop is None else self.stop

    def __str__(self) -> str:
        if self.stop is None:
            return f"steps {self.start} and later"
        return f"step {self.start}" if self.least == self.start + 1 else f"steps {self.start} to {self.stop - 1}"


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """What a program asks of a generation. `slot`: where in the state the number of the step is put."""

    slot: str
    steps: tuple[Wanted, ...]


class Counter(Protocol):
    """What numbers the calls of a module within a step."""

    count: int


def covers(ranges: Sequence[Steps], step: int) -> bool:
    """Whether a step is among these."""
    return any(start <= step and (stop is None or step < stop) for start, stop in ranges)


@final
@dataclass(slots=True)
class Generation:
    """What one run of a generation has come to.

    span: the `generate` that it is of, and `asked` what that asks for.
    states: where the number of each step is put as it begins.
    settle: called with the number of each step when it is over.
    on_token: a caller's, which sees the plain model; `seed`: what is drawn from.
    step: the step that is running; `count`: how many have begun.
    ended: for each row, the number of its steps once its sequence has ended.
    counters: what begins anew with each step.
    endings: the tokens that end a sequence.
    sizes: what several invokes have of the forward that runs: each later step brings one more token.
    """

    span: Span
    asked: Asked
    states: Sequence[Any]
    settle: Callable[[int], None]
    on_token: Callable[[torch.Tensor], Any] | None = None
    seed: int | None = None
    count: int = 0
    counters: list[Counter] = field(default_factory=list)
    ended: list[int | None] = field(default_factory=list)
    endings: frozenset[int] = frozenset()
    sizes: Sizes | None = None

    @property
    def step(self) -> int:
        return max(self.count - 1, 0)

    def begin(self) -> None:
        """A forward of the model begins: the next step."""
        RECORDER.count(self.span)
        if self.count:
            self.settle(self.step)
            for counter in self.counters:
                counter.count = 0
            if self.sizes is not None:
                self.sizes.tokens += 1
                self.sizes.step += 1
                self.sizes.ended = self.ended
        self.count += 1
        self._advance(self.step)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has the model generate, and gives what it returns."""
        self._advance(0)
        generate: Any = module.generate
        if hasattr(module, "generation_config"):
            kwargs = {**kwargs, "stopping_criteria": self._watched(module, kwargs)}
        with _seeded(self.seed, module):
            result = generate(*args, **kwargs)
        if self.count:
            self.settle(self.step)
        if self.sizes is not None:
            self.sizes.ended = self.ended
        return result

    def _advance(self, step: int) -> None:
        for state in self.states:
            setattr(state, self.asked.slot, step)

    def check(self, module: nn.Module, kwargs: Mapping[str, Any], divided: Span | None) -> None:
        """Refuses steps that cannot come, and arguments that cannot go together, before the model runs.

        Args:
            divided: the forward, where several invokes divide it.
        """
        config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        for name in ("num_beams", "num_return_sequences", "stop_strings") if divided is not None else ():
            found = kwargs.get(name) or getattr(config, name, None)
            if found not in (None, 1):
                raise RunError(
                    f"{divided}: `{name}={found!r}` does not go with several invokes: which rows are whose, and which"
                    " have ended, cannot be told then\n  way out: a `generate` for each prompt"
                )
        if self.on_token is not None and beams > 1:
            raise RunError("`on_token=` is called with the tokens of a row, and a row of beams has none until its end")
        most = kwargs.get("max_new_tokens")
        for each in self.asked.steps:
            if isinstance(most, int) and each.least > most:
                raise RunError(
                    f"{each.span}: this is meant for {each}, but max_new_tokens={most} ends the generation before\n"
                    f"  way out: `max_new_tokens={each.least}`, or a loop over `tracer.iter[:]`"
                )

    def finish(self, wanted: Sequence[Wanted], count: int) -> None:
        """Refuses a generation of `count` steps that was too short for what was asked of it.

        Raises:
            RunError: steps that the program names did not come.
        """
        for each in wanted:
            if count < each.least:
                at_end = count < self.count or (bool(self.ended) and all(ended is not None for ended in self.ended))
                reason = " at an end of sequence" if at_end else ""
                raise RunError(
                    f"{each.span}: this is meant for {each}, but the generation ended{reason} after step"
                    f" {count - 1}, so it did not happen\n"
                    f"  way out: `min_new_tokens={each.least}` makes it go on; a loop over `tracer.iter[:]` takes the"
                    " steps that come"
                )

    def _watched(self, module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
        """The criteria of a caller's, and one that notes which rows have ended and hands on their tokens."""
        from transformers import StoppingCriteriaList

        config = kwargs.get("generation_config") or module.generation_config
        endings = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
        if isinstance(endings, torch.Tensor):
            endings = endings.tolist()
        self.endings = frozenset(
            endings if isinstance(endings, (list, tuple)) else () if endings is None else (endings,)
        )
        return StoppingCriteriaList([*map(self._noted, kwargs.get("stopping_criteria") or ()), self._token])

    def _noted(self, criterion: Callable[..., Any]) -> Callable[..., Any]:
        def noted(ids: torch.Tensor, scores: Any, **options: Any) -> Any:
            found = criterion(ids, scores, **options)
            self._end(found if isinstance(found, torch.Tensor) else torch.full((ids.shape[0],), bool(found)))
            return found

        return noted

    def _token(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        last = ids[:, -1]
        over = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for ending in self.endings:
            over |= last == ending
        self._end(over)
        if self.on_token is not None:
            with ACTIVE.running(None):
                self.on_token(last.clone())
        return torch.zeros_like(over)

    def _end(self, over: torch.Tensor) -> None:
        if len(self.ended) != len(over):
            self.ended = [None] * len(over)
        if over.any():
            for row in over.nonzero()[:, 0].tolist():
                if self.ended[row] is None:
                    self.ended[row] = self.count


@contextmanager
def _seeded(seed: int | None, module: nn.Module) -> Iterator[None]:
    """Draws from this seed inside, and goes on as before after it."""
    if seed is None:
        yield
        return
    devices = {parameter.device.index or 0 for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        torch.manual_seed(seed)
        yield
