"""IPython's autoreload: what it puts into an old object when a module is reloaded.

For a function it is the new code. For an object of another class it does nothing, unless there is a rule for the class:
then a notebook's `from study import patch` would stay with the old experiment, without a word.
"""

from __future__ import annotations

import sys
from typing import Any


def follow_autoreload(kind: type) -> None:
    """Has autoreload, where it is in use, put all that the new object of a class holds into the old one."""
    extension: Any = sys.modules.get("IPython.extensions.autoreload")
    if extension is not None and not any(update is _take_over for _, update in extension.UPDATE_RULES):
        extension.UPDATE_RULES.append((lambda old, new: isinstance(old, kind) and isinstance(new, kind), _take_over))


def _take_over(old: object, new: object) -> None:
    vars(old).clear()
    vars(old).update(vars(new))
