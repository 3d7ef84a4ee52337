"""What a program has changed so far, while it is specialised: facts about it no longer hold.

A fact about a global, an attribute or an item of a list is what it was when the program started. After
`layers.append(3)` nothing is known of that list, after a call of unknown code nothing of any variable or object whose
value can be another by now. What it is then is known to a stage that begins later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Changes:
    """What may differ from how it was when the program started.

    anything: unknown code ran.
    names: the global and free names that the program assigned.
    objects: the known objects that it changed, by identity.
    """

    anything: bool = False
    names: set[str] = field(default_factory=set)
    objects: dict[int, Any] = field(default_factory=dict)

    def add(self, other: Changes) -> None:
        self.anything |= other.anything
        self.names |= other.names
        self.objects.update(other.objects)

    def copy(self) -> Changes:
        return Changes(self.anything, set(self.names), dict(self.objects))

    def covers(self, other: Changes) -> bool:
        """Whether everything that the other says is said here."""
        if not self.names >= other.names:
            return False
        return self.anything or (not other.anything and self.objects.keys() >= other.objects.keys())

    def of(self, held: Any) -> bool:
        """Whether an object may have changed."""
        return self.anything or id(held) in self.objects
