"""The shares of the invokes of one forward: which rows and tokens of a value are whose.

Which dimensions of a value are rows and tokens was told before the run (`axes`); from the run come only how many there
are, and which of them an invoke brought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import torch
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.assignments import described
from nnsight_compiler.passes.rows import Part
from nnsight_compiler.passes.sites import PlacePort
from nnsight_compiler.runtime.extent import Extent
from nnsight_compiler.runtime.formulas import TensorAxes

SitesAxes = Callable[[str, PlacePort, int], "SiteAxes"]
"""What stands at a site: the path of a module, a port, a call."""


@final
@dataclass(slots=True)
class Sizes:
    """How many rows a running forward has, and up to which position its tokens reach: in a later step of a generation,
    that is more than it is given. `axes`: what stands at its sites, where its inputs were not known before.

    step: the step of a generation that runs. ended: for each row, the number of its steps once its sequence has ended.
    """

    rows: int
    tokens: int
    axes: SitesAxes | None = None
    step: int = 0
    ended: list[int | None] = field(default_factory=list)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One invoke of a running forward: what it brought, and the sizes of the forward as they are now."""

    part: Part
    sizes: Sizes

    def axes(self, path: str, port: PlacePort, call: int) -> SiteAxes:
        """What stands at a site, of which that became known with the inputs."""
        assert self.sizes.axes is not None
        return self.sizes.axes(path, port, call)

    def padding(self, size: int) -> int:
        """How many of the last `size` positions up to now are padding of this invoke's."""
        return max(0, self.part.padding - (self.sizes.tokens - size))

    @property
    def length(self) -> int | None:
        """How many steps its rows have had in a generation, if all of them have ended."""
        ended = self.sizes.ended[self.part.start : self.part.stop]
        known = [each for each in ended if each is not None]
        return max(known) if known and len(known) == len(ended) else None

    def lasts(self, least: int, where: str) -> bool:
        """Whether the step that runs is one of its own: those that follow its end are other invokes'.

        Args:
            least: how many steps it must have.
        """
        length, step = self.length, self.sizes.step
        if length is None or step < length:
            return True
        if step < least:
            raise RunError(
                f"{where}: this is meant for step {step} too, but the rows of this invoke ended at an end of sequence"
                f" after step {length - 1}, so it did not happen\n"
                f"  way out: `min_new_tokens={least}` makes it go on; a loop over `tracer.iter[:]` takes the steps that"
                " come"
            )
        return False

    def result(self, value: Any) -> Any:
        """What it has of what a generation returned: what it would return for this invoke alone."""
        if isinstance(value, torch.Tensor):
            return self._ids(value)
        if not isinstance(value, Mapping):
            return Withheld(_undivided(value))
        steps = self.sizes.step + 1 if self.length is None else self.length
        parts: dict[str, Any] = {}
        for name, held in value.items():
            match name, held:
                case "sequences", torch.Tensor():
                    parts[name] = self._ids(held)
                case "scores" | "logits", tuple():
                    parts[name] = tuple(map(self._rows, held[:steps]))
                case _:
                    parts[name] = Withheld(_undivided(held, name))
        made: Callable[..., Any] = type(value)
        return made(**parts)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != self.sizes.rows:
            raise RunError(f"the generation returned {described(tensor)} for {self.sizes.rows} rows of invokes")
        return tensor.narrow(0, self.part.start, self.part.rows)

    def _ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Without the padding before its prompt, and after its end."""
        own = self._rows(ids)
        if own.dim() < 2:
            return own
        start = self.padding(own.shape[1] - 1)  # the last token was given to no forward
        after = 0 if self.length is None else self.sizes.step + 1 - self.length
        return own.narrow(1, start, own.shape[1] - start - after)


@final
@dataclass(frozen=True, slots=True)
class SiteAxes:
    """What stands at a site: the tree, and for each of its leaves which dimensions are rows and tokens."""

    site: str
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @property
    def plain(self) -> bool:
        """Whether a single tensor stands there."""
        return bool(self.structure.is_leaf())


def _undivided(value: Any, name: str = "") -> str:
    part = f"`{name}`, " if name else ""
    return f"the result of a generation holds {part}{described(value)}, which cannot be divided among invokes"


class CannotDivideError(Exception):
    """Why the part of an invoke cannot be told from that of others."""


@final
class Withheld:
    """Stands for a part of a site's value of which no invoke can be given its own; its use says why."""

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "_reason", reason)

    def _refuse(self) -> NoReturn:
        raise RunError(f"{self._reason}\n  way out: read it outside of the invokes, where it is that of all rows")

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse()

    def __iter__(self) -> NoReturn:
        self._refuse()

    def __len__(self) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, cls))._refuse()

    def __repr__(self) -> str:
        return f"<withheld: {self._reason}>"


def region(tensor: torch.Tensor, axes: TensorAxes, share: Share) -> tuple[torch.Tensor, int | None]:
    """A view of the part of an invoke. Where rows and tokens are one dimension and padding stands between them, they
    are two here, the first of which is named.

    Raises:
        CannotDivideError: which entries belong to the invoke cannot be told.
    """
    if tensor.dim() != len(axes.shape):
        raise CannotDivideError(f"it has {tensor.dim()} dimensions, not {len(axes.shape)}")
    rows, part = share.sizes.rows, share.part
    merged: int | None = None
    for dim in reversed(range(tensor.dim())):
        extent, size = axes.shape[dim], tensor.shape[dim]
        match extent:
            case Extent(rows=0, tokens=0, rows_tokens=0):
                continue
            case Extent(constant=0, rows=times, tokens=0, rows_tokens=0):
                if size != times * rows:
                    raise CannotDivideError(f"a dimension of {size} is not {extent} for {rows} rows")
                tensor = tensor.narrow(dim, part.start * times, part.rows * times)
            case Extent(constant=0, rows=0, tokens=1, rows_tokens=0):
                padding = share.padding(size)
                if padding and size > share.sizes.tokens:
                    raise CannotDivideError(f"a dimension of it has room for {size} tokens, more than came yet")
                if padding:
                    tensor = tensor.narrow(dim, padding, size - padding)
            case Extent(constant=0, rows=0, tokens=0, rows_tokens=times):
                each, rest = divmod(size, rows)
                if rest:
                    raise CannotDivideError(f"a dimension of {size} is not {extent} for {rows} rows")
                if times > 1:
                    raise CannotDivideError(f"a dimension of it counts {extent}, in an order that is not known")
                tensor = tensor.narrow(dim, part.start * each, part.rows * each)
                padding = share.padding(each)
                if not padding:
                    continue
                if part.rows == 1:
                    tensor = tensor.narrow(dim, padding, each - padding)
                else:
                    shape = (*tensor.shape[:dim], part.rows, each, *tensor.shape[dim + 1 :])
                    tensor = tensor.view(shape).narrow(dim + 1, padding, each - padding)
                    merged = dim if merged is None else merged + 1
            case _ if extent.rows or extent.rows_tokens:
                raise CannotDivideError(f"a dimension of it counts {extent}")
            case _:
                if part.padding:
                    raise CannotDivideError(f"a dimension of it counts {extent}, some of which are padding's")
    return tensor, merged
