"""What storages hold, however deep: containers their items, closures what they capture, forwards what they were given.

    %a = list [%h]          fresh a holds site h.3
    %b = list [%a]          fresh b holds fresh a, and reaches site h.3
    append(%a, %t)          fresh a holds fresh t too, and so fresh b reaches it

What a storage reaches is found when it is first asked for, and extended as anything on the way holds more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import final

from nnsight_compiler.passes.roots import Gradient, Root, Roots, Site, holder_of, is_outside


@final
class Holdings:
    """What is held, as far as it was found.

    held: what the roots with one holder hold; for a forward, also what any of its sites may be.
    given: what came into a forward from outside, by forward: told apart from `held`, lest every argument alias it.
    grown: whether anything was added since this was last reset.
    """

    def __init__(self) -> None:
        self.held: dict[Hashable, set[Root]] = {}
        self.given: dict[str, set[Root]] = {}
        self.grown = False
        self._closures: dict[Hashable, set[Root]] = {}
        self._followers: dict[Hashable, set[Hashable]] = {}

    def of(self, root: Root) -> Iterable[Root]:
        """What a root itself holds."""
        return self.held.get(holder_of(root), ())

    def hold(self, holders: Iterable[Root], roots: Iterable[Root]) -> None:
        """Each of the holders holds these roots."""
        roots = set(roots)
        for holder in holders if roots else ():
            if isinstance(holder, Site):
                self.enter(holder.forward, roots)
            else:
                self._grow(holder_of(holder), roots)

    def enter(self, forward: str, roots: Iterable[Root]) -> None:
        """The model was given these roots: any site after them may be one of them."""
        roots = set(roots)
        outside = {root for root in roots if is_outside(root)}
        given = self.given.setdefault(forward, set())
        if not outside <= given:
            given |= outside
            self.grown = True
        if outside != roots:
            self._grow(("site", forward), roots - outside)

    def reach(self, roots: Iterable[Root]) -> Roots:
        """These roots and all that they hold, however deep."""
        roots = frozenset(roots)
        return roots.union(*(self._contents(holder) for holder in {holder_of(root) for root in roots}))

    def spread(self, roots: Iterable[Root]) -> Roots:
        """The roots, and those that the sites among them may be besides."""
        found: set[Root] = set()
        waiting = list(roots)
        while waiting:
            root = waiting.pop()
            if root not in found:
                found.add(root)
                if isinstance(root, (Site, Gradient)):
                    waiting.extend(self.held.get(holder_of(root), ()))
        return frozenset(found)

    def _grow(self, holder: Hashable, roots: Iterable[Root]) -> None:
        held = self.held.setdefault(holder, set())
        new = set(roots) - held
        if new:
            held |= new
            self.grown = True
            for follower in tuple(self._followers.get(holder, ())):
                self._extend(follower, new)

    def _contents(self, holder: Hashable) -> set[Root]:
        """All that the roots of a holder hold, however deep."""
        if holder not in self._closures:
            self._closures[holder] = set()
            self._followers.setdefault(holder, set()).add(holder)
            self._extend(holder, self.held.get(holder, ()))
        return self._closures[holder]

    def _extend(self, holder: Hashable, roots: Iterable[Root]) -> None:
        contents, waiting = self._closures[holder], list(roots)
        while waiting:
            root = waiting.pop()
            if root not in contents:
                contents.add(root)
                inner = holder_of(root)
                self._followers.setdefault(inner, set()).add(holder)
                waiting.extend(self.held.get(inner, ()))
