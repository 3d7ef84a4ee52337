"""What the invokes of one forward see of the values at its sites: their own rows, and their own tokens.

Which dimensions of a value are rows and tokens was told before the run (`axes`); from the run come only how many there
are, and which of them an invoke brought. What an invoke reads is a view where it can be, so that writing in place
reaches the model. What it assigns is put into its rows when the site is left: one copy of the whole value, however many
invokes assign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import torch
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.assignments import described, misfit
from nnsight_compiler.passes.rows import Part
from nnsight_compiler.passes.sites import PlacePort
from nnsight_compiler.runtime import sites
from nnsight_compiler.runtime.extent import Extent
from nnsight_compiler.runtime.formulas import Opaque, TensorAxes

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


@dataclass(slots=True)
class _Served:
    """A leaf as an invoke was given it. `version`: of a copy, so that it shows whether it was written to since;
    `apart`: whether the model's own cannot be written in its place, being one in memory with other rows'; `common`: the
    model's own, where all rows have it in common."""

    leaf: Any
    copied: bool = False
    version: int | None = None
    apart: bool = False
    common: torch.Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether a copy may have been written to."""
        return self.copied and (self.version is None or self.leaf._version != self.version)


@dataclass(slots=True)
class _Piece:
    """What an invoke sees of a site, and the leaves as it was given them."""

    value: Any
    served: list[_Served]


@final
class Divided:
    """The value at a site while the functions of the invokes run. `None` in the place of a share means all rows."""

    __slots__ = ("_flat", "axes", "pieces", "value")

    def __init__(self, value: Any, axes: SiteAxes) -> None:
        self.value, self.axes = value, axes
        self.pieces: dict[Share, _Piece] = {}
        self._flat: tuple[Any, list[tuple[Any, Any, int | None]]] | None = None

    # --- as site functions ask for it ---

    def read(self, share: Share | None) -> Any:
        if share is None:
            return self.whole()
        return self._piece(share).value

    def read_first(self, share: Share | None, where: str) -> Any:
        return sites.first_argument(self.read(share), where)

    def write(self, share: Share | None, new: Any, where: str) -> None:
        self._assign(share, sites.replaced(self.read(share), new, where), where)

    def write_first(self, share: Share | None, new: Any, where: str) -> None:
        self._assign(share, sites.replaced_first(self.read(share), new, where), where)

    def write_all(self, share: Share | None, new: Any, where: str) -> None:
        self._assign(share, sites.replaced_all(self.read(share), new, where), where)

    def set_item(self, share: Share | None, held: Any, index: Any, new: Any, where: str) -> Any:
        """`held[index] = new` for what was read from the site; gives what was read, after it."""
        before = self.read(share)
        after, made = sites.set_item(before, held, index, new)
        if after is not before:
            self._assign(share, after, where)
        return made

    def set_first_item(self, share: Share | None, held: Any, index: Any, new: Any, where: str) -> Any:
        before = self.read(share)
        after, made = sites.set_first_item(before, held, index, new)
        if after is not before:
            self._assign(share, after, where)
        return made

    def replace(self, share: Share, new: Any, where: str) -> None:
        """Has the rows of an invoke hold another value."""
        self._assign(share, new, where)

    def whole(self) -> Any:
        """The value with all that the invokes assigned."""
        leaves: list[Any] | None = None
        copies: set[int] = set()
        for share, piece in self.pieces.items():
            now = self._leaves(piece.value)
            for index, (served, leaf) in enumerate(zip(piece.served, now, strict=True)):
                if leaf is served.leaf and not served.changed:
                    continue
                if served.common is not None:
                    self._require_same(served)
                    continue
                leaves = self._leaves(self.value) if leaves is None else leaves
                if index not in copies and (leaf is not served.leaf or served.apart):
                    leaves[index] = leaves[index].clone()
                    copies.add(index)
                _put(leaves[index], leaf, self.axes.leaves[index], share)
        if copies:
            assert leaves is not None
            self.value = leaves[0] if self.axes.plain else pytree.tree_unflatten(leaves, self.axes.structure)
        self.pieces.clear()
        return self.value

    def _require_same(self, served: _Served) -> None:
        """Refuses what an invoke wrote in place to something that is one for all rows."""
        assert served.common is not None
        if not torch.equal(served.leaf, served.common):
            raise RunError(
                f"an invoke writes in place to {self.axes.site}, which is one for all rows, and would change it for"
                " others\n  way out: write to it outside of the invokes"
            )

    # --- pieces ---

    def _piece(self, share: Share) -> _Piece:
        found = self.pieces.get(share)
        if found is None:
            served = [
                self._served(each, axes, share)
                if dim is None or share.part.padding
                else _Served(each.narrow(dim, share.part.start, share.part.rows))
                for each, axes, dim in self._tree(share.sizes)
            ]
            leaves = [each.leaf for each in served]
            value = leaves[0] if self.axes.plain else pytree.tree_unflatten(leaves, self.axes.structure)
            found = self.pieces[share] = _Piece(value, served)
        return found

    def _tree(self, sizes: Sizes) -> list[tuple[Any, Any, int | None]]:
        """The leaves of the whole value, which has the structure that was told, each with its axes, and with the
        dimension of its rows where nothing else is to be told."""
        if self._flat is None or self._flat[0] is not self.value:
            leaves, structure = ([self.value], None) if self.axes.plain else pytree.tree_flatten(self.value)
            if structure is not None and structure != self.axes.structure:
                raise RunError(
                    f"{self.axes.site} holds {described(self.value)} of another structure than the one that this was"
                    " compiled for, so that rows cannot be told apart in it"
                )
            pairs = zip(leaves, self.axes.leaves, strict=True)
            self._flat = self.value, [(leaf, axes, _row_dimension(leaf, axes, sizes)) for leaf, axes in pairs]
        return self._flat[1]

    def _leaves(self, value: Any) -> list[Any]:
        return [value] if self.axes.plain else pytree.tree_leaves(value)

    def _served(self, leaf: Any, axes: Any, share: Share) -> _Served:
        if isinstance(axes, Opaque) and isinstance(leaf, torch.Tensor) and axes.sometimes is not None:
            axes = axes.sometimes
        if isinstance(leaf, torch.Tensor) and isinstance(axes, TensorAxes):
            try:
                return _narrowed(leaf, axes, share)
            except CannotDivideError as error:
                reason = f"{self.axes.site} cannot be divided among invokes: {error}"
        elif isinstance(leaf, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
            return _Served(leaf)
        else:
            reason = f"{self.axes.site} holds {described(leaf)}, which cannot be divided among invokes" + (
                f": {axes.reason}" if isinstance(axes, Opaque) else ""
            )
        if self.axes.plain:
            Withheld(reason)._refuse()
        return _Served(Withheld(reason))

    def _assign(self, share: Share | None, new: Any, where: str) -> None:
        if share is None:
            self.value = new
            self.pieces.clear()
            return
        piece = self._piece(share)
        self._require_fit(piece, share, new, where)
        piece.value = new

    def _require_fit(self, piece: _Piece, share: Share, new: Any, where: str) -> None:
        """Refuses what cannot be put into the rows of an invoke alone."""
        leaves, structure = ([new], None) if self.axes.plain else pytree.tree_flatten(new)
        if structure is not None and structure != self.axes.structure:
            raise RunError(
                f"{where}: {described(new)} is assigned in an invoke where the module gives {described(self.value)} of"
                " another structure\n  way out: assign its items one by one, each as the module gives it"
            )
        for served, leaf, axes in zip(piece.served, leaves, self.axes.leaves, strict=True):
            if leaf is served.leaf:
                continue
            wrong: tuple[str, str] | None
            if not isinstance(served.leaf, torch.Tensor) or not isinstance(leaf, torch.Tensor):
                wrong = f"{described(leaf)} is assigned to the rows of an invoke", "assign a tensor in a tensor's place"
            else:
                wrong = misfit(served.leaf, leaf)
                if leaf.shape != served.leaf.shape and wrong is None:
                    wrong = misfit(served.leaf, leaf.reshape(1)) or ("", "")
                axes = axes.sometimes if isinstance(axes, Opaque) else axes
                if wrong is None and not _has_rows(axes) and share.part.rows < share.sizes.rows:
                    wrong = (
                        f"{self.axes.site} is one for all rows, and an invoke cannot change it for its own alone",
                        "assign it outside of the invokes",
                    )
            if wrong is not None:
                raise RunError(f"{where}: {wrong[0]}" + (f"\n  way out: {wrong[1]}" if wrong[1] else ""))


# --- one tensor ---


def _has_rows(axes: Any) -> bool:
    return isinstance(axes, TensorAxes) and any(extent.rows or extent.rows_tokens for extent in axes.shape)


def _row_dimension(tensor: Any, axes: Any, sizes: Sizes) -> int | None:
    """The dimension along which an invoke without padding has its rows, where that is all there is to tell."""
    if not isinstance(tensor, torch.Tensor) or not isinstance(axes, TensorAxes) or tensor.dim() != len(axes.shape):
        return None
    found: int | None = None
    for dim, (extent, size) in enumerate(zip(axes.shape, tensor.shape, strict=True)):
        if extent == _ROWS and size == sizes.rows and tensor.stride(dim) and found is None:
            found = dim
        elif extent.axis is not None and not (extent == _TOKENS and size <= sizes.tokens):
            return None
    return found


_ROWS, _TOKENS = Extent(rows=1), Extent(tokens=1)


def _narrowed(tensor: torch.Tensor, axes: TensorAxes, share: Share) -> _Served:
    """The part of an invoke: a view, or a copy where no view has the shape that it has alone."""
    part, merged = region(tensor, axes, share)
    if not _has_rows(axes) and share.part.rows < share.sizes.rows:
        copy = part.clone()
        return _Served(copy, True, None if copy.is_inference() else copy._version, True, part)
    apart = any(
        tensor.stride(dim) == 0 and tensor.shape[dim] > 1 and (extent.rows or extent.rows_tokens)
        for dim, extent in enumerate(axes.shape)
    )
    if merged is None and not apart:
        return _Served(part)
    copy = part.flatten(merged, merged + 1) if merged is not None else part.clone()
    version = None if copy.is_inference() else copy._version
    return _Served(copy, True, version, apart)


def _put(whole: torch.Tensor, part: torch.Tensor, axes: Any, share: Share) -> None:
    """Writes the part of an invoke into the whole, in place."""
    axes = axes.sometimes if isinstance(axes, Opaque) else axes
    part_of_whole, merged = region(whole, axes, share)
    if merged is not None:
        part = part.reshape(part_of_whole.shape)
    part_of_whole.copy_(part)


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
