"""The values at sites that the invokes of one forward divide: each sees its own rows, and its own tokens.

What an invoke reads is a view where it can be, so that writing in place reaches the model. What it assigns is put into
its rows when the site is left: one copy of the whole value, however many invokes assign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils import _pytree as pytree

from nnsight_compiler.ir.errors import RunError
from nnsight_compiler.passes.assignments import described, misfit
from nnsight_compiler.runtime import sites
from nnsight_compiler.runtime.extent import Extent
from nnsight_compiler.runtime.formulas import Opaque, TensorAxes
from nnsight_compiler.runtime.shares import CannotDivideError, Share, SiteAxes, Sizes, Withheld, region


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
